"""Makes everything that a release consists of, in `build/release/`, and changes nothing elsewhere: `make release`.

Both wheels, built twice from the last commit and equal to the byte; each installed into a fresh environment of every Python there
is, and used; a list of what they contain (SBOM) in CycloneDX's format; the notes; and a checksum of each file. The locked versions
are compared with the known advisories, where those can be reached.
"""

from __future__ import annotations

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
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "release"
TOOLS = Path(sys.executable).parent
#: Which Pythons are tried, if they are on PATH.
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
#: Distribution, its project, and the lock that it is tried and listed with.
DISTRIBUTIONS = {"imattr": ".", "imattr_worker": "worker"}
#: What an installed client, and an installed worker, must be able to do.
CLIENT = "from imattr import AsyncProducer, Producer, RateLimiter, __version__; print(__version__)"
WORKER = ["imattr", "demo", "--no-flower"]


class Wrong(Exception):
    """Raised when something may not be released as it is."""


def run(*command: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Run a command; raises `Wrong` with its last words if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd or ROOT,
        env={**os.environ, **environ},
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
    """The section of a version; raises `Wrong` if it is missing or has no date."""
    found = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}\n(.*?)(?=^## \[|\Z)",
        changelog,
        re.MULTILINE | re.DOTALL,
    )
    if not found:
        raise Wrong(f"CHANGELOG.md has no section [{version}] with a date")
    return found[1].strip() + "\n"


def constraints(lock: str) -> str:
    """The versions of a lock, without their hashes: local wheels have none."""
    found = (line.rstrip(" \\") for line in lock.splitlines() if re.match(r"[\w.-]+==", line))
    return "".join(f"{line}\n" for line in found)


def source(into: Path) -> int:
    """Unpack the last commit, and return when that was made, in seconds since 1970."""
    packed = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(into, filter="data")
    return int(run("git", "log", "-1", "--format=%ct"))


def wheels(into: Path) -> dict[str, Path]:
    """Build both wheels from the last commit."""
    with tempfile.TemporaryDirectory() as directory:
        made = source(Path(directory))
        for project in DISTRIBUTIONS.values():
            run(
                *(TOOLS / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", into),
                cwd=Path(directory) / project,
                SOURCE_DATE_EPOCH=str(made),
            )
    return {wheel.name.partition("-")[0]: wheel for wheel in into.glob("*.whl")}


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def installed(python: str, built: dict[str, Path], names: Iterable[str], extra: str, into: Path) -> Path:
    """A fresh environment with some of the distributions; returns its folder of programs."""
    run(python, "-m", "venv", into)
    versions = into / "constraints.txt"
    versions.write_text(constraints((ROOT / "requirements-dev.lock").read_text()))
    wanted = [f"{built[name]}{extra if name == 'imattr_worker' else ''}" for name in names]
    run(into / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "-c", versions, *wanted)
    return into / "bin"


def runs(python: str) -> bool:
    """Whether there is such a Python. A name on PATH may be a version manager's, with nothing behind it."""
    found = shutil.which(python)
    return found is not None and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0


def tried(python: str, built: dict[str, Path], version: str) -> str:
    """Install and use the client, the worker, and both together; returns what was tried."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        client = installed(python, built, ["imattr"], "", place / "client")
        if run(client / "python", "-c", CLIENT, cwd=place).strip() != version:
            raise Wrong(f"the installed client is not {version}")
        both = installed(python, built, DISTRIBUTIONS, "[sandbox]", place / "both")
        run(both / "python", "-c", CLIENT, cwd=place)
        if not run(both / "imattr", "--version", cwd=place).strip().endswith(version):
            raise Wrong(f"the installed worker is not {version}")
        run(both / WORKER[0], *WORKER[1:], cwd=place, PATH=f"{both}{os.pathsep}{os.environ['PATH']}")
    return "client; client and worker, with the demo"


def bill_of_materials(built: dict[str, Path], name: str) -> int:
    """List what a distribution brings, and return how many components that is."""
    target = BUILT / f"{built[name].name.removesuffix('-py3-none-any.whl')}.cdx.json"
    with tempfile.TemporaryDirectory() as directory:
        found = installed(sys.executable, built, [name], "", Path(directory) / "alone")
        run(found / "pip", "uninstall", "--quiet", "--yes", "setuptools")
        run(
            *(TOOLS / "cyclonedx-py", "environment", "--output-reproducible", "--validate"),
            *("--output-file", target, found / "python"),
        )
    listed = json.loads(target.read_text())
    for component in listed["components"]:
        # Where the wheel was on this machine is nobody's concern.
        kept = [it for it in component.get("externalReferences", ()) if not it["url"].startswith("file:")]
        component["externalReferences"] = kept
    target.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n")
    return len(listed["components"])


def audit() -> str:
    """Compare the locked versions with the known advisories; returns what was found."""
    known = 0
    for lock in ("requirements.lock", "requirements-dev.lock"):
        command = (TOOLS / "pip-audit", "-r", ROOT / lock, "--disable-pip", "--require-hashes", "-f", "json")
        done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
        try:
            found = json.loads(done.stdout)["dependencies"]
        except ValueError:
            return "the source of advisories cannot be reached from here: NOT CHECKED"
        bad = [f"{it['name']} {it['version']}: {v['id']}" for it in found for v in it.get("vulns", ())]
        if bad:
            raise Wrong("known advisories: " + "; ".join(bad))
        known += sum("skip_reason" not in it for it in found)
    return f"no advisory for {known} packages" if known else "the source knows no package: NOT CHECKED"


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
    built = wheels(BUILT)
    with tempfile.TemporaryDirectory() as directory:
        again = wheels(Path(directory))
        if {name: checksum(path) for name, path in built.items()} != {
            name: checksum(path) for name, path in again.items()
        }:
            raise Wrong("two builds of the same commit differ")
    for name, wheel in built.items():
        say("wheel", f"{wheel.name}, {wheel.stat().st_size:,} bytes, the same when built twice")
        run(TOOLS / "twine", "check", "--strict", wheel)
        say("components", f"{name}: {bill_of_materials(built, name)}")
    for python in pythons:
        say(Path(python).name, tried(python, built, version[1]) if runs(python) else "not here, so not tried")
    say("advisories", audit())

    files = sorted(BUILT.iterdir())
    (BUILT / "SHA256SUMS").write_text("".join(f"{checksum(path)}  {path.name}\n" for path in files))
    print(
        f"\n{len(files) + 1} files in {BUILT.relative_to(ROOT)}. Nothing was tagged, and nothing uploaded. What comes next:"
    )
    print(f"  git tag -a v{version[1]} -F {(BUILT / 'NOTES.md').relative_to(ROOT)}")
    print(f"  twine upload {BUILT.relative_to(ROOT)}/*.whl")


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or list(PYTHONS))
    except Wrong as wrong:
        sys.exit(f"not released: {wrong}")
