"""The auditor of a fleet: a few calls a minute by one worker, and none while the line is not open."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import redis

from tests.conftest import SECRET_KEY
from tests.readback.test_audit import House, ids
from tests.simulation import simulation
from worker import runtime
from worker.config import Settings
from worker.errors import CallFailed
from worker.models import BatchId
from worker.readback.auditor import HOPELESS, TELL_EVERY, TERM, Auditor
from worker.readback.reader import ReadingStopped
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.history import Event, History
from worker.state.leader import Leader
from worker.state.line import Line
from worker.steps import AuditStep


class Fleet(House):
    """Some workers, each with an auditor, whose threads take turns as long as time is let pass."""

    def __init__(self, client: redis.Redis, workers: int = 1, calls_a_minute: float = 6) -> None:
        super().__init__(client)
        self.line, self.history = Line(client, self.keys), History(client, self.keys)
        self.must_stop: list[Callable[[], bool]] = []
        self.auditors = [self._auditor(f"worker-{number}", calls_a_minute) for number in range(workers)]
        self._turns = [0.0] * workers

    def _auditor(self, name: str, calls_a_minute: float) -> Auditor:
        def make_reader(stopping: Callable[[], bool]) -> object:
            self.must_stop.append(stopping)
            return self.store

        return Auditor(
            Leader(self.redis, self.keys.auditor, name, self.clock, term=TERM),
            self.shadow,
            make_reader,  # type: ignore[arg-type]  # a store reads
            self.line,
            self.log,
            self.history,
            self.clock,
            calls_a_minute=calls_a_minute,
        )

    def let(self, seconds: float) -> None:
        """Let time pass: each auditor takes its turns."""
        end = self.clock.now + seconds
        while (due := min(self._turns)) < end or due < self.clock.now:
            number = self._turns.index(due)
            self.clock.now = max(self.clock.now, due)
            self._turns[number] = self.clock.now + max(0.001, self.auditors[number]._try())
            if self.clock.now >= end:
                break
        self.clock.now = max(self.clock.now, end)

    def events(self) -> list[Event]:
        return [event for event in self.history.newest(100) if event.event == "audit"]


@pytest.fixture
def fleet(client: redis.Redis) -> Fleet:
    made = Fleet(client)
    made.deliver(ids(1000), city="Paris", level="Gold")
    return made


def test_so_many_calls_a_minute_are_made_with_a_hundred_users_each(fleet: Fleet) -> None:
    fleet.let(600)

    assert 58 <= fleet.store.calls <= 60
    assert all(len(users) == 100 for users in fleet.store.asked)
    totals = fleet.log.read()
    assert totals.checked == totals.as_delivered == 100 * fleet.store.calls
    assert fleet.events() == []


def test_who_seems_wrong_takes_the_place_of_others_and_costs_no_call_more(fleet: Fleet) -> None:
    fleet.store.users["user00007"] = {}
    fleet.let(600)

    assert 58 <= fleet.store.calls <= 60
    totals = fleet.log.read()
    asked = sum(users.count("user00007") for users in fleet.store.asked)
    # Twice each time; the last one may still wait.
    assert asked // 2 == totals.lost > 0
    assert all(len(set(users)) == len(users) <= 100 for users in fleet.store.asked)


def test_what_is_wrong_is_told_in_the_history_once_an_hour(fleet: Fleet) -> None:
    for user in ids(500):
        fleet.store.users[user]["city"] = "Rome"
    fleet.let(TELL_EVERY / 2)
    first = fleet.events()
    fleet.let(TELL_EVERY)
    both = fleet.events()

    assert [event.by for event in first] == ["worker"]
    assert len(both) == 2
    assert int(both[0].details["changed"]) > 100 * int(first[0].details["changed"]) > 0
    assert "Rome" not in str(both)
    assert "user0" not in str(both)


def test_one_worker_audits_and_another_when_it_is_gone(client: redis.Redis) -> None:
    fleet = Fleet(client, workers=3)
    fleet.deliver(ids(500), city="Paris")
    # The election is on Redis' clock, which nobody holds still: the first one leads.
    fleet.let(300)
    assert 27 <= fleet.store.calls <= 30
    assert client.get(fleet.keys.auditor) == b"worker-0"

    fleet.auditors[0].leader.step_down()
    fleet._turns[0] = math.inf
    fleet.let(300)
    assert 54 <= fleet.store.calls <= 60


@pytest.mark.parametrize("how", ["paused", "stopped"])
def test_it_stands_still_while_the_line_is_not_open(fleet: Fleet, how: str) -> None:
    fleet.let(60)
    before = fleet.store.calls
    if how == "paused":
        fleet.line.pause("a test")
    else:
        fleet.line.stop(BatchId("batch"), "outage", 0, "timeout")
    assert fleet.must_stop[0]()
    fleet.let(600)
    assert fleet.store.calls == before

    fleet.line.resume()
    assert not fleet.must_stop[0]()
    fleet.let(60)
    assert fleet.store.calls > before


def test_a_read_that_is_given_up_judges_nobody_and_forgets_no_suspect(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.store.users.update({user: {} for user in ids(1000)})
    fleet.let(11)
    assert fleet.store.calls == 1
    read, failures = fleet.store.read, iter([ReadingStopped(), OSError("no route"), ReadingStopped()])

    def unsteady(users: Sequence[str]) -> object:
        for failure in failures:
            raise failure
        return read(users)

    monkeypatch.setattr(fleet.store, "read", unsteady)
    fleet.let(120)

    assert fleet.log.read().lost >= 100
    assert set(fleet.store.asked[0]) == set(fleet.store.asked[1])


def test_when_nothing_passes_until_a_person_acts_it_asks_rarely(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def refuse(users: Sequence[str]) -> object:
        attempts.append(fleet.clock.now)
        raise CallFailed("the API refused", "make it an administrator")

    monkeypatch.setattr(fleet.store, "read", refuse)
    fleet.let(600)

    assert 9 <= len(attempts) <= 600 / HOPELESS + 1
    assert fleet.log.read().checked == 0


def test_it_outlives_redis(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(count: int) -> list[str]:
        raise redis.ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(fleet.shadow, "draw", away)
        fleet.let(60)
        assert fleet.store.calls == 0
    fleet.let(60)

    assert fleet.store.calls > 0


def test_it_ends_soon_and_steps_down(fleet: Fleet, client: redis.Redis) -> None:
    [auditor] = fleet.auditors
    fleet.let(1)
    assert client.get(fleet.keys.auditor)
    auditor.stop()
    auditor.run()

    assert fleet.must_stop[0]()
    assert client.get(fleet.keys.auditor) is None


def test_nothing_remembered_is_no_call_and_no_total(client: redis.Redis) -> None:
    fleet = Fleet(client)
    fleet.let(600)

    assert fleet.store.calls == 0
    assert fleet.log.read().at is None


@pytest.mark.slow
def test_a_worker_audits_in_a_thread_of_its_own_if_it_is_asked_to(
    client: redis.Redis, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(client)
    house.deliver(ids(300), city="Paris")
    house.store.users["user00007"] = {}
    worker, waiter = SimpleNamespace(hostname="worker-1"), threading.Event()
    with simulation() as api:
        api.api.sdkappid, api.api.users = house.keys.sdkappid, house.store.users
        environ = {"REDIS_URL": server.url, "SDKAPPID": f"{house.keys.sdkappid}", "SECRET_KEY": SECRET_KEY}
        environ |= {"API_URL": api.url, "AUDIT": "0"}

        def step(**settings: str) -> AuditStep:
            found = Settings.from_env(
                {f"IMATTR_{name}": value for name, value in (environ | settings).items()}
            )
            monkeypatch.setattr(runtime, "settings", lambda: found)
            made = AuditStep(worker)
            made.start(worker)
            return made

        idle = step()
        assert idle._thread is None
        idle.stop(worker)

        made = step(AUDIT="6000")
        try:
            for _ in range(600):
                if house.log.read().lost:
                    break
                waiter.wait(0.05)
        finally:
            made.stop(worker)
        assert made._thread
        assert not made._thread.is_alive()

    totals = house.log.read()
    assert totals.lost >= 1
    assert totals.as_delivered > 100
    assert totals.changed == totals.gone == totals.skipped == 0
