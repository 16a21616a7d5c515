"""The event time of a Celery message: the best that is known about when it was published."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from tasks import attributes
from worker import runtime
from worker.intake.event_time import PUBLISHED, Stamps, event_ms

TAKEN = 1_800_000_000_500


@pytest.mark.parametrize(
    ("headers", "properties", "expected"),
    [
        ({}, {}, TAKEN),
        ({PUBLISHED: TAKEN - 7}, {"timestamp": 1_700_000_000}, TAKEN - 7),
        ({"timestamp_in_ms": TAKEN - 7}, {}, TAKEN - 7),
        ({PUBLISHED: TAKEN - 9, "timestamp_in_ms": TAKEN - 7}, {}, TAKEN - 9),
        # A whole second is an upper bound: its end, or the moment of taking when that is sooner.
        ({}, {"timestamp": 1_799_999_999}, 1_799_999_999_999),
        ({}, {"timestamp": 1_800_000_000}, TAKEN),
        ({}, {"timestamp": datetime(2026, 1, 1, tzinfo=UTC)}, 1_767_225_600_999),
        # A clock that is ahead.
        ({PUBLISHED: TAKEN + 3_600_000}, {}, TAKEN),
        # What no client means.
        ({PUBLISHED: "nonsense"}, {"timestamp": [1]}, TAKEN),
        ({PUBLISHED: None, "timestamp_in_ms": {}}, {"timestamp": None}, TAKEN),
        ({PUBLISHED: 0}, {"timestamp": datetime(2026, 1, 1)}, TAKEN),
    ],
)
def test_the_best_that_is_known_is_taken(
    headers: dict[str, object], properties: dict[str, object], expected: int
) -> None:
    assert event_ms(headers, properties, TAKEN) == expected


def test_stamps_rise_whatever_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = Stamps()
    times = iter([5_000_000, 5_900_000, 3_000_000, 9_000_000])
    monkeypatch.setattr("worker.intake.event_time.time.time_ns", lambda: next(times))

    assert [stamps.next() for _ in range(4)] == [5, 6, 7, 9]


def test_threads_never_get_the_same_stamp() -> None:
    stamps = Stamps()
    drawn: list[int] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend(stamps.next() for _ in range(1000))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(drawn)) == 4000


def test_a_message_without_a_time_counts_on_redis_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's clock is what it was taken by; what it is compared with has Redis'."""
    wall_ms = time.time_ns() // 1_000_000
    monkeypatch.setattr(runtime, "producer", lambda: SimpleNamespace(now_ms=lambda: wall_ms + 3000))

    def request(event_ms: int) -> SimpleNamespace:
        return SimpleNamespace(event_ms=event_ms, taken_ms=TAKEN)

    assert TAKEN + 2000 < (attributes._event_ms(request(TAKEN)) or 0) <= TAKEN + 3000
    assert attributes._event_ms(request(TAKEN - 5)) == TAKEN - 5, (
        "one that was published with a time keeps it"
    )
