"""What a whole file wants, merged on disk: the same as a dict would say, for any order of lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import CannotImport
from worker.intake.import_progress import Refusal
from worker.models import Update
from worker.readback.difference import Want
from worker.readback.wanted import WantedUsers

THEN = 1_750_000_000_000

USERS = st.sampled_from(["ann", "bob", "cid", "d'or", "x\0y"])
UPDATES = st.lists(
    st.builds(
        Update,
        USERS,
        st.dictionaries(
            st.sampled_from(["city", "level"]), st.none() | st.text(min_size=1, max_size=3), min_size=1
        ),
        st.integers(THEN, THEN + 2),
    )
)


def merged(updates: list[Update]) -> dict[str, dict[str, Want]]:
    """The same by the plainest means."""
    found: dict[str, dict[str, Want]] = {}
    for update in updates:
        wants = found.setdefault(update.user, {})
        for name, value in update.attrs.items():
            if update.occurred_ms >= wants.get(name, Want(None, 0)).version:
                wants[name] = Want(value, update.occurred_ms)
    return found


@given(UPDATES.filter(lambda updates: not any("\ud800" <= c <= "\udfff" for u in updates for c in str(u))))
def test_of_several_lines_the_newest_value_counts_and_of_equals_the_last(updates: list[Update]) -> None:
    with WantedUsers() as wanted:
        for first in range(0, len(updates), 2):
            wanted.add(updates[first : first + 2])

        assert len(wanted) == len(merged(updates))
        chunks = list(wanted.chunks(2))
        assert all(len(chunk) == 2 for chunk in chunks[:-1])
        assert {user: wants for chunk in chunks for user, wants in chunk.items()} == merged(updates)
        # In the order in which they came.
        assert [user for chunk in chunks for user in chunk] == list(merged(updates))
        for after in range(len(wanted) + 1):
            rest = [user for chunk in wanted.chunks(3, after) for user in chunk]
            assert rest == list(merged(updates))[after:]


def test_refused_lines_are_kept_in_order() -> None:
    refusals = [Refusal(7, "?", "no JSON"), Refusal(3, "字", "too long")]
    with WantedUsers() as wanted:
        wanted.add([], refusals[:1])
        wanted.add([Update("ann", {"city": "Paris"}, THEN)], refusals[1:])

        assert list(wanted.refusals()) == refusals
        assert len(wanted) == 1


def test_the_digest_tells_contents_apart() -> None:
    def digest(*updates: Update, refusals: tuple[Refusal, ...] = ()) -> str:
        with WantedUsers() as wanted:
            wanted.add(updates, refusals)
            return wanted.digest()

    ann, bob = Update("ann", {"city": "Paris"}, THEN), Update("bob", {"city": "Paris"}, THEN)
    variants = [
        digest(),
        digest(ann),
        digest(bob),
        digest(ann, bob),
        digest(bob, ann),
        digest(Update("ann", {"city": "Rome"}, THEN)),
        digest(Update("ann", {"city": None}, THEN)),
        digest(Update("ann", {"city": "Paris"}, THEN + 1)),
        digest(ann, refusals=(Refusal(1, "?", "bad"),)),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(ann, bob) == digest(ann, bob)


def test_a_directory_without_room_is_explained() -> None:
    with WantedUsers() as wanted:
        wanted._database.execute("PRAGMA max_page_count = 5")

        with pytest.raises(CannotImport, match="TMPDIR"):
            wanted.add([Update(f"user{number}", {"city": "Paris"}, THEN) for number in range(10_000)])
