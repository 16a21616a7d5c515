"""The catalogue of planted bugs: enough for each promise, each where it says, and none that breaks everything."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.planted import BUGS, ROOT, Bug, Promise, plant


def test_every_promise_has_at_least_three_bugs_and_no_two_have_one_name() -> None:
    assert min(Counter(bug.promise for bug in BUGS).values()) >= 3
    assert {bug.promise for bug in BUGS} == set(Promise)
    assert len({(bug.what, bug.found_by) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.found_by.split('::')[0]}: {bug.what}")
def test_a_bug_can_be_planted(bug: Bug, tmp_path: Path) -> None:
    copy = tmp_path / bug.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / bug.file).read_text(encoding="utf-8"), encoding="utf-8")

    plant(bug, tmp_path)

    assert bug.wrong in copy.read_text(encoding="utf-8")
    if copy.suffix == ".py":
        ast.parse(copy.read_text(encoding="utf-8"))
    for test in bug.found_by.split():
        assert (ROOT / test.split("::")[0]).exists()


def test_a_text_that_is_no_longer_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("nothing")

    with pytest.raises(ValueError, match="no longer"):
        plant(Bug(Promise.LOST, "gone", "file.py", "something", "", "tests"), tmp_path)
