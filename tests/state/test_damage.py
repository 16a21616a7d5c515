"""What is in Redis and cannot be read: whatever it is and wherever it is, nobody else notices.

Redis does not undo what a script has written when it fails half-way. So every record of every table is damaged
in every way that comes to mind, then every step is taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.conftest import FAST, new_keys
from worker.models import Acked, DeadLettered, Retried, Snoozed, Update
from worker.state import scripts
from worker.state.buffer import Buffer, new_batch_id
from worker.state.dead_letters import DeadLetters
from worker.state.line import Line
from worker.state.quarantine import Quarantine
from worker.state.scripts import text

NOW = 1_700_000_000_000
#: Raw JSON in place of a value.
ODD = [
    "null",
    "true",
    "[]",
    "{}",
    '"x"',
    "-1",
    "1e999",
    "1e308",
    "9" * 400,
    '["x"]',
    '{"x":{"y":[1]}}',
    "[" * 900,
]
#: Raw bytes in place of a record.
RAW = [
    b"",
    b"{",
    b"x",
    b"\xff\xfe",
    b'{"a":{"city":["\xff",1700000000000]},"t":1700000000000}',
    b'{"a":{"city":["\\ud800",1700000000000]},"t":1700000000000}',
    b'{"a":{"\\ud800":["x",1700000000000]},"t":1700000000000}',
    b'{"a":{"city":["x",1700000000000,1e999]},"t":1700000000000}',
    b'{"a":{"city":{"x":1}},"t":1700000000000}',
    b'{"a":[["Paris",1700000000000]],"t":1700000000000}',
    b'{"a":{},"t":1700000000000}',
    b'{"a":{"city":["Paris",1700000000000]},"t":1700000000000,"z":1e999}',
    b'{"a":{"city":["Paris",1700000000000]},"t":1700000000000,"z":{"deep":[[[]]]}}',
    b'{"a":{"city":["Paris",1700000000000]},"t":1700000000000,"n":1e300}',
    b"[" * 5000,
    *(odd.encode() for odd in ODD),
]


def damaged(packed: bytes) -> Iterator[bytes]:
    """A record, with each of its fields missing or replaced by each odd value, at every level."""
    yield from RAW
    record = json.loads(packed)
    marks = {"field": '"@@"'}

    def spoilt(record: Any) -> Iterator[bytes]:
        packed = json.dumps(record)
        for odd in ODD:
            yield packed.replace(marks["field"], odd).encode()

    for field in record:
        yield json.dumps({name: value for name, value in record.items() if name != field}).encode()
        yield from spoilt(record | {field: "@@"})
    for name in record["a"]:
        yield from spoilt(record | {"a": record["a"] | {name: "@@"}})
        for place in (0, 1):
            pair = list(record["a"][name])
            pair[place] = "@@"
            yield from spoilt(record | {"a": record["a"] | {name: pair}})


class House:
    """An app with a user, ann, somewhere in it; and one more in every other place."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis, self.keys = client, new_keys()
        self.buffer = Buffer(client, self.keys, shadow_ttl=10**6)
        self.letters = DeadLetters(client, self.keys)
        self.now = NOW

    def add(self, *users: str, lane: str = "live", value: str = "Paris") -> None:
        updates = [Update(user, {"city": value, "level": None}) for user in users]
        self.buffer.add(updates, lane=lane, now_ms=self.now)

    def claim(self) -> Any:
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: self.now})
        return self.buffer.claim(ticket, 100, now_ms=self.now)

    def settle(self, batch: Any, outcome: Any) -> None:
        self.buffer.settle(batch.id, {}, rest=outcome, claimed_ms=self.now, now_ms=self.now)

    def settle_in(self, place: str) -> None:
        """Bring ann to a place, with others around her."""
        self.add("old1", "ann", "old2")
        if place in ("pending", "backfill"):
            return
        batch = self.claim()
        if place == "shadow":
            self.settle(batch, Acked())
        elif place == "delayed":
            self.settle(batch, Retried(5.0))
        elif place == "dead":
            self.settle(batch, DeadLettered(90033, "no"))
        elif place == "waiting":
            self.add("ann", "old1", value="Rome")

    def table(self, place: str) -> str:
        tables = {"flight": "flight", "batches": "batches", "shadow": "shadow", "dead": "dead"}
        return str(getattr(self.keys, tables.get(place, "pending")))

    def use_everything(self, *, settle_first: bool = False) -> None:
        """Every step of every script, for everybody."""
        if settle_first:
            # What is in flight comes back before anybody sends anything newer.
            self.now += 61_000
            while self.buffer.reclaim(now_ms=self.now):
                pass
        self.add("ann", "bob", value="Bern")
        self.add("cid", lane="backfill")
        list(self.letters.find())
        for outcome in (Retried(1.0), Snoozed(0.5, suspect=True), DeadLettered(90033, "no"), Acked()):
            self.add("dan", "ann", value=str(outcome)[:8])
            self.now += 2000
            self.buffer.tick(size=100, linger=0.1, ticket_ttl=10.0, quota=100, horizon=1.0, now_ms=self.now)
            batch = self.claim()
            if batch and batch.users:
                self.buffer.extend(batch.id, now_ms=self.now)
                self.settle(batch, outcome)
        self.letters.redrive(self.letters.choose())
        self.buffer.forget(now_ms=self.now)
        # Whoever held a batch is gone, or has never known that it does.
        for _ in range(5):
            self.now += 61_000
            while self.buffer.reclaim(now_ms=self.now):
                pass
            while (batch := self.claim()) and batch.users:
                self.settle(batch, Acked())


PLACES = ["pending", "delayed", "flight", "waiting", "shadow", "dead"]


@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_record_is_set_aside_and_everybody_else_is_delivered(
    client: redis.Redis, place: str
) -> None:
    house = House(client)
    house.settle_in(place)
    kinds = list(dict.fromkeys(damaged(str.encode(text(client.hget(house.table(place), "ann") or b"")))))
    assert len(kinds) > 90

    for number, damage in enumerate(kinds[:: 7 if FAST else 1]):
        house = House(client)
        house.settle_in(place)
        client.hset(house.table(place), "ann", damage)

        house.use_everything(settle_first=number % 2 == 0)

        keys = house.keys
        delivered = {text(user) for user in client.hkeys(keys.shadow)}
        assert delivered == {"ann", "bob", "cid", "dan", "old1", "old2"}, damage
        assert json.loads(client.hget(keys.shadow, "ann") or b"")["a"]["city"][0] == "Acked()", damage
        for empty in (keys.pending, keys.flight, keys.batches, keys.leases, keys.live, keys.delayed):
            assert not client.exists(empty), (damage, empty)
        assert house.buffer.snapshot().balanced, damage


def test_what_was_set_aside_keeps_its_bytes(client: redis.Redis) -> None:
    house = House(client)
    house.settle_in("pending")
    client.hset(house.keys.pending, "ann", b"{\xff")

    batch = house.claim()

    assert [user.user for user in batch.users] == ["old1", "old2"]
    (found,) = Quarantine(client, house.keys).find()
    assert (found.table, found.user, found.raw, found.at_ms) == ("flight", "ann", b"{\xff", NOW)
    snapshot = house.buffer.snapshot()
    assert (snapshot.quarantine, snapshot.ledger["quarantined"], snapshot.balanced) == (1, 1, True)


@pytest.mark.parametrize("id", [b"\xff\xfe", "zoë".encode(), b"a\nb", b"\x00"])
def test_a_user_that_no_id_can_be_is_set_aside(client: redis.Redis, id: bytes) -> None:
    house = House(client)
    house.settle_in("pending")
    client.hset(house.keys.pending, id, client.hget(house.keys.pending, "ann") or b"")
    client.zadd(house.keys.live, {id: NOW})
    client.hincrby(house.keys.ledger, "accepted", 1)

    batch = house.claim()

    assert [user.user for user in batch.users] == ["ann", "old1", "old2"]
    assert house.buffer.snapshot().balanced
    assert len(list(Quarantine(client, house.keys).find())) == 1


@pytest.mark.parametrize("lane", ["live", "backfill", "delayed"])
def test_a_user_in_a_lane_without_a_record_leaves_it(client: redis.Redis, lane: str) -> None:
    house = House(client)
    house.settle_in("pending")
    client.zadd(getattr(house.keys, lane), {"ghost": NOW - 1})

    batch = house.claim()

    assert [user.user for user in batch.users] == ["ann", "old1", "old2"]
    house.settle(batch, Acked())
    assert house.claim().users == ()


@pytest.mark.parametrize("packed", [None, *RAW, b'{"0":"ann"}', b"[1,2]"])
def test_users_of_a_damaged_batch_are_found_again(client: redis.Redis, packed: bytes | None) -> None:
    house = House(client)
    house.settle_in("flight")
    house.add("bob")
    other = house.claim()
    (batch,) = {text(id) for id in client.hkeys(house.keys.batches)} - {other.id}
    if packed is None:
        client.hdel(house.keys.batches, batch)
    else:
        client.hset(house.keys.batches, batch, packed)
    house.settle(other, Acked())

    house.use_everything()

    assert {b"ann", b"bob", b"old1", b"old2"} <= set(client.hkeys(house.keys.shadow))
    assert not client.exists(house.keys.flight)
    assert house.buffer.snapshot().balanced


def test_users_of_a_damaged_batch_are_found_while_others_are_in_flight(client: redis.Redis) -> None:
    keys = new_keys()
    buffer = Buffer(client, keys, lease=60)
    batches = []
    for user in ("ann", "bob"):
        ticket = new_batch_id()
        client.zadd(keys.tickets, {ticket: NOW})
        buffer.add([Update(user, {"city": "Paris"})], now_ms=NOW)
        batches.append(buffer.claim(ticket, 100, now_ms=NOW))
    damaged, other = batches
    assert damaged
    assert other
    client.hset(keys.batches, damaged.id, b"{")
    buffer.extend(other.id, now_ms=NOW + 50_000)

    assert buffer.reclaim(now_ms=NOW + 70_000) == damaged.id

    assert client.hkeys(keys.flight) == [b"bob"]
    assert client.hkeys(keys.pending) == [b"ann"]


def test_a_batch_without_a_lease_gets_one(client: redis.Redis) -> None:
    house = House(client)
    house.settle_in("flight")
    client.delete(house.keys.leases)

    house.use_everything()

    assert not client.exists(house.keys.flight)
    assert house.buffer.snapshot().balanced


NUMBERS = [b"", b"x", b"nan", b"inf", b"-inf", b"1e999", b"-5", b"0x10", b"9" * 400, b"\xff"]


@pytest.mark.parametrize("table", ["rate", "health", "line", "ledger"])
def test_numbers_that_are_none_block_nothing(client: redis.Redis, table: str) -> None:
    rate = "next next_isolating paused_at paused_until epoch limit good bad step granted climb_at hold apart jitter"
    stretch = "stretch stretch_at stretch_hold stretch_jitter busy refused_at refusals"
    fields = {
        "rate": f"{rate} {stretch}",
        "health": "ok_at calm_at signed_at dead_row dead_seen dead_since dead_count dead_base let_until",
        "line": "wait next_probe since code failed kind",
        "ledger": "accepted delivered",
    }[table].split()
    steps = {name: scripts.load(client, name) for name in ("reserve", "pause")}
    for field, value in [*itertools.product(fields, NUMBERS)][:: 5 if FAST else 1]:
        house = House(client)
        line, keys = Line(client, house.keys), house.keys
        house.settle_in("pending")
        if table == "line":
            line.stop(new_batch_id(), "error", 70009, "wrong key", now_ms=house.now)
        client.hset(str(getattr(keys, table)), field, value)

        for second in range(8):
            now = (house.now + second * 1000) * 1000
            limiter = [keys.rate, keys.quotas, keys.server, keys.tickets, keys.ledger]
            answer = steps["reserve"](
                limiter, (now, 100, 2_000_000, 0, 1_500_000, "", 0, 0, 0, "next_isolating")
            )
        steps["pause"]([keys.rate], (now, 1000, "x", 60007, "", 100, 1, 1, 1))
        line.read()
        if table == "line":
            probe = house.buffer.tick(
                size=1, linger=0, ticket_ttl=10, quota=100, horizon=1, now_ms=house.now + 400_000
            )
            assert probe.tickets, (field, value)
            line.stop(probe.tickets[0], "error", 70009, "wrong key", now_ms=house.now + 400_000)
            line.record_dead_letters(90033, 3)
            line.resume(now_ms=house.now)
        house.use_everything()

        assert answer[0] == 1, (field, value)
        assert not client.exists(keys.pending), (field, value)
        house.buffer.snapshot()
