"""The buffer against a model: any sequence of steps, on a real server, with time held still.

The model is plain Python that says what the design says. After every step the whole state in Redis must
equal it, and besides, by rules that know nothing of how the buffer works: a user is in one place, the
newest accepted value of every attribute is the one that is kept, what was delivered never gets older, and
the ledger balances.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import drawn, new_keys, planted
from tests.planted import MODEL, of, plant_in_scripts
from tests.schedules.wire import Wire
from worker.models import (
    Acked,
    Attributes,
    BatchId,
    ClaimedUser,
    DeadLettered,
    Outcome,
    Retried,
    Snoozed,
    Update,
)
from worker.state import buffer
from worker.state.buffer import Buffer
from worker.state.dead_letters import DeadLetters, Redriven
from worker.state.keys import LEDGER

LEASE_MS = 60_000
LINGER_MS = 250

#: What an attribute is to be, None = to be removed; and its version.
Values = dict[str, tuple[str | None, int]]
#: What the shadow holds of a value that nobody knows.
UNKNOWN = "(unknown)"


@dataclass
class Record:
    """What is known about a user and not delivered."""

    since: int
    attempts: int = 0
    #: When it failed, as it seemed through the service's fault.
    failed_at: int = 0
    suspect: bool = False
    backfill: bool = False
    values: Values = field(default_factory=dict)
    #: Whether its last call may have been applied.
    unknown: bool = False

    @classmethod
    def read(cls, packed: bytes) -> Record:
        raw = json.loads(packed)
        values = {name: (value or None, version) for name, (value, version) in raw["a"].items()}
        return cls(raw["t"], raw.get("n", 0), raw.get("f", 0), "s" in raw, "b" in raw, values, "u" in raw)


@dataclass
class Model:
    """The state machine in plain Python."""

    pending: dict[str, Record] = field(default_factory=dict)
    lanes: dict[str, dict[str, int]] = field(
        default_factory=lambda: {"live": {}, "backfill": {}, "delayed": {}}
    )
    flight: dict[str, Record] = field(default_factory=dict)
    batches: dict[str, list[str]] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    shadow: dict[str, dict[str, tuple[str | None, int]]] = field(default_factory=dict)
    dead: dict[str, Values] = field(default_factory=dict)
    tickets: set[str] = field(default_factory=set)
    partial_at: int = 0
    #: When the last successful batch was claimed, and when the last outage ended.
    ok_at: int = 0
    calm_at: int = 0
    #: When each batch was claimed; the worker knows it, so not compared here.
    claimed_at: dict[str, int] = field(default_factory=dict, compare=False)
    #: First update of each dead letter; kept in the letter, so not compared here.
    buried_since: dict[str, int] = field(default_factory=dict, compare=False)
    ledger: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEDGER, 0))

    def add(self, update: Update, lane: str, max_pending: int, now: int) -> bool:
        user = update.user
        record, sent = self.pending.get(user), self.flight.get(user)
        if max_pending and not record and not sent and len(self.pending) >= max_pending:
            return False
        fresh: Values = {}
        same = False
        for name, value in update.attrs.items():
            delivered = self.shadow.get(user, {}).get(name)
            known = (record and record.values.get(name)) or (sent and sent.values.get(name))
            floor = known or delivered
            given_up = self.dead.get(user, {}).get(name)
            version = update.occurred_ms or max(now, *(found[1] for found in (floor, given_up) if found), 0)
            if floor and version < floor[1]:
                continue
            if not known and delivered and delivered[0] == value:
                self.shadow[user][name] = (value, version)
                same = True
            else:
                fresh[name] = (value, version)
        self.ledger["accepted"] += 1
        if not fresh:
            self.ledger["unchanged" if same else "stale"] += 1
            return True
        if record:
            self.ledger["coalesced"] += 1
        else:
            record = self.pending[user] = Record(now, backfill=lane == "backfill")
            if not sent:
                self.lanes[lane][user] = now
        record.values |= fresh
        letter = self.dead.get(user, {})
        for name, (_, version) in fresh.items():
            if name in letter and letter[name][1] <= version:
                del letter[name]
        if not letter:
            self.dead.pop(user, None)
        if lane == "live" and record.backfill:
            record.backfill = False
            if self.lanes["backfill"].pop(user, None) is not None:
                self.lanes["live"][user] = record.since
        return True

    def enter_lane(self, user: str, record: Record) -> None:
        self.lanes["backfill" if record.backfill else "live"][user] = record.since

    def claim(self, ticket: str, size: int, now: int) -> list[str]:
        self.tickets.discard(ticket)
        delayed = sorted(self.lanes["delayed"].items(), key=lambda item: (item[1], item[0]))
        for user, _ in [item for item in delayed if item[1] <= now][:size]:
            del self.lanes["delayed"][user]
            self.enter_lane(user, self.pending[user])
        users: list[str] = []
        for lane in ("live", "backfill"):
            entries = self.lanes[lane]
            for user in sorted(entries, key=lambda user: (entries[user], user))[: size - len(users)]:
                del entries[user]
                self.flight[user] = self.pending.pop(user)
                users.append(user)
        if users:
            self.batches[ticket] = users
            self.claimed_at[ticket] = now
            self.leases[ticket] = now + LEASE_MS
        return users

    def settle(self, batch: str, outcomes: dict[str, Outcome], rest: Outcome | None, now: int) -> int | None:
        if batch not in self.batches:
            return None
        settled, delivered = 0, self.ledger["delivered"]
        for user in list(self.batches[batch]):
            outcome = outcomes.get(user, rest)
            if outcome is None:
                continue
            settled += 1
            self.batches[batch].remove(user)
            self.settle_user(user, outcome, now)
        if self.ledger["delivered"] > delivered and batch in self.claimed_at:
            self.ok_at = self.claimed_at[batch]
        if not self.batches[batch]:
            del self.batches[batch], self.leases[batch]
        return settled

    def attempts(self, record: Record) -> int:
        """Attempts used, with a failure that others' success has shown not to be the service's."""
        return record.attempts + (self.calm_at < record.failed_at < self.ok_at)

    def settle_user(self, user: str, outcome: Outcome, now: int) -> None:
        record, newer = self.flight.pop(user), self.pending.get(user)
        shadow = self.shadow.setdefault(user, {})
        match outcome:
            case Acked():
                shadow.update(record.values)
                self.ledger["delivered"] += 1
            case DeadLettered():
                shadow.update({name: (UNKNOWN, version) for name, (_, version) in record.values.items()})
                self.dead_letter(user, record, newer)
            case Retried(delay) | Snoozed(delay):
                if not shadow:
                    del self.shadow[user]
                if isinstance(outcome, Retried):
                    record.attempts = self.attempts(record) + outcome.proven
                    record.failed_at = 0 if outcome.proven else now
                    record.unknown = outcome.unknown
                else:
                    record.suspect |= outcome.suspect
                if newer:
                    record.values |= newer.values
                    record.backfill = record.backfill and newer.backfill
                    self.ledger["coalesced"] += 1
                self.pending[user] = record
                if delay:
                    self.lanes["delayed"][user] = now + round(delay * 1000)
                else:
                    self.enter_lane(user, record)
                return
        if newer:
            self.enter_lane(user, newer)

    def dead_letter(self, user: str, record: Record, newer: Record | None) -> None:
        superseded = newer.values if newer else {}
        letter = {name: pair for name, pair in record.values.items() if name not in superseded}
        if not letter:
            self.ledger["coalesced"] += 1
            return
        before = self.dead.get(user, {})
        kept = {name: pair for name, pair in before.items() if name not in record.values | superseded}
        self.dead[user] = kept | letter
        self.buried_since[user] = record.since
        self.ledger["dead_lettered"] += 1

    def redrive(self, user: str) -> bool:
        """Whether anything of the letter was still worth sending."""
        letter = self.dead.pop(user)
        self.ledger["redriven"] += 1
        record, sent = self.pending.get(user), self.flight.get(user)
        back: Values = {}
        for name, (value, version) in letter.items():
            known = (record and record.values.get(name)) or (sent and sent.values.get(name))
            floor = known or self.shadow.get(user, {}).get(name)
            buried = floor is not None and floor[0] == UNKNOWN and floor[1] == version
            if floor is None or version > floor[1] or buried:
                back[name] = (value, version)
        if not back:
            self.ledger["stale"] += 1
            return False
        if record:
            self.ledger["coalesced"] += 1
            record.values |= back
            return True
        record = self.pending[user] = Record(self.buried_since[user], backfill=True, values=back)
        if not sent:
            self.enter_lane(user, record)
        return True

    def reassert(self, late: dict[str, Attributes], now: int) -> int:
        """How many users have newer values than those of a late call, which are sent again."""
        users = 0
        for user, values in late.items():
            record, sent = self.pending.get(user), self.flight.get(user)
            newest = {
                name: known
                for name, value in values.items()
                if (known := (sent and sent.values.get(name)) or self.shadow.get(user, {}).get(name))
                and known[0] not in (value, UNKNOWN)
                and not (record and name in record.values)
            }
            if not newest:
                continue
            users += 1
            if record:
                record.values |= newest
                continue
            self.ledger["redriven"] += 1
            self.pending[user] = Record(now, values=newest)
            if not sent:
                self.lanes["live"][user] = now
        return users

    def balanced(self) -> bool:
        accepted, redriven, *out = self.ledger.values()
        return accepted + redriven == sum(out) + len(self.pending) + len(self.flight)


def read(client: redis.Redis, buffer: Buffer) -> Model:
    """What Redis holds, as a model."""
    keys = buffer._keys

    def table(key: str) -> dict[str, Any]:
        found: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
        return {field.decode(): value for field, value in found.items()}

    def scores(key: str) -> dict[str, int]:
        found: list[tuple[bytes, float]] = client.zrange(key, 0, -1, withscores=True)  # type: ignore[assignment]
        return {member.decode(): int(score) for member, score in found}

    return Model(
        pending={user: Record.read(raw) for user, raw in table(keys.pending).items()},
        lanes={lane: scores(getattr(keys, lane)) for lane in ("live", "backfill", "delayed")},
        flight={user: Record.read(raw) for user, raw in table(keys.flight).items()},
        batches={batch: json.loads(raw) for batch, raw in table(keys.batches).items()},
        leases=scores(keys.leases),
        shadow={
            user: {
                name: (UNKNOWN if value is None else value or None, version)
                for name, (value, version) in json.loads(raw)["a"].items()
            }
            for user, raw in table(keys.shadow).items()
        },
        dead={
            user: {name: (value or None, version) for name, (value, version) in json.loads(raw)["a"].items()}
            for user, raw in table(keys.dead).items()
        },
        tickets=set(scores(keys.tickets)),
        partial_at=int(client.get(keys.partial_at) or 0),
        ok_at=int(client.hget(keys.health, "ok_at") or 0),
        calm_at=int(client.hget(keys.health, "calm_at") or 0),
        ledger=dict.fromkeys(LEDGER, 0)
        | {counter: int(count) for counter, count in table(keys.ledger).items()},
    )


# Few of each, so that things happen to the same user again and again.
users = st.sampled_from(["ann", "c d", "~"])
names = st.sampled_from(["city", "level", "tier/é"])
values = st.sampled_from(["Paris", "深圳", 'a "b" \\ / \x7f', None])
attrs = st.dictionaries(names, values, min_size=1, max_size=3)
ages = st.one_of(st.none(), st.integers(-3000, 1000))
delays = st.sampled_from([0.0, 0.5, 5.0])
outcomes = st.one_of(
    st.just(Acked()),
    st.builds(Retried, delays, st.booleans()),
    st.builds(Retried, delays, st.just(False), st.just(True)),
    st.builds(Snoozed, delays, st.booleans()),
    st.just(DeadLettered(90033, "refused")),
)


class BufferMachine(RuleBasedStateMachine):
    """Drives the real buffer and the model side by side."""

    client: redis.Redis

    tickets = Bundle("tickets")
    batches = Bundle("batches")
    ended = Bundle("ended")

    @initialize()
    def start(self) -> None:
        # The same ids in each run: two leases that end at the same time are reclaimed in the order of ids.
        numbers = itertools.count()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(
            "worker.state.buffer.new_batch_id", lambda: BatchId(f"batch {next(numbers):06} 0000")
        )
        keys = new_keys()
        self.dead = DeadLetters(self.client, keys)
        self.buffer = Buffer(self.client, keys, lease=LEASE_MS / 1000, shadow_ttl=10**8)
        self.model = Model()
        self.now = 1_700_000_000_000
        #: The newest accepted value of every attribute: highest version, among equals the last.
        self.newest: dict[tuple[str, str], tuple[str | None, int]] = {}
        self.delivered: dict[tuple[str, str], int] = {}
        #: What each batch was about to send.
        self.sent: dict[str, tuple[ClaimedUser, ...]] = {}

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule(passed=st.sampled_from([1, 100, 1000, 61_000, -2000]))
    def time_passes(self, passed: int) -> None:
        self.now += passed

    @rule(
        given=st.lists(st.tuples(users, attrs, ages), min_size=1, max_size=5),
        lane=st.sampled_from(["live", "backfill"]),
        max_pending=st.sampled_from([0, 0, 2]),
    )
    def add(self, given: list[tuple[str, Attributes, int | None]], lane: str, max_pending: int) -> None:
        updates = [Update(user, attrs, 0 if age is None else self.now + age) for user, attrs, age in given]
        before = dict(self.model.ledger)
        full = []
        for index, update in enumerate(updates):
            if self.model.add(update, lane, max_pending, self.now):
                self._note(update)
            else:
                full.append(index)

        added = self.buffer.add(updates, lane=lane, max_pending=max_pending, now_ms=self.now)

        assert added.full == tuple(full)
        for counter in ("accepted", "coalesced", "unchanged", "stale"):
            assert getattr(added, counter) == self.model.ledger[counter] - before[counter]

    @precondition(lambda self: self.model.shadow)
    @rule(data=st.data(), age=ages)
    def repeat_what_was_delivered(self, data: st.DataObject, age: int | None) -> None:
        user = data.draw(st.sampled_from(sorted(self.model.shadow)))
        name, (value, _) = data.draw(st.sampled_from(sorted(self.model.shadow[user].items(), key=str)))
        self.add([(user, {name: "again" if value == UNKNOWN else value}, age)], "live", 0)

    def _note(self, update: Update) -> None:
        for name, value in update.attrs.items():
            known = self.newest.get((update.user, name))
            version = update.occurred_ms or max(self.now, known[1] if known else 0)
            if known is None or version >= known[1]:
                self.newest[update.user, name] = (value, version)

    @rule(target=tickets, size=st.integers(1, 3))
    def tick(self, size: int) -> Any:
        tick = self.buffer.tick(
            size=size, linger=LINGER_MS / 1000, ticket_ttl=10**6, quota=3, horizon=1.0, now_ms=self.now
        )
        lanes, last = self.model.lanes, self.model.partial_at
        due = [at for at in lanes["delayed"].values() if at <= self.now]
        waiting = [*lanes["live"].values(), *lanes["backfill"].values()]
        wanted, rest = divmod(len(due) + len(waiting), size)
        oldest = min(waiting, default=10**15)
        lingers = last <= self.now < oldest + LINGER_MS and oldest < last + LINGER_MS
        partial = bool(rest) and (bool(due) or not lingers)
        wanted += partial
        assert len(tick.tickets) == max(0, min(wanted, 3) - len(self.model.tickets))
        if partial and tick.tickets and wanted == len(self.model.tickets) + len(tick.tickets):
            self.model.partial_at = self.now
        self.model.tickets |= set(tick.tickets)
        return multiple(*tick.tickets)

    @rule(target=batches, size=st.integers(1, 3))
    def claim_without_waiting_for_a_turn(self, size: int) -> Any:
        ticket = buffer.new_batch_id()
        self.client.zadd(self.buffer._keys.tickets, {ticket: self.now})
        return self.claim(ticket, size)

    @rule(target=batches, ticket=consumes(tickets), size=st.integers(1, 3))
    def claim_for_a_ticket(self, ticket: BatchId, size: int) -> Any:
        return self.claim(ticket, size)

    def claim(self, ticket: BatchId, size: int) -> Any:
        expected = self.model.claim(ticket, size, self.now)

        batch = self.buffer.claim(ticket, size, now_ms=self.now)

        assert batch is not None
        assert [claimed.user for claimed in batch.users] == expected
        for claimed in batch.users:
            record = self.model.flight[claimed.user]
            assert claimed.attrs == {name: pair[0] for name, pair in record.values.items()}
            assert (claimed.attempts, claimed.since_ms) == (self.model.attempts(record), record.since)
            assert (claimed.suspect, claimed.unknown) == (record.suspect, record.unknown)
        self.sent[batch.id] = batch.users
        assert self.buffer.claim(ticket, size, now_ms=self.now) is None, "a ticket is good for one claim"
        return multiple(batch.id) if expected else multiple()

    @rule(
        target=ended,
        batch=batches,
        named=st.dictionaries(users, outcomes, max_size=5),
        rest=st.one_of(st.none(), outcomes),
        size=st.sampled_from([0, 1, 2]),
    )
    def settle(self, batch: BatchId, named: dict[str, Outcome], rest: Outcome | None, size: int) -> Any:
        successor = buffer.new_batch_id() if size else None
        for user in self.model.batches.get(batch, []):
            if isinstance(named.get(user, rest), Acked):
                for name, (_, version) in self.model.flight[user].values.items():
                    assert version >= self.delivered.get((user, name), 0), "an older value was delivered"
                    self.delivered[user, name] = version
        expected = self.model.settle(batch, named, rest, self.now)
        claimed_ms = self.model.claimed_at[batch]

        settled = self.buffer.settle(
            batch, named, rest=rest, claimed_ms=claimed_ms, successor=successor, size=size, now_ms=self.now
        )

        ready = len(self.model.lanes["live"]) + len(self.model.lanes["backfill"])
        goes_on = bool(expected and successor) and ready >= size * (len(self.model.tickets) + 1)
        assert settled == (None if expected is None else (expected, goes_on))
        if goes_on and successor:
            self.model.tickets.add(successor)

        return multiple() if batch in self.model.batches else batch

    @rule(batch=ended, named=st.dictionaries(users, outcomes, max_size=5), rest=outcomes)
    def settle_too_late(self, batch: BatchId, named: dict[str, Outcome], rest: Outcome) -> None:
        before = copy.deepcopy(self.model)

        assert self.buffer.settle(batch, named, rest=rest, now_ms=self.now) is None

        assert read(self.client, self.buffer) == before

    @rule(batch=ended)
    def a_late_call_lands(self, batch: BatchId) -> None:
        """A worker was frozen, sent its batch after it was taken over, and finds out."""
        late = {user.user: user.attrs for user in self.sent.get(batch, ())}
        expected = self.model.reassert(late, self.now)

        assert self.buffer.reassert(self.sent.get(batch, ()), now_ms=self.now) == expected

        # Whatever newer values it may have replaced are on their way again.
        for user, values in late.items():
            for name, value in values.items():
                given_up = name in self.model.dead.get(user, {}) or user not in self.model.shadow
                newest, _ = self.newest[user, name]
                if newest != value and not given_up:
                    assert name in self.model.pending[user].values

    @precondition(lambda self: self.model.dead)
    @rule(data=st.data())
    def redrive(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model.dead)), min_size=1, unique=True))
        worth = [self.model.redrive(user) for user in chosen]

        letters = {letter.user: letter.at_ms for letter in self.dead.find() if letter.user in chosen}
        assert self.dead.redrive({user: letters[user] for user in chosen} | {"nobody": 5}) == Redriven(
            len(chosen), worth.count(False)
        )

    @rule()
    def an_outage_ends(self) -> None:
        self.model.calm_at = self.now
        self.client.hset(self.buffer._keys.health, "calm_at", self.now)

    @rule(batch=batches)
    def extend(self, batch: BatchId) -> None:
        held = batch in self.model.batches
        if held:
            self.model.leases[batch] = self.now + LEASE_MS

        assert self.buffer.extend(batch, now_ms=self.now) == ("held" if held else "lost")

    @rule(target=ended)
    def reclaim(self) -> Any:
        expired = [(end, batch) for batch, end in self.model.leases.items() if end < self.now]

        reclaimed = self.buffer.reclaim(now_ms=self.now)

        if not expired:
            assert reclaimed is None
            return multiple()
        assert reclaimed == min(expired)[1]
        self.model.settle(reclaimed, {}, Snoozed(), self.now)
        return reclaimed

    @invariant()
    def all_is_well(self) -> None:
        found = read(self.client, self.buffer)
        assert found == self.model
        assert found.balanced()
        assert self.buffer.snapshot().balanced
        self._a_user_is_in_one_place(found)
        self._the_newest_value_is_the_one_kept(found)

    def _a_user_is_in_one_place(self, found: Model) -> None:
        places = [*found.lanes["live"], *found.lanes["backfill"], *found.lanes["delayed"], *found.flight]
        assert len(places) == len(set(places))
        assert found.pending.keys() <= set(places)
        assert set(found.flight) == {user for users in found.batches.values() for user in users}
        assert found.batches.keys() == found.leases.keys()

    def _the_newest_value_is_the_one_kept(self, found: Model) -> None:
        for (user, name), newest in self.newest.items():
            sources: list[Any] = [
                record.values for table in (found.pending, found.flight) if (record := table.get(user))
            ]
            sources += [{n: p for n, p in found.shadow.get(user, {}).items() if p[0] != UNKNOWN}]
            sources += [found.dead.get(user, {})]
            kept = next((source[name] for source in sources if name in source), None)
            assert kept == newest


def run_machine(client: redis.Redis, number: int | None = None, **how: Any) -> None:
    """Run the comparison, from a seed if one is given; raises what the first difference raises."""
    machine = type("Machine", (BufferMachine,), {"client": client})
    if number is not None:
        machine = seed(number)(machine)
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=40, **how))


@pytest.mark.timeout(300)
def test_the_buffer_does_what_the_model_does(wire: Wire) -> None:
    run_machine(wire, max_examples=drawn(120))


def search(client: redis.Redis) -> None:
    """Look for a difference in many short runs: each takes other paths, while a long one took 23 s to leave its own."""
    for number in (3, 1, 5, 4, *range(6, 160)):
        run_machine(client, number, max_examples=6, phases=[Phase.generate])


BUGS = of(MODEL)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", planted(BUGS))
def test_the_model_catches(bug: str, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_scripts(BUGS[bug], monkeypatch)

    with pytest.raises((AssertionError, redis.ResponseError, StopIteration, BaseExceptionGroup)):
        search(wire)
