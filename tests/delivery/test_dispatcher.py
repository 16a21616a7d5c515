"""The dispatcher: one acts, tickets follow the work, and no failure ends its thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from worker.clock import SystemClock
from worker.delivery.dispatcher import TERM, TURN, Dispatcher
from worker.models import BatchId, Update
from worker.state.buffer import Buffer
from worker.state.fleet import Fleet
from worker.state.keys import Keys
from worker.state.leader import RETRY_AFTER, Leader


@pytest.fixture
def buffer(client: redis.Redis, keys: Keys) -> Buffer:
    buffer = Buffer(client, keys)
    buffer.add([Update(f"user{number}", {"city": "Paris"}) for number in range(300)])
    return buffer


def dispatcher(buffer: Buffer, publish: Callable[[BatchId], None], worker: str = "w1") -> Dispatcher:
    leader = Leader(buffer._redis, buffer._keys.dispatcher, worker, SystemClock(), term=TERM)
    fleet = Fleet(buffer._redis, buffer._keys)
    return Dispatcher(leader, buffer, fleet, publish, batch_size=100, linger=0.25, quota=100)


def test_a_ticket_is_published_for_every_full_batch(buffer: Buffer) -> None:
    published: list[BatchId] = []

    pause = dispatcher(buffer, published.append).turn()

    assert len(set(published)) == 3
    assert 0 < pause <= TURN


def test_a_follower_publishes_nothing_and_looks_again_when_the_term_ends(buffer: Buffer) -> None:
    published: list[BatchId] = []
    dispatcher(buffer, lambda ticket: None, "w1").turn()

    pause = dispatcher(buffer, published.append, "w2").turn()

    assert not published
    assert 0.01 <= pause <= 2.2


def test_tickets_that_cannot_be_published_are_given_back(
    buffer: Buffer, client: redis.Redis, keys: Keys
) -> None:
    published: list[BatchId] = []

    def broken(ticket: BatchId) -> None:
        if published:
            raise ConnectionError("the broker is away")
        published.append(ticket)

    with pytest.raises(ConnectionError):
        dispatcher(buffer, broken).turn()

    assert client.zrange(keys.tickets, 0, -1) == [published[0].encode()]


def test_the_thread_outlives_any_failure_and_says_so_once(
    buffer: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    failures = iter([OSError(), ValueError(), None, None])

    def publish(ticket: BatchId) -> None:
        if failure := next(failures):
            raise failure

    running = dispatcher(buffer, publish)

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 3:
            running.stop()
        return True

    monkeypatch.setattr(running._stopped, "wait", wait)
    running.run()

    assert waits[:2] == [RETRY_AFTER, RETRY_AFTER]


def test_a_dispatcher_that_ends_steps_down(buffer: Buffer, client: redis.Redis, keys: Keys) -> None:
    ending = dispatcher(buffer, lambda ticket: None)
    ending.turn()
    ending.stop()

    ending.run()

    assert client.get(keys.dispatcher) is None


def test_expired_leases_are_reclaimed(buffer: Buffer, client: redis.Redis, keys: Keys) -> None:
    tickets: list[BatchId] = []
    leading = dispatcher(buffer, tickets.append)
    leading.turn()
    buffer.claim(tickets[0], 100)
    client.zadd(keys.leases, {tickets[0]: 1})

    for _ in range(60):
        leading.turn()

    assert buffer.snapshot().in_flight == 0
    assert buffer.snapshot().live == 300
