"""One schedule, from a seed to a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import redis

from tests import history
from tests.conftest import SECRET_KEY, new_keys
from tests.fleet import Fleet, Request, StraightCall
from tests.history import Applied, Call, History, Offer, Violation
from tests.schedules.borders import Borders, has_borders
from tests.schedules.plan import APPLIED_WITHIN, Event, Plan, any_code, draw
from tests.schedules.wire import Wire
from tests.virtual import Process, World, terms_on_our_clock
from worker import ratelimit
from worker.delivery import loop
from worker.delivery.answers import Answer, Failure, NoReply, Reply, UserError
from worker.delivery.dispatcher import TERM, Dispatcher
from worker.delivery.loop import Delivery
from worker.models import BatchId, Update
from worker.ratelimit import RateLimiter
from worker.sandbox.simulator import Api, Quirks, at_once, never
from worker.state import buffer, leader, scripts
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys
from worker.state.leader import RETRY_AFTER
from worker.state.line import Line
from worker.state.quarantine import Quarantine

#: Attributes of updates without, and with event times; never mixed, since only one of both orders can be judged.
UNTIMED, TIMED = ("city", "name"), ("level", "tier")
#: Seconds after which a client gives up waiting for Redis (`socket_timeout` in `worker/runtime.py`).
SOCKET_TIMEOUT = 5.0
#: Seconds from the end of all trouble in which everything must be delivered, besides the waits that are
#: part of the plan: the longest until a probe, and until the last user has backed off.
DRAINED_WITHIN = 420.0
#: Seconds in which a worker that was asked to stop may finish (`terminationGracePeriod` and the like).
GRACE_PERIOD = 10.0


class ErrorReply(redis.ResponseError):
    """What Redis answers instead of running a command, while it is loading, full, busy or a replica."""


_LOST_REPLIES = (redis.ConnectionError, redis.TimeoutError, ErrorReply)
_ERROR_REPLIES = (
    "READONLY",
    "OOM",
    "NOREPLICAS",
    "BUSY",
    "MISCONF",
    "MASTERDOWN",
    "LOADING",
    "NOAUTH",
    "CLUSTERDOWN",
)
#: What something else may leave in place of a record.
_DAMAGE = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b'{"a":{"level":[1,2]},"t":5}',
    b'{"a":{"level":["x",1e999]},"t":5}',
)


class BrokerDown(Exception):
    """Raised under publishing a ticket."""


@dataclass(eq=False, slots=True)
class Worker(Process):
    """One process of the fleet."""

    number: int = 0
    stopping: bool = False
    #: Whether it has compared its clock with that of Redis, which it does with its first permit.
    knows_the_clock: bool = False


@dataclass(slots=True)
class Result:
    """What became of a schedule."""

    seed: int
    digest: str
    scripts: int
    requests: int
    faults: Counter[str]
    violations: list[Violation]
    #: Every step, when it was asked for: time, who, what.
    trace: list[str]


@dataclass
class Schedule(Fleet):
    """The fleet of one schedule, and all that happens to it."""

    wire: Wire = field(kw_only=True)
    plan: Plan = field(kw_only=True)
    seed: int = field(kw_only=True)
    telling: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        self.troubled = True
        self.trace: list[str] = []
        self.faults: Counter[str] = Counter()
        self.scripts = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._dice = random.Random(f"{self.seed} dice")
        self._rates = {
            where: (sum(kinds.values()), [*kinds], [*kinds.values()])
            for where, kinds in self.plan.faults.items()
        }
        #: How calls fail while the service is out.
        self._outage: list[str] = []
        #: Users whose record somebody has damaged: what was in it may be in the quarantine. And those of whom something else
        #: than updates was damaged: what was delivered, or given up, is not known any more.
        self._damaged: set[str] = set()
        self._forgotten: set[str] = set()
        #: The places of offers that were made to the broker, and are accepted at some later time.
        self._in_transit: set[int] = set()
        self.borders = Borders(self) if has_borders(self.seed) else None
        #: Users that the API refuses at present, and with what code.
        self._codes: dict[str, int] = {}
        self._offers: list[Offer] = []
        self._dropped: set[tuple[str, str, str | None]] = set()
        self._ledgers: list[dict[str, int]] = []
        self._values, self._events_ms = 0, set[int]()
        self._last: dict[tuple[str, str], str | None] = {}
        self.issued = 0
        self._workers: list[Worker] = []
        self._writing = self.plan.writers
        self._operator = Process("operator")
        #: Commands that their clients have given up, and that still come to Redis.
        self._underway = 0
        self._jumped_at = -math.inf
        #: Stretches of time in which the quota is not judged; see `_note_permit`.
        self._blind: list[tuple[float, float]] = []
        #: Stretches of time whose updates may be lost with a server, and whether a replica lags now.
        self._losable: list[tuple[float, float]] = []
        self._lags = False

    # Telling.

    def tell(self, what: str) -> None:
        """Note a step: for the digest, and for a reader who asked."""
        line = f"{self.world.monotonic():.6f} {self.world.running.name}: {what}"
        self._digest.update(line.encode())
        if self.telling:
            self.trace.append(line if len(line) < 400 else f"{line[:400]}...")

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def _strikes(self, where: str) -> str | None:
        """The fault that strikes now, if any."""
        if not self.troubled:
            return None
        total, kinds, weights = self._rates[where]
        if self._dice.random() >= total:
            return None
        (kind,) = self._dice.choices(kinds, weights)
        ends = kind in ("kill", "freeze", "kill at the socket")
        if ends and not isinstance(self.world.running.process, Worker):
            return None
        self.faults[f"{where}: {kind}"] += 1
        self.tell(f"FAULT {where}: {kind}")
        return kind

    def _interrupt(self, kind: str | None) -> None:
        """What can happen to a process anywhere."""
        worker = self.world.running.process
        if kind == "kill" and isinstance(worker, Worker):
            self.kill(worker)
            self.world.check()
        elif kind == "freeze" and worker:
            self.world.freeze(worker, self._freeze_length())
            self.world.check()

    def _freeze_length(self) -> float:
        lease = self.limits.lease
        return self._dice.choice([self._dice.uniform(0, 2), self._dice.uniform(0, lease), 1.2 * lease])

    # Redis (a `Stage`).

    def step(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one script, with what goes wrong before and after it."""
        world = self.world
        world.check()
        if world.running is world.main:
            # Those who look on are not part of it.
            return run()
        self.scripts += 1
        match self._strikes("before a script"):
            case "refused":
                raise redis.ConnectionError("refused")
            case "error reply":
                raise ErrorReply(f"{self._dice.choice(_ERROR_REPLIES)} on purpose")
            case "ran later":
                self._run_later(name, run)
            case "slow":
                world.sleep(self._delay())
            case "others first":
                world.pause()
            case kind:
                self._interrupt(kind)
        reply = run()
        self.tell(f"{name} {_told_reply(name, reply)!r}")
        if name == "reserve":
            self._note_permit()
        if self.borders:
            self.borders.note(name, reply)
        match self._strikes("after a script"):
            case "reply lost":
                raise self._dice.choice([redis.ConnectionError, redis.TimeoutError])("the reply is lost")
            case "slow":
                world.sleep(self._delay())
            case "others first":
                world.pause()
            case kind:
                self._interrupt(kind)
        return reply

    def us(self) -> int:
        return self.world.us()

    def _note_permit(self) -> None:
        """Notes when a process could not know that the clock of Redis has jumped.

        After a jump the slots of before and after overlap for one patience, and who sees the jump makes all
        wait for so long. A process that asks for its first permit just then has nothing to compare with. No
        script can tell such a jump from a quiet time, either.
        """
        worker = self.world.running.process
        if isinstance(worker, Worker) and not worker.knows_the_clock:
            worker.knows_the_clock = True
            overlap = self.limits.patience + 1 / self.limits.quota
            if self.world.monotonic() < self._jumped_at + overlap:
                self._blind.append((self._jumped_at - 1, self._jumped_at + overlap + 1))

    def _delay(self) -> float:
        return self._dice.choice([0.001, 0.01, 0.1, 1.0, 0.45 * SOCKET_TIMEOUT]) * self._dice.random()

    def _run_later(self, name: str, run: Callable[[], Any]) -> None:
        """The command is on its way for longer than its client waits."""
        later = SOCKET_TIMEOUT + self._dice.uniform(0, 10)

        self._underway += 1

        def arrive() -> None:
            self._underway -= 1
            with contextlib.suppress(redis.exceptions.NoScriptError):
                self.tell(f"{name}, sent {later:.3f} s ago: {run()!r}")

        self.world.later(later, arrive)
        self.world.sleep(SOCKET_TIMEOUT)
        raise redis.TimeoutError("no reply yet")

    def expires(self, key: str, seconds: float) -> None:
        self.world.later(seconds, lambda: self.wire.bare("DEL", key))

    # The network, and the API.

    def prepare(self, call: StraightCall) -> NoReply | None:
        dice = self._dice
        call.fault = self._strikes("before a request")
        if call.fault == "unreachable":
            self.world.sleep(self.limits.connect_timeout * dice.random())
            return NoReply(Failure.UNREACHABLE, sent=False)
        if call.fault == "slow to connect":
            self.world.sleep(self.limits.connect_timeout * dice.random())
        else:
            self._interrupt(call.fault)
        return None

    def send(self, call: StraightCall) -> None:
        # Between the last look at the lease and the socket only a kill strikes: after a pause right here an old value is
        # applied late, and then the newest again. A story of its own shows that.
        if call.fault == "kill at the socket":
            self._interrupt("kill")
        if call.fault != "never arrived":
            call.request = self.arrive(call.url, call.body)

    def read(self, call: StraightCall) -> Answer:
        request = call.request
        if request is None:
            return self._no_reply(Failure.BROKEN)
        fault = self._dice.choice(self._outage) if self._outage else self._strikes("a request")
        answer = self._answer(request, fault)
        self.tell(f"{request.command} {','.join(request.users)}: {_told(answer)}")
        self._interrupt(self._strikes("after a request"))
        if not isinstance(answer, NoReply):
            self.world.sleep(self.latency)
        return answer

    def _no_reply(self, failure: Failure, status: int | None = None) -> NoReply:
        slow = failure is Failure.TIMEOUT
        self.world.sleep(self.limits.read_timeout if slow else self.latency)
        return NoReply(failure, http_status=status)

    def _answer(self, request: Request, fault: str | None) -> Answer:
        world, dice, codes = self.world, self._dice, self._codes
        match fault:
            case "applied, reply lost":
                self._by_the_rules(request, codes)
                return self._no_reply(Failure.BROKEN)
            case "applied, reply too late":
                self._by_the_rules(request, codes)
                return self._no_reply(Failure.TIMEOUT)
            case "timeout":
                return self._no_reply(Failure.TIMEOUT)
            case "applied late, reset" | "applied late, timeout" | "applied late, 502":
                late = APPLIED_WITHIN * dice.random()

                def write(write: Callable[[], None]) -> None:
                    def apply() -> None:
                        self.tell(f"the call of {request.at:.6f} is applied")
                        write()

                    world.later(late, apply)

                self._by_the_rules(request, codes, write)
                match fault.rpartition(" ")[2]:
                    case "reset":
                        return self._no_reply(Failure.BROKEN)
                    case "502":
                        return self._no_reply(Failure.HTTP_STATUS, 502)
                return self._no_reply(Failure.TIMEOUT)
            case "truncated":
                self._by_the_rules(request, codes)
                return self._no_reply(Failure.UNREADABLE)
            case "502":
                self._by_the_rules(request, codes, dice.choice([at_once, never]))
                return self._no_reply(Failure.HTTP_STATUS, 502)
            case "code":
                return Reply(any_code(dice), "on purpose")
            case "internal error":
                return Reply(91000)
            case "429":
                wait = dice.choice([0.0, 0.5, 3.0])
                return NoReply(Failure.HTTP_STATUS, http_status=429, retry_after=wait)
            case "odd answer":
                answer = self._by_the_rules(request, codes)
                applied = isinstance(answer, Reply) and not answer.code and not answer.errors
                return self._odd_answer(request) if applied else answer
            case "code for some":
                some = [user for user in request.users if dice.random() < 0.3]
                return self._by_the_rules(request, codes | {user: any_code(dice) for user in some})
            case "slow":
                answer = self._by_the_rules(request, codes)
                world.sleep(0.9 * self.limits.read_timeout * dice.random())
                return answer
        return self._by_the_rules(request, codes)

    def _odd_answer(self, request: Request) -> Answer:
        """What only a gateway, or a defect, answers; the call was applied."""
        dice, users = self._dice, request.users
        if not users or dice.random() < 0.5:
            return self._no_reply(Failure.HTTP_STATUS, dice.choice([204, 302, 418, 999]))
        error = UserError(dice.choice([-1, 10**400, -5]), "\udc80" + "x" * 5000)
        return Reply(0, errors={dice.choice([*users, "nobody"]): error})

    def _damage(self) -> None:
        """Somebody else's program writes over a record."""
        k, dice = self.buffer._keys, self._dice
        table = dice.choice([k.pending, k.flight, k.shadow, k.dead, k.batches])
        fields: list[bytes] = sorted(self.wire.bare("HKEYS", table))
        if fields:
            field = dice.choice(fields)
            self.wire.bare("HSET", table, field, dice.choice(_DAMAGE))
            if table == k.pending:
                self._damaged.add(field.decode())
            elif table != k.batches:
                self._forgotten.add(field.decode())
            self.tell(f"damaged {field!r} in {table.rpartition(':')[2]}")

    def _by_the_rules(
        self,
        request: Request,
        codes: dict[str, int],
        perform: Callable[[Callable[[], None]], object] = at_once,
    ) -> Answer:
        answer = self.answer(request, perform=perform, user_codes=codes)
        if self.api.quirks.bad_user == "silent" and isinstance(answer, Reply) and not answer.code:
            # The API says that it did what it did not: nobody can know better.
            for entry in request.body.get("UserAttrs", ()):
                user, attrs = entry["To_Account"], entry["Attrs"]
                if user in codes:
                    values = attrs if isinstance(attrs, dict) else dict.fromkeys(attrs)
                    self._dropped |= {(user, name, value) for name, value in values.items()}
        return answer

    # Processes.

    def start(self, number: int, name: str) -> None:
        """A process begins: its threads, and its dispatcher."""
        worker = Worker(name, number=number)
        self._workers[number : number + 1] = [worker]
        rng = random.Random(f"{self.seed} {name} {self.world.monotonic()}")
        settings = self.plan.settings[number]
        delivery = self.new_delivery(self.world, rng, lambda: worker.stopping, settings)
        for thread in range(self.plan.threads):
            self.world.spawn(lambda: self._deliver(delivery, worker), f"{name}.{thread}", worker)
        if self.borders:
            consume = self.borders.consume
            self.world.spawn(lambda: consume(worker), f"{name}.consumer", worker)
        dispatcher = self.new_dispatcher(name)
        self.world.spawn(lambda: self._dispatch(dispatcher, worker), f"{name}.dispatcher", worker)

    def kill(self, worker: Worker) -> None:
        """A process ends where it is; another one begins soon, which may have the same name."""
        if worker.dead:
            return
        name = worker.name if self._dice.random() < 0.5 else f"{worker.name}'"
        self.world.later(self._dice.uniform(0.1, 8), lambda: self.start(worker.number, name))
        self.tell(f"{worker.name} is killed")
        self.world.kill(worker)

    def _terminate(self, worker: Worker) -> None:
        """A process is asked to end, then killed."""
        worker.stopping = True
        self.world.later(GRACE_PERIOD, lambda: self.kill(worker))

    def _deliver(self, delivery: Delivery, worker: Worker) -> None:
        while True:
            while not self.tickets:
                self.world.park()
            ticket = self.tickets.pop(0)
            try:
                summaries = delivery.carry(ticket)
            except _LOST_REPLIES as error:
                self.tell(f"deliver {ticket}: {type(error).__name__}")
            else:
                self.tell(f"deliver {summaries}")

    def _dispatch(self, dispatcher: Dispatcher, worker: Worker) -> None:
        # As `Dispatcher.run` does, but ever more slowly while there is nothing to do: turns that find
        # nothing are most of what a schedule would cost.
        wait = shortest = self.plan.turn
        while not worker.stopping:
            issued = self.issued
            try:
                pause = dispatcher.turn()
            except (*_LOST_REPLIES, BrokerDown):
                pause = RETRY_AFTER
            wait = shortest if self.issued != issued else min(2 * wait, 0.9 * TERM)
            self.world.sleep(max(pause, wait))
        with contextlib.suppress(*_LOST_REPLIES):
            dispatcher.leader.step_down()

    def _publish(self, ticket: BatchId) -> None:
        self.issued += 1
        match self._strikes("a ticket"):
            case "lost":
                return
            case "twice":
                super()._publish(ticket)
                self.world.later(self._dice.uniform(0, 20), lambda: super(Schedule, self)._publish(ticket))
            case "late":
                self.world.later(self._dice.uniform(0, 15), lambda: super(Schedule, self)._publish(ticket))
            case "broker down":
                raise BrokerDown
            case _:
                super()._publish(ticket)

    # Writers and operators.

    def write(self, number: int) -> None:
        """One producer: offers updates, and notes what it was told."""
        plan, rng = self.plan, random.Random(f"{self.seed} writer {number}")
        for _ in range(plan.updates):
            self.world.sleep(rng.uniform(0, 2 * plan.gap))
            updates = [self._update(rng) for _ in range(rng.randint(1, plan.users_a_call))]
            lane = "backfill" if rng.random() < 0.2 else "live"
            # A writer in doubt may try again.
            while not self._offer(updates, lane) and rng.random() < 0.5:
                self.world.sleep(rng.random())
        self._writing -= 1

    def _update(self, rng: random.Random) -> Update:
        plan = self.plan
        user = f"u{int(plan.users * rng.random() ** 2):03}"
        timed = rng.random() < plan.timed
        names = rng.sample(TIMED if timed else UNTIMED, rng.choice([1, 1, 2]))
        return Update(
            user, {name: self._value(user, name, rng) for name in names}, self._event_ms(rng) if timed else 0
        )

    def _value(self, user: str, name: str, rng: random.Random) -> str | None:
        """A value of its own, a removal, or once more the one that was offered last."""
        kind = rng.random()
        if kind < 0.1 and (user, name) in self._last:
            return self._last[user, name]
        self._values += 1
        self._last[user, name] = None if kind < 0.25 else str(self._values)
        return self._last[user, name]

    def _event_ms(self, rng: random.Random) -> int:
        late = 20_000 * rng.random() if rng.random() < self.plan.out_of_order else 0.0
        event_ms = int(self.world.wall() * 1000 - late)
        while event_ms in self._events_ms:
            event_ms += 1
        self._events_ms.add(event_ms)
        return event_ms

    def _offer(self, updates: Sequence[Update], lane: str) -> bool:
        """Whether there was an answer."""
        began, told, full = self.world.monotonic(), True, frozenset[int]()
        try:
            added = self.buffer.add(updates, lane=lane, max_pending=self.plan.max_pending)
            # While the clock is set back, event times are too far ahead of it.
            full = frozenset(added.full) | {index for index, _ in added.refused}
        except _LOST_REPLIES:
            told = False
        ended = self.world.monotonic() if told else math.inf
        for index, update in enumerate(updates):
            answer = history.Answer.ACCEPTED if told else history.Answer.DOUBT
            if index in full:
                answer = history.Answer.REFUSED
            event_ms = update.occurred_ms or None
            for name, value in update.attrs.items():
                self._offers.append(Offer(update.user, name, value, began, ended, answer, event_ms))
            self.tell(f"offered {update.user} {update.attrs} {event_ms}: {answer}")
        return told

    def operate(self) -> None:
        """A person who looks at dead letters, pauses and opens the line."""
        rng = random.Random(f"{self.seed} operator")
        while True:
            self.world.sleep(rng.uniform(2, 20))
            with contextlib.suppress(*_LOST_REPLIES):
                match rng.choice(["redrive", "redrive", "resume", "pause"]):
                    case "redrive":
                        found = {letter.user: letter.at_ms for letter in self.letters.find()}
                        self.letters.redrive(dict(list(found.items())[: rng.randint(0, 10)]))
                    case "resume":
                        self.line.resume()
                    case "pause" if rng.random() < 0.3:
                        self.line.pause("by hand")
                        self.world.sleep(rng.uniform(0, 5))
                        self.line.resume()

    # What happens at times of its own.

    def live(self) -> None:
        """The trouble: everything that the plan has, in its order."""
        # Somebody with the right quota has been here; it is remembered while the others are busy.
        RateLimiter(
            self.wire, self.buffer._keys, quota=self.limits.quota, patience=0.0, clock=self.world
        ).reserve()
        for number in range(self.plan.processes):
            self._workers.append(Worker(""))
            self.start(number, f"w{number}")
        for number in range(self.plan.writers):
            self.world.spawn(lambda number=number: self.write(number), f"writer{number}")  # type: ignore[misc]
        self.world.spawn(self.operate, "operator", self._operator)
        if self.borders:
            self.borders.begin()
        begin = self.world.monotonic()
        for event in self.plan.events:
            self.world.sleep(begin + event.at - self.world.monotonic())
            self.tell(f"EVENT {event}")
            if event.kind != "look":
                self.faults[event.kind] += 1
            self._happen(event, event.until - event.at)
        self.world.sleep(begin + self.plan.trouble - self.world.monotonic())
        while self._writing or (self.borders and self.borders.writing):
            self.world.sleep(1)

    def _happen(self, event: Event, seconds: float) -> None:
        world, api, rng = self.world, self.api, self._dice
        match event.kind:
            case "outage":
                ways = ["502", "timeout", "internal error"]
                if not self.plan.jumps:
                    ways += ["applied late, reset", "applied late, 502"]
                self._outage = rng.sample(ways, rng.randint(1, 2))
                world.later(seconds, self._outage.clear)
            case "quota lowered":
                api.quirks.quota = max(1, round(self.limits.quota * event.size))
                world.later(seconds, self._restore_quota)
            case "signatures expired":
                api.quirks.signatures_from = int(world.wall())
            case "key rotated":
                key = f"{SECRET_KEY[:-2]}{len(self.key):02}" if self.key == SECRET_KEY else SECRET_KEY
                api.rotate_key(key)
                world.later(seconds / 2, lambda: setattr(self, "key", key))
            case "no administrator":
                api.administrators.clear()
                world.later(seconds, lambda: api.administrators.add("administrator"))
            case "bad users":
                share = event.size**3
                users = [f"u{number:03}" for number in range(self.plan.users) if rng.random() < share]
                self._codes = dict.fromkeys(users, event.code)
                world.later(seconds, self._codes.clear)
            case "clock jump":
                world.jumped_us += round(event.size * 1e6)
                self._jumped_at = world.monotonic()
            case "script flush":
                self.wire.flush_scripts()
            case "damage":
                self._damage()
            case "promotion" if not self._lags:
                self._promote(event.size)
            case "emptied" if not self._lags and len({quota for quota, _ in self.plan.settings}) == 1:
                # Else the lowest quota that anybody has named is forgotten, too, until it is named again.
                self._losable.append((-math.inf, world.monotonic()))
                _forget(self.wire, self.buffer._keys)
            case "terminate":
                self._terminate(rng.choice(self._workers))
            case "freeze":
                world.freeze(rng.choice(self._workers), self._freeze_length())
            case "look":
                self._look()

    def _promote(self, lag: float) -> None:
        """A replica that is so many seconds behind becomes the primary."""
        wire, since = self.wire, self.world.monotonic()
        keys = _all_keys(self.buffer._keys)
        copy = {key: packed for key in keys if (packed := wire.bare("DUMP", key))}
        self._lags = True

        def promote() -> None:
            self.tell("a replica is promoted")
            wire.bare("UNLINK", *keys)
            for key, packed in copy.items():
                wire.bare("RESTORE", key, 0, packed)
            # What scripts remember is the id of the one before.
            wire.bare("HSET", self.buffer._keys.server, "id", f"before {since}")
            self._losable.append((since, self.world.monotonic()))
            self._lags = False

        self.world.later(lag, promote)

    def _restore_quota(self) -> None:
        self.api.quirks.quota = self.limits.quota

    def _look(self) -> bool:
        """Read the ledger; whether everything is delivered."""
        snapshot = self.snapshot()
        counts = {"pending": snapshot.pending, "in_flight": snapshot.in_flight}
        self._ledgers.append({**snapshot.ledger, **counts})
        taken = not self.borders or self.borders.is_empty()
        return taken and not snapshot.pending and not snapshot.in_flight

    def mend(self) -> None:
        """The end of all faults. What is late, asleep or about to start comes by itself."""
        self.tell("MENDED")
        self.troubled = False
        self._outage = []
        self._codes = {}
        self._restore_quota()
        self.api.administrators.add("administrator")
        self.world.kill(self._operator)
        while self._underway or self._lags:
            self.world.sleep(1)

    def drain(self) -> None:
        """Let everything be delivered; raises `Stuck` when it is not."""
        end = self.world.monotonic() + DRAINED_WITHIN + 2 * self.limits.lease
        step = 1.0
        while not self._look():
            if self.world.monotonic() > end:
                raise Stuck(f"{self.snapshot()} {self.line.read()}")
            state = self.line.read()
            if state.state == "paused" or state.kind == "data":
                # A person must.
                self.line.resume()
            self.world.sleep(step)
            step = min(1.3 * step, 20)

    def _judged(self, offer: Offer, *, in_transit: bool) -> Offer:
        """What was accepted while a replica lagged may be lost, whatever its writer was told.

        What was in a damaged record is in the quarantine, neither lost nor delivered.
        """
        ended = math.inf if in_transit else offer.ended
        if offer.answer is history.Answer.REFUSED:
            return offer
        if any(offer.began <= until and ended >= since for since, until in self._losable):
            return dataclasses.replace(offer, answer=history.Answer.LOSABLE)
        if offer.user in self._set_aside:
            return dataclasses.replace(offer, answer=history.Answer.SET_ASIDE)
        return offer

    @functools.cached_property
    def _set_aside(self) -> set[str]:
        """Users of whom a record was damaged, and found."""
        found = {entry.user for entry in Quarantine(self.wire, self.buffer._keys).find()}
        return self._forgotten | (self._damaged & found)

    def judge(self) -> list[Violation]:
        kept = {
            (letter.user, name, value)
            for letter in self.letters.find()
            for name, (value, _) in letter.values.items()
        }
        seen = History(
            offers=[
                self._judged(offer, in_transit=place in self._in_transit)
                for place, offer in enumerate(self._offers)
            ],
            applied=[
                Applied(write.at, write.request, write.user, name, value)
                for write in self.api.writes
                for name, value in write.attrs.items()
            ],
            calls=[
                Call(
                    request.at,
                    tuple(request.users),
                    bool(self.limits.read_quota) and request.command.endswith("get_attr"),
                )
                for request in self.requests
                if not any(begin <= request.at <= end for begin, end in self._blind)
            ],
            ledgers=list(self._ledgers),
            kept=kept | self._dropped,
            quota=self.limits.quota,
            batch_size=self.limits.batch_size,
        )
        found = history.check(seen)
        k = self.buffer._keys
        if left := [
            key for key in (k.live, k.backfill, k.delayed, k.batches, k.leases) if self.redis.exists(key)
        ]:
            found.append(Violation("leak", f"something is left in {', '.join(left)}", ()))
        return found


class Stuck(Exception):
    """Raised when work is left after all trouble has ended."""


def _told_reply(name: str, reply: Any) -> Any:
    """What a script answered, without what comes from the server's own clock: that is another time in each run."""
    if name == "XADD":
        return ""
    return reply[1:] if name == "recall" else reply


def _told(answer: Answer) -> str:
    if isinstance(answer, NoReply):
        return f"no reply, {answer.failure} {answer.http_status or ''}"
    errors = {user: error.code for user, error in answer.errors.items()}
    return f"{answer.code} {errors or ''}"


def run(seed: int, wire: Wire, *, telling: bool = False) -> Result:
    """Play the schedule of a seed; `telling` keeps every step."""
    plan = draw(random.Random(f"{seed} plan"))
    world, keys = World(f"{seed} world"), new_keys()
    with _deterministic(seed), _loaded_once(wire), terms_on_our_clock():
        # Not drawn, so that the other schedules stay as they are.
        apart = seed % 4 == 2
        limits = replace(plan.limits, read_quota=plan.limits.quota if apart else 0)
        quirks = Quirks(**plan.quirks, reads="apart" if apart else "shared")
        state = Buffer(
            wire,
            keys,
            lease=limits.lease,
            shadow_ttl=limits.shadow_ttl,
            shadow_max_users=limits.shadow_max_users,
        )
        schedule = Schedule(
            wire,
            world,
            Api(keys.sdkappid, SECRET_KEY, names=UNTIMED + TIMED, quirks=quirks, wall=world.wall),
            state,
            Line(wire, keys),
            DeadLetters(wire, keys),
            AttributeNames(wire, keys, world),
            limits,
            plan.latency,
            wire=wire,
            plan=plan,
            seed=seed,
            telling=telling,
        )
        wire.stage = schedule
        violations = []
        try:
            violations = _play(schedule)
        finally:
            wire.stage = None
            wire.restore_scripts()
            _forget(wire, keys)
            if schedule.borders:
                wire.bare("UNLINK", *schedule.borders.broker_keys)
    return Result(
        seed,
        schedule.digest,
        schedule.scripts,
        len(schedule.requests),
        schedule.faults,
        violations,
        schedule.trace,
    )


def _play(schedule: Schedule) -> list[Violation]:
    try:
        try:
            schedule.live()
            schedule.mend()
            schedule.drain()
            # Dead letters that are put back are delivered like all others.
            schedule.letters.redrive(schedule.letters.choose())
            schedule.drain()
            schedule.world.sleep(APPLIED_WITHIN)
            # A worker that was frozen may have woken up meanwhile, and sent newer values again.
            schedule.drain()
            return schedule.judge()
        finally:
            schedule.world.end()
    except Stuck as stuck:
        return [Violation("stuck", f"not delivered in time: {stuck}", ()), *schedule.judge()]
    except Exception as error:
        return [Violation("crash", repr(error), tuple(traceback.format_exc().splitlines()))]


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """What the product takes from chance comes from the seed."""
    made = 0

    def new_batch_id() -> BatchId:
        nonlocal made
        made += 1
        return BatchId(f"batch{made:06}-0000")

    with (
        mock.patch.object(buffer, "new_batch_id", new_batch_id),
        mock.patch.object(loop, "new_batch_id", new_batch_id),
        mock.patch.object(leader, "random", random.Random(f"{seed} dispatchers")),
        mock.patch.object(ratelimit, "random", random.Random(f"{seed} limiters")),
    ):
        yield


_texts: dict[tuple[Callable[[str], str], str], str] = {}


@contextlib.contextmanager
def _loaded_once(wire: Wire) -> Iterator[None]:
    """Scripts come from the wire, which keeps them; reading the files is a good part of a schedule, too."""
    source, as_written = scripts.source, scripts.as_written

    def once(name: str) -> str:
        if (as_written, name) not in _texts:
            _texts[as_written, name] = source(name)
        return _texts[as_written, name]

    def load(_: redis.Redis, name: str) -> scripts.Script:
        return wire.load(name, scripts.source(name))

    with mock.patch.object(scripts, "source", once), mock.patch.object(scripts, "load", load):
        yield


_KEYS = [name for name, kept in vars(Keys).items() if isinstance(kept, property) and name != "pattern"]


def _all_keys(keys: Keys) -> list[str]:
    return [*(getattr(keys, name) for name in _KEYS), f"{keys.dispatcher}:ends"]


def _forget(wire: Wire, keys: Keys) -> None:
    wire.bare("UNLINK", *_all_keys(keys))
