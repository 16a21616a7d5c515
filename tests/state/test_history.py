"""Every step of the line is in the history, by whom and with its figures; nothing that did not happen is."""

from __future__ import annotations

import pytest
import redis

from tests.state.test_dead_letters import Case
from worker.errors import InvalidUpdate
from worker.models import BatchId, Update
from worker.state import history
from worker.state.buffer import Buffer
from worker.state.dead_letters import DeadLetters
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.quarantine import Quarantine
from worker.state.refused import Refused

BATCH = BatchId("batch")


@pytest.fixture
def told(client: redis.Redis, keys: Keys) -> History:
    return History(client, keys)


def test_a_stop_is_told_with_its_probes_until_the_line_opens(
    client: redis.Redis, keys: Keys, told: History
) -> None:
    line = Line(client, keys)
    line.stop(BATCH, "error", 90009, "no administrator", now_ms=1_000)
    line.stop(BatchId("other"), "error", 90009, "no administrator", now_ms=1_000)
    client.hset(keys.line, "probe", BATCH)
    line.stop(BATCH, "error", 90009, "no administrator", now_ms=31_000)
    client.hset(keys.line, "probe", BATCH)
    line.reopen(BATCH, quota=100, dwell=1.0, now_us=91_000_000)

    opened, failed, stopped = told.newest(10)

    assert (stopped.event, stopped.by) == ("stopped", "worker")
    assert stopped.details["code"] == "90009"
    assert stopped.details["probe_in_ms"] == "30000"
    assert (failed.event, failed.details["failed"], failed.details["probe_in_ms"]) == (
        "probe_failed",
        "1",
        "60000",
    )
    assert (opened.event, opened.details["stopped_for_ms"]) == ("reopened", "90000")


def test_a_pause_tells_who_was_first_and_a_second_one_nothing(
    client: redis.Redis, keys: Keys, told: History
) -> None:
    line = Line(client, keys)
    line.pause("new year", by="ann@host", now_ms=1_000)
    line.pause("again", by="bob@host", now_ms=2_000)
    line.resume(by="bob@host", now_ms=5_000)
    line.resume(by="bob@host", now_ms=5_000)

    resumed, paused = told.newest(10)

    assert (paused.event, paused.by, paused.details) == ("paused", "ann@host", {"reason": "new year"})
    assert (resumed.event, resumed.by) == ("resumed", "bob@host")
    assert resumed.details == {"was": "paused", "stopped_for_ms": "4000"}


def test_a_probe_and_a_reclaimed_lease_are_told(client: redis.Redis, keys: Keys, told: History) -> None:
    buffer = Buffer(client, keys, lease=1.0)
    buffer.add([Update("ann", {"city": "Rome"})], now_ms=1_000)
    (ticket,) = buffer.tick(size=100, linger=0, ticket_ttl=10, quota=100, horizon=1, now_ms=1_000).tickets
    assert buffer.claim(ticket, 100, now_ms=1_000)
    buffer.reclaim(now_ms=3_000)
    Line(client, keys).stop(BATCH, "error", 90009, "x", now_ms=3_000)
    (probe,) = buffer.tick(size=100, linger=0, ticket_ttl=10, quota=100, horizon=1, now_ms=40_000).tickets

    events = {one.event: one.details for one in told.newest(10)}

    assert events["reclaimed"] == {"batch": ticket, "users": "1"}
    assert events["probe"] == {"batch": probe}


def test_what_is_done_to_dead_letters_is_told(client: redis.Redis, keys: Keys, told: History) -> None:
    letters = DeadLetters(client, keys)
    Case(client, keys).dead_letter("ann", "bob", "cid", city="Paris")
    letters.redrive({"ann": next(iter(letters.find())).at_ms}, by="ann@host")
    letters.purge(letters.choose(), by="bob@host")
    letters.purge(letters.choose(), by="bob@host")

    purged, redriven = told.newest(2)

    assert (redriven.event, redriven.by, redriven.details["users"]) == ("redriven", "ann@host", "1")
    assert (purged.event, purged.by, purged.details["users"]) == ("purged", "bob@host", "2")


def test_an_import_begins_and_ends_once(client: redis.Redis, keys: Keys, told: History) -> None:
    buffer = Buffer(client, keys)
    buffer.begin_import("host:/users.csv", 1)
    buffer.begin_import("host:/users.csv", 2)
    buffer.show_import("host:/users.csv", {"lines": 5})
    buffer.end_import("host:/users.csv")
    buffer.end_import("host:/users.csv")

    ended, began = told.newest(10)

    assert (began.event, began.details) == ("import_began", {"name": "host:/users.csv"})
    assert ended.event == "import_ended"
    assert "5" in ended.details["last_seen"]


def test_the_history_can_be_asked_for_a_kind_and_a_time(told: History) -> None:
    for number in range(250):
        told.note("odd" if number % 2 else "even", "test", number=number)
    at = told.newest(1)[0].at_ms

    assert [one.details["number"] for one in told.newest(3, event="even")] == ["248", "246", "244"]
    assert len(told.newest(1000)) == 250
    assert told.newest(1000, since_ms=at + 1000) == []


def test_the_history_is_capped(told: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 100)
    for number in range(1000):
        told.note("event", "test", number=number)

    assert len(told.newest(1000)) < 500


def test_what_is_thrown_away_is_told_once(client: redis.Redis, keys: Keys, told: History) -> None:
    refused, quarantine = Refused(client, keys), Quarantine(client, keys)
    refused.keep("stream", [(InvalidUpdate("ann", "a rule"), {})])
    client.hset(keys.quarantine, "pending:1:ann", "{")
    newest = refused.newest(1)[0].id
    for _ in range(2):
        refused.purge(newest, by="ann@host")
        quarantine.drop([b"pending:1:ann"], by="ann@host")

    dropped, purged = told.newest(10)

    assert (purged.event, purged.by, purged.details) == ("refused_purged", "ann@host", {"updates": "1"})
    assert (dropped.event, dropped.by, dropped.details) == (
        "quarantine_dropped",
        "ann@host",
        {"records": "1"},
    )
