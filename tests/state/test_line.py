"""The line: stopped by an error, paused by a person, opened by a probe."""

from __future__ import annotations

import pytest
import redis

from worker.models import Acked, BatchId, Snoozed, Update
from worker.state.buffer import Buffer, Tick, new_batch_id
from worker.state.keys import Keys
from worker.state.line import DEAD_IN_A_ROW, DEAD_IN_WINDOW, IGNORED_FOR, WAITS, Kind, Line, LineState

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
    return buffer.tick(size=100, linger=0.25, ticket_ttl=10, quota=10, horizon=1.0, now_ms=now_ms)


def stop(
    line: Line, batch: BatchId = BATCH, *, now_ms: int = NOW, first: float = 0.0, kind: Kind = "error"
) -> float | None:
    return line.stop(batch, kind, 90009, "not an administrator", first_wait=first, now_ms=now_ms)


def test_a_line_is_open_until_something_stops_it(line: Line) -> None:
    assert line.read() == LineState()
    assert not line.resume()


def test_a_stop_says_why_since_when_and_until_when(line: Line) -> None:
    assert stop(line) == 30.0

    expected = LineState("stopped", "not an administrator", 90009, NOW / 1000, NOW / 1000 + 30, "error")
    assert line.read() == expected


def test_other_batches_that_meet_the_same_error_change_nothing(line: Line) -> None:
    stop(line)

    assert stop(line, new_batch_id(), now_ms=NOW + 5000) == 0
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
    assert batch.probe == "error"
    assert len(batch.users) == 100


def test_a_probe_that_is_lost_is_followed_by_another(line: Line, buffer: Buffer) -> None:
    stop(line)
    [lost] = turn(buffer, NOW + 30_000).tickets

    [another] = turn(buffer, NOW + 60_000).tickets

    assert buffer.claim(lost, 100, now_ms=NOW + 60_000) is None
    assert buffer.claim(another, 100, now_ms=NOW + 60_000) is not None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("error", [30, 60, 120, 240, 300, 300]),
        ("outage", [1, 2, 4, 8, 16, 32, 60, 60]),
        ("data", [30, 60, 120, 240, 300, 300]),
    ],
)
def test_each_probe_that_fails_doubles_the_wait_up_to_a_bound(
    line: Line, buffer: Buffer, kind: Kind, expected: list[float]
) -> None:
    now, waits = NOW, [stop(line, kind=kind)]
    while len(waits) < len(expected):
        now += round((waits[-1] or 0) * 1000)
        [probe] = turn(buffer, now).tickets
        waits.append(stop(line, probe, now_ms=now, kind=kind))

    assert waits == expected
    assert waits[-1] == WAITS[kind][1]
    assert line.read().failed_probes == len(expected) - 1


def test_the_probes_of_an_outage_carry_ever_fewer_users(line: Line, buffer: Buffer) -> None:
    now, sizes, wait = NOW, [], stop(line, kind="outage")
    for _ in range(9):
        now += round((wait or 0) * 1000)
        [probe] = turn(buffer, now).tickets
        batch = buffer.claim(probe, 100, now_ms=now)
        assert batch is not None
        sizes.append(len(batch.users))
        buffer.settle(batch.id, {}, rest=Snoozed(), now_ms=now)
        wait = stop(line, probe, now_ms=now, kind="outage")

    assert sizes == [100, 50, 25, 12, 6, 3, 1, 1, 1]


def test_a_reason_that_needs_a_longer_wait_gets_it(line: Line, buffer: Buffer) -> None:
    stop(line)
    [probe] = turn(buffer, NOW + 30_000).tickets

    assert stop(line, probe, now_ms=NOW + 30_000, first=90.0) == 90.0


def test_a_probe_that_passes_opens_the_line_and_a_former_one_does_not(line: Line, buffer: Buffer) -> None:
    stop(line)
    [former] = turn(buffer, NOW + 30_000).tickets
    [probe] = turn(buffer, NOW + 60_000).tickets

    assert not line.reopen(former, quota=100, dwell=1.5)
    assert line.reopen(probe, quota=100, dwell=1.5)
    assert not line.reopen(probe, quota=100, dwell=1.5)
    assert line.read() == LineState()
    assert len(turn(buffer, NOW + 60_001).tickets) >= 1


def test_a_line_that_opens_by_itself_begins_with_a_tenth_of_the_rate(
    line: Line, buffer: Buffer, client: redis.Redis, keys: Keys
) -> None:
    stop(line)
    [probe] = turn(buffer, NOW + 30_000).tickets

    line.reopen(probe, quota=100, dwell=1.5, signed_at=77)

    assert client.hget(keys.rate, "limit") == b"10"
    assert client.hget(keys.health, "signed_at") == b"77", "and who has an older signature signs again"


def test_failures_are_counted_until_one_user_is_delivered(line: Line, buffer: Buffer) -> None:
    assert [line.record_failure() for _ in range(3)] == [1, 2, 3]
    [ticket, *_] = turn(buffer, NOW).tickets
    batch = buffer.claim(ticket, 100, now_ms=NOW)
    assert batch is not None

    buffer.settle(batch.id, {}, rest=Acked(), claimed_ms=batch.claimed_ms, now_ms=NOW)

    assert line.failures() == 0
    assert line.record_failure() == 1


def test_a_bad_signature_is_made_again_once_for_the_whole_fleet(
    line: Line, client: redis.Redis, keys: Keys
) -> None:
    first = line.renew_signature(1_600_000_000, now_ms=NOW)
    another = line.renew_signature(1_650_000_000, now_ms=NOW + 4000)

    assert first == another == NOW // 1000
    assert line.renew_signature(NOW // 1000, now_ms=NOW + 5000) is None, "the new one is bad, too"
    client.hset(keys.health, "ok_at", NOW + 6000)
    assert line.renew_signature(NOW // 1000, now_ms=NOW + 10**8) == (NOW + 10**8) // 1000, (
        "it was good for a while"
    )


def test_dead_letters_in_a_row_are_too_many_when_nobody_is_delivered_in_between(
    line: Line, client: redis.Redis, keys: Keys
) -> None:
    one_short = [line.record_dead_letters(70107, 1, now_ms=NOW) for _ in range(DEAD_IN_A_ROW - 1)]
    client.hincrby(keys.ledger, "delivered", 1000)
    after_a_success = [line.record_dead_letters(70107, 1, now_ms=NOW) for _ in range(DEAD_IN_A_ROW)]

    assert not any(one_short)
    assert not any(after_a_success)
    assert line.record_dead_letters(70107, 1, now_ms=NOW)


def test_another_code_begins_the_row_anew(line: Line) -> None:
    line.record_dead_letters(70107, DEAD_IN_A_ROW - 1, now_ms=NOW)

    assert not line.record_dead_letters(90033, DEAD_IN_A_ROW - 1, now_ms=NOW)
    assert line.record_dead_letters(90033, 1, now_ms=NOW)


@pytest.mark.parametrize(("delivered_each", "masses"), [(3, True), (5, False)])
def test_a_good_part_of_all_users_within_a_minute_is_too_many(
    line: Line, client: redis.Redis, keys: Keys, delivered_each: int, masses: bool
) -> None:
    verdicts = []
    for number in range(DEAD_IN_WINDOW + 10):
        client.hincrby(keys.ledger, "delivered", delivered_each)
        verdicts.append(line.record_dead_letters(70107, 1, now_ms=NOW + 500 * number))

    assert not any(verdicts[: DEAD_IN_WINDOW - 1])
    assert any(verdicts) is masses


def test_a_few_dead_letters_a_minute_go_on_for_ever(line: Line, client: redis.Redis, keys: Keys) -> None:
    for number in range(300):
        client.hincrby(keys.ledger, "delivered", 1)
        assert not line.record_dead_letters(70107, 1, now_ms=NOW + 2000 * number)


def test_what_a_person_has_seen_in_the_data_stops_the_line_no_more_for_a_while(line: Line) -> None:
    stop(line, kind="data")

    assert line.resume(now_ms=NOW)

    assert stop(line, kind="data", now_ms=NOW + 1000) is None
    assert line.read() == LineState()
    assert line.stop(BATCH, "data", 70107, "another code", now_ms=NOW + 1000) == 30
    assert line.resume(now_ms=NOW)
    assert stop(line, kind="error", now_ms=NOW + 1000) == 30, "an error is another matter"


def test_after_that_while_it_stops_the_line_again(line: Line) -> None:
    stop(line, kind="data")
    line.resume(now_ms=NOW)

    assert stop(line, kind="data", now_ms=NOW + round(IGNORED_FOR * 1000)) == 30


def test_without_anything_to_send_no_probe_is_made(line: Line, client: redis.Redis, keys: Keys) -> None:
    stop(line)

    assert turn(Buffer(client, keys), NOW + 60_000).tickets == ()


def test_a_stopped_line_comes_back_when_the_clock_was_set_back(line: Line, buffer: Buffer) -> None:
    stop(line)

    assert len(turn(buffer, NOW - 3_600_000).tickets) == 1


def test_a_persons_pause_is_ended_by_a_person_only(line: Line, buffer: Buffer) -> None:
    line.pause("maintenance")

    assert stop(line) == 0
    assert not line.reopen(BATCH, quota=100, dwell=1.5)
    assert turn(buffer, NOW + 10**9).tickets == ()
    state = line.read()
    assert (state.state, state.reason, state.next_probe) == ("paused", "maintenance", None)
    assert line.resume()
    assert len(turn(buffer, NOW).tickets) == 3


def test_what_is_in_flight_at_a_pause_is_still_settled(line: Line, buffer: Buffer) -> None:
    [ticket, *_] = turn(buffer, NOW).tickets
    batch = buffer.claim(ticket, 100, now_ms=NOW)
    assert batch is not None

    line.pause("maintenance")

    assert buffer.settle(batch.id, {}, rest=Acked()) == (100, False)
    assert buffer.snapshot().balanced


@pytest.mark.parametrize("kind", ["error", "outage", "data"])
def test_after_a_person_has_mended_the_settings_nobody_uses_a_signature_of_before(
    line: Line, buffer: Buffer, kind: Kind
) -> None:
    """The key may have been rotated: with the old signature the first call would stop the line again."""
    stop(line, kind=kind)

    line.resume(now_ms=NOW)

    [ticket, *_] = turn(buffer, NOW).tickets
    batch = buffer.claim(ticket, 100, now_ms=NOW)
    assert batch
    assert batch.signed_at == (NOW // 1000 + 1 if kind == "error" else 0)
