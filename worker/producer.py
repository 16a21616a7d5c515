"""The way in for Python programs: validate at the door, then merge into the buffer.

    producer = Producer("redis://localhost:6379/0", sdkappid=1400000000)
    producer.set("u1", {"city": "Paris"})

Needs neither Celery nor the API's credentials. When `set` returns, the update is accepted: it will be
delivered, superseded by a newer value, or kept as a dead letter. Errors of Redis pass through unchanged.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

from .clock import Clock, SystemClock
from .config import Settings
from .errors import BufferFull, InvalidUpdate
from .models import Attributes, BulkResult, Refusal, Update, UserId, check_update
from .state.attribute_names import AttributeNames
from .state.buffer import MAX_UPDATES_PER_ADD, NOBODY_NEW, Added, Buffer
from .state.connection import Redis, ResponseError, connect, retry_once
from .state.keys import Keys

#: What became of one accepted update: a new pending user, merged into a pending one, already delivered
#: with the same value, or older than what is known.
Accepted = Literal["pending", "coalesced", "unchanged", "stale"]

Lane = Literal["live", "backfill"]

#: Seconds that a call waits for Redis, unless the caller says otherwise.
TIMEOUT = 1.0

#: The part of Redis' memory beyond which new users are refused, and seconds between two looks at it.
MEMORY_SHARE, MEMORY_EVERY = 0.9, 1.0


@dataclass(frozen=True, slots=True)
class NoRoom(Refusal):
    """A new user refused for want of room: the update is good, and may be given again later."""


class Memory:
    """Whether Redis is near its memory limit. Thread-safe: at worst two threads look at once."""

    def __init__(self, redis: Redis, clock: Clock) -> None:
        self._redis, self._clock = redis, clock
        self._look_at = clock.monotonic()
        self._short = False

    def is_short(self) -> bool:
        """As of the last look, at most `MEMORY_EVERY` seconds ago."""
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + MEMORY_EVERY
            self._short = self._look()
        return self._short

    def _look(self) -> bool:
        try:
            memory = self._redis.info("memory")
        except ResponseError:
            # Some services do not let anybody see it.
            return False
        limit, used = int(memory.get("maxmemory", 0)), int(memory["used_memory"])
        return 0 < MEMORY_SHARE * limit < used


class Producer:
    """Accepts updates. Thread-safe."""

    def __init__(
        self, redis_url: str, sdkappid: int, *, max_pending: int = 0, timeout: float = TIMEOUT
    ) -> None:
        """`max_pending` refuses new users beyond that many with `BufferFull`; 0 = no limit.

        `timeout` in seconds: a Redis that does not answer ends a call after that time with `redis.TimeoutError`.
        """
        self._redis_url, self._keys, self._timeout = redis_url, Keys(sdkappid), timeout
        self._redis = self._connect()
        self._names = AttributeNames(self._redis, self._keys, SystemClock())
        self._memory = Memory(self._redis, SystemClock())
        self._max_pending = max_pending
        self._local = threading.local()

    @property
    def _buffer(self) -> Buffer:
        """This thread's buffer, on a connection of its own.

        Taking one from a pool and giving it back costs a sixth of a `set`. After a fork the connection
        still belongs to the parent, so the child makes another.
        """
        if getattr(self._local, "pid", None) != os.getpid():
            redis = self._connect(single_connection_client=True)
            self._local.buffer, self._local.pid = Buffer(redis, self._keys), os.getpid()
        buffer: Buffer = self._local.buffer
        return buffer

    def _connect(self, **options: Any) -> Redis:
        return connect(
            self._redis_url,
            timeout=self._timeout,
            connect_timeout=self._timeout,
            retry=retry_once(),
            **options,
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read IMATTR_REDIS_URL, IMATTR_SDKAPPID and IMATTR_MAX_PENDING; raises `ConfigError`."""
        settings = Settings.from_env(os.environ if environ is None else environ, "producer")
        return cls(settings.redis_url.reveal(), settings.sdkappid, max_pending=settings.max_pending)

    def set(self, user_id: UserId, attrs: Attributes, occurred_at: object = None) -> Accepted:
        """Accept one update.

        `occurred_at` is when it happened: a datetime with a time zone, ISO 8601 text, or seconds or
        milliseconds since 1970. Without it the update counts as newer than everything known.

        Raises `InvalidUpdate`, `BufferFull`, or what `redis` raises: then it was not accepted.
        """
        update = check_update(user_id, attrs, occurred_at, self._names.get())
        added = self.add([update])
        if added.full:
            raise self._full(user_id)
        if added.coalesced:
            return "coalesced"
        if added.unchanged:
            return "unchanged"
        return "stale" if added.stale else "pending"

    def set_many(self, updates: Iterable[object], *, lane: Lane = "live") -> BulkResult:
        """Accept many updates, each (user id, attributes) or (user id, attributes, occurred_at).

        An invalid one is refused alone and returned with its reason; so is a new user when the buffer
        is full, as `NoRoom`. When Redis fails midway the error passes through, and some may have been accepted:
        giving them all again is harmless.
        """
        result = BulkResult()
        numbered = enumerate(updates)
        names = self._names.get()
        while chunk := list(islice(numbered, MAX_UPDATES_PER_ADD)):
            self._add(chunk, lane, names, result)
        return result

    def add(self, updates: Sequence[Update], *, lane: Lane = "live") -> Added:
        """Accept up to `MAX_UPDATES_PER_ADD` updates that are checked; `full` has those without room."""
        limit = NOBODY_NEW if self._memory.is_short() else self._max_pending
        return self._buffer.add(updates, lane=lane, max_pending=limit)

    def has_room(self, share: float = 0.0) -> bool:
        """Whether new users are accepted now; with a `share`, whether that part of the room is free."""
        return not self._memory.is_short() and self._buffer.has_room(self._max_pending, share)

    def _full(self, user: UserId) -> BufferFull:
        return BufferFull(user, None if self._memory.is_short() else self._max_pending or None)

    def names(self) -> frozenset[str]:
        """The app's attribute names to check against; empty when they are not known."""
        return self._names.get()

    def now_ms(self) -> int:
        """Redis' clock, ms since 1970."""
        seconds, micros = self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _add(
        self, chunk: list[tuple[int, object]], lane: Lane, names: frozenset[str], result: BulkResult
    ) -> None:
        valid: list[Update] = []
        places: list[int] = []
        for index, given in chunk:
            try:
                valid.append(_checked(given, names))
                places.append(index)
            except InvalidUpdate as error:
                result.refused.append(Refusal(index, error.user, error.rule))
        added = self.add(valid, lane=lane)
        for place in added.full:
            full = self._full(valid[place].user)
            result.refused.append(NoRoom(places[place], full.user, full.rule))
        result.accepted += added.accepted
        result.coalesced += added.coalesced
        result.unchanged += added.unchanged
        result.stale += added.stale


def _checked(given: object, names: frozenset[str]) -> Update:
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        kind = type(given).__name__
        raise InvalidUpdate("?", f"an update must be (user, attributes[, occurred_at]), got {kind}")
    return check_update(given[0], given[1], given[2] if len(given) == 3 else None, names)
