"""The audit on a real Redis, with an API of the test's own: who is judged, who never is, and what is sent again."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ManualClock, drawn, new_keys
from worker.models import Acked, Attributes, DeadLettered, Update
from worker.producer import Producer
from worker.readback.audit import AGAIN_AFTER, Audit, Examiner, Report, Sample
from worker.readback.certainty import between
from worker.readback.crew import USERS_PER_CALL
from worker.readback.repair import Repair, Repaired
from worker.state.audit import AuditLog, AuditTotals
from worker.state.buffer import Buffer, new_batch_id
from worker.state.keys import Keys
from worker.state.shadow import Shadow


class Store:
    """The API's side, and a reader of it. `during` is called between asking and answering, `before` before both."""

    def __init__(self, clock: ManualClock) -> None:
        self.users: dict[str, dict[str, str]] = {}
        self.calls, self.asked = 0, list[list[str]]()
        self.before: Callable[[], None] = lambda: None
        self.during: Callable[[], None] = lambda: None
        self._clock = clock

    def read(self, users: Sequence[str]) -> Mapping[str, Mapping[str, str] | None]:
        assert 0 < len(users) <= USERS_PER_CALL
        self.calls += 1
        self._clock.now += 0.01
        self.asked.append(list(users))
        self.before()
        found = {user: dict(self.users[user]) if user in self.users else None for user in users}
        self.during()
        return found


class House:
    """An app with a buffer, a memory, and an API that has what was delivered unless the test says otherwise."""

    def __init__(self, client: redis.Redis, keys: Keys | None = None) -> None:
        self.redis, self.keys, self.clock = client, keys or new_keys(), ManualClock()
        self.buffer, self.shadow = Buffer(client, self.keys), Shadow(client, self.keys)
        self.log, self.store = AuditLog(client, self.keys), Store(self.clock)
        self.stopped, self.shown = False, list[float | None]()

    def accept(self, users: Sequence[str], attrs: Attributes, at_ms: int = 0) -> None:
        for first in range(0, len(users), 200):
            self.buffer.add([Update(user, attrs, at_ms) for user in users[first : first + 200]])

    def claim(self) -> Any:
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: 1})
        return self.buffer.claim(ticket, 1000)

    def settle(self, batch: Any, outcome: Any = None, number: int = 1) -> None:
        self.buffer.settle(batch.id, {}, rest=outcome or Acked(), number=number)

    def send(self) -> None:
        """Deliver everything that is pending."""
        while (batch := self.claim()) and batch.users:
            for claimed in batch.users:
                stored = self.store.users.setdefault(claimed.user, {})
                for name, value in claimed.attrs.items():
                    stored.pop(name, None)
                    if value is not None:
                        stored[name] = value
            self.settle(batch)

    def deliver(self, users: Sequence[str], **attrs: str | None) -> None:
        self.accept(users, attrs)
        self.send()

    def audit(self, users: int = 3000, **options: Any) -> Report:
        return Audit(
            self.shadow,
            self.store,
            self.log,
            self.clock,
            users=users,
            stopped=lambda: self.stopped,
            show=lambda report: self.shown.append(report.eta),
            **options,
        ).run()

    def repair(self, users: Sequence[str], *verdicts: Any, **options: Any) -> Repaired:
        port = self.redis.connection_pool.connection_kwargs["port"]
        producer = Producer(f"redis://127.0.0.1:{port}/0", self.keys.sdkappid, **options)
        examiner = Examiner(self.shadow, self.store, self.clock)
        return Repair(
            examiner, producer, self.clock, verdicts=verdicts or ("lost",), stopped=lambda: self.stopped
        ).run(users)


@pytest.fixture
def house(client: redis.Redis) -> House:
    return House(client)


def ids(count: int) -> list[str]:
    return [f"user{number:05}" for number in range(count)]


def counts(report: Report) -> dict[str, int]:
    return dict(+report.counts)


def test_nobody_is_wrong_when_everything_was_delivered(house: House) -> None:
    house.deliver(ids(250), city="Paris", level="Gold")
    report = house.audit()

    assert counts(report) == {"as_delivered": 250}
    assert (report.state, report.is_everybody, report.calls) == ("done", True, 3)
    assert house.clock.slept == []
    totals = house.log.read()
    assert (totals.checked, totals.wrong, totals.skipped) == (250, 0, 0)
    assert totals.at
    assert totals.since
    assert totals.at >= totals.since > 1e9


def test_what_is_wrong_is_told_with_its_names_and_its_batch(house: House) -> None:
    house.deliver(ids(5), city="Paris", level="Gold")
    users = house.store.users
    users["user00000"] = {}
    users["user00001"]["level"] = "Silver"
    del users["user00002"]
    report = house.audit(most_shown=10, keep_wrong=True)

    assert counts(report) == {"as_delivered": 2, "lost": 1, "changed": 1, "gone": 1}
    assert {one.user: (one.became, sorted(one.differences), one.claim) for one in report.shown} == {
        "user00000": ("lost", ["city", "level"], 1),
        "user00001": ("changed", ["level"], 1),
        "user00002": ("gone", ["city", "level"], 1),
    }
    assert sorted(report.wrong_users) == ids(3)
    totals = house.log.read()
    assert (totals.lost, totals.changed, totals.gone, totals.checked) == (1, 1, 1, 5)


def test_a_copy_that_is_behind_is_asked_again(house: House) -> None:
    house.deliver(ids(150), city="Paris")
    house.store.users["user00007"] = {}
    caught_up = house.clock.now + AGAIN_AFTER - 0.5

    def catch_up() -> None:
        if house.clock.now >= caught_up:
            house.store.users["user00007"] = {"city": "Paris"}

    house.store.before = catch_up
    report = house.audit()

    assert counts(report) == {"as_delivered": 150}
    assert sum(users.count("user00007") for users in house.store.asked) == 2


def test_who_seems_wrong_is_not_judged_if_it_is_right_or_in_motion_later(house: House) -> None:
    house.deliver(ids(3), city="Paris")
    house.store.users = {user: {} for user in ids(3)}

    def later() -> None:
        if house.store.calls == 2:
            house.store.users["user00000"] = {"city": "Paris"}
            house.accept(["user00001"], {"city": "Rome"})

    house.store.before = later

    assert counts(house.audit()) == {"as_delivered": 1, "skipped": 1, "lost": 1}


def test_who_is_wrong_about_two_deliveries_in_turn_is_not_wrong_twice(house: House) -> None:
    house.deliver(ids(1), city="Paris")
    house.store.users = {"user00000": {}}
    sleep = house.clock.sleep

    def slept(seconds: float) -> None:
        sleep(seconds)
        if len(house.clock.slept) == 1:
            house.deliver(ids(1), city="Rome")
            house.store.users = {"user00000": {}}

    house.clock.sleep = slept  # type: ignore[method-assign]

    assert counts(house.audit()) == {"skipped": 1}


@pytest.mark.parametrize("moment", ["before", "asked", "answered", "delivered meanwhile"])
def test_a_user_in_motion_at_any_moment_is_never_judged(house: House, moment: str) -> None:
    """The API has nothing of anybody, so whoever is judged is wrong."""
    users = ids(6)
    house.deliver(users, city="Paris")
    house.store.users = {user: {} for user in users}
    moved = users[:3]

    def move() -> None:
        # One is pending, one in flight, one held after an unknown outcome.
        house.accept([moved[1]], {"city": "Rome"})
        assert house.claim()
        house.accept([moved[2]], {"city": "Rome"})
        batch = house.claim()
        house.redis.zadd(house.keys.delayed, {moved[2]: 9e15})
        house.accept([moved[0]], {"city": "Rome"})
        assert batch

    def deliver() -> None:
        house.accept(moved, {"city": "Rome"})
        while (batch := house.claim()) and batch.users:
            house.settle(batch, number=2)

    if moment == "before":
        move()
    elif moment == "asked":
        house.store.before = lambda: move() if house.store.calls == 1 else None
    elif moment == "answered":
        house.store.during = lambda: move() if house.store.calls == 1 else None
    else:
        house.store.during = lambda: deliver() if house.store.calls == 1 else None

    assert counts(house.audit()) == {"lost": 3, "skipped": 3}
    if moment == "before":
        assert not {user for asked in house.store.asked for user in asked} & set(moved)


@given(data=st.data())
def test_whoever_moves_at_whatever_moment_is_judged_right_or_not_at_all(
    client: redis.Redis, data: st.DataObject
) -> None:
    """Everybody is delivered for real, at any moment of the audit: nobody may ever be wrong."""
    house = House(client)
    users = ids(8)
    house.deliver(users, city="Paris")
    batches: list[Any] = []

    def act() -> None:
        for what in data.draw(
            st.lists(st.sampled_from(["accept", "claim", "land", "settle", "dead"]), max_size=4)
        ):
            if what == "accept":
                some = data.draw(st.lists(st.sampled_from(users), min_size=1, unique=True))
                house.accept(some, {"city": data.draw(st.sampled_from(["Rome", "Oslo"]))})
            elif what == "claim":
                batch = house.claim()
                if batch and batch.users:
                    batches.append(batch)
            elif batches and what == "land":
                for claimed in batches[0].users:
                    house.store.users[claimed.user] |= claimed.attrs
            elif batches:
                batch = batches.pop(0)
                if what == "dead" and data.draw(st.booleans()):
                    house.settle(batch, DeadLettered(1, ""), number=batch.number)
                    continue
                for claimed in batch.users:
                    house.store.users[claimed.user] |= claimed.attrs
                house.settle(batch, number=batch.number)

    act()
    house.store.before = house.store.during = act
    report = house.audit()

    assert report.wrong == 0
    assert report.counts.total() == len(users)


def test_nobody_is_judged_by_what_nobody_knows(house: House) -> None:
    house.deliver(ids(2), city="Paris")
    house.accept(["user00000"], {"city": "Rome"})
    house.settle(house.claim(), DeadLettered(40001, ""))
    house.store.users["user00000"] = {}

    assert counts(house.audit()) == {"as_delivered": 1, "skipped": 1}


def test_hostile_memories_do_not_stop_it(house: House) -> None:
    house.deliver(ids(50), city="Paris")
    hostile: list[str | bytes] = [
        "", "{", "null", "[]", "17", '"text"', '{"a":null}', '{"a":[]}', '{"a":{"city":null}}',
        '{"a":{"city":["Paris"]}}', '{"a":{"city":["Paris",1,2]}}', '{"a":{"city":[{"x":1},1]}}',
        '{"a":{"city":["Paris","soon"]}}', '{"a":{"city":["Paris",1e999]}}', '{"a":{"":["",0]}}',
        '{"a":{"city":["Paris",1]},"c":"x"}', "[" * 50_000, b"\xff\xfe\x00", '{"a":{"\\ud800":["\\ud800",1]}}',
    ]  # fmt: skip
    for number, record in enumerate(hostile):
        house.redis.hset(house.keys.shadow, f"hostile{number}", record)
        house.redis.zadd(house.keys.shadow_at, {f"hostile{number}": 1})
    for user in (b"\xff\xfe", b"", b"x" * 5000, "日本".encode(), b"new\nline"):
        house.redis.hset(house.keys.shadow, user, '{"a":{"city":["Paris",1]}}')
        house.redis.zadd(house.keys.shadow_at, {user: 1})
    # One of whom nothing is remembered, after all, and one whom the other table does not know.
    house.redis.zadd(house.keys.shadow_at, {"nobody": 1})
    house.redis.zrem(house.keys.shadow_at, "user00049")
    report = house.audit(most_shown=100)

    # Of one of the hostile ones an empty value is remembered, which is that of a removal.
    assert report.counts["as_delivered"] == 49 + 1
    assert report.counts["lost"] + report.counts["changed"] == 0
    assert {one.user for one in report.shown} <= {f"hostile{number}" for number in range(len(hostile))}
    assert all(set(map(type, users)) == {str} for users in house.store.asked)


def test_the_sample_has_nobody_twice_and_is_no_larger_than_asked(house: House) -> None:
    house.deliver(ids(3000), city="Paris")
    for wanted in (1, 100, 1400, 1600, 2999, 3000, 5000):
        sample = Sample(house.shadow, wanted)
        found = list(sample)
        assert len(found) == len(set(found)) == min(wanted, 3000)
        assert sample.is_everybody == (wanted >= 3000)
        assert sample.remembered == 3000


def test_a_sample_of_a_memory_that_is_forgotten_meanwhile_ends(house: House) -> None:
    house.deliver(ids(1000), city="Paris")
    sample = Sample(house.shadow, 450)
    found = [next(iterator := iter(sample))]
    house.redis.delete(house.keys.shadow, house.keys.shadow_at)
    found += iterator

    assert len(found) <= USERS_PER_CALL


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_a_planted_loss_is_found_within_the_stated_certainty(house: House, share: float) -> None:
    """Of many samples, nearly all must have the truth within their bounds."""
    users = ids(2000)
    house.deliver(users, city="Paris")
    for user in random.Random(7).sample(users, round(share * len(users))):
        house.store.users[user] = {}
    missed = 0
    for _ in range(drawn(40)):
        report = house.audit(600)
        least, most = between(report.wrong, report.judged)
        assert report.judged == 600
        missed += not least <= share <= most

    # They may miss once in twenty samples. Without repetition, they miss far less often.
    assert missed <= 4


def test_an_audit_of_everybody_finds_exactly_what_is_lost(house: House) -> None:
    users = ids(1000)
    house.deliver(users, city="Paris", level="Gold")
    lost = set(random.Random(3).sample(users, 10))
    for user in lost:
        house.store.users[user] = {"city": "Rome"}
    report = house.audit(1000, keep_wrong=True)

    assert set(report.wrong_users) == lost
    assert counts(report) == {"as_delivered": 990, "lost": 10}
    # Those who seemed wrong came along with others, or waited for a last call.
    assert report.calls <= 11


def test_when_all_are_wrong_all_are_asked_twice(house: House) -> None:
    house.deliver(ids(1000), city="Paris")
    house.store.users = {user: {} for user in ids(1000)}
    report = house.audit()

    assert counts(report) == {"lost": 1000}
    assert report.calls == 20


def test_no_call_asks_for_too_many_whoever_becomes_due_meanwhile(house: House) -> None:
    house.deliver(ids(2000), city="Paris")
    for user in ids(2000)[::2]:
        house.store.users[user] = {}
    monotonic = house.clock.monotonic

    def passing() -> float:
        house.clock.now += 0.03
        return monotonic()

    house.clock.monotonic = passing  # type: ignore[method-assign]

    assert counts(house.audit()) == {"as_delivered": 1000, "lost": 1000}
    assert max(map(len, house.store.asked)) == USERS_PER_CALL


def test_a_stop_leaves_who_only_seemed_wrong_out(house: House) -> None:
    house.deliver(ids(300), city="Paris")
    house.store.users["user00001"] = {}

    def stop() -> None:
        house.stopped = house.store.calls == 3

    house.store.during = stop
    report = house.audit()

    assert report.state == "stopped"
    assert counts(report) == {"as_delivered": 299}


def test_progress_and_the_time_left_are_told(house: House) -> None:
    house.deliver(ids(1000), city="Paris")
    house.audit(1000)

    assert len(house.shown) == 10
    assert house.shown[-1] == 0
    assert sorted(filter(None, house.shown), reverse=True) == [*filter(None, house.shown)]


def test_nothing_remembered_is_nobody_judged(house: House) -> None:
    report = house.audit()

    assert (report.judged, report.remembered, report.state, report.calls) == (0, 0, "done", 0)


# The repair.


def test_what_was_lost_is_sent_again_and_a_second_audit_finds_nothing(house: House) -> None:
    users = ids(1000)
    house.deliver(users, city="Paris", level="Gold")
    for user in users[:250]:
        house.store.users[user] = {}
    report = house.audit(keep_wrong=True)
    assert counts(report) == {"as_delivered": 750, "lost": 250}

    assert house.repair(report.wrong_users) == Repaired(queued=250)
    snapshot = house.buffer.snapshot()
    assert (snapshot.backfill, snapshot.live, snapshot.balanced) == (250, 0, True)
    house.send()

    assert counts(house.audit()) == {"as_delivered": 1000}
    assert house.store.users[users[0]] == {"city": "Paris", "level": "Gold"}


def test_a_repair_sends_with_the_versions_of_the_delivery(house: House) -> None:
    house.accept(["ann"], {"city": "Paris"}, 1_700_000_000_000)
    house.accept(["ann"], {"level": "Gold", "plan": None}, 1_700_000_005_000)
    house.send()
    house.store.users["ann"] = {"plan": "free"}

    assert house.repair(["ann"]) == Repaired(queued=1)
    record = json.loads(house.redis.hget(house.keys.pending, "ann") or "")
    assert record["a"] == {
        "city": ["Paris", 1_700_000_000_000],
        "level": ["Gold", 1_700_000_005_000],
        "plan": [False, 1_700_000_005_000],
    }
    assert record["b"] == 1


def test_only_what_was_asked_for_is_repaired(house: House) -> None:
    house.accept(["ann"], {"city": "Paris", "level": "Gold"}, 1_700_000_000_000)
    house.accept(["ann"], {"plan": "free"}, 1_700_000_005_000)
    house.send()
    house.deliver(["bob", "cem"], city="Oslo", level="Gold")
    house.store.users = {"ann": {"city": "Paris"}, "bob": {"city": "Oslo"}}

    assert house.repair(["ann", "bob", "cem"]) == Repaired(queued=1, spared=2)
    assert json.loads(house.redis.hget(house.keys.pending, "ann") or "")["a"].keys() == {"plan"}
    assert counts(house.audit()) == {"skipped": 1, "changed": 1, "gone": 1}
    house.send()
    assert house.repair(["ann", "bob", "cem"], "lost", "changed") == Repaired(queued=2, spared=1)
    house.send()
    assert house.store.users == {
        "ann": {"city": "Paris", "level": "Gold", "plan": "free"},
        "bob": {"city": "Oslo", "level": "Gold"},
    }


def test_what_is_newer_is_never_replaced(house: House) -> None:
    house.deliver(ids(3), city="Paris")
    house.store.users = {user: {} for user in ids(3)}
    # One is updated before it is read once more, one after that.
    house.accept(["user00000"], {"city": "Rome"})
    house.store.during = lambda: house.accept(["user00001"], {"city": "Rome"})

    assert house.repair(ids(3)) == Repaired(queued=1, spared=2)
    house.send()
    assert {user: has["city"] for user, has in house.store.users.items()} == {
        "user00000": "Rome",
        "user00001": "Rome",
        "user00002": "Paris",
    }


def test_a_user_who_is_right_again_is_spared(house: House) -> None:
    house.deliver(ids(2), city="Paris")

    assert house.repair(ids(2)) == Repaired(spared=2)
    assert house.buffer.snapshot().pending == 0


def test_a_repair_waits_for_room_and_can_be_stopped_meanwhile(house: House) -> None:
    house.deliver(ids(2), city="Paris")
    house.store.users = {user: {} for user in ids(2)}
    house.accept(["other"], {"city": "Paris"})
    sleep = house.clock.sleep

    def slept(seconds: float) -> None:
        sleep(seconds)
        house.stopped = len(house.clock.slept) == 3

    house.clock.sleep = slept  # type: ignore[method-assign]

    assert house.repair(ids(2), max_pending=1) == Repaired(state="stopped")
    # They are still found.
    house.stopped = False
    house.send()
    assert counts(house.audit())["lost"] == 2


def test_whoever_finds_no_room_is_found_again(house: House) -> None:
    house.deliver(ids(3), city="Paris")
    house.store.users = {user: {} for user in ids(3)}

    assert house.repair(ids(3), max_pending=2) == Repaired(queued=2, refused=1)
    house.send()
    assert counts(house.audit()) == {"as_delivered": 2, "lost": 1}


def test_a_repair_that_fails_loses_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.deliver(ids(3), city="Paris")
    house.store.users = {user: {} for user in ids(3)}

    def away(*args: Any, **options: Any) -> Any:
        raise redis.ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Producer, "add", away)
        with pytest.raises(redis.ConnectionError):
            house.repair(ids(3))

    assert counts(house.audit()) == {"lost": 3}
    assert house.repair(ids(3)) == Repaired(queued=3)


def test_what_is_forgotten_by_now_is_not_brought_back(house: House) -> None:
    """A newer value may have been delivered, and forgotten, since the user was read."""
    house.deliver(ids(2), city="Paris")
    house.store.users = {user: {} for user in ids(2)}
    add = Producer.add

    def late(producer: Producer, *args: Any, **options: Any) -> Any:
        house.deliver(["user00000"], city="Rome")
        house.redis.delete(house.keys.shadow, house.keys.shadow_at)
        house.redis.set(house.keys.forgotten_at, 9e12)
        return add(producer, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Producer, "add", late)
        assert house.repair(ids(2)) == Repaired(refused=2)
    assert house.store.users["user00000"] == {"city": "Rome"}


# The totals.


def test_totals_add_up_and_survive_nonsense(client: redis.Redis) -> None:
    keys = new_keys()
    log = AuditLog(client, keys)
    assert log.read() == AuditTotals()

    log.add(Counter(as_delivered=5, lost=1))
    client.hset(keys.audit, mapping={"lost": "many", "gone": "-5", "since": "?", "extra": "1"})
    log.add({"as_delivered": 2, "lost": 1, "skipped": 3})
    totals = log.read()

    assert (totals.as_delivered, totals.lost, totals.gone, totals.skipped) == (7, 1, 0, 3)
    assert totals.since is None
    assert totals.at
    assert totals.checked == 8
