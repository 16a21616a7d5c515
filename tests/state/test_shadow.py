"""What is remembered of users, and how it is corrected."""

from __future__ import annotations

import pytest
import redis

from tests.conftest import new_keys
from worker.models import Acked, BatchId, Update
from worker.state.buffer import Buffer, new_batch_id
from worker.state.shadow import UNKNOWN, Shadow

NOW = 1_700_000_000_000


class House:
    def __init__(self, client: redis.Redis) -> None:
        self.redis, self.keys = client, new_keys()
        self.buffer, self.shadow = Buffer(client, self.keys), Shadow(client, self.keys)
        self.now = NOW

    def add(self, user: str, **attrs: str | None) -> None:
        self.now += 1000
        self.buffer.add([Update(user, attrs, 0)], now_ms=self.now)

    def claim(self) -> BatchId:
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: self.now})
        batch = self.buffer.claim(ticket, 100, now_ms=self.now)
        assert batch
        return batch.id

    def deliver(self, user: str, **attrs: str | None) -> None:
        self.add(user, **attrs)
        self.buffer.settle(self.claim(), {}, rest=Acked(), number=1, now_ms=self.now)

    def values(self, user: str) -> dict[str, object]:
        return {name: value for name, (value, _) in self.shadow.look([user])[1][user].values.items()}


@pytest.fixture
def house(client: redis.Redis) -> House:
    return House(client)


def test_what_was_delivered_is_remembered(house: House) -> None:
    house.deliver("ann", city="Paris", level=None)
    _, found = house.shadow.look(["ann", "bob"])

    assert found["ann"].values == {"city": ("Paris", NOW + 1000), "level": (None, NOW + 1000)}
    assert not found["ann"].in_motion
    assert found["ann"].claim == 1
    assert (found["bob"].values, found["bob"].mark, found["bob"].in_motion) == ({}, "", False)


def test_whoever_is_pending_or_in_flight_is_in_motion(house: House) -> None:
    house.deliver("ann", city="Paris")
    mark = house.shadow.look(["ann"])[1]["ann"].mark
    house.add("ann", city="Rome")
    assert house.shadow.look(["ann"])[1]["ann"].in_motion
    batch = house.claim()
    assert house.shadow.look(["ann"])[1]["ann"].in_motion
    house.buffer.settle(batch, {}, rest=Acked(), number=2, now_ms=house.now)
    after = house.shadow.look(["ann"])[1]["ann"]
    assert not after.in_motion
    assert after.mark != mark


def test_a_failover_leaves_nothing_that_can_be_trusted(house: House) -> None:
    house.deliver("ann", city="Paris")
    house.redis.hset(house.keys.server, mapping={"servers": 2, "at": house.now + 1})
    assert house.values("ann") == {"city": UNKNOWN}


def test_what_cannot_be_read_is_nothing(house: House) -> None:
    for number, packed in enumerate(
        ["", "[]", '{"a":[]}', '{"a":{"city":1}}', "\xff", '{"a":{"city":["x",null]}}']
    ):
        house.redis.hset(house.keys.shadow, f"user{number}", packed)
    _, found = house.shadow.look([f"user{number}" for number in range(6)])
    assert all(not known.values for known in found.values())


def test_users_are_drawn_once_each(house: House) -> None:
    assert house.shadow.draw(10) == []
    for number in range(20):
        house.deliver(f"user{number}", city="Paris")
    drawn = house.shadow.draw(10)
    assert len(drawn) == len(set(drawn)) == 10
    assert len(house.shadow.draw(100)) == house.shadow.size() == 20


def test_a_correction_makes_the_same_value_worth_sending(house: House) -> None:
    house.deliver("ann", city="Paris", level="3")
    mark = house.shadow.look(["ann"])[1]["ann"].mark
    assert house.buffer.add([Update("ann", {"city": "Paris"}, 0)], now_ms=house.now).unchanged == 1

    mark = house.shadow.look(["ann"])[1]["ann"].mark
    assert house.shadow.correct({"ann": (mark, {"city": "Rome"}), "bob": ("", {"city": None})}) == [
        "ann",
        "bob",
    ]
    assert house.values("ann") == {"city": "Rome", "level": "3"}
    assert house.buffer.add([Update("ann", {"city": "Paris"}, 0)], now_ms=house.now).unchanged == 0
    assert house.shadow.look(["ann"])[1]["ann"].in_motion


def test_a_memory_or_a_value_that_is_no_text_stops_no_correction(house: House) -> None:
    house.redis.hset(house.keys.shadow, "ann", b"\xff\xfe")
    mark = house.shadow.look(["ann"])[1]["ann"].mark

    # As JSON can have it, half a character.
    found = house.shadow.correct({"ann": (mark, {"city": "Rome"}), "bob": ("", {"city": "\ud800"})})

    assert found == ["ann", "bob"]


def test_what_was_damaged_in_flight_is_not_believed_to_be_what_was_there_before(house: House) -> None:
    house.deliver("ann", city="Paris")
    house.add("ann", city="Rome")
    batch = house.claim()
    house.redis.hset(house.keys.flight, "ann", b"{")
    house.buffer.settle(batch, {}, rest=Acked(), number=2, now_ms=house.now)

    assert house.values("ann") == {"city": UNKNOWN}
    assert house.buffer.add([Update("ann", {"city": "Paris"}, 0)], now_ms=house.now).unchanged == 0


def test_a_correction_keeps_the_versions(house: House) -> None:
    house.deliver("ann", city="Paris")
    house.shadow.correct({"ann": (house.shadow.look(["ann"])[1]["ann"].mark, {"city": None})})
    assert house.values("ann") == {"city": None}
    assert house.buffer.add([Update("ann", {"city": "Oslo"}, NOW)], now_ms=house.now).stale == 1


@pytest.mark.parametrize("what", ["pending", "in flight", "delivered again"])
def test_whoever_has_moved_on_is_left_alone(house: House, what: str) -> None:
    house.deliver("ann", city="Paris")
    mark = house.shadow.look(["ann"])[1]["ann"].mark
    if what == "delivered again":
        house.deliver("ann", city="Rome")
    else:
        house.add("ann", city="Rome")
        if what == "in flight":
            house.claim()
    before = house.values("ann")

    assert house.shadow.correct({"ann": (mark, {"city": "Bern"})}) == []
    assert house.values("ann") == before


def test_after_a_failover_only_what_was_read_is_known(house: House) -> None:
    house.deliver("ann", city="Paris", level="3")
    mark = house.shadow.look(["ann"])[1]["ann"].mark
    house.redis.hset(house.keys.server, mapping={"servers": 2, "at": house.now + 1})
    house.shadow.correct({"ann": (mark, {"city": "Paris"})}, now_ms=house.now + 2)
    assert house.values("ann") == {"city": "Paris", "level": UNKNOWN}
