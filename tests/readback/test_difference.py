"""What a file wants against what the API has: every kind of difference, without anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.readback.difference import (
    FATES,
    MOST_NAMES,
    OTHER_NAMES,
    Change,
    Tally,
    Verdict,
    Want,
    judge,
    recheck,
)

#: When the file was true, and times before and after that, ms.
OLDER, THEN, NEWER = 1_700_000_000_000, 1_750_000_000_000, 1_800_000_000_000

NAMES = st.sampled_from(["city", "level", "tier"])
VALUES = st.sampled_from(["Paris", "Rome", "3"])
TIMES = st.sampled_from([OLDER, THEN, NEWER])
WANTED = st.dictionaries(NAMES, st.builds(Want, st.none() | VALUES, TIMES), min_size=1)
HAVE = st.dictionaries(NAMES, VALUES)
KNOWN = st.dictionaries(NAMES, st.tuples(st.none() | VALUES, TIMES))


@pytest.mark.parametrize(
    ("want", "old", "kind"),
    [
        ("Paris", None, "set"),
        ("Paris", "Rome", "change"),
        (None, "Rome", "remove"),
        ("Paris", "Paris", "same"),
        (None, None, "same"),
        # An empty value is one, if the API has it.
        ("Paris", "", "change"),
        (None, "", "remove"),
    ],
)
def test_each_kind_of_difference(want: str | None, old: str | None, kind: str) -> None:
    have = {} if old is None else {"city": old}

    found = judge({"city": Want(want, THEN)}, have, {})

    assert found.kinds == {"city": kind}
    assert found.changes == ({} if kind == "same" else {"city": Change(old, want, THEN)})
    assert found.fate == ("same" if kind == "same" else "differs")
    assert all(change.kind == kind for change in found.changes.values())


def test_what_the_file_does_not_name_stays() -> None:
    assert judge({"city": Want("Paris", THEN)}, {"city": "Paris", "tier": "gold"}, {}) == Verdict(
        "same", {}, {"city": "same"}
    )


def test_a_user_that_the_api_does_not_know_is_not_a_user_without_values() -> None:
    assert judge({"city": Want("Paris", THEN)}, None, {}).fate == "unknown"
    assert judge({"city": Want("Paris", THEN)}, {}, {}).fate == "differs"


@pytest.mark.parametrize("version", [OLDER, THEN])
def test_what_was_delivered_before_the_time_of_the_file_is_overruled(version: int) -> None:
    found = judge({"city": Want("Paris", THEN)}, {"city": "Rome"}, {"city": ("Rome", version)})

    assert found.changes == {"city": Change("Rome", "Paris", THEN)}


def test_what_was_delivered_after_the_time_of_the_file_stays() -> None:
    known = {"city": ("Rome", THEN + 1)}

    found = judge({"city": Want("Paris", THEN), "level": Want("3", THEN)}, {"city": "Rome"}, known)

    assert found.kinds == {"city": "newer", "level": "set"}
    assert found.changes == {"level": Change(None, "3", THEN)}
    assert judge({"city": Want("Paris", THEN)}, {"city": "Rome"}, known).fate == "newer"


def test_a_newer_value_that_the_api_has_lost_is_set_again_as_of_its_delivery() -> None:
    found = judge({"city": Want("Paris", THEN)}, {"city": "Rome"}, {"city": ("Paris", NEWER)})

    assert found.changes == {"city": Change("Rome", "Paris", NEWER)}


@given(WANTED, HAVE, KNOWN)
def test_carrying_out_the_changes_leaves_nothing_to_do_but_what_is_newer(
    wanted: dict[str, Want], have: dict[str, str], known: dict[str, tuple[str | None, int]]
) -> None:
    found = judge(wanted, have, known)

    assert found.kinds.keys() == wanted.keys()
    after = {name: value for name, value in have.items() if name not in found.changes}
    after |= {name: change.new for name, change in found.changes.items() if change.new is not None}
    again = judge(wanted, after, known)
    assert again.changes == {}
    for name, kind in found.kinds.items():
        if kind == "newer":
            assert known[name][1] > wanted[name].version
            assert again.kinds[name] == "newer"
        else:
            assert again.kinds[name] == "same"
            assert after.get(name) == wanted[name].value
    # Whatever the file does not name is as it was.
    assert {n: v for n, v in after.items() if n not in wanted} == {
        n: v for n, v in have.items() if n not in wanted
    }
    # `add` takes nothing that is older than what is remembered.
    assert all(change.version >= known.get(name, (None, 0))[1] for name, change in found.changes.items())


CHANGE = {"city": Change("Rome", "Paris", THEN), "tier": Change("gold", None, THEN)}


@pytest.mark.parametrize(
    ("have", "newest", "standing", "left"),
    [
        ({"city": "Rome", "tier": "gold"}, {}, "ready", {"city", "tier"}),
        ({"city": "Rome", "tier": "gold"}, {"city": THEN, "tier": OLDER}, "ready", {"city", "tier"}),
        ({"city": "Paris", "tier": "gold"}, {}, "ready", {"tier"}),
        ({"city": "Paris"}, {"city": NEWER}, "done", set()),
        ({"city": "Oslo", "tier": "gold"}, {}, "changed", set()),
        ({"city": "Rome", "tier": "silver"}, {}, "changed", set()),
        ({"tier": "gold"}, {}, "changed", set()),
        # Set once more to what it was: somebody wants that.
        ({"city": "Rome", "tier": "gold"}, {"city": NEWER}, "changed", set()),
        (None, {}, "unknown", set()),
    ],
)
def test_a_planned_change_is_checked_once_more(
    have: dict[str, str] | None, newest: dict[str, int], standing: str, left: set[str]
) -> None:
    found, changes = recheck(CHANGE, have, newest)

    assert (found, set(changes)) == (standing, left)


def test_everybody_is_counted_once_and_every_value_of_those_who_are_judged() -> None:
    tally = Tally()
    for fate in FATES:
        tally.count(Verdict(fate))
    tally.count(judge({"city": Want("Paris", THEN), "tier": Want(None, THEN)}, {"tier": "gold"}, {}))

    assert tally.judged == len(FATES) + 1
    assert tally.users["differs"] == 2
    assert (tally.total("set"), tally.total("remove"), tally.total("same")) == (1, 1, 0)


def test_a_file_with_any_number_of_names_is_counted_in_little_room() -> None:
    tally = Tally()
    for number in range(10 * MOST_NAMES):
        tally.count(judge({f"name{number}": Want("x", THEN)}, {}, {}))

    assert len(tally.values) == MOST_NAMES + 1
    assert tally.values[OTHER_NAMES]["set"] == 9 * MOST_NAMES
    assert tally.total("set") == 10 * MOST_NAMES
