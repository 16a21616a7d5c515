"""Back-pressure on the broker's queue: closed without room or Redis, opened when a part of it is free."""

from __future__ import annotations

import pytest
import redis

from tests.conftest import ManualClock
from worker.intake.backpressure import FREE_SHARE, LOOK_EVERY, Backpressure


class Room:
    """Room as the test says, and what was asked and told."""

    def __init__(self) -> None:
        self.free: float | Exception = 1.0
        self.asked: list[float] = []
        self.told: list[bool] = []

    def has(self, share: float) -> bool:
        self.asked.append(share)
        if isinstance(self.free, Exception):
            raise self.free
        return self.free > share


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def intake(room: Room, clock: ManualClock) -> Backpressure:
    return Backpressure(room.has, room.told.append, clock)


def look(intake: Backpressure, clock: ManualClock) -> None:
    clock.now += LOOK_EVERY
    intake.look()


def test_it_closes_when_there_is_no_room_and_opens_when_a_part_of_it_is_free(
    intake: Backpressure, room: Room, clock: ManualClock
) -> None:
    for free in (1.0, 0.0, FREE_SHARE / 2, FREE_SHARE * 2, FREE_SHARE / 2):
        room.free = free
        look(intake, clock)

    assert room.told == [True, False, False, True, True]
    assert room.asked == [0.0, 0.0, FREE_SHARE, FREE_SHARE, 0.0]


def test_a_redis_that_is_away_has_no_room(intake: Backpressure, room: Room, clock: ManualClock) -> None:
    for free in (redis.ConnectionError(), redis.TimeoutError(), 1.0):
        room.free = free
        look(intake, clock)

    assert room.told == [False, False, True]


def test_it_looks_now_and_then_only(intake: Backpressure, room: Room, clock: ManualClock) -> None:
    for _ in range(5):
        intake.look()
        clock.now += LOOK_EVERY / 3

    assert len(room.told) == 2


def test_a_change_is_told_once(
    intake: Backpressure, room: Room, clock: ManualClock, capsys: pytest.CaptureFixture[str]
) -> None:
    room.free = 0.0
    look(intake, clock)
    look(intake, clock)
    room.free = 1.0
    look(intake, clock)

    said = capsys.readouterr().out
    assert (said.count("intake_closed"), said.count("intake_opened")) == (1, 1)
