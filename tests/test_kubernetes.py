"""The Helm chart: what it makes is valid, confined and accepted by the programs, and what contradicts itself is refused.

`make manifests` installs what renders it, and checks the two sets of values with checkov as well.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import requests

from tests.conftest import SECRET_KEY
from tests.test_end_to_end import wait_until
from worker.config import PREFIX, Role, Settings
from worker.console.accounts import hash_password
from worker.operate import metric_catalog
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.version import VERSION

ROOT = Path(__file__).parent.parent
CHART = ROOT / "docker" / "helm" / "imattr"
PYTHON = ROOT / ".venv" / "kubernetes" / "bin" / "python"

Values = dict[str, Any]
Object = dict[str, Any]

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="what renders the chart is not here: make manifests"
)

#: Settings that the chart sets itself, or takes from a Secret.
OWN = {
    *("sdkappid", "region", "api_url", "secret_key", "secret_key_file", "redis_url", "redis_password_file"),
    *("broker_url", "broker_password_file", "health_port"),
    *(field.name for field in dataclasses.fields(Settings) if field.name.startswith("console_")),
}
PREFIX_OF_CONSOLE = "/team/imattr"
#: Components that call the API, and so have its key.
WITH_KEY = {"worker", "doctor"}


def ask(what: str, question: object = None) -> Any:
    done = subprocess.run(
        [PYTHON, "-m", "tests.manifests", what],
        cwd=ROOT,
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def merged(values: Values, changes: Values) -> Values:
    """As Helm puts one set of values over another."""
    result = copy.deepcopy(values)
    for name, value in changes.items():
        inside = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if inside else value
    return result


def at(path: str, value: object) -> Values:
    """Values with one in it: `at("a.b", 1)` is {"a": {"b": 1}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def values() -> dict[str, Values]:
    """The sets of values: the defaults, the chart's two examples, and two more that use what those do not."""
    found: dict[str, Values] = ask("values")
    found["apart"] = merged(
        found["production"],
        {
            "app": {"region": "", "apiUrl": "https://api.example.com"},
            "settings": {"PATIENCE": 3, "SHADOW_MAX_USERS": 2_000_000, "LINGER": 0.5, "REPLICAS_FSYNC": True},
            "redis": {"tlsSecret": "redis-tls"},
            "broker": {"url": "redis://broker:6379/1", "existingSecret": "broker"},
            "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]},
            "worker": {"pool": "prefork", "concurrency": 8, "terminationGracePeriodSeconds": 120},
            "autoscaling": {"type": "hpa"},
            "networkPolicy": {"broker": {"ports": [6380]}, "flower": [{"podSelector": {}}]},
            "console": {
                "prefix": PREFIX_OF_CONSOLE,
                "proxy": {
                    "header": "X-Forwarded-User",
                    "operators": ["ann", "bob@example.com"],
                    "addresses": ["10.0.0.0/8", "fd00::1"],
                },
                "ingress": {"annotations": {"a": "b"}},
            },
            "serviceAccount": {"annotations": {"a": "b"}},
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "priorityClassName": "high",
        },
    )
    found["by url"] = merged(
        found["trial"],
        {
            "redis": {"internal": {"enabled": False}, "urlKey": "redis-url"},
            "broker": {"urlKey": "broker-url", "existingSecret": "rabbit"},
            "doctor": {"enabled": True},
            "worker": {"replicas": 3},
            "fullnameOverride": "attributes",
            "serviceAccount": {"create": False, "name": "theirs"},
        },
    )
    return found


EXAMPLES = ("trial", "production", "apart", "by url")


@pytest.fixture(scope="module")
def rendered(values: dict[str, Values]) -> dict[str, list[Object]]:
    answers = ask("answer", [{"values": values[name]} for name in EXAMPLES])
    for name, answer in zip(EXAMPLES, answers, strict=True):
        assert "objects" in answer, (name, answer)
    return {name: answer["objects"] for name, answer in zip(EXAMPLES, answers, strict=True)}


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def component(found: Object) -> str:
    return str(found["metadata"]["labels"]["app.kubernetes.io/component"])


def pods(objects: list[Object]) -> dict[str, Object]:
    """The pod of each component, as its metadata and spec."""
    makers = of_kind(objects, "Deployment", "StatefulSet", "Job")
    return {component(found): found["spec"]["template"] for found in makers}


def container(pod: Object) -> Object:
    [only] = pod["spec"]["containers"]
    found: Object = only
    return found


def settings_of(objects: list[Object]) -> dict[str, str]:
    [found] = [one for one in of_kind(objects, "ConfigMap") if component(one) == "settings"]
    data: dict[str, str] = found["data"]
    return data


def all_pods(rendered: dict[str, list[Object]]) -> Iterator[tuple[str, str, Object]]:
    for name, objects in rendered.items():
        for part, pod in pods(objects).items():
            yield name, part, pod


# What is made.


def test_the_chart_has_the_version_of_the_product() -> None:
    text = (CHART / "Chart.yaml").read_text()
    # 0.2.0.dev0 is 0.2.0-dev.0 for SemVer, and 0.2.0rc1 is 0.2.0-rc.1.
    semver = re.sub(r"\.?(dev|a|b|rc)(\d+)$", r"-\1.\2", VERSION)

    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [semver]
    assert re.findall(r"^appVersion: (.*)$", text, re.MULTILINE) == [VERSION]


def test_the_page_says_what_was_checked_with_what() -> None:
    page = (ROOT / "docs" / "operate" / "kubernetes.md").read_text()
    lock = (ROOT / "requirements-kubernetes.lock").read_text()
    [listed] = re.findall(
        r"^VERSIONS = \((.*)\)$", (ROOT / "tests" / "manifests.py").read_text(), re.MULTILINE
    )
    versions = re.findall(r'"(.*?)"', listed)

    assert f"Kubernetes {', '.join(versions[:-1])} and {versions[-1]} " in page
    assert f'kubeVersion: ">={versions[0]}.0-0"' in (CHART / "Chart.yaml").read_text()
    for tool in ("helm-python-sdk", "kubernetes-validate", "checkov"):
        [pinned] = re.findall(rf"^{tool}==(\S+)", lock, re.MULTILINE)
        assert f"{tool} {pinned}" in page
    assert f"{len(CONTRADICTIONS)} contradictions are refused" in page


def test_every_object_is_valid_in_every_version(rendered: dict[str, list[Object]]) -> None:
    answers = ask("answer", [{"objects": objects} for objects in rendered.values()])

    assert [answer["complaints"] for answer in answers] == [[]] * len(rendered)


#: What must be noticed.
DAMAGES: list[tuple[str, Callable[[Object], object]]] = [
    ("Deployment", lambda found: found["spec"].update(replicas="two")),
    ("Deployment", lambda found: found["spec"].update(replica=2)),
    ("NetworkPolicy", lambda found: found.update(apiVersion="networking.k8s.io/v2")),
    ("ScaledObject", lambda found: found["spec"].update(maxReplicas=2)),
    ("ScaledObject", lambda found: found["spec"].pop("scaleTargetRef")),
    ("PodMonitor", lambda found: found["spec"]["podMetricsEndpoints"][0].update(prot="health")),
    ("PrometheusRule", lambda found: found["spec"]["groups"][0]["rules"][0].pop("expr")),
]


def test_an_invalid_object_is_found(rendered: dict[str, list[Object]]) -> None:
    damaged = [copy.deepcopy(of_kind(rendered["production"], kind)[0]) for kind, _ in DAMAGES]
    for found, (_, damage) in zip(damaged, DAMAGES, strict=True):
        damage(found)

    answers = ask("answer", [{"objects": [found]} for found in damaged])

    assert [bool(answer["complaints"]) for answer in answers] == [True] * len(DAMAGES), answers


def test_both_sets_have_what_they_are_for(rendered: dict[str, list[Object]]) -> None:
    kinds = {
        name: {(one["kind"], component(one)) for one in rendered[name]} for name in ("trial", "production")
    }

    assert kinds["trial"] - kinds["production"] == {("StatefulSet", "redis")} | {
        (kind, "redis") for kind in ("Service", "NetworkPolicy")
    }
    assert kinds["production"] - kinds["trial"] == {
        *(("ScaledObject", "worker"), ("PodMonitor", "worker"), ("ServiceMonitor", "exporter")),
        *(("PrometheusRule", "rules"), ("ConfigMap", "dashboard")),
        *(("Job", "doctor"), ("NetworkPolicy", "doctor"), ("Ingress", "console")),
    }
    assert {part for kind, part in kinds["trial"] if kind in ("Deployment", "PodDisruptionBudget")} == {
        *("worker", "exporter", "console", "flower")
    }


def test_every_pod_is_confined(rendered: dict[str, list[Object]]) -> None:
    for name, part, pod in all_pods(rendered):
        spec, inside = pod["spec"], container(pod)
        where = f"{name}, {part}"
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["runAsGroup"] == 10001, where
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["fsGroup"] == 10001, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert inside["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, where
        assert spec["automountServiceAccountToken"] is False, where
        # Else a Service of the chart would set IMATTR_REDIS_PORT and the like.
        assert spec["enableServiceLinks"] is False, where
        assert set(inside["resources"]["limits"]) == set(inside["resources"]["requests"]) == {"cpu", "memory"}
        if part != "redis":
            [tmp] = [volume for volume in spec["volumes"] if volume["name"] == "tmp"]
            assert tmp["emptyDir"], where
            assert {"name": "tmp", "mountPath": "/tmp"} in inside["volumeMounts"], where


def test_no_manifest_has_a_secret(rendered: dict[str, list[Object]]) -> None:
    for name, objects in rendered.items():
        assert not of_kind(objects, "Secret"), name
        assert not re.search(r"://[^\s\"/@]*:[^\s\"/@]+@", json.dumps(objects)), name
    for name, part, pod in all_pods(rendered):
        variables = {entry["name"]: entry for entry in container(pod).get("env", [])}
        by_variable = {variable for variable, entry in variables.items() if "secretKeyRef" in str(entry)}
        allowed = {"FLOWER_BASIC_AUTH"} if part == "flower" else set()
        if name == "by url" and part != "redis":
            allowed |= {"IMATTR_REDIS_URL", "IMATTR_BROKER_URL"}
        assert by_variable == allowed, f"{name}, {part}"
        # Root's and the group's, which fsGroup makes that of the pod's user.
        for volume in pod["spec"]["volumes"]:
            for source in filter(None, [volume.get("secret"), volume.get("projected")]):
                assert source["defaultMode"] == 0o440, f"{name}, {part}"


def test_only_what_calls_the_api_has_its_key(
    rendered: dict[str, list[Object]], values: dict[str, Values]
) -> None:
    for name, part, pod in all_pods(rendered):
        app = values[name]["app"]
        has_key = f"'path': '{values['defaults']['app']['secretKey']}'" in str(pod["spec"]["volumes"])
        names_it = "IMATTR_SECRET_KEY_FILE" in str(container(pod).get("env"))
        assert has_key == names_it == (part in WITH_KEY), f"{name}, {part}, {app}"
        assert "'IMATTR_SECRET_KEY'" not in str(pod), f"{name}, {part}"
        # Nor does anybody but the console know who may use it.
        has_accounts = "'path': 'console-accounts'" in str(pod["spec"]["volumes"])
        knows_them = "IMATTR_CONSOLE_ACCOUNTS_FILE" in str(container(pod).get("env"))
        assert has_accounts == knows_them == (part == "console"), f"{name}, {part}"


def test_every_environment_is_one_that_the_program_accepts(
    rendered: dict[str, list[Object]], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET_KEY)
    urls = {"IMATTR_REDIS_URL": "redis://:p@h", "IMATTR_BROKER_URL": "amqp://u:p@h"}
    for name, part, pod in all_pods(rendered):
        if part == "redis":
            continue
        inside = container(pod)
        environ = settings_of(rendered[name]) if "envFrom" in inside else {}
        mounted = {mount["mountPath"] for mount in inside["volumeMounts"]}
        paths = {
            f"/run/secrets/imattr/{item['path']}"
            for volume in pod["spec"]["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
            for item in source["secret"]["items"]
        }
        for entry in inside["env"]:
            variable = entry["name"]
            if not variable.startswith(PREFIX):
                continue
            value = urls[variable] if "valueFrom" in entry else entry["value"]
            if variable.endswith("_FILE"):
                assert "/run/secrets/imattr" in mounted, f"{name}, {part}"
                assert value in paths, f"{name}, {part}: nothing is mounted at {value}"
                paths.remove(value)
                value = str(secret)
            environ = environ | {variable: value}
        role: Role = "worker" if part in WITH_KEY else "producer"

        settings = Settings.from_env(environ, role)

        assert settings.sdkappid == 1_400_000_000
        assert not paths, f"{name}, {part}: nothing reads {paths}"
        if name == "apart":
            assert (settings.shadow_max_users, settings.linger, settings.replicas_fsync) == (
                2_000_000,
                0.5,
                True,
            )


def test_a_worker_gets_the_time_that_it_needs_to_stop(values: dict[str, Values], tmp_path: Path) -> None:
    changes: list[Values] = [
        {},
        {"PATIENCE": 60},
        {"LEASE": 300.5},
        {"CONNECT_TIMEOUT": 7, "READ_TIMEOUT": 15},
        {"LEASE": 3600, "PATIENCE": 30, "CONNECT_TIMEOUT": 60, "READ_TIMEOUT": 300},
    ]
    answers = ask(
        "answer", [{"values": merged(values["trial"], {"settings": changed})} for changed in changes]
    )
    for answer in answers:
        environ = settings_of(answer["objects"]) | {"IMATTR_SECRET_KEY": SECRET_KEY}
        needed = Settings.from_env(environ).longest_task
        grace = pods(answer["objects"])["worker"]["spec"]["terminationGracePeriodSeconds"]

        # 10 s for what a worker does before and after its tasks.
        assert grace == math.ceil(needed) + 10
        assert "lifecycle" not in container(pods(answer["objects"])["worker"]), "a preStop takes from it"


def test_each_probe_asks_what_it_is_for(rendered: dict[str, list[Object]]) -> None:
    for name, part, pod in all_pods(rendered):
        inside = container(pod)
        prefix = PREFIX_OF_CONSOLE if name == "apart" else ""
        asked = {probe: inside[probe].get("httpGet", {}).get("path") for probe in inside if "Probe" in probe}
        ports = {port["name"] for port in inside.get("ports", [])}
        expected = {
            "worker": {"startupProbe": "/livez", "readinessProbe": "/readyz", "livenessProbe": "/livez"},
            "exporter": {"readinessProbe": "/healthz", "livenessProbe": "/healthz"},
            "console": dict.fromkeys(["readinessProbe", "livenessProbe"], f"{prefix}/healthz"),
            "flower": {"readinessProbe": "/healthcheck", "livenessProbe": "/healthcheck"},
            "redis": dict.fromkeys(["startupProbe", "readinessProbe", "livenessProbe"]),
            "doctor": {},
        }
        assert asked == expected[part], name
        assert {inside[probe]["httpGet"]["port"] for probe in asked if asked[probe]} <= ports, name


def test_what_selects_pods_finds_them_and_names_ports_that_they_have(
    rendered: dict[str, list[Object]],
) -> None:
    for name, objects in rendered.items():
        found = pods(objects)
        listening = {
            part: {(port["name"], port["containerPort"]) for port in container(pod).get("ports", [])}
            for part, pod in found.items()
        }
        for one in objects:
            part, spec = component(one), one.get("spec", {})
            where = f"{name}, {one['kind']} {one['metadata']['name']}"
            if one["kind"] == "Service":
                assert spec["selector"].items() <= found[part]["metadata"]["labels"].items(), where
                assert {(port["targetPort"], port["port"]) for port in spec["ports"]} == listening[part], (
                    where
                )
            for selector in [spec.get("selector"), spec.get("podSelector")]:
                if selector and "matchLabels" in selector:
                    assert selector["matchLabels"].items() <= found[part]["metadata"]["labels"].items(), where
            if one["kind"] == "Ingress":
                [path] = spec["rules"][0]["http"]["paths"]
                [target] = [other for other in of_kind(objects, "Service") if component(other) == part]
                assert path["backend"]["service"]["name"] == target["metadata"]["name"], where
                assert path["backend"]["service"]["port"]["name"] == target["spec"]["ports"][0]["name"], where
                assert path["path"] == (PREFIX_OF_CONSOLE if name == "apart" else "/"), where
                assert spec["tls"][0]["hosts"] == [spec["rules"][0]["host"]], where
                assert one["spec"]["tls"][0]["secretName"], where
            if one["kind"] == "NetworkPolicy":
                opened = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
                assert opened <= {port for _, port in listening[part]}, where
            for endpoint in [*spec.get("podMetricsEndpoints", []), *spec.get("endpoints", [])]:
                assert endpoint["port"] in {port for port, _ in listening[part]}, where
            if "scaleTargetRef" in spec:
                [target] = [other for other in of_kind(objects, "Deployment") if component(other) == "worker"]
                assert spec["scaleTargetRef"]["name"] == target["metadata"]["name"], where
                # Else every upgrade would set the number that the scaler has found.
                assert "replicas" not in target["spec"], where
        confined = {component(policy) for policy in of_kind(objects, "NetworkPolicy")}
        assert confined == found.keys(), name
        assert len({(one["kind"], one["metadata"]["name"]) for one in objects}) == len(objects), name


def test_no_service_sets_one_of_our_settings_in_other_pods(rendered: dict[str, list[Object]]) -> None:
    settings = {PREFIX + field.name.upper() for field in dataclasses.fields(Settings)}
    for name, objects in rendered.items():
        for service in of_kind(objects, "Service"):
            variable = service["metadata"]["name"].upper().replace("-", "_") + "_PORT"
            assert variable not in settings, f"{name}: Kubernetes sets {variable}=tcp://... for it"


def test_keda_scales_on_the_threads_that_the_quota_needs(
    rendered: dict[str, list[Object]], values: dict[str, Values]
) -> None:
    [scaled] = of_kind(rendered["production"], "ScaledObject")
    [trigger] = scaled["spec"]["triggers"]
    metric, value = metric_catalog.THREADS_WANTED, trigger["metadata"]

    assert value["query"] == f'max({metric.name}{{sdkappid="1400000000"}})'
    assert (value["threshold"], trigger["metricType"]) == ("16", "AverageValue")
    # An exporter that is away would otherwise read as an idle fleet.
    assert value["ignoreNullValues"] == "false"
    assert scaled["spec"]["minReplicaCount"] == 2
    assert scaled["spec"]["fallback"]["replicas"] >= 2
    assert not of_kind(rendered["production"], "HorizontalPodAutoscaler")
    assert not of_kind(rendered["apart"], "ScaledObject")
    assert len(of_kind(rendered["apart"], "HorizontalPodAutoscaler")) == 1


def test_there_is_one_exporter_and_its_counters_outlive_it(rendered: dict[str, list[Object]]) -> None:
    [exporter] = [
        one for one in of_kind(rendered["production"], "Deployment") if component(one) == "exporter"
    ]
    [monitor] = of_kind(rendered["production"], "ServiceMonitor")
    [endpoint] = monitor["spec"]["endpoints"]

    assert (exporter["spec"]["replicas"], exporter["spec"]["strategy"]) == (1, {"type": "Recreate"})
    assert {"action": "labeldrop", "regex": "pod|container"} in endpoint["relabelings"]


def test_the_rules_and_the_dashboard_are_those_of_docker(rendered: dict[str, list[Object]]) -> None:
    # The chart can only read what is in it: files/ has a link to each.
    docker = ROOT / "docker"
    rules = [
        file
        for file in (docker / "prometheus").glob("*.yml")
        if re.search(r"^groups:", file.read_text(), re.MULTILINE)
    ]
    dashboards = list((docker / "grafana").glob("*.json"))
    links = {file.resolve() for file in (CHART / "files").iterdir()}
    [rule] = of_kind(rendered["production"], "PrometheusRule")
    [dashboard] = [
        one for one in of_kind(rendered["production"], "ConfigMap") if component(one) == "dashboard"
    ]
    named = [
        found.get("alert") or found["record"] for group in rule["spec"]["groups"] for found in group["rules"]
    ]

    assert rules
    assert links == {*rules, *dashboards}
    assert sorted(named) == sorted(
        name
        for file in rules
        for name in re.findall(r"^\s+(?:- )?(?:alert|record): (\S+)$", file.read_text(), re.MULTILINE)
    )
    assert {name: json.loads(text) for name, text in dashboard["data"].items()} == {
        file.name: json.loads(file.read_text()) for file in dashboards
    }


# What is refused.


CONTRADICTIONS = [
    (at("app.region", ""), "set app.region or app.apiUrl"),
    (at("app.apiUrl", "https://h"), "set app.region or app.apiUrl, and not both"),
    (at("app.sdkappid", 0), "sdkappid"),
    (at("app.existingSecret", ""), "existingSecret"),
    (at("redis.url", "redis://h:6379/0"), "set one of redis.url, redis.urlKey and redis.internal.enabled"),
    (at("redis.internal.enabled", False), "set one of redis.url, redis.urlKey and"),
    (at("redis.existingSecret", ""), "need redis.existingSecret"),
    (at("broker", {"url": "redis://h", "urlKey": "k", "existingSecret": "s"}), "set broker.url or broker.urlKey"),
    (at("broker.existingSecret", "s"), "broker.existingSecret is for"),
    (at("broker.urlKey", "k"), "broker.urlKey needs broker.existingSecret"),
    (at("flower.existingSecret", ""), "Flower needs a login"),
    (at("console.existingSecret", ""), "the console needs accounts"),
    (at("console.proxy.header", "X-User"), "needs console.proxy.addresses"),
    (at("console.proxy.operators", ["ann"]), "needs console.proxy.header"),
    (at("console.proxy.addresses", ["example.com"]), "addresses"),
    (at("console.prefix", "imattr/"), "prefix"),
    (at("console.ingress.host", "h.example.com"), "needs console.ingress.tlsSecret"),
    (at("console.ingress", {"host": "h.example.com", "tlsSecret": "tls"}), "needs networkPolicy.console"),
    (at("autoscaling.type", "keda"), "autoscaling.keda.prometheus is not set"),
    (at("autoscaling.type", "both"), "type"),
    (at("autoscaling", {"type": "hpa", "minReplicas": 13}), "minReplicas is more than"),
    (
        at("autoscaling", {"type": "keda", "keda": {"prometheus": "http://p", "fallbackReplicas": 1}}),
        "fallbackReplicas is not between",
    ),
    (
        {"exporter": {"enabled": False}, **at("autoscaling", {"type": "keda", "keda": {"prometheus": "http://p"}})},
        "needs exporter.enabled",
    ),
    (at("worker.terminationGracePeriodSeconds", 87), "a worker may need 88 to finish"),
    (at("worker.pool", "gevent"), "pool"),
    (at("settings.LEASES", 60), "LEASES"),
    (at("settings.QUOTA", "100"), "QUOTA"),
    (at("settings.SECRET_KEY", SECRET_KEY), "SECRET_KEY"),
    (at("redis.url", "redis://user:hunter22@h:6379/0"), "/redis/url"),
    (at("redis.url", "redis+sentinel://h/m?sentinel_password=hunter22"), "/redis/url"),
    (at("broker.url", "amqp://user:hunter22@h"), "/broker/url"),
    (at("app.apiUrl", "https://user:hunter22@h"), "/app/apiUrl"),
    (at("image.digest", "sha256:0"), "digest"),
    (at("worker.resources.limits.cpus", 1), "cpus"),
]  # fmt: skip


@pytest.fixture(scope="module")
def refusals(values: dict[str, Values]) -> list[Object]:
    found: list[Object] = ask(
        "answer", [{"values": merged(values["trial"], changes)} for changes, _ in CONTRADICTIONS]
    )
    return found


@pytest.mark.parametrize("case", range(len(CONTRADICTIONS)), ids=lambda case: CONTRADICTIONS[case][1])
def test_values_that_contradict_themselves_are_refused(refusals: list[Object], case: int) -> None:
    assert CONTRADICTIONS[case][1] in refusals[case].get("refused", ""), refusals[case]


def test_a_grace_period_that_is_long_enough_is_taken(values: dict[str, Values]) -> None:
    longer = merged(values["trial"], at("worker.terminationGracePeriodSeconds", 88))

    [answer] = ask("answer", [{"values": longer}])

    assert pods(answer["objects"])["worker"]["spec"]["terminationGracePeriodSeconds"] == 88


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return found


def test_unknown_values_are_refused_everywhere(values: dict[str, Values]) -> None:
    def objects_in(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield path, node.get("additionalProperties", "anything")
            for name, inside in node.items():
                yield from objects_in(inside, f"{path}/{name}")
        elif isinstance(node, list):
            for inside in node:
                yield from objects_in(inside, path)

    # Labels and the like have names of their own; what a chart above this one calls global is not ours.
    exempt = {"/definitions/labels": {"type": "string"}, "/properties/global": "anything"}
    for path, others in objects_in(schema(), ""):
        assert others == exempt.get(path, False), path
    groups = [
        path for path, value in leaves(values["defaults"], inner=True) if isinstance(value, dict) and value
    ]
    answers = ask("answer", [{"values": merged(values["trial"], at(f"{path}.bogus", 1))} for path in groups])

    assert len(groups) > 20
    for path, answer in zip(groups, answers, strict=True):
        assert "bogus" in answer.get("refused", "") or path.endswith("abels"), path


def test_the_schema_has_every_value_and_every_setting(values: dict[str, Values]) -> None:
    kinds = {int: "integer", float: "number", bool: "boolean", str: "string"}
    expected = {
        field.name.upper(): kinds[type(field.default)]
        for field in dataclasses.fields(Settings)
        if field.name not in OWN
    }

    def names(node: dict[str, Any], path: str = "") -> Iterator[str]:
        node = schema()["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for name, inside in node.get("properties", {}).items():
            yield f"{path}{name}"
            yield from names(inside, f"{path}{name}.")

    assert {
        name: rule["type"] for name, rule in schema()["properties"]["settings"]["properties"].items()
    } == expected
    known = {name for name in names(schema()) if not name.startswith(("settings.", "global"))}
    listed = {path for path, _ in leaves(values["defaults"], inner=True)} - {
        "monitoring.dashboardLabels.grafana_dashboard"
    }
    assert known == listed


# The values.


def leaves(node: Values, path: str = "", *, inner: bool = False) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        is_group = isinstance(value, dict) and bool(value)
        if inner or not is_group:
            yield f"{path}{name}", value
        if is_group:
            yield from leaves(value, f"{path}{name}.", inner=inner)


def changed(path: str, value: Any) -> Any:
    """Another value of the same type."""
    special = {"tolerations": [{"key": "x"}], "image.pullSecrets": ["x"], "settings": {"QUOTA": 50}}
    if path in special:
        return special[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1000
    if isinstance(value, str):
        return f"{value}7"
    return [] if value else [{"podSelector": {}}] if isinstance(value, list) else {"x": "y"}


def test_every_value_changes_something(values: dict[str, Values]) -> None:
    wide_open = merged(values["production"], at("networkPolicy.broker.ports", [1]))
    dead = dict(leaves(values["defaults"]))
    assert len(dead) > 60
    for base in [values["apart"], values["production"], values["trial"], values["by url"], wide_open]:
        whole = merged(values["defaults"], base)
        others = [merged(whole, at(path, changed(path, value_at(whole, path)))) for path in dead]
        original, *answers = ask("answer", [{"values": each, "checked": False} for each in (whole, *others)])
        # What contradicts another value, and is refused, is read, too.
        dead = {path: 0 for path, answer in zip(dead, answers, strict=True) if answer == original}

    assert not dead


def value_at(values: Values, path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found


def test_every_value_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    for line, before in zip(lines[1:], lines, strict=False):
        if re.match(r"\s*\w+: *\S", line) and not re.match(r"\s*(requests|limits):", line):
            assert before.strip().startswith("#"), line


# What the pods run.


def started(pod: Object, environ: dict[str, str], log: Path, **replaced: str) -> subprocess.Popen[bytes]:
    """Start what a pod runs, here."""
    inside = container(pod)
    programs = {"celery": ["-m", "celery"], "imattr": ["-m", "worker.cli"]}
    given: list[str] = [*inside["command"], *inside["args"]]
    arguments = [replaced.get(argument, argument) for argument in given[1:]]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *programs[given[0]], *arguments],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
            cwd=log.parent,
            stdout=output,
            stderr=output,
        )


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_what_the_pods_run_starts_answers_its_probes_and_ends(
    values: dict[str, Values], tmp_path: Path, pool: str
) -> None:
    health, metrics, page, flower = free_port(), free_port(), free_port(), str(free_port())
    (tmp_path / "key").write_text(SECRET_KEY)
    (tmp_path / "accounts").write_text(f"ops:operator:{hash_password('hunter22hunter22', (2, 8, 1))}\n")
    with EmbeddedServer(tmp_path / "redis", persistent=False) as server:
        changes = {
            "app": {"region": "", "apiUrl": "http://127.0.0.1:9"},
            "redis": {"internal": {"enabled": False}, "existingSecret": "", "url": server.url},
            "worker": {"healthPort": health, "pool": pool, "concurrency": 2},
            "exporter": {"port": metrics},
            "console": {"port": page, "prefix": PREFIX_OF_CONSOLE},
            "autoscaling": {"type": "keda", "keda": {"prometheus": "http://prometheus"}},
        }
        [answer] = ask("answer", [{"values": merged(values["trial"], changes)}])
        found, shared = pods(answer["objects"]), settings_of(answer["objects"])
        own = {
            "worker": {"IMATTR_HEALTH_PORT": str(health), "IMATTR_SECRET_KEY_FILE": str(tmp_path / "key")},
            "exporter": {},
            "console": {
                "IMATTR_CONSOLE_ACCOUNTS_FILE": str(tmp_path / "accounts"),
                "IMATTR_CONSOLE_PREFIX": PREFIX_OF_CONSOLE,
            },
            "flower": {"FLOWER_BASIC_AUTH": "ops:hunter22"},
        }
        ports = {"worker": str(health), "exporter": str(metrics), "console": str(page), "flower": flower}
        with contextlib.ExitStack() as stack:
            running = {}
            for part, environ in own.items():
                log = tmp_path / f"{part}.log"
                process = started(found[part], shared | environ, log, **{"--port=5555": f"--port={flower}"})
                running[part] = stack.enter_context(process)
                stack.callback(process.terminate)
            for part, process in running.items():
                probes = [probe for name, probe in container(found[part]).items() if name.endswith("Probe")]
                urls = {f"http://127.0.0.1:{ports[part]}{probe['httpGet']['path']}" for probe in probes}
                wait_until(partial(_has_ended_or_answers, process, urls))
                assert process.poll() is None, (tmp_path / f"{part}.log").read_text()

            # Nobody gets into the console without a login.
            answer_to_stranger = requests.get(
                f"http://127.0.0.1:{page}{PREFIX_OF_CONSOLE}/", timeout=20, allow_redirects=False
            )
            assert answer_to_stranger.headers["Location"] == f"{PREFIX_OF_CONSOLE}/login"

            # What KEDA asks Prometheus for is there.
            [scaled] = of_kind(answer["objects"], "ScaledObject")
            query = scaled["spec"]["triggers"][0]["metadata"]["query"]
            series = requests.get(f"http://127.0.0.1:{metrics}/metrics", timeout=20).text
            assert query.removeprefix("max(").removesuffix(")") in series
            assert "imattr_build_info" in requests.get(f"http://127.0.0.1:{health}/metrics", timeout=20).text

            for process in running.values():
                process.terminate()
            assert {part: process.wait(60) for part, process in running.items()} == dict.fromkeys(own, 0)


def _has_ended_or_answers(process: subprocess.Popen[bytes], urls: set[str]) -> bool:
    return process.poll() is not None or all(map(_is_ok, urls))


def _is_ok(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=5).ok
    return False


# The Redis of a trial.


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
def test_the_redis_of_a_trial_takes_its_password_from_the_file_alone(
    rendered: dict[str, list[Object]], tmp_path: Path
) -> None:
    inside = container(pods(rendered["trial"])["redis"])
    password, port = 'hun ter"22\\$(x)`', free_port()
    (tmp_path / "redis-password").write_text(f"{password}\n")
    script = (
        inside["args"][0]
        .replace("/run/secrets/imattr", str(tmp_path))
        .replace("dir /data", f"dir {tmp_path}")
    )
    assert script.count(str(tmp_path)) == 2
    script = script.replace("CONFIG\ndir", f"CONFIG\nport {port}\nbind 127.0.0.1\ndir")

    with subprocess.Popen([*inside["command"], script], stdout=subprocess.DEVNULL) as server:
        try:
            with redis.Redis(port=port, password=password) as client:
                wait_until(lambda: _answers(client))
                found = client.config_get("*")
                assert found["appendonly"] == "yes"
                assert found["maxmemory"] == str(256 * 1024 * 1024)
                assert found["maxmemory-policy"] == "noeviction"
            seen = (
                Path(f"/proc/{server.pid}/cmdline").read_bytes()
                + Path(f"/proc/{server.pid}/environ").read_bytes()
            )
            assert b"hun" not in seen
            with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
        finally:
            server.terminate()


def _answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False
