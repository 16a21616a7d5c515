"""What holds the shape of the project: floors, borders, Lua headers, locks, and what must not be in a file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LUA = sorted((ROOT / "worker" / "lua").glob("*.lua"))

#: A module imports lower floors only. The lists are the map of the project.
FLOORS = [
    ["errors", "clock", "keys"],
    ["models"],
    ["config", "logs", "scripts", "stamps", "usersig", "demo_events", "records"],
    ["buffer", "ratelimit", "deadletters", "names", "client", "simulator", "embedded", "health", "refused"],
    ["line", "policy", "dispatch", "producer", "intake", "sandbox"],
    ["delivery", "stream", "demo", "status", "appnames", "bulk"],
    ["runtime"],
    ["celery", "doctor"],
    ["cli"],
]
FLOOR = {f"worker.{name}": number for number, names in enumerate(FLOORS) for name in names}
FLOOR["tasks.attributes"] = len(FLOORS) - 1

#: Libraries that only some modules may know.
BORDERS = {
    "requests": {"worker.client", "worker.demo"},
    "celery": {"worker.celery", "tasks.attributes"},
    "kombu": {"worker.celery", "worker.doctor"},
    "tornado": {"worker.simulator"},
    "click": {"worker.cli"},
    "rich": {"worker.cli"},
    "babel": {"worker.demo_events"},
}


def modules() -> dict[str, ast.Module]:
    files = [*ROOT.glob("worker/*.py"), *ROOT.glob("tasks/*.py")]
    return {
        f"{file.parent.name}.{file.stem}": ast.parse(file.read_text())
        for file in files
        if file.stem != "__init__"
    }


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("worker", "tasks"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_has_a_floor_and_imports_only_lower_ones(module: str) -> None:
    assert module in FLOOR
    for name in imports(modules()[module]) & FLOOR.keys():
        assert FLOOR[name] < FLOOR[module], f"{module} imports {name}"


@pytest.mark.parametrize("library", BORDERS)
def test_a_library_stays_behind_its_border(library: str) -> None:
    users = {
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] == library for name in imports(tree))
    }

    assert users <= BORDERS[library]


def test_packages_re_export_nothing() -> None:
    for package in ("worker", "tasks"):
        assert not imports(ast.parse((ROOT / package / "__init__.py").read_text()))


@pytest.mark.parametrize("file", LUA, ids=lambda file: file.stem)
def test_a_lua_header_documents_exactly_the_inputs_used(file: Path) -> None:
    header, _, code = file.read_text().partition("]]")
    assert header.startswith("--[[")
    assert re.search(r"^Returns ", header, re.MULTILINE)

    for table in ("KEYS", "ARGV"):
        documented = [int(number) for number in re.findall(rf"^{table}\[(\d+)\] ", header, re.MULTILINE)]
        used = {int(number) for number in re.findall(rf"{table}\[(\d+)\]", code)}
        assert documented == list(range(1, len(documented) + 1))
        assert used == set(documented)
        # No input is reached by a computed index, which this test could not see.
        assert not re.search(rf"{table}\[\D", code)


@pytest.mark.parametrize("file", LUA, ids=lambda file: file.stem)
def test_a_script_names_its_arguments_at_once_and_builds_no_keys(file: Path) -> None:
    code = file.read_text().partition("]]")[2].strip()
    named, _, rest = code.partition("\nlocal time")

    assert "ARGV" not in rest
    assert named.startswith("local ")
    assert not re.search(r"redis\.call\('(KEYS|SCAN)'", code)


def test_each_script_is_loaded_once() -> None:
    source = "".join(file.read_text() for file in ROOT.glob("worker/*.py"))

    assert sorted(re.findall(r'scripts\.load\(\w+, "(\w+)"\)', source)) == sorted(f.stem for f in LUA)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock", "requirements-bench.lock"])
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
    slow = {"test_end_to_end.py"}
    for file in (ROOT / "tests").glob("*.py"):
        if file.name not in slow:
            assert not re.search(r"\btime\.sleep\(", file.read_text()), file.name
