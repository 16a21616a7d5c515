"""The judge itself: it must see every way in which a history can be broken, and nothing else."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import history
from tests.history import Answer, Applied, Call, History, Offer, check

ACCEPTED, DOUBT, LOSABLE, REFUSED = Answer.ACCEPTED, Answer.DOUBT, Answer.LOSABLE, Answer.REFUSED


def offer(
    value: str | None,
    began: float,
    answer: Answer = ACCEPTED,
    *,
    ended: float | None = None,
    event_ms: int | None = None,
    name: str = "city",
) -> Offer:
    told = began + 0.1 if ended is None else ended
    return Offer("u1", name, value, began, math.inf if answer is DOUBT else told, answer, event_ms)


_requests = itertools.count(1)


def applied(value: str | None, at: float, name: str = "city") -> Applied:
    return Applied(at, next(_requests), "u1", name, value)


def rules(*events: Offer | Applied, kept: set[tuple[str, str, str | None]] | None = None) -> list[str]:
    seen = History(
        offers=[event for event in events if isinstance(event, Offer)],
        applied=[event for event in events if isinstance(event, Applied)],
        kept=kept or set(),
    )
    return [violation.rule for violation in check(seen)]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [offer("A", 1), applied("A", 2)],
        [offer("A", 1), offer("B", 2), applied("B", 3)],
        [offer("A", 1), applied("A", 2), offer("B", 2.5), applied("B", 3), applied("B", 4)],
        # A late one that was recognised as stale.
        [offer("B", 1, event_ms=200), offer("A", 2, event_ms=100), applied("B", 3)],
        # Two writers at the same time: either may win, and the other may have been sent before.
        [offer("A", 1, ended=3), offer("B", 2, ended=2.5), applied("B", 4), applied("A", 5)],
        # In doubt: arrived, did not arrive, or took effect after the next one.
        [offer("A", 1), offer("B", 2, DOUBT), applied("A", 3)],
        [offer("A", 1), offer("B", 2, DOUBT), applied("B", 3)],
        [offer("A", 1, DOUBT), offer("B", 2), applied("B", 3), applied("A", 4)],
        # Sent while the writer still waited for its answer.
        [offer("A", 1, ended=9), applied("A", 2)],
        # The same value again: nothing needs to be sent.
        [offer("A", 1), applied("A", 2), offer("A", 3)],
        [offer("A", 1), applied("A", 2), offer("B", 3), offer("A", 4), applied("B", 3.5), applied("A", 5)],
        # Removed.
        [offer("A", 1), applied("A", 2), offer(None, 3), applied(None, 4)],
        # Removed before it was sent: whoever looks finds nothing to remove.
        [offer("A", 1), offer(None, 2)],
        # The server lost its last second: it may have delivered what it lost.
        [offer("A", 1), offer("B", 2, LOSABLE), applied("A", 3)],
        [offer("A", 1), offer("B", 2, LOSABLE), applied("B", 3), applied("A", 4)],
        [offer("A", 1), offer("B", 2, REFUSED), applied("A", 3)],
        [offer("A", 1, event_ms=100), offer("B", 2, event_ms=100), applied("B", 3)],
    ],
)
def test_good_histories_pass(events: list[Offer | Applied]) -> None:
    assert rules(*events) == []


@pytest.mark.parametrize(
    ("rule", "events"),
    [
        ("lost", [offer("A", 1)]),
        ("lost", [offer("A", 1), offer("B", 2), applied("A", 3)]),
        ("lost", [offer("A", 1), applied("A", 2), offer(None, 3)]),
        ("lost", [offer("A", 1, event_ms=200), offer("B", 2, event_ms=100), applied("B", 3)]),
        ("lost", [offer("A", 1, event_ms=100), offer("B", 2, event_ms=100), applied("A", 3)]),
        # What is in doubt does not excuse the loss of what was accepted before it, unless it arrived.
        ("lost", [offer("A", 1), offer("B", 2, DOUBT)]),
        ("lost", [offer("A", 1), offer("B", 2, LOSABLE)]),
        ("lost", [offer("A", 1), offer("B", 2, REFUSED)]),
        ("stale", [offer("A", 1), offer("B", 2), applied("B", 3), applied("A", 4), applied("B", 5)]),
        (
            "stale",
            [
                offer("A", 1, event_ms=200),
                offer("B", 2, event_ms=100),
                applied("A", 3),
                applied("B", 4),
                applied("A", 5),
            ],
        ),
        (
            "stale",
            [
                offer("A", 1),
                applied("A", 2),
                offer(None, 3),
                applied(None, 4),
                applied("A", 5),
                applied(None, 6),
            ],
        ),
        # The value fits two offers, both older than what was applied before.
        (
            "stale",
            [offer("A", 1), offer("A", 2), offer("B", 3), applied("B", 4), applied("A", 5), applied("B", 6)],
        ),
        ("invented", [offer("A", 1), applied("X", 2), applied("A", 3)]),
        ("invented", [offer("A", 1), offer("B", 2, REFUSED), applied("B", 3), applied("A", 4)]),
        # Applied before it was offered.
        ("invented", [offer("A", 5), applied("A", 2), applied("A", 6)]),
        ("invented", [offer("A", 1), applied("A", 2), applied("A", 3, name="level")]),
    ],
)
def test_broken_histories_are_seen(rule: str, events: list[Offer | Applied]) -> None:
    assert rules(*events) == [rule]


def test_an_old_value_that_stays_is_both_stale_and_a_loss() -> None:
    assert rules(offer("A", 1), offer("B", 2), applied("B", 3), applied("A", 4)) == ["stale", "lost"]


def test_what_is_kept_is_not_lost() -> None:
    events: list[Offer | Applied] = [offer("A", 1), applied("A", 2), offer("B", 3)]

    assert rules(*events) == ["lost"]
    assert rules(*events, kept={("u1", "city", "B")}) == []
    assert rules(*events, kept={("u1", "city", "A")}) == ["lost"]
    assert rules(*events, kept={("u1", "level", "B")}) == ["lost"]


def test_the_shortest_story_is_told_and_the_others_are_counted() -> None:
    events = [offer("A", 1), offer("B", 2), applied("A", 3)]
    seen = History(
        offers=[*events[:2], Offer("u2", "city", "C", 1, 2, ACCEPTED)],  # type: ignore[list-item]
        applied=[events[2]],  # type: ignore[list-item]
    )

    (violation,) = check(seen)

    assert violation.summary == "u2 city=C was accepted, and did not arrive"
    assert str(violation).splitlines() == [
        "lost: u2 city=C was accepted, and did not arrive (and 1 more like it)",
        "      1.000000 to 2.000000  offered u2 city=C: accepted",
    ]


def test_a_stale_write_is_told_with_both_offers_and_both_writes() -> None:
    seen = History(
        offers=[offer("A", 1), offer("B", 2), *(offer(f"C{n}", 3 + n) for n in range(5))],
        applied=[applied("B", 3), applied("A", 4), applied("C4", 9)],
    )

    (violation,) = check(seen)

    assert [line.split("  ", 1)[1].split(":")[0].split(" by ")[0].strip() for line in violation.story] == [
        "1.000000 to 1.100000  offered u1 city=A",
        "2.000000 to 2.100000  offered u1 city=B",
        "3.000000  applied u1 city=B",
        "4.000000  applied u1 city=A",
    ]


@pytest.mark.parametrize(
    ("count", "seconds", "broken"), [(100, 0.99, False), (101, 1.001, False), (101, 0.99, True)]
)
def test_calls_in_a_second(count: int, seconds: float, broken: bool) -> None:
    calls = [Call(5 + seconds * number / (count - 1)) for number in range(count)]

    assert [violation.rule for violation in check(History(calls=calls))] == ["quota"] * broken


def test_the_second_that_begins_anywhere_counts() -> None:
    calls = [Call(0.5 + number / 1000) for number in range(60)] + [
        Call(1.2 + number / 1000) for number in range(60)
    ]

    (violation,) = check(History(calls=calls))

    assert violation.rule == "quota"
    assert violation.story[0].strip() == "0.500000  the first of 101 calls"


def test_a_call_has_a_most_of_users_and_each_once() -> None:
    many, twice = Call(1, tuple(f"u{number}" for number in range(101))), Call(2, ("a", "b", "a"))

    assert [str(violation).splitlines()[0] for violation in check(History(calls=[many]))] == [
        "batch: more than 100 users in one call"
    ]
    assert [violation.story for violation in check(History(calls=[twice]))] == [
        ("    2.000000  a call with a twice",)
    ]
    assert check(History(calls=[Call(1, many.users[:100])])) == []


@pytest.mark.parametrize("name", [*history.LEDGER_IN, *history.LEDGER_OUT])
def test_every_counter_takes_part_in_the_balance(name: str) -> None:
    balanced = {"accepted": 8, "redriven": 1, "coalesced": 2, "unchanged": 1, "stale": 1, "delivered": 2}
    balanced |= {"dead_lettered": 1, "quarantined": 0, "lost": 0, "pending": 1, "in_flight": 1}

    assert check(History(ledgers=[balanced])) == []
    (violation,) = check(History(ledgers=[balanced, balanced | {name: balanced[name] + 1}]))
    assert violation.rule == "ledger"
    assert "at look 2" in violation.summary


@given(st.data())
def test_a_correct_register_always_passes_and_a_forgetful_one_never(data: st.DataObject) -> None:
    """A system that takes updates one by one and applies the newest, now and then, is correct."""
    offers, writes, clock = [], [], 0.0
    for number in range(data.draw(st.integers(1, 12))):
        clock += 1
        offers.append(offer(f"v{number}", clock))
        for _ in range(data.draw(st.integers(0, 2))):
            clock += 1
            writes.append(applied(f"v{number}", clock))
    good = History(offers=offers, applied=[*writes, applied(offers[-1].value, clock + 1)])
    assert check(good) == []

    last = good.applied.pop()
    if not writes or writes[-1].value != last.value:
        assert "lost" in {violation.rule for violation in check(good)}
    if len(offers) > 1:
        good.applied += [last, applied(data.draw(st.sampled_from(offers[:-1])).value, clock + 2), last]
        assert [violation.rule for violation in check(good)] == ["stale"]


def test_the_judge_knows_nothing_of_the_product() -> None:
    tree = ast.parse(Path(history.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }

    assert not {name for name in imported if name and name.split(".")[0] in ("worker", "tasks")}
