"""The pace is what was done, workers are those that are alive, and samples note what changed."""

from __future__ import annotations

import json

import pytest
import redis

from worker.state.buffer import Buffer
from worker.state.fleet import ALIVE, FORGOTTEN, Fleet, Sample, pace
from worker.state.history import History
from worker.state.keys import Keys


@pytest.fixture
def fleet(client: redis.Redis, keys: Keys) -> Fleet:
    return Fleet(client, keys)


def sample(at: float, calls: int, users: int, seconds: float = 0.0) -> Sample:
    return Sample(at, calls, seconds, users, users, 0, 0)


SAMPLES = [sample(100.0, 0, 0), sample(150.0, 500, 50_000, 50.0), sample(160.0, 1480, 148_000, 99.0)]


def test_a_pace_is_measured_over_the_time_asked_for() -> None:
    lately, long = pace(SAMPLES, 10.0), pace(SAMPLES, 60.0)

    assert lately is not None
    assert long is not None
    assert (lately.calls, lately.users, lately.call) == (98.0, 9800.0, 0.05)
    assert (long.calls, long.users) == (1480 / 60, 148_000 / 60)


def test_a_time_shorter_than_between_two_samples_has_the_last_two() -> None:
    found = pace(SAMPLES, 1.0)

    assert found is not None
    assert found.calls == 98.0


@pytest.mark.parametrize(
    "samples",
    [[], SAMPLES[:1], [SAMPLES[2], sample(165.0, 3, 300)], [sample(5.0, 0, 0), sample(5.0, 9, 9)]],
    ids=["none", "one", "counters that fell", "at the same time"],
)
def test_without_two_good_samples_there_is_no_pace(samples: list[Sample]) -> None:
    assert pace(samples, 60.0) is None


def test_nothing_done_is_a_pace_of_nothing() -> None:
    found = pace([sample(1.0, 5, 5), sample(6.0, 5, 5)], 10.0)

    assert found is not None
    assert (found.calls, found.users, found.call) == (0.0, 0.0, None)


def test_a_sample_has_the_counters_and_what_is_left(client: redis.Redis, keys: Keys, fleet: Fleet) -> None:
    client.hset(keys.ledger, mapping={"calls": 7, "call_ms": 350, "delivered": 700, "accepted": 800})
    client.hset(keys.pending, mapping={"a": "x", "b": "x"})
    client.hset(keys.flight, "c", "x")

    fleet.sample()

    (found,) = fleet.samples()
    assert (found.calls, found.call_seconds, found.delivered, found.accepted) == (7, 0.35, 700, 800)
    assert (found.pending, found.in_flight) == (2, 1)


def test_another_limit_and_another_server_go_into_the_history(
    client: redis.Redis, keys: Keys, fleet: Fleet
) -> None:
    Buffer(client, keys).tick(size=1, linger=0, ticket_ttl=1, quota=1, horizon=1)
    fleet.sample()
    client.hset(keys.rate, "limit", 50)
    fleet.sample()
    client.hset(keys.server, mapping={"number": 99, "lost": 3, "behind": 1})
    fleet.sample()
    fleet.sample()

    newest, oldest = History(client, keys).newest(10)

    assert (newest.event, newest.details) == ("failover", {"how": "behind", "lost": "3"})
    assert (oldest.event, oldest.details) == ("limit", {"from": "0", "to": "50"})


def test_a_worker_is_alive_for_a_while_after_each_report(
    client: redis.Redis, keys: Keys, fleet: Fleet
) -> None:
    fleet.report("one", threads=16, busy=3, version="0.2")
    now = client.time()[0]
    for name, age in (("silent", ALIVE + 1), ("gone", FORGOTTEN + 1)):
        client.hset(
            keys.workers, name, json.dumps({"at": now - age, "threads": 1, "busy": 0, "version": "0.2"})
        )
    client.hset(keys.workers, "damaged", "{")

    assert [(worker.name, worker.threads, worker.busy) for worker in fleet.workers()] == [("one", 16, 3)]

    fleet.sample()

    assert set(client.hkeys(keys.workers)) == {b"one", b"silent"}

    fleet.leave("one")

    assert fleet.workers() == []


def test_one_sample_of_each_minute_is_kept_for_a_day(client: redis.Redis, keys: Keys, fleet: Fleet) -> None:
    fleet.sample()
    fleet.sample()
    (first,) = fleet.minutes_since(0)
    client.delete(keys.samples_by_minute)
    client.xadd(keys.samples_by_minute, {"calls": 1}, id=f"{round(first.at * 1000) - 60_000}-0")
    fleet.sample()

    assert [sample.at for sample in fleet.minutes_since(first.at - 1)] == [fleet.samples()[-1].at]
    assert [sample.oldest for sample in fleet.minutes_since(0)] == [None, 0.0]


def test_a_sample_says_how_long_the_oldest_user_has_waited(
    client: redis.Redis, keys: Keys, fleet: Fleet
) -> None:
    now_ms = client.time()[0] * 1000
    client.zadd(keys.live, {"a": now_ms - 5_000})
    client.zadd(keys.backfill, {"b": now_ms - 90_000, "c": now_ms})

    fleet.sample()

    (found,) = fleet.samples()
    assert found.oldest is not None
    assert 90 <= found.oldest < 120


def test_a_worker_says_which_settings_it_has(client: redis.Redis, keys: Keys, fleet: Fleet) -> None:
    fleet.report("one", threads=1, busy=0, version="0.2", settings={"quota": "50"})
    now = client.time()[0]
    for name, settings in (("before", None), ("damaged", "[1]")):
        about = {"at": now, "threads": 1, "busy": 0, "version": "0.1"} | (
            {"settings": settings} if settings else {}
        )
        client.hset(keys.workers, name, json.dumps(about))

    assert [(worker.name, worker.settings) for worker in fleet.workers()] == [
        ("before", None),
        ("one", {"quota": "50"}),
    ]
