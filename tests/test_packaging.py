"""Both distributions: what is in their wheels, and that the client fits into somebody else's project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import redis

from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys
from worker.version import VERSION

#: Building takes seconds, and so does a fresh environment.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

#: A project with Celery's usual names of its own, which uses the client.
PROJECT = {
    "tasks.py": "WHOSE = 'theirs'\n",
    "worker/__init__.py": "WHOSE = 'theirs'\n",
    "main.py": """
import asyncio, sys
import tasks, worker
from imattr import AsyncProducer, InvalidUpdate, Producer, RateLimiter

url, app = sys.argv[1], int(sys.argv[2])
assert tasks.WHOSE == worker.WHOSE == "theirs"
assert Producer(url, app).set("sync", {"city": "Paris"}) == "pending"
assert Producer.from_env({"IMATTR_REDIS_URL": url, "IMATTR_SDKAPPID": str(app)}).set_many([]).accepted == 0

async def main():
    async with AsyncProducer(url, app) as producer:
        assert await producer.set("async", {"city": "Oslo"}) == "pending"
        try:
            await producer.set("async", {"city": "x" * 51})
        except InvalidUpdate as error:
            assert "51 bytes, at most 50" in str(error)

asyncio.run(main())
assert RateLimiter.connect(url, app).acquire()
ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("celery", "kombu", "structlog", "requests"))
assert not ours, ours
print("sent")
""",
}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, built from a copy: the build leaves folders behind."""
    copy = tmp_path_factory.mktemp("source") / "imattr"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for folder in ("worker", "tasks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    built = tmp_path_factory.mktemp("wheels")
    # What installers call; the environment may have none of them.
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    for project in (copy, copy / "worker"):
        done = subprocess.run(
            [sys.executable, "-c", build, str(built)], cwd=project, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return {file.name.partition("-")[0]: file for file in built.glob("*.whl")}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path) -> tuple[dict[str, str], list[str]]:
    """The fields, and the packages it always needs."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        parsed = Parser().parsestr(archive.read(name).decode())
    needed = [line for line in parsed.get_all("Requires-Dist", []) if "extra ==" not in line]
    return dict(parsed.items()), needed


def test_the_client_installs_one_package_and_needs_only_redis(wheels: dict[str, Path]) -> None:
    fields, needed = metadata(wheels["imattr"])

    assert {name.partition("/")[0] for name in contents(wheels["imattr"])} == {"imattr"}
    assert [line.split(">")[0] for line in needed] == ["redis"]
    assert (fields["Version"], fields["License-Expression"]) == (VERSION, "MIT")


def test_the_client_has_its_modules_all_scripts_and_nothing_else(wheels: dict[str, Path]) -> None:
    found = contents(wheels["imattr"])
    scripts = {f"imattr/state/lua/{file.name}" for file in ROOT.glob("worker/state/lua/*.lua")}
    modules = {name for name in found if name.endswith(".py")}

    assert found - modules == scripts | {"imattr/py.typed"}
    assert modules == {
        *(f"imattr/{name}.py" for name in ("__init__", "async_producer", "clock", "config", "errors")),
        *(f"imattr/{name}.py" for name in ("models", "producer", "ratelimit", "redis_url", "version")),
        *(f"imattr/state/{name}.py" for name in ("__init__", "attribute_names", "buffer", "connection")),
        *(f"imattr/state/{name}.py" for name in ("confirmation", "history", "keys", "scripts")),
    }


def test_the_worker_has_every_module_and_the_command(wheels: dict[str, Path]) -> None:
    expected = {
        str(file.relative_to(ROOT))
        for pattern in (
            "worker/**/*.py",
            "worker/**/*.lua",
            "worker/py.typed",
            "worker/console/templates/*.html",
            "worker/console/static/*",
            "tasks/*.py",
        )
        for file in ROOT.glob(pattern)
    }

    assert contents(wheels["imattr_worker"]) == expected
    assert metadata(wheels["imattr_worker"])[0]["Version"] == VERSION


@pytest.fixture(scope="session")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the client, and redis as it is installed here: nothing is fetched."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheels["imattr"]) as archive:
        archive.extractall(site)
    shutil.copytree(Path(redis.__file__).parent, site / "redis")
    return place / "bin" / "python"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_the_client_works_beside_a_worker_and_tasks_of_their_own(
    environment: Path, project: Path, server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    done = subprocess.run(
        [str(environment), "main.py", server.url, str(keys.sdkappid)],
        cwd=project,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )

    assert done.stdout == "sent\n", done.stderr
    records = {user: json.loads(record)["a"] for user, record in client.hgetall(keys.pending).items()}
    assert {user: attrs["city"][0] for user, attrs in records.items()} == {b"sync": "Paris", b"async": "Oslo"}
    assert client.hget(keys.rate, "next"), "a permit was taken"


def test_the_client_is_typed(environment: Path, project: Path) -> None:
    (project / "typed.py").write_text(
        "from imattr import AsyncProducer, Producer, RateLimiter\n"
        "reveal_type(Producer('redis://h', 1).set('u', {'a': 'b'}))\n"
        "async def main() -> None:\n"
        "    reveal_type(await AsyncProducer('redis://h', 1).set_many([]))\n"
        "reveal_type(RateLimiter.connect('redis://h', 1).acquire())\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(environment), "typed.py"]

    done = subprocess.run(command, cwd=project, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert "Literal['pending'" in done.stdout
    assert "BulkResult" in done.stdout
    assert '"bool"' in done.stdout


def test_the_worker_starts_from_its_wheel(wheels: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels["imattr_worker"]) as archive:
        archive.extractall(tmp_path / "site")
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path / "site"),
        "IMATTR_SDKAPPID": "1400000000",
        "IMATTR_SECRET_KEY": "k" * 64,
        "IMATTR_API_URL": "http://127.0.0.1:9",
        "IMATTR_REDIS_URL": "redis://127.0.0.1:9/0",
    }
    code = (
        "import worker, tasks.attributes; print(worker.__file__); print(*sorted(tasks.attributes.app.tasks))"
    )

    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    report = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker", "report"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )

    assert str(tmp_path) in found.stdout, found.stderr
    assert "attributes.deliver attributes.update attributes.update_many" in found.stdout
    assert report.returncode == 0, report.stderr
