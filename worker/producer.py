"""Send updates from Python: validate, then merge into the buffer.

    producer = Producer("redis://localhost:6379/0", sdkappid=1400000000)
    producer.set("u1", {"city": "Paris"})

Needs neither Celery nor the API's credentials. When `set` returns, the update is accepted: it will be delivered,
superseded by a newer value, or kept as a dead letter. Errors of the `redis` library pass through unchanged.

Everything that does no I/O (`Bulk`, `MemoryWatch`, the functions below) is shared with `AsyncProducer`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

from .clock import Clock, SystemClock
from .config import Settings
from .errors import BufferFull, InvalidUpdate
from .models import MAX_AHEAD, Attributes, BulkResult, Refusal, Update, UserId, check_update
from .redis_url import RedisUrl, with_password_file
from .state.attribute_names import AttributeNames
from .state.buffer import MAX_UPDATES_PER_ADD, NOBODY_NEW, Added, Buffer, Guard, Lead, Way
from .state.confirmation import Confirmation
from .state.connection import Redis, ResponseError, connect, retry_once
from .state.keys import Keys

#: What became of one accepted update: its user is newly pending; it was merged into a pending one; the same value has been
#: delivered already; or it is older than what is known.
Accepted = Literal["pending", "coalesced", "unchanged", "stale"]

Lane = Literal["live", "backfill"]

#: Seconds that a call waits for Redis, unless the caller says otherwise.
TIMEOUT = 1.0

#: While memory is short, updates from a queue in the same Redis are let in until this many users are pending.
DRAINED = 5000

#: The share of Redis' memory limit beyond which new users are refused, and seconds between two readings of it.
MEMORY_SHARE, MEMORY_EVERY = 0.9, 1.0


@dataclass(frozen=True, slots=True)
class NoRoom(Refusal):
    """A new user refused for want of room: the update is valid, and may be sent again later."""


class MemoryWatch:
    """Whether Redis is near its memory limit, as of the last reading."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._read_at = clock.monotonic()
        self.is_short = False

    def is_due(self) -> bool:
        """Whether to read it again; true once for each reading."""
        now = self._clock.monotonic()
        if now < self._read_at:
            return False
        self._read_at = now + MEMORY_EVERY
        return True

    def keep(self, memory: Mapping[str, Any] | None) -> None:
        """Take the answer of INFO memory; None if the service hides it."""
        limit = int(memory.get("maxmemory", 0)) if memory else 0
        self.is_short = bool(memory) and 0 < MEMORY_SHARE * limit < int((memory or {})["used_memory"])


class Memory:
    """Whether Redis is near its memory limit. Thread-safe: at worst two threads read it at once."""

    def __init__(self, redis: Redis, clock: Clock) -> None:
        self._redis, self._watch = redis, MemoryWatch(clock)

    def is_short(self) -> bool:
        """As of a reading at most `MEMORY_EVERY` seconds ago."""
        if self._watch.is_due():
            try:
                self._watch.keep(self._redis.info("memory"))
            except ResponseError:
                # Some services hide it.
                self._watch.keep(None)
        return self._watch.is_short


class Bulk:
    """One `set_many` without its I/O: hands out chunks of valid updates, and collects what became of them."""

    def __init__(self, updates: Iterable[object], names: frozenset[str]) -> None:
        """`names` are the app's attribute names, empty if they are not known."""
        self.result = BulkResult()
        self._numbered, self._names = enumerate(updates), names
        self._chunk: list[tuple[int, Update]] = []

    def chunks(self) -> Iterator[list[Update]]:
        """Yield up to `MAX_UPDATES_PER_ADD` updates at a time; invalid ones are refused on the way."""
        while given := list(islice(self._numbered, MAX_UPDATES_PER_ADD)):
            self._chunk = []
            for index, update in given:
                try:
                    self._chunk.append((index, checked(update, self._names)))
                except InvalidUpdate as error:
                    self.result.refused.append(Refusal(index, error.user, error.rule))
            yield [update for _, update in self._chunk]

    def take(self, added: Added, limit: int | None) -> None:
        """Record what became of the last chunk; `limit` is why there was no room, as in `BufferFull`."""
        for place in added.full:
            index, update = self._chunk[place]
            full = BufferFull(update.user, limit)
            self.result.refused.append(NoRoom(index, full.user, full.rule))
        for place, rule in added.refused:
            index, update = self._chunk[place]
            self.result.refused.append(Refusal(index, update.user, rule))
        self.result.accepted += added.accepted
        self.result.coalesced += added.coalesced
        self.result.unchanged += added.unchanged
        self.result.stale += added.stale


def confirmation(replicas: int, timeout: float, *, fsync: bool) -> Confirmation | None:
    """What to wait for after adding, if anything. The wait must end before the connection's own timeout."""
    return Confirmation(replicas, 0.8 * timeout, fsync) if replicas else None


def options_of(settings: Settings) -> dict[str, Any]:
    """The settings that concern a producer."""
    names = ("max_pending", "max_ahead", "replicas", "replicas_fsync")
    return {name: getattr(settings, name) for name in names}


def fate_of(added: Added, update: Update) -> Accepted:
    """What became of the one update that was added; raises `InvalidUpdate` if it was refused."""
    for _, rule in added.refused:
        raise InvalidUpdate(update.user, rule)
    if added.coalesced:
        return "coalesced"
    if added.unchanged:
        return "unchanged"
    return "stale" if added.stale else "pending"


def checked(given: object, names: frozenset[str], otherwise: int | None = None) -> Update:
    """Return a valid update, or raise `InvalidUpdate`; `otherwise` is the event time, in ms, of one that has none."""
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        kind = type(given).__name__
        raise InvalidUpdate("?", f"an update must be (user, attributes[, occurred_at]), got {kind}")
    occurred_at = given[2] if len(given) == 3 else None
    return check_update(given[0], given[1], otherwise if occurred_at is None else occurred_at, names)


class Producer:
    """Accepts updates. Thread-safe, and safe to use after a fork.

    In asyncio applications use `AsyncProducer`, which has the same methods.
    """

    def __init__(
        self,
        redis_url: str | RedisUrl,
        sdkappid: int,
        *,
        max_pending: int = 0,
        max_ahead: float = MAX_AHEAD,
        timeout: float = TIMEOUT,
        replicas: int = 0,
        replicas_fsync: bool = False,
        password_file: str | os.PathLike[str] = "",
    ) -> None:
        """`max_pending` refuses new users beyond that many with `BufferFull`; 0 = no limit.

        `max_ahead` in seconds is how far ahead of Redis' clock an event time may be. `timeout` in seconds is the longest that
        connecting to Redis, or any of its answers, may take. If Redis is frozen, a call raises `redis.TimeoutError` after
        that time; if it cannot be reached, `redis.ConnectionError` at once.

        With `replicas`, an update counts as accepted only once that many replicas of Redis have it, too (with
        `replicas_fsync`, on disk). If they do not confirm that within four fifths of `timeout`, `NotConfirmed` is raised.

        `password_file` holds the password in place of the URL, verbatim except for the line's end. It is read for every
        connection, so a new password is used as soon as Redis demands it. Raises `ValueError` for a URL that cannot be read,
        or that has a password despite the file.
        """
        if password_file:
            redis_url = with_password_file(redis_url, os.fspath(password_file))
        self._redis_url, self._keys, self._timeout = redis_url, Keys(sdkappid), timeout
        self._confirmation = confirmation(replicas, timeout, fsync=replicas_fsync)
        self._redis = self._connect()
        self._names = AttributeNames(self._redis, self._keys, SystemClock())
        self._memory = Memory(self._redis, SystemClock())
        self._max_pending, self._max_ahead = max_pending, max_ahead
        self._local = threading.local()
        self._way: Way = "producer"

    @property
    def _buffer(self) -> Buffer:
        """This thread's buffer, on a connection of its own.

        Taking one from a pool and giving it back costs a sixth of a `set`. After a fork the connection still belongs to
        the parent, so the child opens another.
        """
        if getattr(self._local, "pid", None) != os.getpid():
            redis = self._connect(single_connection=True)
            self._local.buffer = Buffer(redis, self._keys, confirmation=self._confirmation)
            self._local.pid = os.getpid()
        buffer: Buffer = self._local.buffer
        return buffer

    def _connect(self, **options: Any) -> Redis:
        times: dict[str, Any] = {"timeout": self._timeout, "connect_timeout": self._timeout}
        return connect(self._redis_url, key=self._keys.pending, retry=retry_once(), **times, **options)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, timeout: float = TIMEOUT) -> Self:
        """Read the environment; raises `ConfigError`.

        Uses `IMATTR_REDIS_URL`, `IMATTR_REDIS_PASSWORD_FILE`, `IMATTR_SDKAPPID`, `IMATTR_MAX_PENDING`, `IMATTR_MAX_AHEAD`,
        `IMATTR_REPLICAS` and `IMATTR_REPLICAS_FSYNC`.
        """
        return cls.of(
            Settings.from_env(os.environ if environ is None else environ, "producer"), timeout=timeout
        )

    @classmethod
    def of(cls, settings: Settings, *, timeout: float = TIMEOUT, way: Way = "producer") -> Self:
        """The producer that these settings describe; `way` is how its updates arrive, for the counters."""
        made = cls(settings.redis, settings.sdkappid, timeout=timeout, **options_of(settings))
        made._way = way
        return made

    def set(self, user_id: UserId, attrs: Attributes, occurred_at: object = None) -> Accepted:
        """Accept one update; a value of None removes the attribute.

        `occurred_at` is when it happened: a datetime with a time zone, ISO 8601 text, or seconds or milliseconds since
        1970. Without it, the update counts as newer than everything known.

        Raises `InvalidUpdate`, `BufferFull`, or what `redis` raises: then it was not accepted, except that after a
        `redis` error, or `NotConfirmed`, it may have been. Sending it again is harmless.
        """
        update = check_update(user_id, attrs, occurred_at, self._names.get())
        added = self.add([update])
        if added.full:
            raise BufferFull(user_id, self._limit())
        return fate_of(added, update)

    def set_many(self, updates: Iterable[object], *, lane: Lane = "live") -> BulkResult:
        """Accept many updates, each (user id, attributes) or (user id, attributes, occurred_at).

        An invalid one is refused alone and returned with its reason; so is a new user if the buffer is full, as
        `NoRoom`. If Redis fails midway the error passes through, and some may have been accepted: sending them all again
        is harmless.
        """
        bulk = Bulk(updates, self._names.get())
        for chunk in bulk.chunks():
            bulk.take(self.add(chunk, lane=lane), self._limit())
        return bulk.result

    def add(
        self,
        updates: Sequence[Update],
        *,
        lane: Lane = "live",
        as_of_ms: int = 0,
        lead: Lead | None = None,
        way: Way | None = None,
        again: bool = False,
    ) -> Added:
        """Accept up to `MAX_UPDATES_PER_ADD` validated updates.

        `as_of_ms` is the time as of which an import is true, `lead` what its consumer must hold, `way` how they arrived, if
        not as usual, `again` whether to send what is remembered as delivered: see `Guard`. Raises `LostLead`.

        Updates that a consumer adds leave their queue in Redis. So even while memory is short, it may add a few users;
        otherwise a queue that has filled the server could never drain.
        """
        way = way or self._way
        guard = Guard(self._max_ahead, as_of_ms, lead, makes_room=lead is not None, way=way, again=again)
        limit = self._most(makes_room=guard.makes_room)
        return self._buffer.add(updates, lane=lane, max_pending=limit, guard=guard)

    def begin_import(self, name: str, as_of_ms: int) -> None:
        """Until `end_import`, forget nothing that is delivered from `as_of_ms` on."""
        self._buffer.begin_import(name, as_of_ms)

    def show_import(self, name: str, about: Mapping[str, object]) -> None:
        """Show people how far an import has come."""
        self._buffer.show_import(name, about)

    def end_import(self, name: str) -> None:
        """End an import that is finished, or never will be."""
        self._buffer.end_import(name)

    def has_room(self, share: float = 0.0, *, makes_room: bool = False) -> bool:
        """Whether new users are accepted now; with a `share`, whether that part of the room is free.

        `makes_room`: whether accepting them frees memory elsewhere; see `add`.
        """
        most = self._most(makes_room=makes_room)
        return most != NOBODY_NEW and self._buffer.has_room(most, share)

    def _most(self, *, makes_room: bool) -> int:
        """How many users may be pending, as in `Buffer.add`."""
        if not self._memory.is_short():
            return self._max_pending
        return min(self._max_pending or DRAINED, DRAINED) if makes_room else NOBODY_NEW

    def names(self) -> frozenset[str]:
        """Return the app's attribute names to validate against; empty if they are not known."""
        return self._names.get()

    def now_ms(self) -> int:
        """Return Redis' clock, in ms since 1970."""
        seconds, micros = self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _limit(self) -> int | None:
        """Why there is no room: too many users, or None if it is Redis' memory."""
        return None if self._memory.is_short() else self._max_pending or None
