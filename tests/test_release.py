"""What a release checks before it is made."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.release import PYTHONS, ROOT, Wrong, judge, locked, needs, notes_of, runs, settle
from worker.version import VERSION

CHANGELOG = """# Changelog

## [0.3.0] - 2026-12-24

### Added
- This.

## [0.1.0] - 2026-11-24

- That.
"""


def test_the_notes_are_those_of_the_version() -> None:
    assert notes_of(CHANGELOG, "0.3.0") == "### Added\n- This.\n"
    assert notes_of("## [0.1.0] - 2026-11-24\n\n- All.", "0.1.0") == "- All.\n"


@pytest.mark.parametrize(
    ("changelog", "version", "reason"),
    [
        (CHANGELOG, "0.1.0", r"newest section of CHANGELOG.md is \[0.3.0\]"),
        (CHANGELOG, "0.3", "newest section"),
        ("## [Unreleased]\n\n- More.\n\n" + CHANGELOG, "0.3.0", r"is \[Unreleased\], not \[0.3.0\]"),
        ("## [0.3.0]\n\n- This.\n", "0.3.0", "has no date"),
        ("", "0.3.0", "newest section"),
    ],
)
def test_a_version_is_not_released_unless_its_notes_are_the_newest(
    changelog: str, version: str, reason: str
) -> None:
    with pytest.raises(Wrong, match=reason):
        notes_of(changelog, version)


def test_the_changelog_has_the_version() -> None:
    assert "dev" in VERSION or notes_of((ROOT / "CHANGELOG.md").read_text(), VERSION)


LOCK = """celery==5.6.3 \\
    --hash=sha256:00 \\
    --hash=sha256:11
django==5.2 ; python_version < '3.12' \\
    --hash=sha256:22
"""


def test_packages_keep_their_hashes_and_conditions() -> None:
    found = locked(LOCK)

    assert list(found) == ["celery", "django"]
    assert "".join(found.values()) == LOCK


def test_each_distribution_is_tried_with_its_part_of_the_locks() -> None:
    worker, sandbox = needs("imattr_worker"), needs("imattr_worker", sandbox=True)

    assert "".join(worker) == (ROOT / "requirements.lock").read_text()
    assert set(needs("imattr")) < set(worker) < set(sandbox)
    assert all("--hash=sha256:" in it for it in sandbox)


@pytest.mark.parametrize("project", ["pyproject.toml", "worker/pyproject.toml"])
def test_what_is_said_to_be_supported_is_tried(project: str) -> None:
    named = tomllib.loads((ROOT / project).read_text())["project"]["classifiers"]

    prefix = "Programming Language :: Python :: 3."
    assert tuple(f"python3.{it.removeprefix(prefix)}" for it in named if it.startswith(prefix)) == PYTHONS


def test_no_page_shows_another_development_version() -> None:
    shown = {
        version
        for page in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.svg"), ROOT / "README.md"]
        for version in re.findall(r"\d+\.\d+\.\d+\.dev\d+", page.read_text())
    }

    assert shown <= {VERSION}


def package(name: str, *advisories: str) -> dict[str, object]:
    return {"name": name, "version": "1", "vulns": [{"id": it} for it in advisories]}


def test_a_known_advisory_is_not_released() -> None:
    with pytest.raises(Wrong, match="tornado 1: CVE-1"):
        judge([package("celery"), package("tornado", "CVE-1")])


def test_what_was_not_checked_is_not_said_to_be_free_of_advisories() -> None:
    skipped = {"name": "kombu", "skip_reason": "not found"}

    assert judge([package("celery"), package("celery")]) == "none for 1 packages"
    assert judge([skipped]) == "1 packages NOT CHECKED, the source does not know them"
    assert "none for 1 packages; 1 packages NOT CHECKED" in judge([package("celery"), skipped])


def test_a_source_archive_does_not_depend_on_when_and_by_whom_it_was_built(tmp_path: Path) -> None:
    found = []
    for when, who, names in ((1, "a", "xy"), (2, "b", "yx")):
        archive = tmp_path / f"{who}.tar.gz"
        with (
            archive.open("wb") as file,
            gzip.GzipFile(who, "wb", fileobj=file, mtime=when) as zipped,
            tarfile.open(fileobj=zipped, mode="w") as packed,
        ):
            for name in names:
                member = tarfile.TarInfo(name)
                member.mtime, member.uname, member.uid, member.size = when, who, when, 1
                packed.addfile(member, io.BytesIO(name.encode()))
        settle(archive, 7)
        found.append(archive.read_bytes())
        with tarfile.open(archive) as packed:
            assert {it.name: packed.extractfile(it).read() for it in packed} == {"x": b"x", "y": b"y"}  # type: ignore[union-attr]

    assert found[0] == found[1]


def test_a_name_with_nothing_behind_it_is_no_python() -> None:
    assert runs("python3")
    assert not runs("python3.999")
