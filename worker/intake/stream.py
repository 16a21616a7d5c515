"""The way in for programs in any language: a Redis stream, consumed in bulk by the workers.

    XADD {imattr:1400000000}:updates * user u1 attrs '{"city":"Paris"}'

Every worker runs a consumer in a thread of its own; the one that holds a short term in Redis acts, so entries are taken in
stream order. All consumers share one name in the consumer group: entries that one took and did not acknowledge, because it
was killed or there was no room, are the first that its successor finds, in order. An entry is acknowledged and deleted once
its update is accepted, or kept among the refused ones; taking one twice is harmless, because its id is its event time.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import structlog

from worker.clock import Clock
from worker.errors import InvalidUpdate
from worker.models import Update, check_update, check_user
from worker.producer import Producer
from worker.state import scripts
from worker.state.buffer import LostLead
from worker.state.connection import Redis, ResponseError
from worker.state.keys import Keys
from worker.state.leader import Leader, LeaderLoop
from worker.state.refused import Refused

log = structlog.get_logger()

#: The consumer group, and the one consumer in it.
GROUP = CONSUMER = "imattr"

#: Most entries per turn. While a script adds many, deliveries wait for Redis and miss their slots.
MOST = 100
#: Seconds for which a consumer stays elected without renewing; how long a killed one is missed.
TERM = 3.0
#: Seconds that a read waits for the first new entry, and so how late a stop is noticed.
BLOCK = 0.25
#: Seconds until entries without room are sent again.
FULL_PAUSE = 1.0

#: Where to read from: entries taken and not acknowledged, or entries that nobody has taken yet.
_UNSETTLED, _NEW = "0", ">"

_decode = json.JSONDecoder().decode


class Entry(NamedTuple):
    """One entry of the stream. `fields` is empty if it was deleted after it was taken."""

    id: bytes
    fields: dict[bytes, bytes]


class StreamConsumer(LeaderLoop):
    """One worker's consumer of the stream."""

    interrupted = "stream_interrupted"

    def __init__(
        self, redis: Redis, keys: Keys, producer: Producer, refused: Refused, clock: Clock, *, worker: str
    ) -> None:
        """`redis` needs a connection of its own: a read blocks it for `BLOCK` seconds."""
        super().__init__(Leader(redis, keys.consumer, worker, clock, term=TERM))
        self._redis, self._keys = redis, keys
        self._producer, self._refused, self._clock = producer, refused, clock
        self._group = scripts.load(redis, "make_group")
        self._full = False
        self._from = _UNSETTLED

    def follow(self) -> None:
        self._from = _UNSETTLED

    def lead(self) -> float:
        """Take up to `MOST` entries."""
        entries = self._read()
        # If the machine slept in between, these entries belong to its successor.
        if not self.leader.leads:
            self._from = _UNSETTLED
            return 0.0
        if entries:
            return self._take(entries)
        self._from = _NEW
        return 0.0

    def _read(self) -> list[Entry]:
        try:
            found: Any = self._redis.xreadgroup(
                GROUP, CONSUMER, {self._keys.updates: self._from}, count=MOST, block=round(BLOCK * 1000)
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._make_group()
            return []
        return [Entry(id, fields or {}) for _, entries in found for id, fields in entries]

    def _make_group(self) -> None:
        self._group([self._keys.updates], [GROUP])

    def _take(self, entries: list[Entry]) -> float:
        since = self._clock.monotonic()
        names = self._producer.names()
        good: list[tuple[Entry, Update]] = []
        bad: list[tuple[Entry, InvalidUpdate]] = []
        for entry in entries:
            try:
                good.append((entry, _update(entry, names)))
            except InvalidUpdate as error:
                bad.append((entry, error))
        try:
            added = self._producer.add([update for _, update in good], lead=self.leader.lead, way="stream")
        except LostLead:
            self.leader.forget()
            self._from = _UNSETTLED
            return 0.0
        bad += [(good[place][0], InvalidUpdate(good[place][1].user, rule)) for place, rule in added.refused]
        waiting = {good[place][0].id for place in added.full}
        delivering = self._settle([entry.id for entry in entries if entry.id not in waiting], bad)
        self._note(full=bool(waiting))
        if waiting:
            return FULL_PAUSE
        # Deliveries get half of the time: they share the CPU and Redis, and their slots do not wait.
        return self._clock.monotonic() - since if delivering else 0.0

    def _settle(self, done: list[bytes], bad: list[tuple[Entry, InvalidUpdate]]) -> bool:
        """Keep the refused entries, then acknowledge and delete all that are done.

        Returns whether the fleet is delivering.
        """
        if not done:
            return False
        refused = [(error, _texts(entry)) for entry, error in bad if entry.fields]
        self._refused.keep("stream", refused)
        for error, _ in refused:
            log.warning("update_refused", source="stream", rule=error.rule)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.xack(self._keys.updates, GROUP, *done)
            pipe.xdel(self._keys.updates, *done)
            pipe.zcard(self._keys.leases)
            leases: int = pipe.execute()[-1]
        return leases > 0

    def _note(self, *, full: bool) -> None:
        """While there is no room, nothing newer is taken."""
        if full != self._full:
            log.warning("stream_halted" if full else "stream_resumed")
        self._full = full
        if full:
            self._from = _UNSETTLED


def _update(entry: Entry, names: frozenset[str]) -> Update:
    for name in (b"user", b"attrs"):
        if name not in entry.fields:
            raise InvalidUpdate("?", f"the entry has no field {name.decode()}")
    user = check_user(entry.fields[b"user"].decode(errors="replace"))
    try:
        attrs = _decode(entry.fields[b"attrs"].decode())
    except (ValueError, RecursionError):
        raise InvalidUpdate(user, "the field attrs is not JSON") from None
    return check_update(user, attrs, _occurred_at(entry.fields, entry.id), names)


def _occurred_at(fields: dict[bytes, bytes], id: bytes) -> object:
    """When it happened: as the sender says, else when it was added to the stream."""
    if b"occurred_at" not in fields:
        return int(id.partition(b"-")[0])
    text = fields[b"occurred_at"].decode(errors="replace")
    # A stream has only text: a number is seconds or milliseconds.
    try:
        return float(text)
    except ValueError:
        return text


def _texts(entry: Entry) -> dict[str, str]:
    return {
        name.decode(errors="replace"): text.decode(errors="replace") for name, text in entry.fields.items()
    }
