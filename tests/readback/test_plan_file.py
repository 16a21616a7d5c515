"""The file of a plan: whatever is written is read back, any interruption is survived, and nothing else is let in."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import drawn
from worker.errors import UnusablePlan
from worker.intake.import_progress import Refusal
from worker.readback.difference import KINDS, Change, Tally, Verdict
from worker.readback.plan_file import (
    MAX_LINE,
    Difference,
    Header,
    Mark,
    PlanWriter,
    UnknownUser,
    packed,
    read_lines,
    survey,
)

THEN = 1_750_000_000_000


@pytest.fixture(autouse=True, scope="module")
def synced() -> Iterator[list[int]]:
    """How often something was brought to the disk, without waiting for it."""
    calls = list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", calls.append)
        yield calls


HEADER = Header(
    id="0123456789abcdef",
    app=1400000000,
    api="http://api chat",
    source="users.csv",
    digest="d" * 64,
    format="csv",
    user_column="user",
    null=None,
    as_of=THEN,
    explicit=False,
    lines=3,
    refused=0,
    users=3,
    made=1_750_000_000,
    made_by="ann@ops-1",
)

# Any text that JSON can hold, lone surrogates included: the API may answer with them.
TEXT = st.text(st.characters(), max_size=5)
CHANGES = st.dictionaries(
    TEXT,
    st.tuples(st.none() | TEXT, st.none() | TEXT, st.integers(THEN, THEN + 5))
    .filter(lambda change: change[0] != change[1])
    .map(lambda change: Change(*change)),
    min_size=1,
    max_size=3,
)
#: What was found for a user.
FOUND = st.one_of(
    st.builds(Difference, TEXT, CHANGES), st.builds(UnknownUser, TEXT), st.just("same"), st.just("in_motion")
)


def count(tally: Tally, found: Any) -> None:
    if isinstance(found, Difference):
        kinds: dict[str, Any] = {name: change.kind for name, change in found.changes.items()}
        tally.count(Verdict("differs", found.changes, kinds))
    else:
        tally.count(Verdict("unknown" if isinstance(found, UnknownUser) else found))


def header_of(found: Sequence[Any], refusals: Sequence[Refusal] = ()) -> Header:
    return Header(**{**as_fields(HEADER), "users": len(found), "refused": len(refusals)})


def as_fields(header: Header) -> dict[str, Any]:
    return {name: getattr(header, name) for name in Header.__annotations__}


def write(path: Path, found: Sequence[Any], refusals: Sequence[Refusal] = (), every: int = 1) -> None:
    """Write a whole plan, or go on with one, with a checkpoint after every so many users."""
    with PlanWriter(path) as plan:
        mark = plan.begin(header_of(found, refusals), refusals)
        tally = mark.tally
        for place in range(mark.users, len(found)):
            count(tally, found[place])
            if isinstance(found[place], Difference | UnknownUser):
                plan.write(found[place])
            if (place + 1) % every == 0 and place + 1 < len(found):
                plan.checkpoint(Mark(place + 1, tally, calls=place + 1))
        plan.checkpoint(Mark(len(found), tally, calls=len(found), final=True))


def contents(path: Path) -> list[Any]:
    """All but the checkpoints."""
    with open(path, "rb") as file:
        lines = [line.found for line in read_lines(file, path)]
    return [line for line in lines if not isinstance(line, Mark) or line.final]


@contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(st.lists(FOUND, max_size=6), st.lists(st.builds(Refusal, st.integers(1, 99), TEXT, TEXT), max_size=3))
def test_whatever_is_written_is_read_back(found: list[Any], refusals: list[Refusal]) -> None:
    with directory() as place:
        write(place / "plan", found, refusals)

        header, *lines, last = contents(place / "plan")
        assert header == header_of(found, refusals)
        assert lines == [*refusals, *(one for one in found if isinstance(one, Difference | UnknownUser))]
        assert last.final
        with open(place / "plan", "rb") as file:
            seen = survey(file, place / "plan", samples=2)
        assert seen.complete
        assert seen.mark == last
        differences = [one for one in found if isinstance(one, Difference)]
        assert (seen.differences, seen.samples) == (len(differences), differences[:2])


EXAMPLE: list[Any] = [
    Difference("ann", {"city": Change("Rome", "Paris", THEN), "字": Change(None, "\ud800", THEN)}),
    "same",
    UnknownUser("bob"),
    Difference("cid", {"city": Change("Rome", None, THEN)}),
]
REFUSALS = [Refusal(4, "?", "the line is not JSON")]


def test_a_plan_that_ends_at_any_byte_goes_on_to_the_same_plan(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write(whole, EXAMPLE, REFUSALS)
    kept, expected = whole.read_bytes(), contents(whole)
    plan = tmp_path / "plan"

    for size in range(0, len(kept), 1 if drawn(4) > 1 else 7):
        plan.write_bytes(kept[:size])

        write(plan, EXAMPLE, REFUSALS)

        assert contents(plan) == expected, size


def test_what_stands_behind_the_last_checkpoint_is_written_again(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    with PlanWriter(plan) as writer:
        writer.begin(header_of(EXAMPLE), [])
        tally = Tally()
        count(tally, EXAMPLE[0])
        writer.write(EXAMPLE[0])
        writer.checkpoint(Mark(1, tally, 1, 0.5))
    with open(plan, "ab") as file:
        file.write(packed(EXAMPLE[3]) + b'{"user": "to')

    with open(plan, "rb") as read:
        seen = survey(read, plan)
    assert (seen.mark.users, seen.differences, seen.complete) == (1, 1, False)
    write(plan, EXAMPLE)
    assert [one.user for one in contents(plan)[1:-1]] == ["ann", "bob", "cid"]


def test_a_complete_plan_is_replaced(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    write(plan, EXAMPLE)

    write(plan, EXAMPLE[:1])

    assert [one.user for one in contents(plan)[1:-1]] == ["ann"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("app", 1, "app"),
        ("api", "http://other chat", "API"),
        ("digest", "e" * 64, "content of the file"),
        ("as_of", THEN + 1, "as-of time"),
        ("null", "NULL", "text for no value"),
    ],
)
def test_another_plan_does_not_go_on_with_this_one(
    tmp_path: Path, field: str, value: object, words: str
) -> None:
    plan = tmp_path / "plan"
    with PlanWriter(plan) as writer:
        writer.begin(HEADER, [])
    kept = plan.read_bytes()
    other = Header(**{**as_fields(HEADER), field: value})

    with PlanWriter(plan) as writer, pytest.raises(UnusablePlan, match=rf"the {words} must be .* --restart"):
        writer.begin(other, [])
    assert plan.read_bytes() == kept

    with PlanWriter(plan, restart=True) as writer:
        writer.begin(other, [])
    assert contents(plan)[0] == other


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    write(plan, EXAMPLE)
    assert stat.S_IMODE(plan.stat().st_mode) == 0o600

    plan.chmod(0o644)
    write(plan, EXAMPLE)
    assert stat.S_IMODE(plan.stat().st_mode) == 0o600


def test_what_stands_before_a_checkpoint_is_on_disk(tmp_path: Path, synced: list[int]) -> None:
    with PlanWriter(tmp_path / "plan") as plan:
        plan.begin(HEADER, [])
        plan.write(UnknownUser("bob"))
        before = len(synced)
        assert b"bob" not in (tmp_path / "plan").read_bytes()
        plan.checkpoint(Mark(1))
        assert len(synced) == before + 1
        assert b"bob" in (tmp_path / "plan").read_bytes()


def test_two_at_once_do_not_write_one_plan(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    with PlanWriter(plan), pytest.raises(UnusablePlan, match="by another imattr"):
        PlanWriter(plan)


def test_a_plan_of_which_nothing_came_leaves_no_file(tmp_path: Path) -> None:
    with PlanWriter(tmp_path / "plan"):
        pass

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"user,city\nann,Paris\n", b"{}\n", b"x", b'{"imattr', b"\n", b"\0" * 99]
)
def test_a_file_of_somebody_else_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(content)

    if b'{"imattr_plan": '.startswith(content):
        # No more than what we would have begun with.
        PlanWriter(plan).__exit__()
        return
    for restart in (False, True):
        with pytest.raises(UnusablePlan, match="is not a plan of imattr; it is left as it is"):
            PlanWriter(plan, restart=restart)
        assert plan.read_bytes() == content


def test_what_is_no_regular_file_is_not_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path, tmp_path / "missing" / "plan"):
        with pytest.raises(UnusablePlan, match=r"regular file|cannot be read or written"):
            PlanWriter(path)


def test_a_full_disk_is_explained_and_the_plan_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data[:3]))
            raise OSError(errno.ENOSPC, "No space left on device")

    plan = tmp_path / "plan"
    with PlanWriter(plan) as writer:
        writer.begin(header_of(EXAMPLE), [])
        writer.write(EXAMPLE[0])
        real, writer._file = writer._file, Full(os.dup(writer._file.fileno()), "r+")
        with pytest.raises(UnusablePlan, match="cannot be read or written: No space left on device"):
            writer.checkpoint(Mark(1, Tally(), 1))
        real.close()

    write(plan, EXAMPLE)
    assert [one.user for one in contents(plan)[1:-1]] == ["ann", "bob", "cid"]


# A plan comes from outside when it is applied.


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with open(path, "rb") as file, pytest.raises(UnusablePlan) as error:
        survey(file, path)
    return str(error.value)


@pytest.fixture
def whole(tmp_path: Path) -> list[bytes]:
    write(tmp_path / "whole", EXAMPLE, every=10)
    return lines_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"PK\x03\x04",
        b"\xff\xfe\n",
        b"user,city\nann,Paris\n",
        b"[" * 99999 + b"\n",
    ],
)
def test_what_is_no_plan_is_called_so(tmp_path: Path, content: bytes) -> None:
    assert refused(tmp_path / "plan", content).endswith("is not a plan of imattr")


def test_another_version_is_called_so(tmp_path: Path, whole: list[bytes]) -> None:
    other = whole[0].replace(b'"imattr_plan": 1', b'"imattr_plan": 2')

    assert "is of version 2; this imattr reads version 1" in refused(tmp_path / "plan", other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("app", "1400000000"),
        ("app", True),
        ("app", -1),
        ("id", None),
        ("as_of", 7),
        ("users", 1e3),
        ("explicit", 1),
        ("null", 0),
        ("made", 2**60),
        ("unheard", 1),
    ],
)
def test_a_header_with_a_wrong_field_is_none(
    tmp_path: Path, whole: list[bytes], field: str, value: object
) -> None:
    header = json.dumps(json.loads(whole[0]) | {field: value}).encode() + b"\n"

    assert refused(tmp_path / "plan", header + b"".join(whole[1:])).endswith("is not a plan of imattr")


GOOD = ["Rome", "Paris", THEN]


@pytest.mark.parametrize(
    "line",
    [
        {"user": "ann", "changes": {}},
        {"user": "ann", "changes": []},
        {"user": 7, "changes": {"city": GOOD}},
        {"user": "ann", "changes": {"city": ["Rome", "Paris"]}},
        {"user": "ann", "changes": {"city": ["Rome", "Rome", THEN]}},
        {"user": "ann", "changes": {"city": [None, None, THEN]}},
        {"user": "ann", "changes": {"city": [1, "Paris", THEN]}},
        {"user": "ann", "changes": {"city": ["Rome", False, THEN]}},
        {"user": "ann", "changes": {"city": ["Rome", "Paris", 7]}},
        {"user": "ann", "changes": {"city": ["Rome", "Paris", True]}},
        {"user": "ann", "changes": {"city": ["Rome", "Paris", float(THEN)]}},
        {"user": "ann", "changes": {"city": "Rom"}},
        {"user": "ann", "changes": {"city": GOOD}, "more": 1},
        {"user": "ann", "unknown": False},
        {"checkpoint": 1, "tally": {}, "calls": 1, "seconds": 1},
        {"checkpoint": 1, "tally": {"users": {}, "values": {}}, "calls": 1, "seconds": 1},
        {"checkpoint": -1},
        {"delete": "everything"},
        [],
        None,
        "ann",
    ],
)
def test_a_line_with_anything_wrong_in_it_spoils_the_plan(
    tmp_path: Path, whole: list[bytes], line: object
) -> None:
    told = refused(tmp_path / "plan", whole[0] + json.dumps(line).encode() + b"\n" + b"".join(whole[1:]))

    assert told.endswith("is damaged: line 2 cannot be read")
    assert "Rome" not in told


@pytest.mark.parametrize(
    "line",
    [
        b'{"user": "ann", "user": "bob", "unknown": true}\n',
        b'{"user": "ann", "unknown": t}\n',
        b'{"user": "ann", "changes": {"city": ["a", "b", NaN]}}\n',
        b"\xff\n",
        b"\n",
        b"[" * 99_999 + b"\n",
        b'{"user": "ann", "changes": {"city": ["a", "b", ' + b"9" * 5000 + b"]}}\n",
    ],
)
def test_a_line_that_is_no_json_of_ours_spoils_the_plan(
    tmp_path: Path, whole: list[bytes], line: bytes
) -> None:
    told = refused(tmp_path / "plan", whole[0] + line + b"".join(whole[1:]))

    assert told.endswith("is damaged: line 2 cannot be read")


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, whole: list[bytes]) -> None:
    told = refused(tmp_path / "plan", whole[0] + b'{"user": "' + b"x" * (2 * MAX_LINE))

    assert told.endswith("is damaged: line 2 is too long")


def test_a_plan_with_lines_taken_out_or_put_in_is_damaged(tmp_path: Path, whole: list[bytes]) -> None:
    header, *lines, last = whole

    for changed in (
        [header, *lines[:-1], last],
        [header, *lines, lines[-1], last],
        [header, header, *lines, last],
        [*whole, lines[-1]],
        [*whole, b"x"],
        [header, *lines, last.replace(b'"summary": 4', b'"summary": 3')],
    ):
        assert "is damaged" in refused(tmp_path / "plan", b"".join(changed))


@given(st.binary(max_size=60).filter(bytes.strip), st.integers(0, 3), st.booleans())
def test_no_bytes_do_anything_but_be_refused(noise: bytes, place: int, ended: bool) -> None:
    with directory() as folder:
        path = folder / "plan"
        write(path, EXAMPLE, every=10)
        lines = lines_of(path)
        lines.insert(place, noise + b"\n" * ended)
        path.write_bytes(b"".join(lines))

        with open(path, "rb") as file, pytest.raises(UnusablePlan):
            survey(file, path)


def test_every_kind_has_its_place_in_the_tally() -> None:
    assert set(json.loads(packed(Mark()))["tally"]["users"]) >= {"differs", "same", "unknown", "in_motion"}
    assert set(KINDS) == {"set", "change", "remove", "same", "newer"}
