"""The demo's events are what the README says, and its judge can tell good from bad."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from itertools import islice

import pytest

from tests.conftest import drawn
from worker.errors import InvalidUpdate
from worker.models import check_update
from worker.sandbox import demo, demo_events


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return list(demo_events.events())


def test_the_same_seed_makes_the_same_events(lines: list[str]) -> None:
    assert list(islice(demo_events.events(), drawn(60_000))) == lines[: drawn(60_000)]
    assert next(iter(demo_events.events(seed=1))) != lines[0]


def test_there_are_many_events_about_many_users_some_of_them_hot(lines: list[str]) -> None:
    users = Counter(event[0] for line in lines if (event := demo._parse(line)))

    assert len(lines) > 60_000
    assert 11_000 < len(users) <= 12_000
    assert users.most_common(1)[0][1] > 300


def test_the_values_are_in_many_writing_systems(lines: list[str]) -> None:
    scripts = {
        unicodedata.name(letter, "?").split()[0]
        for line in lines[:20_000]
        if (event := demo._parse(line))
        for value in event[1].values()
        for letter in value
    }

    assert {"LATIN", "CYRILLIC", "CJK", "HANGUL", "ARABIC", "THAI", "DEVANAGARI", "TAMIL", "GREEK"} <= scripts


def test_some_events_come_twice_some_late_and_some_are_invalid(lines: list[str]) -> None:
    valid = [event for line in lines if (event := demo._parse(line))]
    newest, late = 0, 0
    for _, _, at in valid:
        late += at < newest
        newest = max(newest, at)

    assert len(lines) - len(set(lines)) > 500
    assert late > 1000
    assert 500 < len(lines) - len(valid) < 3000


def test_the_judge_and_the_product_agree_on_what_is_valid(lines: list[str]) -> None:
    names = frozenset(demo_events.NAMES)
    for line in lines:
        try:
            event = json.loads(line)
            accepted = check_update(event["user"], event["attrs"], event["occurred_at"], names)
        except (ValueError, InvalidUpdate):
            assert demo._parse(line) is None
        else:
            assert demo._parse(line) == (accepted.user, accepted.attrs, accepted.occurred_ms)


def line(user: str, city: str, at: int) -> str:
    return json.dumps({"user": user, "attrs": {"city": city}, "occurred_at": 1_800_000_000_000 + at})


def test_the_newest_event_is_expected_whatever_the_order() -> None:
    given = [line("ann", "Rome", 2), line("ann", "Paris", 1), line("bob", "Oslo", 1), "{", line("cid", "", 1)]

    expected = demo.expect(given, frozenset({"bob"}))

    assert expected.latest == {"ann": {"city": "Rome"}}
    assert (expected.valid, expected.invalid) == (3, 2)


def test_a_write_that_is_older_than_the_one_before_is_found() -> None:
    expected = demo.expect(
        [line("ann", "Paris", 1), line("ann", "Rome", 2), line("ann", "Paris", 3)], frozenset()
    )
    rome, paris = [0, 1, "ann", {"city": "Rome"}], [0, 1, "ann", {"city": "Paris"}]

    assert demo.stale_writes([paris, rome, paris], expected) == 0
    assert demo.stale_writes([rome, paris, rome], expected) == 1
