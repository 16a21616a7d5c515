"""What is known of one user is what is stored, at one instant."""

from __future__ import annotations

import redis

from worker.models import Acked, BatchId, DeadLettered, Update
from worker.state.buffer import Buffer
from worker.state.keys import Keys
from worker.state.users import look

TICKET = {"size": 100, "linger": 0, "ticket_ttl": 10, "quota": 100, "horizon": 1}


def claim(buffer: Buffer, now_ms: int | None = None) -> BatchId:
    (ticket,) = buffer.tick(**TICKET, now_ms=now_ms).tickets
    batch = buffer.claim(ticket, 100, now_ms=now_ms)
    assert batch
    return ticket


def test_nothing_is_known_of_a_stranger(client: redis.Redis, keys: Keys) -> None:
    found = look(client, keys, "nobody")

    assert (found.pending, found.in_flight, found.delivered, found.dead, found.lane) == (None,) * 5
    assert found.now_ms > 0


def test_a_pending_user_has_a_place_in_its_lane(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys)
    buffer.add([Update("first", {"city": "Paris"})], now_ms=1000)
    buffer.add([Update("ann", {"city": "Rome", "level": None}, 5)], now_ms=2000)

    found = look(client, keys, "ann")

    assert (found.lane, found.place) == ("live", 1)
    assert found.pending
    assert found.pending.values == {"city": ("Rome", 5), "level": (None, 5)}
    assert found.pending.since_ms == 2000


def test_a_user_in_flight_is_in_a_batch_and_a_delivered_one_came_by_it(
    client: redis.Redis, keys: Keys
) -> None:
    buffer = Buffer(client, keys)
    buffer.add([Update("ann", {"city": "Rome"}), Update("bob", {"city": "Rome"})])
    batch = claim(buffer)

    found = look(client, keys, "ann")

    assert (found.batch, found.pending, found.lane) == (batch, None, None)
    assert found.in_flight
    assert found.lease_ends_ms
    assert found.lease_ends_ms > found.now_ms

    buffer.settle(batch, {"ann": Acked()}, rest=DeadLettered(40001, "no account"), number=7)
    ann, bob = look(client, keys, "ann"), look(client, keys, "bob")

    assert ann.delivered
    assert (ann.delivered.values["city"][0], ann.delivered.call, ann.delivered.unknown) == (
        "Rome",
        7,
        frozenset(),
    )
    assert bob.dead
    assert bob.delivered
    assert (bob.dead.code, set(bob.delivered.unknown)) == (40001, {"city"})


def test_the_second_delivery_is_the_one_that_is_named(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys)
    for number, city in ((7, "Rome"), (8, "Oslo")):
        buffer.add([Update("ann", {"city": city})])
        buffer.settle(claim(buffer), {}, rest=Acked(), number=number)

    found = look(client, keys, "ann")

    assert found.delivered
    assert (found.delivered.values["city"][0], found.delivered.call) == ("Oslo", 8)


def test_what_cannot_be_read_is_named(client: redis.Redis, keys: Keys) -> None:
    client.hset(keys.pending, "ann", "{")
    client.hset(keys.shadow, "ann", '{"a": {"city": "Rome"}}')
    client.hset(keys.dead, "ann", "[]")

    found = look(client, keys, "ann")

    assert found.damaged == ("pending", "delivered", "dead")
