"""What holds the shape of the project: floors, borders, Lua headers, locks, and what must not be in a file."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

from tests.services import complaint
from worker import transport
from worker.state import scripts

ROOT = Path(__file__).parent.parent
LUA = sorted((ROOT / "worker" / "state" / "lua").glob("*.lua"))
SHARED = [ROOT / "worker" / "state" / "lua" / f"{name}.lua" for name in scripts.SHARED]
SCRIPTS = [file for file in LUA if file not in SHARED]

#: The rooms from the bottom up. A module imports its own room and lower ones only; modules at the root of `worker/`, which
#: others import or start, stand alone. The list is the map of the project.
ROOMS = [
    {"worker.errors", "worker.clock", "worker.version"},
    {"worker.models", "worker.redis_url"},
    {"worker.config", "worker.logs"},
    {"worker.state"},
    {"worker.producer", "worker.ratelimit"},
    {"worker.async_producer"},
    {"worker.intake", "worker.delivery"},
    {"worker.readback"},
    {"worker.runtime"},
    {"worker.operate", "worker.sandbox"},
    {"worker.steps", "worker.transport", "worker.console"},
    {"worker.celery"},
    {"worker.queue_process", "worker.cli", "tasks"},
]

#: Libraries that only some modules, or rooms, may know.
BORDERS = {
    "requests": {"worker.delivery", "worker.sandbox.demo"},
    "redis": {"worker.state"},
    "celery": {"worker.celery", "worker.steps", "worker.transport", "tasks"},
    "kombu": {"worker.celery", "worker.transport", "worker.intake.celery_message", "worker.operate.doctor"},
    "orjson": {"worker.intake.celery_message"},
    "tornado": {"worker.sandbox.simulator"},
    "click": {"worker.cli", "worker.celery"},
    "rich": {"worker.cli"},
    "babel": {"worker.sandbox.demo_events"},
    "prometheus_client": {"worker.operate"},
    "starlette": {"worker.console"},
    "uvicorn": {"worker.console"},
    "jinja2": {"worker.console"},
}


def modules() -> dict[str, ast.Module]:
    files = [*ROOT.glob("worker/**/*.py"), *ROOT.glob("tasks/*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text())
        for file in files
        if file.stem != "__init__"
    }


MODULES = modules()


def imports(module: str) -> set[str]:
    """What a module imports: our own modules by their full names, libraries as they are written."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            place = (
                ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
                if node.level
                else node.module or ""
            )
            inside = {f"{place}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {place}
    return found


def is_in(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(ROOMS) if is_in(module, rooms))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_its_own_room_and_lower_ones_only(module: str) -> None:
    for name in imports(module) & MODULES.keys():
        same_room = module.rpartition(".")[0] == name.rpartition(".")[0] and module.count(".") > 1
        assert same_room or floor(name) < floor(module), f"{module} imports {name}"


def test_no_imports_go_round_in_circles() -> None:
    sorter = graphlib.TopologicalSorter({module: imports(module) & MODULES.keys() for module in MODULES})

    sorter.prepare()


@pytest.mark.parametrize("library", BORDERS)
def test_a_library_stays_behind_its_border(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}

    assert {module for module in users if not is_in(module, BORDERS[library])} == set()


@pytest.mark.parametrize(
    "package", sorted(ROOT.glob("worker/*/__init__.py")), ids=lambda file: file.parent.name
)
def test_a_room_re_exports_nothing(package: Path) -> None:
    assert not any(
        isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(package.read_text()))
    )


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_lua_header_documents_exactly_the_inputs_used(file: Path) -> None:
    header, _, code = file.read_text().partition("]]\n")
    assert header.startswith("--[[")
    assert re.search(r"^Returns ", header, re.MULTILINE)

    for table in ("KEYS", "ARGV"):
        documented = [int(number) for number in re.findall(rf"^{table}\[(\d+)\] ", header, re.MULTILINE)]
        used = {int(number) for number in re.findall(rf"{table}\[(\d+)\]", code)}
        assert documented == list(range(1, len(documented) + 1))
        assert used == set(documented)
        # No input is reached by a computed index, which this test could not see.
        assert not re.search(rf"{table}\[\D", code)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_names_its_keys_and_arguments_at_once(file: Path) -> None:
    names, _, body = file.read_text().partition("]]\n")[2].partition("\n\n")

    assert "KEYS" in names
    assert all(re.match(r"(local [\w, ]+ =|  )", line) for line in names.splitlines())
    assert not re.search(r"\b(KEYS|ARGV)", body)


@pytest.mark.parametrize("file", LUA, ids=lambda file: file.stem)
def test_a_script_builds_no_keys_searches_none_and_can_be_read(file: Path) -> None:
    code = file.read_text().partition("]]\n")[2]

    assert not re.search(r"redis\.call\('(KEYS|SCAN)'", code)
    assert len(code.splitlines()) <= 150


@pytest.mark.parametrize("name", [file.stem for file in SCRIPTS])
def test_the_keys_of_a_script_can_be_read_in_what_is_sent(name: str) -> None:
    assert complaint(scripts.source(name)) is None


@pytest.mark.parametrize("script", [transport._despite_full_memory("LPUSH"), transport._SWEEP])
def test_the_keys_of_a_script_for_the_broker_can_be_read(script: str) -> None:
    assert complaint(script) is None


@pytest.mark.parametrize(
    "script",
    [
        "return redis.call('GET', key)",
        "local key = KEYS[1]",
        "return redis.call('GET', a and KEYS[1] or KEYS[2])",
        "return redis.call('GET', KEYS[i])",
        "return redis.call('GET', KEYS[1] .. 'x')",
        "return redis.pcall(ARGV[1], KEYS[1])",
        "return redis.call(unpack(ARGV))",
    ],
)
def test_a_script_whose_keys_cannot_be_read_is_noticed(script: str) -> None:
    assert complaint(script)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_asks_for_a_transaction(module: str) -> None:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Constant):
            assert node.value != "MULTI"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        assert node.func.attr not in ("transaction", "multi"), f"{module}, line {node.lineno}"
        if node.func.attr == "pipeline":
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("transaction") == "False", f"{module}, line {node.lineno}"


@pytest.mark.parametrize("shared", SHARED, ids=lambda file: file.stem)
def test_what_is_shared_is_what_several_scripts_use(shared: Path) -> None:
    functions = re.findall(r"^local function (\w+)", shared.read_text(), re.MULTILINE)

    assert functions
    for function in functions:
        users = [file.stem for file in LUA if re.search(rf"(?<!function )\b{function}\(", file.read_text())]
        assert len(users) >= 2, f"{function} is used by {users}"


def test_each_script_is_loaded_once() -> None:
    source = "".join(file.read_text() for file in ROOT.glob("worker/**/*.py"))

    assert sorted(re.findall(r'scripts\.load\(\w+, "(\w+)"\)', source)) == sorted(f.stem for f in SCRIPTS)


@pytest.mark.parametrize("lock", sorted(file.name for file in ROOT.glob("requirements*.lock")))
def test_a_lock_pins_hashes_and_names_no_host(lock: str) -> None:
    text = (ROOT / lock).read_text()
    packages = re.findall(r"^[a-z0-9._-]+==", text, re.MULTILINE)

    assert len(packages) > 20
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links)", text, re.MULTILINE)
    for block in re.split(r"\n(?=[a-z])", text.strip()):
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_lock_of_the_node_project_names_no_registry() -> None:
    text = (ROOT / "tests" / "bench" / "rivals" / "bullmq" / "package-lock.json").read_text()

    assert '"integrity": "sha512-' in text
    assert '"resolved"' not in text


def test_the_locks_agree() -> None:
    def pins(lock: str) -> set[str]:
        return set(re.findall(r"^[a-z0-9._-]+==\S+", (ROOT / lock).read_text(), re.MULTILINE))

    assert pins("requirements.lock") <= pins("requirements-dev.lock")
    assert pins("requirements.lock") <= pins("requirements-bench.lock")


def test_fast_tests_do_not_sleep() -> None:
    slow = {"test_end_to_end.py", "test_celery_border.py", "test_failover.py", "test_processes.py"}
    for file in (ROOT / "tests").rglob("test_*.py"):
        if file.name not in slow:
            assert not re.search(r"\btime\.sleep\(", file.read_text()), file.name
