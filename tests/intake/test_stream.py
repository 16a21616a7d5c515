"""The stream: in order, nothing lost between taking and accepting, bad entries alone refused."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from tests.conftest import ManualClock, drawn
from worker.intake.stream import FULL_PAUSE, GROUP, TERM, Entry, StreamConsumer
from worker.models import Acked, Update
from worker.producer import Producer
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.buffer import Added, Buffer, new_batch_id
from worker.state.keys import Keys
from worker.state.leader import RETRY_AFTER
from worker.state.refused import Refused
from worker.state.scripts import text

PARIS, ROME = '{"city":"Paris"}', '{"city":"Rome"}'


@pytest.fixture(autouse=True)
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.intake.stream.BLOCK", 0.005)


Consumers = Callable[..., StreamConsumer]


@pytest.fixture
def consumer(server: EmbeddedServer, keys: Keys, clock: ManualClock) -> Iterator[Consumers]:
    clients: list[redis.Redis] = []

    def make(worker: str = "w1", max_pending: int = 0) -> StreamConsumer:
        clients.append(client := redis.Redis.from_url(server.url))
        producer = Producer(server.url, keys.sdkappid, max_pending=max_pending)
        return StreamConsumer(client, keys, producer, Refused(client, keys), clock, worker=worker)

    yield make
    for client in clients:
        client.close()


def turns(consumer: StreamConsumer, count: int = 4) -> float:
    """The first turn makes the group, the second finds nothing unsettled: then come the new entries."""
    pause = 0.0
    for _ in range(count):
        pause = consumer.turn()
    return pause


def pending(client: redis.Redis, keys: Keys) -> dict[str, dict[str, str]]:
    return {
        text(user): {name: pair[0] for name, pair in json.loads(record)["a"].items()}
        for user, record in client.hgetall(keys.pending).items()
    }


def versions(client: redis.Redis, keys: Keys, user: str) -> dict[str, int]:
    record = json.loads(client.hget(keys.pending, user) or "{}")
    return {name: pair[1] for name, pair in record["a"].items()}


def test_entries_are_accepted_and_gone_from_the_stream(
    consumer: Consumers, client: redis.Redis, keys: Keys
) -> None:
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})
    client.xadd(keys.updates, {"user": "bob", "attrs": '{"city":"字", "level":"Gold"}'})

    turns(consumer())

    assert pending(client, keys) == {"ann": {"city": "Paris"}, "bob": {"city": "字", "level": "Gold"}}
    assert client.xlen(keys.updates) == 0
    assert client.xpending(keys.updates, GROUP)["pending"] == 0


def test_the_id_of_an_entry_is_its_event_time(consumer: Consumers, client: redis.Redis, keys: Keys) -> None:
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS}, id="1750000000000-0")
    client.xadd(keys.updates, {"user": "bob", "attrs": PARIS}, id="1750000000000-1")
    client.xadd(keys.updates, {"user": "bob", "attrs": ROME}, id="1750000000000-2")

    turns(consumer())

    assert versions(client, keys, "ann") == {"city": 1_750_000_000_000}
    assert pending(client, keys)["bob"] == {"city": "Rome"}, "the later of one millisecond wins"


@pytest.mark.parametrize("moment", ["1700000000", "1700000000000", "2023-11-14T22:13:20Z", "1700000000.0"])
def test_an_event_time_may_be_given(
    consumer: Consumers, client: redis.Redis, keys: Keys, moment: str
) -> None:
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS, "occurred_at": moment})

    turns(consumer())

    assert versions(client, keys, "ann") == {"city": 1_700_000_000_000}


BAD: list[tuple[dict[str, str | bytes], str, str]] = [
    ({"attrs": PARIS}, "?", "the entry has no field user"),
    ({"user": "ann"}, "?", "the entry has no field attrs"),
    ({"user": "ann", "attrs": "{"}, "ann", "the field attrs is not JSON"),
    ({"user": "ann", "attrs": b"\xff"}, "ann", "the field attrs is not JSON"),
    ({"user": "ann", "attrs": "[" * 100_000}, "ann", "the field attrs is not JSON"),
    ({"user": "ann", "attrs": f"{PARIS},{PARIS}"}, "ann", "the field attrs is not JSON"),
    ({"user": "ann", "attrs": "[]"}, "ann", "attributes must be a mapping, got list"),
    ({"user": b"\xff", "attrs": PARIS}, "'�'", "user id must be printable ASCII"),
    ({"user": "ann", "attrs": PARIS, "occurred_at": "nan"}, "ann", "occurred_at is outside the years 2001 to 2286"),
    ({"user": "ann", "attrs": PARIS, "occurred_at": "noon"}, "ann", "occurred_at is not an ISO 8601 time"),
    ({"user": "ann", "attrs": '{"city":"\\ud800"}'}, "ann", "the value of 'city' is not valid Unicode (it has a lone surrogate)"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "user", "rule"), BAD, ids=range(len(BAD)))
def test_a_bad_entry_is_refused_alone_and_kept(
    consumer: Consumers, client: redis.Redis, keys: Keys, fields: dict[str, str | bytes], user: str, rule: str
) -> None:
    client.xadd(keys.updates, {"user": "before", "attrs": PARIS})
    client.xadd(keys.updates, dict[Any, Any](fields))
    client.xadd(keys.updates, {"user": "after", "attrs": ROME})

    turns(consumer())

    assert pending(client, keys) == {"before": {"city": "Paris"}, "after": {"city": "Rome"}}
    (kept,) = Refused(client, keys).newest(10)
    assert (kept.source, kept.user, kept.rule) == ("stream", user, rule)
    assert client.xlen(keys.updates) == 0


def test_what_a_killed_consumer_had_taken_comes_first(
    consumer: Consumers, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = consumer("w1")
    turns(killed, 2)
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS}, id="1750000000000-0")
    monkeypatch.setattr(killed, "_take", _killed)
    with pytest.raises(KeyboardInterrupt):
        killed.turn()
    client.xadd(keys.updates, {"user": "ann", "attrs": ROME}, id="1750000000000-1")
    client.delete(keys.consumer)
    successor = consumer("w2")

    successor.turn()
    assert pending(client, keys) == {"ann": {"city": "Paris"}}
    turns(successor, 2)
    assert pending(client, keys) == {"ann": {"city": "Rome"}}
    assert client.xlen(keys.updates) == 0


def _killed(entries: object) -> float:
    raise KeyboardInterrupt


def test_an_entry_accepted_but_not_acknowledged_changes_nothing_the_second_time(
    consumer: Consumers, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = consumer()
    turns(killed, 2)
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})
    monkeypatch.setattr(killed, "_settle", lambda done, bad: _killed(done))
    with pytest.raises(KeyboardInterrupt):
        killed.turn()
    assert client.xlen(keys.updates) == 1

    turns(consumer())

    assert pending(client, keys) == {"ann": {"city": "Paris"}}
    assert client.xlen(keys.updates) == 0
    assert Buffer(client, keys).snapshot().balanced


def test_one_acts_and_the_others_stand_by(consumer: Consumers, client: redis.Redis, keys: Keys) -> None:
    turns(consumer("w1"), 2)
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})

    pause = consumer("w2").turn()

    assert client.xlen(keys.updates) == 1
    assert 0.01 <= pause <= TERM + 0.1


def test_one_that_slept_longer_than_its_term_lets_go(
    consumer: Consumers, client: redis.Redis, keys: Keys, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = consumer()
    turns(sleeper, 2)
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})
    read = sleeper._read

    def read_late() -> list[Entry]:
        clock.sleep(TERM)
        return read()

    with monkeypatch.context() as patch:
        patch.setattr(sleeper, "_read", read_late)
        sleeper.turn()
    assert pending(client, keys) == {}

    sleeper.turn()
    assert pending(client, keys) == {"ann": {"city": "Paris"}}


def test_while_there_is_no_room_entries_wait_in_the_stream_and_nothing_newer_is_taken(
    consumer: Consumers, client: redis.Redis, keys: Keys
) -> None:
    acting = consumer(max_pending=1)
    for user in ("ann", "bob", "ann"):
        client.xadd(keys.updates, {"user": user, "attrs": PARIS})
    pause = turns(acting, 3)
    assert pause == FULL_PAUSE
    assert list(pending(client, keys)) == ["ann"]

    newer = client.xadd(keys.updates, {"user": "cid", "attrs": PARIS})
    assert acting.turn() == FULL_PAUSE
    assert client.xinfo_groups(keys.updates)[0]["last-delivered-id"] != newer
    assert client.xlen(keys.updates) == 2

    for expected in ("bob", "cid"):
        deliver_all(client, keys)
        turns(acting, 3)
        assert list(pending(client, keys)) == [expected]
    assert client.xlen(keys.updates) == 0
    assert Refused(client, keys).count() == 0


def deliver_all(client: redis.Redis, keys: Keys) -> None:
    buffer, ticket = Buffer(client, keys), new_batch_id()
    client.zadd(keys.tickets, {ticket: 1})
    batch = buffer.claim(ticket, 1000)
    assert batch is not None
    buffer.settle(batch.id, {}, rest=Acked())


def test_a_taken_entry_that_somebody_deleted_is_forgotten(
    consumer: Consumers, client: redis.Redis, keys: Keys
) -> None:
    turns(consumer(), 2)
    gone = client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})
    client.xadd(keys.updates, {"user": "bob", "attrs": PARIS})
    client.xreadgroup(GROUP, "imattr", {keys.updates: ">"})
    client.xdel(keys.updates, gone)

    turns(consumer())

    assert list(pending(client, keys)) == ["bob"]
    assert client.xpending(keys.updates, GROUP)["pending"] == 0
    assert Refused(client, keys).count() == 0


def test_more_than_one_read_of_entries_passes_in_order(
    consumer: Consumers, client: redis.Redis, keys: Keys
) -> None:
    with client.pipeline(transaction=False) as pipe:
        for number in range(1300):
            attrs = json.dumps({"city": f"version {number}"})
            pipe.xadd(keys.updates, {"user": f"user{number % 7}", "attrs": attrs})
        pipe.execute()

    turns(consumer(), 2 + 13)

    assert {user: attrs["city"] for user, attrs in pending(client, keys).items()} == {
        f"user{number % 7}": f"version {number}" for number in range(1293, 1300)
    }
    assert client.xlen(keys.updates) == 0


def test_the_thread_outlives_failures_and_a_deleted_stream(
    consumer: Consumers, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = consumer()
    failures: Iterator[Exception | None] = iter([redis.ConnectionError(), ValueError()])
    turn, waits = running.turn, []

    def broken() -> float:
        if failure := next(failures, None):
            raise failure
        return turn()

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 5:
            client.delete(keys.updates)
            client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})
        if len(waits) == 10:
            running.stop()
        return True

    monkeypatch.setattr(running, "turn", broken)
    monkeypatch.setattr(running._stopped, "wait", wait)
    running.run()

    assert waits[:3] == [RETRY_AFTER, RETRY_AFTER, 0.0]
    assert list(pending(client, keys)) == ["ann"]
    assert client.get(keys.consumer) is None, "one that ends steps down"


def test_what_was_taken_when_redis_failed_comes_again_before_what_is_newer(
    consumer: Consumers, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = consumer()
    turns(running, 2)
    for value in (PARIS, ROME):
        client.xadd(keys.updates, {"user": "ann", "attrs": value})
    monkeypatch.setattr("worker.intake.stream.MOST", 1)
    add, seen = running._producer.add, []

    def broken(updates: list[Update], **how: Any) -> Added:
        seen.append(updates[0].attrs["city"])
        if len(seen) == 1:
            raise redis.ConnectionError
        return add(updates, **how)

    def wait(seconds: float) -> bool:
        if not client.xlen(keys.updates):
            running.stop()
        return True

    monkeypatch.setattr(running._producer, "add", broken)
    monkeypatch.setattr(running._stopped, "wait", wait)
    running.run()

    assert seen == ["Paris", "Paris", "Rome"]


@pytest.mark.parametrize(("in_flight", "expected"), [(True, 0.02), (False, 0.0)])
def test_half_of_the_time_is_left_to_deliveries(
    consumer: Consumers,
    client: redis.Redis,
    keys: Keys,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    in_flight: bool,
    expected: float,
) -> None:
    acting = consumer()
    turns(acting, 2)
    client.xadd(keys.updates, {"user": "ann", "attrs": PARIS})
    if in_flight:
        client.zadd(keys.leases, {"batch": 1})
    add = acting._producer.add

    def slow(updates: list[Update], **how: Any) -> Added:
        clock.sleep(0.02)
        return add(updates, **how)

    monkeypatch.setattr(acting._producer, "add", slow)

    assert acting.turn() == pytest.approx(expected)


def test_a_consumer_stays_elected_while_it_takes_turns(
    consumer: Consumers, client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    acting = consumer("w1")
    for _ in range(4):
        acting.turn()
        client.pexpire(keys.consumer, 500)
        clock.now += TERM / 2
        acting.turn()
        assert client.pttl(keys.consumer) > 500


def test_no_log_line_has_a_value(
    consumer: Consumers, client: redis.Redis, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    for attrs in ('{"city":"Xanadu"', '{"city":["Xanadu"]}', '"Xanadu"'):
        client.xadd(keys.updates, {"user": "ann", "attrs": attrs})

    turns(consumer())

    said = capsys.readouterr()
    assert Refused(client, keys).count() == 3
    assert "Xanadu" not in said.out + said.err


def _shuffled(
    seed: int, count: int, users: int
) -> tuple[list[tuple[str, dict[str, str], int]], dict[str, str]]:
    """Updates in an order that is not that of their event times, and the last value of each user."""
    rng, last = random.Random(seed), {}
    updates = []
    for moment in range(count):
        user = f"user{rng.randrange(users):04}"
        updates.append((user, {"city": f"value {moment}"}, 1_750_000_000_000 + moment))
        last[user] = f"value {moment}"
    rng.shuffle(updates)
    return updates, last


def test_shuffled_updates_through_4_workers_and_the_stream_end_in_the_right_state(
    server: EmbeddedServer, consumer: Consumers, client: redis.Redis, keys: Keys
) -> None:
    count = drawn(100_000)
    updates, last = _shuffled(7, count, 2000)
    through_stream, given = updates[: count // 10], updates[count // 10 :]
    with client.pipeline(transaction=False) as pipe:
        for user, attrs, moment in through_stream:
            pipe.xadd(keys.updates, {"user": user, "attrs": json.dumps(attrs), "occurred_at": moment})
        pipe.execute()
    producer = Producer(server.url, keys.sdkappid)
    threads = [threading.Thread(target=producer.set_many, args=(given[part::4],)) for part in range(4)]
    threads.append(threading.Thread(target=turns, args=(consumer(), 20 + count // 500)))
    producer.set_many(given[:1000])
    for thread in threads:
        thread.start()
    deliver_all(client, keys)
    for thread in threads:
        thread.join()

    delivered = {
        text(user): json.loads(record)["a"]["city"][0] for user, record in client.hgetall(keys.shadow).items()
    }
    waiting = {user: attrs["city"] for user, attrs in pending(client, keys).items()}
    assert delivered | waiting == last
    assert Buffer(client, keys).snapshot().balanced
    assert Buffer(client, keys).snapshot().ledger["accepted"] == count + 1000


def test_a_consumer_that_was_frozen_beyond_its_term_brings_nothing_old_back(
    consumer: Consumers, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of one millisecond have one version: among them the order of adding decides."""
    frozen, successor = consumer("w1"), consumer("w2")
    turns(frozen, 2)
    for number, value in enumerate((PARIS, ROME)):
        client.xadd(keys.updates, {"user": "ann", "attrs": value}, id=f"1750000000000-{number}")
    add = frozen._producer.add

    def freeze(updates: list[Update], **how: Any) -> Added:
        client.delete(keys.consumer)
        monkeypatch.setattr(frozen._producer, "add", add)
        turns(successor, 3)
        # It wakes up with the first of the two only.
        return add(updates[:1], **how)

    monkeypatch.setattr(frozen._producer, "add", freeze)
    frozen.turn()

    assert pending(client, keys) == {"ann": {"city": "Rome"}}
    assert client.xlen(keys.updates) == 0
