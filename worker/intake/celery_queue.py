"""The way in for Celery clients: their messages, taken out of the broker's queue hundreds at a time.

    app.send_task("attributes.update", ["u1", {"city": "Paris"}], queue="updates")

No task runs for them: a Celery task per update costs fifty times as much, and the content of a message could end the worker
that runs it. Every worker has a consumer in a process of its own (`worker/queue_process.py`); the one that holds a short term
in Redis acts, so messages are taken in queue order. A message is acknowledged once its updates are accepted, or kept among
the refused ones. The successor of a killed consumer may take it again; its event time is then the same, so that changes
nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import structlog

from worker.clock import Clock
from worker.errors import InvalidUpdate
from worker.intake.brokers import Queue, Taken
from worker.intake.celery_message import Call, Envelope, legible, read, unpack
from worker.models import Update
from worker.producer import Producer, checked
from worker.state.buffer import MAX_UPDATES_PER_ADD, LostLead
from worker.state.connection import Redis
from worker.state.intake import COUNTS, record_intake
from worker.state.keys import Keys
from worker.state.leader import Leader, LeaderLoop
from worker.state.refused import Refused

log = structlog.get_logger()

#: Seconds for which a consumer stays elected without renewing; how long a killed one is missed.
TERM = 3.0
#: Seconds to wait for the first new message: how late a message of another priority, or a stop, is noticed.
BLOCK = 0.1
#: Seconds to let messages gather after a taking of fewer than `FEW`: each turn costs a millisecond, however many it takes.
GATHER, FEW = 0.02, 100
#: Seconds until updates without room are sent again.
FULL_PAUSE = 1.0
#: The share of the room that must be free before messages are taken again.
FREE_SHARE = 0.1
#: Messages that are read at a time, while Redis adds those read before.
READ_AT_ONCE = MAX_UPDATES_PER_ADD
#: Seconds between two reports.
REPORT_EVERY = 0.5
#: Most scheduled messages that are accepted in one turn.
MOST_DUE = 100


@dataclass(slots=True)
class _Read:
    """What some messages contained: updates to accept, updates to refuse, and members of `scheduled` with their ms."""

    updates: list[Update] = field(default_factory=list)
    refused: list[tuple[InvalidUpdate, Any]] = field(default_factory=list)
    scheduled: dict[str, int] = field(default_factory=dict)


class QueueConsumer(LeaderLoop):
    """One worker's consumer of the queue of updates."""

    interrupted = "queue_interrupted"

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        producer: Producer,
        refused: Refused,
        clock: Clock,
        open_queue: Callable[[], Queue],
        *,
        worker: str,
        report: Callable[[dict[str, int], float], None] = lambda _counts, _seconds: None,
    ) -> None:
        """`open_queue` connects to the broker, and is called again after every failure.

        `report` gets the counts of the last `REPORT_EVERY` seconds, and those seconds.
        """
        super().__init__(Leader(redis, keys.queue_consumer, worker, clock, term=TERM))
        self._redis, self._keys = redis, keys
        self._producer, self._refused, self._clock = producer, refused, clock
        self._open_queue, self._report = open_queue, report
        self._queue: Queue | None = None
        self._adder = ThreadPoolExecutor(1, "queue-adder")
        self._taken: Taken | None = None
        #: What was taken and not read yet, and what was read and not accepted yet.
        self._unread: Sequence[tuple[bytes | Envelope, int]] = ()
        self._left: list[Update] = []
        self._due: Any = ()
        self._now_ms = 0
        self._full = False
        self._counts: Counter[str] = Counter()
        self._reported_at = clock.monotonic()

    def run(self) -> None:
        super().run()
        self.follow()
        self._adder.shutdown()

    def follow(self) -> None:
        """Let go of everything: what was taken and not finished belongs to the next leader."""
        self._taken, self._unread, self._left, self._due = None, (), [], ()
        if self._queue:
            self._queue.close()
            self._queue = None

    def sign_of_life(self) -> None:
        self._report_counts()

    def lead(self) -> float:
        """Take some messages and accept what is in them."""
        if self._taken or self._due:
            return self._accept()
        if self._full and not self._producer.has_room(FREE_SHARE, makes_room=True):
            return FULL_PAUSE
        now_ms = self._producer.now_ms()
        if self._take_due(now_ms):
            return self._accept()
        self._queue = self._queue or self._open_queue()
        self._taken = self._queue.take(self._producer.now_ms)
        if self._taken is None:
            self._queue.wait(BLOCK)
            return 0.0
        self._unread, self._now_ms = self._taken.messages, now_ms
        few = len(self._unread) < FEW
        return self._accept() or (GATHER if few else 0.0)

    # Reading: from messages to updates.

    def _read(self) -> list[Update]:
        """Return the updates in the next messages; everything else in them is kept before they are acknowledged."""
        messages, self._unread = self._unread[:READ_AT_ONCE], self._unread[READ_AT_ONCE:]
        names, batch = self._producer.names(), _Read()
        for message, taken_ms in messages:
            envelope: Envelope | bytes = message
            try:
                envelope = unpack(message) if isinstance(message, bytes) else message
                self._sort(read(envelope, taken_ms), self._now_ms, names, batch)
            except InvalidUpdate as error:
                batch.refused.append((error, legible(envelope)))
            except Exception as error:
                # A defect of ours must not hold up the messages behind it.
                log.error("message_unreadable", error=type(error).__name__)
                rule = f"it could not be read ({type(error).__name__})"
                batch.refused.append((InvalidUpdate("?", rule), legible(envelope)))
        self._counts["taken"] += len(messages)
        self._keep(batch)
        return batch.updates

    def _sort(self, call: Call, now_ms: int, names: frozenset[str], batch: _Read) -> None:
        """Sort the updates of a message into where they belong."""
        if call.expires_ms and call.expires_ms <= max(now_ms, call.eta_ms):
            self._counts["expired"] += 1
        elif call.eta_ms > now_ms:
            good = self._check(call, names, batch)
            if good:
                self._counts["scheduled"] += 1
                # ASCII, so that no text in it can fail to be encoded.
                member = json.dumps([[u.user, u.attrs, u.occurred_ms] for u in good])
                batch.scheduled[member] = call.eta_ms
        else:
            batch.updates += self._check(call, names, batch)

    def _check(self, call: Call, names: frozenset[str], batch: _Read) -> list[Update]:
        good = []
        for given in call.updates:
            try:
                good.append(checked(given, names, call.event_ms))
            except InvalidUpdate as error:
                batch.refused.append((error, given))
        return good

    def _keep(self, batch: _Read) -> None:
        """Keep updates that are refused, or must not be accepted yet, before the messages are acknowledged."""
        if not batch.refused and not batch.scheduled:
            return
        self._counts["refused"] += len(batch.refused)
        self._refused.keep("celery", batch.refused, batch.scheduled)
        for rule, updates in Counter(error.rule for error, _ in batch.refused).items():
            log.warning("update_refused", source="celery", rule=rule, updates=updates)

    def _take_due(self, now_ms: int) -> bool:
        """Take the scheduled messages whose time has come, which go first; returns whether there are any."""
        self._due = self._redis.zrangebyscore(self._keys.scheduled, "-inf", now_ms, start=0, num=MOST_DUE)
        if not self._due:
            return False
        names, batch = self._producer.names(), _Read()
        for member in self._due:
            self._sort(Call(json.loads(member), now_ms), now_ms, names, batch)
        self._keep(batch)
        self._left = batch.updates
        return True

    # Accepting.

    def _accept(self) -> float:
        """Accept what was taken, in order, then finish it; returns the seconds until the next turn."""
        while self._left or self._unread:
            # If the machine slept in between, this belongs to its successor.
            if not self.leader.leads:
                self.follow()
                return 0.0
            try:
                has_room = self._add_next()
            except LostLead:
                self.leader.forget()
                self.follow()
                return 0.0
            self._note(full=not has_room)
            if not has_room:
                return FULL_PAUSE
        if self._due:
            self._redis.zrem(self._keys.scheduled, *self._due)
            self._due = ()
        if self._taken and self._queue:
            self._queue.finish(self._taken)
            self._taken = None
        return 0.0

    def _add_next(self) -> bool:
        """Add a chunk, and read the next one meanwhile: each would otherwise wait for the other.

        False if some of it found no room; that comes first again. Raises `LostLead`.
        """
        chunk, rest = self._left[:MAX_UPDATES_PER_ADD], self._left[MAX_UPDATES_PER_ADD:]
        adding = self._adder.submit(self._producer.add, chunk, lead=self.leader.lead)
        try:
            self._left = rest or self._read()
        finally:
            wait([adding])
        added = adding.result()
        self._keep(
            _Read(refused=[(InvalidUpdate(chunk[i].user, rule), chunk[i]) for i, rule in added.refused])
        )
        self._left = [chunk[place] for place in added.full] + self._left
        counts = ("accepted", "coalesced", "unchanged", "stale")
        self._counts.update({name: getattr(added, name) for name in counts})
        return not added.full

    def _note(self, *, full: bool) -> None:
        """While there is no room, messages stay in the broker."""
        if full != self._full:
            log.warning("intake_closed" if full else "intake_opened")
        self._full = full

    def _report_counts(self) -> None:
        now = self._clock.monotonic()
        seconds = now - self._reported_at
        if seconds < REPORT_EVERY or not self._counts.total():
            return
        counts = {name: self._counts[name] for name in COUNTS if self._counts[name]}
        self._reported_at = now
        self._counts.clear()
        log.info("updates_taken", **counts, seconds=round(seconds, 2))
        # For `imattr status` and Flower only: the ledger is kept by the scripts.
        with contextlib.suppress(Exception):
            record_intake(self._redis, self._keys, counts, self._queue.waiting() if self._queue else None)
            self._report(counts, seconds)
