"""What a release checks before it is made."""

from __future__ import annotations

import pytest

from tests.release import ROOT, Wrong, constraints, notes_of, runs
from worker.version import VERSION

CHANGELOG = """# Changelog

## [0.3.0] - 2026-12-24

### Added
- This.

## [0.2.0]

- Not yet.

## [0.1.0] - 2026-11-24

- That.
"""


def test_the_notes_are_those_of_the_version() -> None:
    assert notes_of(CHANGELOG, "0.3.0") == "### Added\n- This.\n"
    assert notes_of(CHANGELOG, "0.1.0") == "- That.\n"


@pytest.mark.parametrize("version", ["0.2.0", "0.3", "0.4.0"])
def test_a_version_without_a_dated_section_is_not_released(version: str) -> None:
    with pytest.raises(Wrong, match="has no section"):
        notes_of(CHANGELOG, version)


def test_the_changelog_has_the_version() -> None:
    assert "dev" in VERSION or notes_of((ROOT / "CHANGELOG.md").read_text(), VERSION)


def test_versions_are_taken_from_a_lock_without_hashes() -> None:
    lock = "celery[redis]==5.6.3 \\\n    --hash=sha256:00\ndjango==5.2 ; python_version < '3.12' \\\n    --hash=sha256:11\n"

    assert (
        constraints(lock.replace("[redis]", "")) == "celery==5.6.3\ndjango==5.2 ; python_version < '3.12'\n"
    )


def test_a_name_with_nothing_behind_it_is_no_python() -> None:
    assert runs("python3")
    assert not runs("python3.999")
