"""Renders the Helm chart into plain manifests, and checks them: `make manifests`.

It runs in an environment of its own, that of `requirements-kubernetes.lock`, with none of our dependencies: the tests ask it
questions as JSON.

    {"values": {...}}      what the chart makes of these values: {"objects": [...]}, or {"refused": "why"}
    {"objects": [...]}     what is wrong with these objects: {"complaints": [...]}
"""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

DOCKER = Path(__file__).parent.parent / "docker" / "helm"
CHART, POLICY = DOCKER / "imattr", DOCKER / "checkov.yaml"
BUILT = Path(__file__).parent.parent / "build" / "manifests"

SETS = ("trial", "production")
#: The oldest that the chart allows, the newest that can be checked, and two in between.
VERSIONS = ("1.28", "1.31", "1.34", "1.37")
#: Where the models of custom resources are.
MODELS = {
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}


@functools.cache
def chart() -> Any:
    """The chart. Helm says for each of its symbolic links that it follows it."""
    return helm_python.Chart.load(CHART)


def values_of(name: str) -> dict[str, Any]:
    """A set of values beside the chart."""
    found: dict[str, Any] = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    return found


def render(values: dict[str, Any], *, checked: bool = True) -> dict[str, str]:
    """The manifests by the name of their template; raises `HelmError` for values that are refused."""
    if checked:
        chart().validate_schema(values)
    rendered = chart().render(values, name="imattr", namespace="imattr")
    texts = {Path(name).name: text.strip() for name, text in sorted(rendered.items())}
    return {name: f"{text}\n" for name, text in texts.items() if text and name.endswith(".yaml")}


def objects_in(text: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(text) if found]


def complaints(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an object, for the schemas of Kubernetes or the models of its operator."""
    name = f"{found['kind']} {found['metadata']['name']}"
    if found["apiVersion"] in MODELS:
        yield from (f"{name}: {words}" for words in _complaints_of_model(found))
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(found, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            place = ".".join(str(step) for step in getattr(error, "path", ()))
            yield f"{name}, Kubernetes {version}: {place} {error.message}"


def _complaints_of_model(found: dict[str, Any]) -> Iterator[str]:
    model = getattr(importlib.import_module(MODELS[found["apiVersion"]]), found["kind"])
    try:
        read = model.model_validate(found).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValueError as error:
        yield str(error)
        return
    # The models leave out what they do not know.
    yield from (f"{path} is unknown" for path in _missing(found, read, ""))


def _missing(given: Any, read: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            if name not in read:
                yield f"{path}.{name}"
            else:
                yield from _missing(value, read[name], f"{path}.{name}")
    elif isinstance(given, list) and isinstance(read, list):
        for position, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from _missing(one, other, f"{path}[{position}]")


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    if "objects" in asked:
        return {"complaints": [words for found in asked["objects"] for words in complaints(found)]}
    try:
        rendered = render(asked["values"], checked=asked.get("checked", True))
    except helm_python.HelmError as error:
        return {"refused": str(error)}
    return {"objects": [found for text in rendered.values() for found in objects_in(text)]}


def write() -> int:
    """Write both sets, check them, and return how many complaints there are."""
    wrong = 0
    for name in SETS:
        folder = BUILT / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.yaml"):
            old.unlink()
        rendered = render(values_of(name))
        found = [one for text in rendered.values() for one in objects_in(text)]
        for file, text in rendered.items():
            (folder / file).write_text(text, encoding="utf-8")
        words = [word for one in found for word in complaints(one)]
        wrong += len(words)
        print(*words, f"{name}: {len(found)} objects in {len(rendered)} files", sep="\n")
    checked = [f"Kubernetes {', '.join(VERSIONS)}", *sorted(MODELS)]
    print(f"complaints by {', '.join(checked)}: {wrong}", flush=True)
    checkov = Path(sys.executable).parent / "checkov"
    policy = subprocess.run([checkov, "--config-file", POLICY, "--directory", BUILT], check=False)
    print(f"complaints by checkov: {'none' if policy.returncode == 0 else 'see above'}")
    return wrong + (policy.returncode != 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["answer"]:
        json.dump([answer_to(question) for question in json.load(sys.stdin)], sys.stdout)
    elif sys.argv[1:] == ["values"]:
        json.dump({"defaults": chart().values} | {name: values_of(name) for name in SETS}, sys.stdout)
    else:
        sys.exit(1 if write() else 0)
