"""The line: stopped by an error, paused by a person, opened by a probe."""

from __future__ import annotations

import pytest
import redis

from worker.buffer import Buffer, Tick, new_batch_id
from worker.keys import Keys
from worker.line import LONGEST_WAIT, Line, LineState
from worker.models import Acked, BatchId, Update

NOW = 1_700_000_000_000
BATCH = new_batch_id()


@pytest.fixture
def line(client: redis.Redis, keys: Keys) -> Line:
    return Line(client, keys)


@pytest.fixture
def buffer(client: redis.Redis, keys: Keys) -> Buffer:
    buffer = Buffer(client, keys)
    buffer.add([Update(f"user{number:03}", {"city": "Paris"}) for number in range(250)], now_ms=NOW)
    return buffer


def turn(buffer: Buffer, now_ms: int) -> Tick:
    return buffer.tick("w", term=60, size=100, linger=0.25, ticket_ttl=10, most=10, now_ms=now_ms)


def stop(line: Line, batch: BatchId = BATCH, *, now_ms: int = NOW, first: float = 30.0) -> float | None:
    return line.stop(batch, 90009, "not an administrator", first, now_ms=now_ms)


def test_a_line_is_open_until_something_stops_it(line: Line) -> None:
    assert line.read() == LineState()
    assert not line.resume()


def test_a_stop_says_why_since_when_and_until_when(line: Line) -> None:
    assert stop(line) == 30.0

    expected = LineState("stopped", "not an administrator", 90009, NOW / 1000, NOW / 1000 + 30)
    assert line.read() == expected


def test_other_batches_that_meet_the_same_error_change_nothing(line: Line) -> None:
    stop(line)

    assert stop(line, new_batch_id(), now_ms=NOW + 5000) is None
    assert line.read().next_probe == NOW / 1000 + 30


def test_tickets_of_before_the_stop_claim_nothing(line: Line, buffer: Buffer) -> None:
    tickets = turn(buffer, NOW).tickets
    stop(line)

    assert buffer.claim(tickets[0], 100, now_ms=NOW) is None
    assert buffer.snapshot().live == 250


def test_nothing_is_issued_but_one_probe_when_it_is_due(line: Line, buffer: Buffer) -> None:
    stop(line)

    assert turn(buffer, NOW + 29_999).tickets == ()
    [probe] = turn(buffer, NOW + 30_000).tickets
    assert turn(buffer, NOW + 30_001).tickets == ()
    assert line.read().state == "probing"
    batch = buffer.claim(probe, 100, now_ms=NOW + 30_010)
    assert batch is not None
    assert batch.probe
    assert len(batch.users) == 100


def test_a_probe_that_is_lost_is_followed_by_another(line: Line, buffer: Buffer) -> None:
    stop(line)
    [lost] = turn(buffer, NOW + 30_000).tickets

    [another] = turn(buffer, NOW + 60_000).tickets

    assert buffer.claim(lost, 100, now_ms=NOW + 60_000) is None
    assert buffer.claim(another, 100, now_ms=NOW + 60_000) is not None


def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound(line: Line, buffer: Buffer) -> None:
    now, waits = NOW, [stop(line)]
    for _ in range(6):
        now += round((waits[-1] or 0) * 1000)
        [probe] = turn(buffer, now).tickets
        waits.append(stop(line, probe, now_ms=now))

    assert waits == [30, 60, 120, 240, 300, 300, 300]
    assert waits[-1] == LONGEST_WAIT


def test_a_reason_that_needs_a_longer_wait_gets_it(line: Line, buffer: Buffer) -> None:
    stop(line, first=1.0)
    [probe] = turn(buffer, NOW + 1000).tickets

    assert stop(line, probe, now_ms=NOW + 1000, first=60.0) == 60.0


def test_a_probe_that_passes_opens_the_line_and_a_former_one_does_not(line: Line, buffer: Buffer) -> None:
    stop(line)
    [former] = turn(buffer, NOW + 30_000).tickets
    [probe] = turn(buffer, NOW + 60_000).tickets

    assert not line.reopen(former)
    assert line.reopen(probe)
    assert not line.reopen(probe)
    assert line.read() == LineState()
    assert len(turn(buffer, NOW + 60_001).tickets) >= 1


def test_without_anything_to_send_no_probe_is_made(line: Line, client: redis.Redis, keys: Keys) -> None:
    stop(line)

    assert turn(Buffer(client, keys), NOW + 60_000).tickets == ()


def test_a_stopped_line_comes_back_when_the_clock_was_set_back(line: Line, buffer: Buffer) -> None:
    stop(line)

    assert len(turn(buffer, NOW - 3_600_000).tickets) == 1


def test_a_persons_pause_is_ended_by_a_person_only(line: Line, buffer: Buffer) -> None:
    line.pause("maintenance")

    assert stop(line) is None
    assert not line.reopen(BATCH)
    assert turn(buffer, NOW + 10**9).tickets == ()
    state = line.read()
    assert (state.state, state.reason, state.next_probe) == ("paused", "maintenance", None)
    assert line.resume()
    assert len(turn(buffer, NOW).tickets) == 2


def test_what_is_in_flight_at_a_pause_is_still_settled(line: Line, buffer: Buffer) -> None:
    [ticket, *_] = turn(buffer, NOW).tickets
    batch = buffer.claim(ticket, 100, now_ms=NOW)
    assert batch is not None

    line.pause("maintenance")

    assert buffer.settle(batch.id, {}, rest=Acked()) == 100
    assert buffer.snapshot().balanced
