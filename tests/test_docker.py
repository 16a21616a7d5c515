"""What can be said of the image and of compose without building: every setting arrives, and nobody gets more than they need."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from worker.config import PREFIX, Settings

ROOT = Path(__file__).parent.parent
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
EXAMPLE = (ROOT / "docker" / ".env.example").read_text()
IGNORED = (ROOT / ".gitignore").read_text().splitlines()

SETTINGS = {PREFIX + field.name.upper() for field in dataclasses.fields(Settings)}
#: It comes as a file, which no `inspect` shows.
AS_A_FILE = "IMATTR_SECRET_KEY"
#: What is the console's alone; where it listens is in its command.
CONSOLE = {name for name in SETTINGS if name.startswith(f"{PREFIX}CONSOLE_")}
#: What only those who call the API may have.
KEY = {"IMATTR_SECRET_KEY", "IMATTR_SECRET_KEY_FILE"}
LISTENS = {"IMATTR_CONSOLE_HOST", "IMATTR_CONSOLE_PORT"}


def block(name: str, indent: int) -> str:
    """What is below a line of the file."""
    lines = COMPOSE.splitlines()
    start = next(
        place for place, line in enumerate(lines) if re.match(rf"{' ' * indent}{name}:( &\S+)?$", line)
    )
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * (indent + 1))):
        end += 1
    return "\n".join(lines[start:end])


SHARED = block("x-redis", 0)
SERVICES = ("redis", "worker", "exporter", "console", "flower")


def settings(service: str) -> set[str]:
    """The settings that a service gets."""
    text = block(service, 2)
    return set(re.findall(r"^ +(IMATTR_\w+):", text + (SHARED if "<<: *redis" in text else ""), re.MULTILINE))


def test_every_setting_reaches_those_whose_it_is() -> None:
    assert settings("worker") == SETTINGS - {AS_A_FILE} - CONSOLE
    assert settings("console") & CONSOLE == CONSOLE - LISTENS


@pytest.mark.parametrize("service", ["exporter", "flower", "console"])
def test_who_does_not_call_the_api_has_no_key(service: str) -> None:
    expected = ["console_accounts"] if service == "console" else []
    assert re.findall(r"secrets: \[(.*)\]", block(service, 2)) == expected
    assert not settings(service) & KEY
    assert {"IMATTR_SDKAPPID", "IMATTR_REDIS_URL", "IMATTR_BROKER_URL"} <= settings(service) <= SETTINGS


def test_no_service_knows_a_setting_that_is_none_of_ours() -> None:
    assert set(re.findall(r"^ +(IMATTR_\w+):", COMPOSE, re.MULTILINE)) <= SETTINGS
    named = set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    assert {name for name in named if name.startswith(PREFIX)} - {"IMATTR_IMAGE"} <= SETTINGS
    assert not named & KEY
    # Whatever must be set is in the example, set.
    for name in re.findall(r"\$\{(\w+):\?", COMPOSE):
        assert re.search(rf"^{name}=", EXAMPLE, re.MULTILINE), name
    for name in re.findall(r"\$\{(\w+):-", COMPOSE):
        assert re.search(rf"^#?{name}=", EXAMPLE, re.MULTILINE), name


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_asked_how_it_is_and_its_log_is_bounded(service: str) -> None:
    text = block(service, 2)

    assert "healthcheck:" in text
    assert "<<: *service" in text or "logging: *logging" in text
    for port in re.findall(r'ports: \["(.*)"\]', text):
        assert port.startswith("127.0.0.1:")


def test_our_services_have_no_more_rights_than_they_need() -> None:
    shared = block("x-service", 0)

    for words in ("read_only: true", "cap_drop: [ALL]", "no-new-privileges:true", "max-size:", "max-file:"):
        assert words in shared
    assert [service for service in SERVICES if "<<: *service" in block(service, 2)] == [
        "worker",
        "exporter",
        "console",
        "flower",
    ]


def test_workers_are_ready_when_they_can_take_work() -> None:
    worker = block("worker", 2)

    assert "/readyz" in worker
    assert "8080" in re.findall(r'IMATTR_HEALTH_PORT: "(\d+)"', worker)
    # Longer than a delivery may take.
    assert int(re.findall(r"stop_grace_period: (\d+)s", worker)[0]) > Settings().longest_task


def test_flower_asks_for_a_login_and_changes_nothing() -> None:
    flower = block("flower", 2)

    assert "${FLOWER_BASIC_AUTH:?" in flower
    assert "--read_only=True" in flower
    assert "basic" not in re.findall(r"command: (.*)", flower)[0], "a command line is no secret"


def test_the_console_asks_who_somebody_is() -> None:
    console = block("console", 2)

    assert "IMATTR_CONSOLE_ACCOUNTS_FILE: /run/secrets/console_accounts" in console
    assert "docker/console_accounts" in COMPOSE, "whose the file must be"


def test_redis_is_full_at_a_bound_and_then_deletes_nothing() -> None:
    words = re.findall(r"^      - (.*)$", block("redis", 2), re.MULTILINE)

    assert words[words.index("--maxmemory") + 1] == "${REDIS_MAXMEMORY:-1gb}"
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert words[words.index("--appendonly") + 1] == '"yes"'


def test_the_image_runs_as_a_number_without_root() -> None:
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)

    assert users == ["10001:10001"]
    assert "--uid 10001" in DOCKERFILE
    assert "10001:10001" in COMPOSE, "whose the key file must be"
    # Every stage that runs comes from the one with the user.
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert stages == [
        ("${BASE}", "build"),
        ("build", "build-sandbox"),
        ("${BASE}", "base"),
        ("base", "sandbox"),
        ("base", "worker"),
    ]
    assert re.search(r"^ARG BASE=\S+:\S+$", DOCKERFILE, re.MULTILINE)


def test_everything_that_is_installed_is_pinned_by_hash() -> None:
    commands = DOCKERFILE.replace("\\\n", " ").splitlines()
    installs = [
        step
        for line in commands
        if line.startswith("RUN")
        for step in line.split("&&")
        if " install " in step
    ]

    assert len(installs) == 4
    for step in installs:
        assert "--require-hashes" in step or step.split()[-1] == "/wheels/*.whl", step


def test_no_secret_can_get_into_the_image_or_the_repository() -> None:
    context = (ROOT / ".dockerignore").read_text().splitlines()

    assert context[0] == "*", "only what is named gets in"
    assert not [line for line in context if line.startswith("!docker")]
    assert {"docker/secret_key", "docker/console_accounts", ".env"} <= set(IGNORED)
    assert not re.search(r"^(ARG|ENV) .*(KEY|PASSWORD|AUTH)", DOCKERFILE, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["hadolint", str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, "")


def test_the_script_that_builds_can_be_read() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "docker" / "image")], check=True)
