"""What else goes on in one schedule of five: Celery's messages, imports, an audit that repairs, a second person.

Each is the product's own code on the schedule's clock. Drawn from dice of its own, so that the other schedules
stay as they are.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import redis

from tests.history import Answer, Offer
from tests.intake.messages import MALFORMED, encoded, sealed
from worker.errors import CallFailed
from worker.intake import celery_queue
from worker.intake.brokers import Queue, RedisQueue
from worker.intake.celery_queue import QueueConsumer
from worker.models import Update
from worker.producer import Producer
from worker.ratelimit import DELIVERS, RateLimiter, reads
from worker.readback.audit import Examiner
from worker.readback.judgement import Verdict
from worker.readback.reader import Reader, ReadingStopped
from worker.readback.repair import Repair
from worker.state.buffer import Added, Guard, Lead
from worker.state.refused import Refused
from worker.state.shadow import Shadow

if TYPE_CHECKING:
    from tests.schedules.run import Schedule, Worker

#: One schedule in so many has all of this, and which one.
EVERY, WHICH = 5, 4
#: Seconds between two turns of a consumer that finds nothing.
SLOWEST = 2.0


#: What the audit of a schedule sends again.
LOST: tuple[Verdict, ...] = ("lost",)

#: As it is in every run: without the ids that come from chance.
_ID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
RUBBISH = [
    _ID.sub(b"1", message if isinstance(message, bytes) else encoded(message))
    for message in MALFORMED.values()
]


def has_borders(seed: int) -> bool:
    return seed % EVERY == WHICH


class AtOnce:
    """In place of the consumer's second thread: whoever takes turns cannot do two things at a time."""

    def submit(self, call: Callable[..., Added], *args: Any, **how: Any) -> Future[Added]:
        done: Future[Added] = Future()
        try:
            done.set_result(call(*args, **how))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        pass


class _Queue(RedisQueue):
    """The broker's queue; waiting is the schedule's."""

    def __init__(self, borders: Borders) -> None:
        wire: Any = borders.schedule.wire
        super().__init__(wire, borders.lists, name=borders.name, close=lambda: None)
        self._world = borders.schedule.world

    def wait(self, seconds: float) -> None:
        self._world.sleep(seconds)


class _Producer:
    """What the consumer and the repair need of a `Producer`, on the schedule's connection and clock."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def add(
        self,
        updates: Sequence[Update],
        *,
        lane: Any = "live",
        as_of_ms: int = 0,
        lead: Lead | None = None,
        way: Any = None,
        again: bool = False,
    ) -> Added:
        guard = Guard(as_of_ms=as_of_ms, lead=lead, makes_room=lead is not None, again=again)
        limit = self._schedule.plan.max_pending
        return self._schedule.buffer.add(updates, lane=lane, max_pending=limit, guard=guard)

    def names(self) -> frozenset[str]:
        return frozenset()

    def now_ms(self) -> int:
        return self._schedule.world.us() // 1000

    def has_room(self, share: float = 0.0, *, makes_room: bool = False) -> bool:
        return self._schedule.buffer.has_room(self._schedule.plan.max_pending, share)


class Borders:
    """All of it, for one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.keys = schedule, schedule.buffer._keys
        self.name = f"queue:{self.keys.sdkappid}"
        self.lists = [f"{self.name}{step}" for step in ("", ":3", ":6", ":9")]
        self.rng = random.Random(f"{schedule.seed} borders")
        #: How many clients still write.
        self.writing = 0
        self._messages = 0
        #: The offers in messages that nobody has taken yet.
        self._untaken: dict[bytes, list[int]] = {}
        self._taken: Any = ()
        #: How often the importer has asked for the same.
        self._tried = 0
        self._producer = cast(Producer, _Producer(schedule))

    @property
    def broker_keys(self) -> list[str]:
        return [
            *self.lists,
            f"{self.name}.taken",
            f"{self.name}.taken_at",
            f"{self.keys.queue_consumer}:ends",
        ]

    def begin(self) -> None:
        """Everything but the consumers, which are the workers'."""
        world, person = self.schedule.world, self.schedule._operator
        for body in (self.client, self.importer):
            self.writing += 1
            world.spawn(self._until_done(body), body.__name__)
        world.spawn(self.second_person, "second person", person)
        world.spawn(self.auditor, "auditor", person)

    def _until_done(self, body: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            body()
            self.writing -= 1

        return run

    def is_empty(self) -> bool:
        """Whether no message is left."""
        wire = self.schedule.wire
        left = sum(wire.bare("LLEN", key) for key in [*self.lists, f"{self.name}.taken"])
        return not left and not wire.bare("ZCARD", self.keys.scheduled)

    # Celery's messages.

    def consume(self, worker: Worker) -> None:
        """The consumer of one worker."""
        schedule = self.schedule
        wire: Any = schedule.wire

        def open_queue() -> Queue:
            return cast(Queue, _Queue(self))

        consumer = QueueConsumer(
            wire,
            self.keys,
            self._producer,
            Refused(wire, self.keys),
            schedule.world,
            open_queue,
            worker=worker.name,
        )
        consumer._adder = cast(Any, AtOnce())
        wait = celery_queue.BLOCK
        while not worker.stopping:
            before = schedule.scripts
            pause = consumer._try()
            # As the dispatcher: ever more slowly while there is nothing.
            wait = celery_queue.BLOCK if schedule.scripts > before + 3 else min(1.5 * wait, SLOWEST)
            schedule.world.sleep(max(pause, wait))

    def client(self) -> None:
        """A Celery client: for users of its own without event times, for others with; later, expiring, or rubbish."""
        schedule, rng, plan = self.schedule, self.rng, self.schedule.plan
        for _ in range(plan.updates):
            schedule.world.sleep(rng.uniform(0, 2 * plan.gap))
            if rng.random() < 0.3:
                self._put(rng.choice(RUBBISH))
            updates = [schedule._update(rng) for _ in range(rng.randint(1, plan.users_a_call))]
            if plan.limits.shadow_ttl < plan.trouble:
                # A message that waits for room comes late, too: what overtook it may be forgotten by then.
                updates = [Update(f"q{one.user}", one.attrs, one.occurred_ms) for one in updates]
            # Without an event time, what is to be accepted later counts as of then: who wrote meanwhile cannot know.
            timed = [update for update in updates if update.occurred_ms]
            self._send([update for update in updates if not update.occurred_ms], {}, rng.choice([0, 0, 0, 3]))
            self._send(timed, self._how(), rng.choice([0, 0, 0, 3]))

    def _how(self) -> dict[str, str]:
        now, rng = self.schedule.world.wall(), self.rng
        if self.schedule.plan.jumps:
            # Of a clock that was set back an hour, something for later waits for an hour.
            return {}
        match rng.choice(["at once", "at once", "later", "expires"]):
            case "later":
                return {"eta": _iso(now + rng.uniform(-2, 10))}
            case "expires":
                return {"expires": _iso(now + rng.uniform(0, 10))}
        return {}

    def note(self, name: str, reply: Any) -> None:
        """Messages without an event time count as of when that was noted, however often they are taken."""
        if name == "take":
            self._taken = reply[1:]
        elif name == "stamp" and reply:
            now = self.schedule.world.monotonic()
            for raw in self._taken:
                for place in self._untaken.pop(raw, ()):
                    self.schedule._offers[place] = replace(self.schedule._offers[place], ended=now)

    def _send(self, updates: Sequence[Update], how: dict[str, str], priority: int) -> None:
        if not updates:
            return
        schedule, now = self.schedule, self.schedule.world.monotonic()
        args = [[update.user, dict(update.attrs), update.occurred_ms or None] for update in updates]
        headers = {"task": "attributes.update_many", "id": f"m{self._messages}", "eta": None, "expires": None}
        raw = self._message([[args], {}, {}], headers | how)
        self._put(raw, priority)
        for update in updates:
            # What expires may never be accepted, nor what is ahead of a clock that was set back.
            sure = "expires" not in how and not schedule.plan.jumps
            answer = Answer.ACCEPTED if sure else Answer.DOUBT
            # With an event time, that decides.
            ended = now if update.occurred_ms else math.inf
            for name, value in update.attrs.items():
                place = len(schedule._offers)
                schedule._in_transit.add(place)
                if not update.occurred_ms:
                    self._untaken.setdefault(raw, []).append(place)
                offer = Offer(update.user, name, value, now, ended, answer, update.occurred_ms or None)
                schedule._offers.append(offer)
            schedule.tell(f"sent {update.user} {update.attrs} {update.occurred_ms} {how}: {answer}")

    def _message(self, body: Any, headers: Any) -> bytes:
        message = sealed(body, headers)
        # Not by chance, so that a seed repeats.
        self._messages += 1
        names = {"correlation_id": f"m{self._messages}", "delivery_tag": f"m{self._messages}"}
        return encoded(message | {"properties": message["properties"] | names})

    def _put(self, raw: bytes, priority: int = 0) -> None:
        self.schedule.wire.bare("LPUSH", self.lists[priority], raw)

    # A file.

    def importer(self) -> None:
        """A file that was true some seconds ago, a page at a time, while live updates overtake it."""
        schedule, rng, plan = self.schedule, self.rng, self.schedule.plan
        schedule.world.sleep(rng.uniform(0, plan.trouble / 2))
        as_of_ms = int(schedule.world.us() / 1000 - rng.uniform(0, 3000))
        while as_of_ms in schedule._events_ms:
            as_of_ms += 1
        schedule._events_ms.add(as_of_ms)
        began, name = schedule.world.monotonic(), "users.jsonl"
        self._until_it_answers(lambda: schedule.buffer.begin_import(name, as_of_ms))
        pages = [
            [Update(f"u{number:03}", {"level": f"file {number}"}, as_of_ms) for number in numbers]
            for numbers in _pages(range(plan.users), 20)
        ]
        for page in pages:
            schedule.world.sleep(rng.uniform(0, plan.trouble / 2 / len(pages)))
            left = list(page)
            while left:
                added = self._until_it_answers(
                    lambda left=left: self._producer.add(left, lane="backfill", as_of_ms=as_of_ms)  # type: ignore[misc]
                )
                refused = {place for place, _ in added.refused}
                ended = schedule.world.monotonic()
                for place, update in enumerate(left):
                    if place in added.full:
                        continue
                    # What is refused now may have been accepted at the first attempt, whose answer was lost.
                    no = Answer.REFUSED if self._tried == 1 else Answer.DOUBT
                    answer = no if place in refused else Answer.ACCEPTED
                    schedule._offers.append(
                        Offer(update.user, "level", update.attrs["level"], began, ended, answer, as_of_ms)
                    )
                left = [left[place] for place in added.full]
                if left:
                    schedule.world.sleep(1)
        self._until_it_answers(lambda: schedule.buffer.end_import(name))

    def _until_it_answers(self, call: Callable[[], Any]) -> Any:
        self._tried = 0
        while True:
            self._tried += 1
            try:
                return call()
            except redis.RedisError:
                self.schedule.world.sleep(self.rng.uniform(0.5, 2))

    # Reading back.

    def auditor(self) -> None:
        """Reads users back, and sends again what was delivered and is not there."""
        schedule, rng, limits = self.schedule, self.rng, self.schedule.limits
        wire: Any = schedule.wire
        apart = bool(limits.read_quota)
        limiter = RateLimiter(
            wire,
            self.keys,
            quota=limits.read_quota or limits.quota,
            patience=limits.patience,
            clock=schedule.world,
            kind=DELIVERS if apart else reads(0.1),
            apart=apart,
        )
        examiner = Examiner(
            Shadow(wire, self.keys), Reader(schedule.new_api(), limiter, schedule.world), schedule.world
        )
        repair = Repair(examiner, self._producer, schedule.world, verdicts=LOST)
        while True:
            schedule.world.sleep(rng.uniform(1, 8))
            users = [f"u{number:03}" for number in range(schedule.plan.users)]
            chosen = rng.sample(users, min(len(users), 90))
            with contextlib.suppress(redis.RedisError, CallFailed, ReadingStopped):
                wrong = [finding.user for finding in examiner.examine(chosen) if finding.is_wrong]
                if wrong:
                    schedule.tell(f"repaired {repair.run(wrong)}")
                    schedule.faults["a lost write was repaired"] += len(wrong)

    # A person who decides about what another one was shown.

    def second_person(self) -> None:
        """Redrives or throws away exactly the letters that somebody looked at some time ago."""
        schedule, rng = self.schedule, self.rng
        while True:
            schedule.world.sleep(rng.uniform(1, 10))
            with contextlib.suppress(redis.RedisError):
                shown = list(schedule.letters.find())
                schedule.world.sleep(rng.uniform(0, 8))
                chosen = {letter.user: letter.at_ms for letter in shown}
                if rng.random() < 0.7:
                    schedule.letters.redrive(chosen)
                    continue
                # Given up for good, as far as they are still what was shown.
                schedule._dropped |= {
                    (letter.user, name, value)
                    for letter in shown
                    for name, (value, _) in letter.values.items()
                }
                schedule.letters.purge(chosen)


def _pages(numbers: range, size: int) -> list[range]:
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(math.floor(seconds * 1000) / 1000, UTC).isoformat()
