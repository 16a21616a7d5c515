"""Plans made and applied: a real Redis, the simulator's rules, and updates at the worst moments."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ManualClock, drawn, new_keys
from worker.config import Settings
from worker.errors import CallFailed, CannotImport, UnusablePlan
from worker.models import Acked, Update, UserId
from worker.readback import planner as module
from worker.readback.applier import Applied, Applier, ApplyStatus, OpenPlan
from worker.readback.crew import Crew
from worker.readback.plan_file import Difference, UnknownUser, read_lines
from worker.readback.planner import Plan, Planner, PlanOptions
from worker.readback.reader import ReadingStopped
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.buffer import Buffer, new_batch_id
from worker.state.connection import RedisError
from worker.state.history import History
from worker.state.import_pauses import ImportPauses
from worker.state.keys import Keys
from worker.state.scripts import text
from worker.state.shadow import Shadow

API = {"IMATTR_SECRET_KEY": "k" * 64, "IMATTR_API_URL": "http://api"}

#: A moment at which something can happen to a system.
Moment = Callable[[str], None]


@dataclass
class World:
    """What the API has, and everything that reads it and writes to it."""

    server: EmbeddedServer
    client: redis.Redis
    directory: Path
    keys: Keys = field(default_factory=new_keys)
    store: dict[str, dict[str, str]] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    #: Called at every step between this and Redis, or the API, with its name.
    moment: Moment = lambda _: None
    stopped: bool = False
    asked: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.buffer, self.history = Buffer(self.client, self.keys), History(self.client, self.keys)
        self.clock = ManualClock()

    @property
    def settings(self) -> Settings:
        app = {"IMATTR_REDIS_URL": self.server.url, "IMATTR_SDKAPPID": str(self.keys.sdkappid)}
        return Settings.from_env(API | app | self.environ)

    @property
    def shadow(self) -> Shadow:
        return _Shadow(self)

    def crew(self, readers: int = 1) -> Crew:
        return Crew(self.shadow, lambda over: _Reader(self, over), lambda: self.stopped, readers=readers)

    def file(self, text: str, name: str = "users.csv") -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    def plan(self, path: Path, *, readers: int = 1, **options: Any) -> Plan:
        chosen = PlanOptions(path=path, **options)
        return Planner(
            self.settings, chosen, self.shadow, self.crew(readers), by="ann", clock=self.clock
        ).run()

    def apply(self, path: Path, *, readers: int = 1, partial: bool = False) -> ApplyStatus:
        with OpenPlan(path, self.settings, partial=partial) as opened:
            parts = (self.shadow, self.history, ImportPauses(self.client, self.keys), self.crew(readers))
            run = Applier(self.settings, opened, *parts, by="ann", clock=self.clock)
            add = run._producer.add

            def watched(*args: Any, **options: Any) -> Any:
                self.moment("add")
                added = add(*args, **options)
                self.moment("added")
                return added

            run._producer.add = watched  # type: ignore[method-assign]
            return run.run()

    def deliver(self) -> None:
        """Send everything that is pending to the API."""
        while True:
            ticket = new_batch_id()
            self.client.zadd(self.keys.tickets, {ticket: 1})
            batch = self.buffer.claim(ticket, 100)
            assert batch is not None
            if not batch.users:
                return
            for user in batch.users:
                self.write(user.user, user.attrs)
            self.buffer.settle(batch.id, {}, rest=Acked())

    def write(self, user: UserId, attrs: Mapping[str, str | None]) -> None:
        """Change what the API has, as a call does."""
        have = self.store.setdefault(user, {})
        for name, value in attrs.items():
            if value is None:
                have.pop(name, None)
            else:
                have[name] = value

    def update(self, user: UserId, **attrs: str | None) -> None:
        self.buffer.add([Update(user, attrs)])

    def deliver_update(self, user: UserId, **attrs: str | None) -> None:
        self.update(user, **attrs)
        self.deliver()


class _Shadow(Shadow):
    def __init__(self, world: World) -> None:
        super().__init__(world.client, world.keys)
        self._world = world

    def look(self, users: Sequence[UserId]) -> Any:
        self._world.moment("look")
        return super().look(users)

    def correct(self, found: Any, *, now_ms: int | None = None) -> list[UserId]:
        self._world.moment("correct")
        return super().correct(found, now_ms=now_ms)


class _Reader:
    """See `worker.readback.reader.Reader`; the API is a dict."""

    def __init__(self, world: World, is_over: Callable[[], bool]) -> None:
        self._world, self._is_over, self.calls = world, is_over, 0

    def read(self, users: Sequence[UserId]) -> dict[UserId, Mapping[str, str] | None]:
        assert 0 < len(users) == len(set(users)) <= 100
        self._world.moment("read")
        if self._is_over():
            raise ReadingStopped
        self.calls += 1
        self._world.asked.append(list(users))
        found: dict[UserId, Mapping[str, str] | None] = {
            user: dict(self._world.store[user]) if user in self._world.store else None for user in users
        }
        self._world.moment("answer")
        return found


@pytest.fixture(autouse=True, scope="module")
def no_disk() -> Iterator[None]:
    """Checkpoints wait for the disk, which these tests need not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def world(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> World:
    return World(server, client, tmp_path)


def lines(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        found = [line.found for line in read_lines(file, path)]
    return [line for line in found if isinstance(line, Difference | UnknownUser)]


def changes(path: Path) -> dict[str, dict[str, tuple[str | None, str | None]]]:
    """User -> attribute -> old and new value, of all that differ."""
    return {
        line.user: {name: change[:2] for name, change in line.changes.items()}
        for line in lines(path)
        if isinstance(line, Difference)
    }


def users(plan: Plan) -> dict[str, int]:
    return {fate: count for fate, count in plan.mark.tally.users.items() if count}


def test_a_plan_has_exactly_what_differs_and_changes_nothing(world: World) -> None:
    world.store = {
        "ann": {"city": "Rome", "level": "3"},
        "bob": {"city": "Oslo"},
        "cid": {"city": "Bern", "x": "y"},
    }
    before = json.dumps(world.store)
    path = world.file(
        '{"user": "ann", "attrs": {"city": "Paris", "level": "3"}}\n'
        '{"user": "bob", "attrs": {"city": "Oslo", "level": "4"}}\n'
        '{"user": "cid", "attrs": {"city": null}}\n'
        '{"user": "eve", "attrs": {"city": "Rome"}}\n'
        '{"user": "", "attrs": {"city": "Rome"}}\n',
        "users.jsonl",
    )

    plan = world.plan(path)

    assert changes(plan_of(path)) == {
        "ann": {"city": ("Rome", "Paris")},
        "bob": {"level": (None, "4")},
        "cid": {"city": ("Bern", None)},
    }
    assert lines(plan_of(path))[-1] == UnknownUser("eve")
    assert users(plan) == {"differs": 3, "unknown": 1}
    assert (plan.state, plan.header.lines, plan.header.refused, plan.mark.calls) == ("complete", 5, 1, 1)
    assert [refusal.line for refusal in plan.refusals] == [5]
    assert json.dumps(world.store) == before
    assert list(world.client.scan_iter(world.keys.pattern)) == []


def plan_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.plan")


def test_a_user_with_an_update_on_its_way_is_counted_and_not_judged(world: World) -> None:
    world.store = {user: {"city": "Rome"} for user in ("ann", "bob", "cid")}
    world.deliver_update("bob", city="Rome")
    world.update("ann", city="Bern")
    ticket = new_batch_id()
    world.update("cid", city="Bern")
    path = world.file("user,city\nann,Paris\nbob,Paris\ncid,Paris\n")

    def claim(step: str) -> None:
        if step == "read":
            world.client.zadd(world.keys.tickets, {ticket: 1})
            world.buffer.claim(ticket, 100)

    world.moment = claim
    plan = world.plan(path)

    assert users(plan) == {"differs": 1, "in_motion": 2}
    assert list(changes(plan_of(path))) == ["bob"]


@pytest.mark.parametrize("step", ["read", "answer"])
def test_a_user_who_was_delivered_during_the_reading_is_not_judged(world: World, step: str) -> None:
    world.store = {"ann": {"city": "Rome"}}
    world.moment = lambda now: world.deliver_update("ann", city="Bern") if now == step else None

    plan = world.plan(world.file("user,city\nann,Paris\n"))

    assert users(plan) == {"in_motion": 1}


def test_of_a_user_who_stands_in_a_file_twice_only_the_last_word_counts(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(250)}
    path = world.file(
        "user,city\nuser0,Paris\n" + "".join(f"user{n},Rome\n" for n in range(250)) + "user249,Oslo\n"
    )

    plan = world.plan(path)

    # The first line of user0 was overruled by a later one, 100 users further down or not.
    assert changes(plan_of(path)) == {"user249": {"city": ("Rome", "Oslo")}}
    assert (plan.header.lines, plan.header.users, plan.mark.calls) == (252, 250, 3)
    assert sorted(map(len, world.asked)) == [50, 100, 100]


def test_what_was_delivered_after_the_time_of_the_file_stays(world: World) -> None:
    world.deliver_update("ann", city="Bern")
    path = world.file("user,city\nann,Paris\n")

    old = world.plan(path, as_of_ms=1_700_000_000_000)
    assert users(old) == {"newer": 1}
    assert changes(plan_of(path)) == {}
    # Without a time, the file is true now.
    assert users(world.plan(path)) == {"differs": 1}


def test_what_may_be_newer_and_was_forgotten_is_not_judged(world: World) -> None:
    world.store = {"ann": {"city": "Bern"}, "bob": {"city": "Paris"}}
    world.client.set(world.keys.forgotten_at, 1_750_000_000_000)
    path = world.file("user,city\nann,Paris\nbob,Paris\n")

    assert users(world.plan(path, as_of_ms=1_700_000_000_000)) == {"forgotten": 1, "same": 1}
    assert users(world.plan(path, as_of_ms=1_760_000_000_000)) == {"differs": 1, "same": 1}
    assert users(world.plan(path)) == {"differs": 1, "same": 1}


def test_a_file_from_the_future_is_refused(world: World) -> None:
    path = world.file("user,city\nann,Paris\n")

    with pytest.raises(CannotImport, match="--as-of"):
        world.plan(path, as_of_ms=9_000_000_000_000)
    assert not plan_of(path).exists()


@pytest.mark.parametrize("content", ["", "nothing here\n", "user,user\n", "[1]\n", "PK\x03\x04"])
def test_a_file_that_cannot_be_imported_cannot_be_planned_either(world: World, content: str) -> None:
    path = world.file(content)

    with pytest.raises(CannotImport):
        world.plan(path)
    assert not plan_of(path).exists()


def test_a_plan_that_is_stopped_at_any_call_goes_on_there(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome" if n % 7 else "Oslo"} for n in range(450)}
    path = world.file("user,city\n" + "".join(f"user{n},Rome\n" for n in range(450)))
    expected = {f"user{n}": {"city": ("Oslo", "Rome")} for n in range(0, 450, 7)}

    for at in range(5):
        world.stopped, world.asked = False, []

        def stop(step: str, at: int = at) -> None:
            world.stopped = world.stopped or (step == "read" and len(world.asked) == at)

        world.moment = stop
        first = world.plan(path)
        assert (first.state, first.mark.users) == ("stopped", 100 * at)
        assert len(first.samples) == min(module.SAMPLES, first.mark.tally.users["differs"])
        world.stopped, world.moment = False, lambda _: None
        last = world.plan(path)
        assert (last.state, last.mark.calls) == ("complete", 5)
        assert users(last) == {"differs": 65, "same": 385}
        assert changes(plan_of(path)) == expected
        # Nobody was asked for twice.
        assert len({user for call in world.asked for user in call}) == 450 == sum(map(len, world.asked))


def test_another_file_does_not_go_on_with_a_plan(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(150)}
    path = world.file("user,city\n" + "".join(f"user{n},Rome\n" for n in range(150)))

    def stop(step: str) -> None:
        world.stopped = len(world.asked) == 1

    world.moment = stop
    world.plan(path)
    world.stopped, world.moment = False, lambda _: None
    path.write_text(path.read_text().replace("user7,Rome", "user7,Oslo"))

    with pytest.raises(UnusablePlan, match=r"content of the file must be the same as then. .* --restart"):
        world.plan(path)
    assert users(world.plan(path, restart=True)) == {"differs": 1, "same": 149}


def test_what_was_compared_is_kept_when_the_api_fails(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(250)}
    path = world.file("user,city\n" + "".join(f"user{n},Oslo\n" for n in range(250)))

    def fail(step: str) -> None:
        if step == "read" and len(world.asked) == 1:
            raise CallFailed("the API is away", "wait")

    world.moment = fail
    with pytest.raises(CallFailed):
        world.plan(path)
    world.moment = lambda _: None

    assert len(changes(plan_of(path))) == 100
    assert world.plan(path).mark.calls == 3
    assert len(changes(plan_of(path))) == 250


def test_many_readers_make_the_same_plan(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome" if n % 3 else "Oslo"} for n in range(5_000)}
    path = world.file("user,city\n" + "".join(f"user{n},Rome\n" for n in range(5_000)))

    plan = world.plan(path, readers=8)

    assert users(plan) == {"differs": 1667, "same": 3333}
    assert list(changes(plan_of(path))) == [f"user{n}" for n in range(0, 5_000, 3)]
    assert plan.mark.calls == 50


# Applying.


def test_applying_queues_exactly_the_plan_and_a_second_plan_finds_nothing(world: World) -> None:
    world.store = {"ann": {"city": "Rome", "x": "y"}, "bob": {"city": "Oslo"}, "cid": {"city": "Bern"}}
    path = world.file(
        '{"user": "ann", "attrs": {"city": "Paris"}}\n{"user": "bob", "attrs": {"city": "Oslo"}}\n'
        '{"user": "cid", "attrs": {"city": null, "level": "4"}}\n',
        "users.jsonl",
    )
    world.plan(path)

    done = world.apply(plan_of(path))

    assert done.state == "complete"
    assert done.applied == Applied(queued=2)
    assert world.client.zrange(world.keys.backfill, 0, -1) == [b"ann", b"cid"]
    world.deliver()
    assert world.store == {"ann": {"city": "Paris", "x": "y"}, "bob": {"city": "Oslo"}, "cid": {"level": "4"}}
    assert users(world.plan(path)) == {"same": 3}
    assert world.buffer.snapshot().balanced
    [event] = world.history.newest(10, event="applied")
    assert (event.by, event.details["queued"], event.details["state"]) == ("ann", "2", "complete")
    assert "Paris" not in str(event)
    # Nothing is remembered for longer than before.
    assert not world.client.exists(world.keys.imports)
    assert sorted(file.name for file in world.directory.iterdir()) == ["users.jsonl", "users.jsonl.plan"]


def test_a_value_that_was_delivered_and_lost_is_repaired(world: World) -> None:
    world.deliver_update("ann", city="Paris", level="4")
    world.store["ann"] = {"city": "Rome", "level": "4"}
    path = world.file("user,city,level\nann,Paris,4\n")

    world.plan(path)
    assert world.apply(plan_of(path)).applied == Applied(queued=1)
    world.deliver()

    assert world.store["ann"] == {"city": "Paris", "level": "4"}


def test_a_lost_value_is_repaired_although_the_file_is_older(world: World) -> None:
    world.deliver_update("ann", city="Paris")
    world.store["ann"] = {"city": "Rome"}
    path = world.file("user,city\nann,Paris\n")

    world.plan(path, as_of_ms=1_700_000_000_000)
    assert world.apply(plan_of(path)).applied == Applied(queued=1)
    world.deliver()

    assert world.store["ann"] == {"city": "Paris"}


def test_who_has_changed_since_the_plan_is_left_alone(world: World) -> None:
    world.store = {user: {"city": "Rome"} for user in ("ann", "bob", "cid", "dan", "eve", "fay")}
    path = world.file("user,city\n" + "".join(f"{user},Paris\n" for user in world.store))
    world.plan(path)
    world.store["ann"] = {"city": "Oslo"}
    world.store["bob"] = {"city": "Paris"}
    del world.store["cid"]
    world.deliver_update("eve", city="Rome")
    world.update("dan", city="Bern")

    done = world.apply(plan_of(path)).applied

    assert done == Applied(queued=1, done=1, changed=2, in_motion=1, unknown=1)
    world.deliver()
    assert world.store["fay"] == {"city": "Paris"}
    assert world.store["ann"] == {"city": "Oslo"}
    assert world.store["eve"] == {"city": "Rome"}
    assert world.store["dan"] == {"city": "Bern"}


def test_values_that_break_a_rule_are_refused_alone(world: World) -> None:
    world.store = {"ann": {"city": "Rome"}, "bob": {"city": "Rome"}}
    path = world.file("user,city\nann,Paris\nbob,Paris\n")
    world.plan(path)
    # As somebody could write it by hand.
    plan_of(path).write_text(
        plan_of(path).read_text().replace('["Rome", "Paris"', '["Rome", "' + "x" * 51 + '"', 1)
    )

    done = world.apply(plan_of(path))

    assert done.applied == Applied(queued=1, refused=1)
    assert done.refusals == [("ann", "the value of 'city' is 51 bytes, at most 50")]
    assert list(world.client.hkeys(world.keys.pending)) == [b"bob"]


def test_a_user_with_more_values_than_an_app_has_is_refused_whatever_their_times(world: World) -> None:
    world.store = {"ann": {}}
    path = world.file("user,city\nann,Paris\n")
    world.plan(path)
    [change] = re.findall(r'"city": \[.*?\]', plan_of(path).read_text())
    many = ", ".join(f'"n{n}": [null, "x", {1_700_000_000_000 + n}]' for n in range(11))
    plan_of(path).write_text(plan_of(path).read_text().replace(change, many))

    done = world.apply(plan_of(path))

    assert done.refusals == [("ann", "11 attributes, must be 1 to 10")]
    assert not world.client.exists(world.keys.pending)


def test_each_value_has_the_time_of_its_own_line(world: World) -> None:
    world.store = {"ann": {"city": "Rome"}}
    path = world.file(
        '{"user": "ann", "attrs": {"city": "Paris"}, "occurred_at": 1700000001}\n'
        '{"user": "ann", "attrs": {"city": "Oslo", "level": "3"}, "occurred_at": 1700000000}\n',
        "users.jsonl",
    )
    world.plan(path)
    assert world.apply(plan_of(path)).applied == Applied(queued=1)

    record = json.loads(world.client.hget(world.keys.pending, "ann") or b"")
    assert record["a"] == {"city": ["Paris", 1_700_000_001_000], "level": ["3", 1_700_000_000_000]}


def test_applying_waits_while_there_is_no_room(world: World) -> None:
    world.environ = {"IMATTR_MAX_PENDING": "120"}
    world.store = {f"user{n}": {"city": "Rome"} for n in range(300)}
    path = world.file("user,city\n" + "".join(f"user{n},Paris\n" for n in range(300)))
    world.plan(path)
    world.clock.sleep = lambda seconds: world.deliver()  # type: ignore[method-assign]

    done = world.apply(plan_of(path))

    world.deliver()
    assert done.applied == Applied(queued=300)
    assert {have["city"] for have in world.store.values()} == {"Paris"}


def test_applying_is_paused_like_an_import(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(250)}
    path = world.file("user,city\n" + "".join(f"user{n},Paris\n" for n in range(250)))
    world.plan(path)
    pauses, seen = ImportPauses(world.client, world.keys), list[tuple[int, str]]()

    def pause(step: str) -> None:
        # What is looked at once a second is looked at now.
        world.clock.now += 1
        if step == "added" and not seen:
            name: Any = world.client.zrange(world.keys.imports, 0, -1)[0]
            assert pauses.pause(text(name), "look first", by="bob")

    def sleep(seconds: float) -> None:
        world.clock.now += seconds
        [about] = world.client.hvals(world.keys.import_progress)
        seen.append((world.client.hlen(world.keys.pending), json.loads(about)["state"]))
        if len(seen) == 3:
            name: Any = world.client.zrange(world.keys.imports, 0, -1)[0]
            pauses.resume(text(name), by="bob")

    world.moment, world.clock.sleep = pause, sleep  # type: ignore[method-assign]
    done = world.apply(plan_of(path))

    assert [pending for pending, _ in seen] == [100] * 3
    assert seen[-1] == (100, "paused")
    assert done.applied == Applied(queued=250)


def test_applying_goes_on_where_it_was_stopped(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(350)}
    path = world.file("user,city\n" + "".join(f"user{n},Paris\n" for n in range(350)))
    world.plan(path)
    world.asked = []

    def stop(step: str) -> None:
        world.stopped = step == "read" and len(world.asked) == 2

    world.moment = stop
    first = world.apply(plan_of(path))
    assert (first.state, first.applied) == ("stopped", Applied(queued=200))
    # What is delivered meanwhile is not forgotten.
    assert world.client.zcard(world.keys.imports) == 1
    world.stopped, world.moment = False, lambda _: None
    last = world.apply(plan_of(path))

    assert (last.state, last.resumed_after, last.applied) == ("complete", 200, Applied(queued=350))
    assert len(world.asked) == 4
    assert world.client.hlen(world.keys.pending) == 350
    assert not world.client.exists(world.keys.imports)


def test_applying_twice_changes_nothing(world: World) -> None:
    world.store = {"ann": {"city": "Rome"}, "bob": {"city": "Rome"}}
    path = world.file("user,city\nann,Paris\nbob,Paris\n")
    world.plan(path)
    world.apply(plan_of(path))

    assert world.apply(plan_of(path)).applied == Applied(in_motion=2)
    world.deliver()
    assert world.apply(plan_of(path)).applied == Applied(done=2)
    assert world.buffer.snapshot().ledger["accepted"] == 2


def test_a_kill_between_queuing_and_remembering_it_repeats_harmlessly(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(250)}
    path = world.file("user,city\n" + "".join(f"user{n},Paris\n" for n in range(250)))
    world.plan(path)
    keep, kept = OpenPlan.keep, list[int]()

    def killed(self: OpenPlan, progress: Any) -> None:
        kept.append(progress.offset)
        if len(kept) == 3:
            raise KeyboardInterrupt
        keep(self, progress)

    monkeypatch.setattr(OpenPlan, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        world.apply(plan_of(path))
    monkeypatch.undo()

    done = world.apply(plan_of(path)).applied
    world.deliver()
    assert done == Applied(queued=150, in_motion=100)
    assert {have["city"] for have in world.store.values()} == {"Paris"}
    assert world.buffer.snapshot().ledger["accepted"] == 250


def test_a_plan_that_is_not_complete_is_applied_only_on_demand(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(150)}
    path = world.file("user,city\n" + "".join(f"user{n},Paris\n" for n in range(150)))

    def stop(step: str) -> None:
        world.stopped = len(world.asked) == 1

    world.moment = stop
    world.plan(path)
    world.stopped, world.moment = False, lambda _: None
    # Half a line behind the last checkpoint.
    with open(plan_of(path), "ab") as file:
        file.write(b'{"user": "user149", "changes": {"city": ["Rome", "Pa')

    with pytest.raises(UnusablePlan, match="100 of 150 users were compared"):
        world.apply(plan_of(path))
    assert world.apply(plan_of(path), partial=True).applied == Applied(queued=100)


def test_a_plan_is_applied_by_one_at_a_time_and_only_where_it_belongs(world: World) -> None:
    world.store = {"ann": {"city": "Rome"}}
    path = world.file("user,city\nann,Paris\n")
    world.plan(path)

    with OpenPlan(plan_of(path), world.settings):
        with pytest.raises(UnusablePlan, match="by another imattr"):
            OpenPlan(plan_of(path), world.settings)
        with pytest.raises(UnusablePlan, match="by another imattr"):
            world.plan(path)
    world.environ = {"IMATTR_API_URL": "http://other"}
    with pytest.raises(UnusablePlan, match="was made with the API at http://api chat"):
        world.apply(plan_of(path))
    world.environ = {}
    world.keys = new_keys()
    with pytest.raises(UnusablePlan, match="is for the app"):
        world.apply(plan_of(path))


def test_redis_that_fails_ends_applying_and_loses_nothing(world: World) -> None:
    world.store = {f"user{n}": {"city": "Rome"} for n in range(150)}
    path = world.file("user,city\n" + "".join(f"user{n},Paris\n" for n in range(150)))
    world.plan(path)

    def fail(step: str) -> None:
        if step == "correct" and world.client.hlen(world.keys.pending):
            raise RedisError

    world.moment = fail
    with pytest.raises(RedisError):
        world.apply(plan_of(path))
    world.moment = lambda _: None

    assert world.apply(plan_of(path)).applied == Applied(queued=150)


# Updates at any moment.

USERS = [f"user{n}" for n in range(4)]
#: What can happen between two steps, to whom: an update, a delivery of everything, an update that is delivered at once,
#: somebody else who writes to the API.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.sampled_from(["update", "deliver", "deliver_update", "write"]),
        st.sampled_from(USERS[1:]),
        st.sampled_from(["city", "level"]),
        # Among the values that anybody else writes are those of the file, and the old ones.
        st.sampled_from(["Paris", "Rome", "Oslo", None]),
    ),
    max_size=8,
)


@settings(max_examples=drawn(60))
@given(EVENTS)
def test_no_update_is_ever_overwritten_whenever_it_comes(
    server: EmbeddedServer, client: redis.Redis, tmp_path_factory: pytest.TempPathFactory, events: list[Any]
) -> None:
    world = World(server, client, tmp_path_factory.mktemp("plan"))
    # Some users are remembered, some are not.
    for user in USERS:
        world.deliver_update(user, city="Rome")
    client.delete(world.keys.shadow, world.keys.shadow_at)
    world.deliver_update(USERS[1], city="Rome")
    world.deliver_update(USERS[2], city="Paris")
    world.store[USERS[2]] = {"city": "Rome"}
    path = world.file("user,city,level\n" + "".join(f"{user},Paris,3\n" for user in USERS))
    newest: dict[tuple[str, str], str | None] = {}
    touched = set[str]()
    steps = iter(range(1000))

    def happen(_: str) -> None:
        step = next(steps)
        for at, what, user, name, value in events:
            if at != step:
                continue
            if what == "deliver":
                world.deliver()
                continue
            touched.add(user)
            if what == "write":
                world.write(user, {name: value})
                continue
            newest[user, name] = value
            world.update(user, **{name: value})
            if what == "deliver_update":
                world.deliver()

    world.moment = happen
    world.plan(path)
    world.apply(plan_of(path))
    world.deliver()

    assert world.store[USERS[0]] == {"city": "Paris", "level": "3"}
    others = {(user, name) for at, what, user, name, _ in events if what == "write"}
    for (user, name), value in newest.items():
        # An update that repeats what was delivered is not sent again, even if that was lost: nobody can know.
        is_repeated = (user, name, value) == (USERS[2], "city", "Paris")
        if (user, name) not in others and not is_repeated:
            assert world.store[user].get(name) == value, (user, name)
    for user in USERS[1:]:
        if user not in touched:
            assert world.store[user] == {"city": "Paris", "level": "3"}
    assert world.buffer.snapshot().balanced
