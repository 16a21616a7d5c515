"""The way in for Python programs: validate at the door, then merge into the buffer.

    producer = Producer("redis://localhost:6379/0", sdkappid=1400000000)
    producer.set("u1", {"city": "Paris"})

Needs neither Celery nor the API's credentials. When `set` returns, the update is accepted: it will be
delivered, superseded by a newer value, or kept as a dead letter. Errors of Redis pass through unchanged.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Literal, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.buffer import MAX_UPDATES_PER_ADD, Buffer
from worker.clock import SystemClock
from worker.config import Settings
from worker.errors import BufferFull, InvalidUpdate
from worker.keys import Keys
from worker.models import Attributes, BulkResult, Refusal, Update, UserId, check_update
from worker.names import AttributeNames

#: What became of one accepted update: a new pending user, merged into a pending one, already delivered
#: with the same value, or older than what is known.
Accepted = Literal["pending", "coalesced", "unchanged", "stale"]

Lane = Literal["live", "backfill"]


#: A connection that the server has dropped since the last call is made anew. Adding an update twice,
#: when only the answer was lost, changes nothing.
_ONCE = Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))


class Producer:
    """Accepts updates. Thread-safe."""

    def __init__(self, redis_url: str, sdkappid: int, *, max_pending: int = 0) -> None:
        """`max_pending` refuses new users beyond that many with `BufferFull`; 0 = no limit."""
        self._redis_url, self._keys = redis_url, Keys(sdkappid)
        self._names = AttributeNames(redis.Redis.from_url(redis_url), self._keys, SystemClock())
        self._max_pending = max_pending
        self._local = threading.local()

    @property
    def _buffer(self) -> Buffer:
        """This thread's buffer, on a connection of its own.

        Taking one from a pool and giving it back costs a sixth of a `set`. After a fork the connection
        still belongs to the parent, so the child makes another.
        """
        if getattr(self._local, "pid", None) != os.getpid():
            client = redis.Redis.from_url(self._redis_url, single_connection_client=True, retry=_ONCE)
            self._local.buffer, self._local.pid = Buffer(client, self._keys), os.getpid()
        buffer: Buffer = self._local.buffer
        return buffer

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
        added = self._buffer.add([update], max_pending=self._max_pending)
        if added.full:
            raise BufferFull(user_id, self._max_pending)
        if added.coalesced:
            return "coalesced"
        if added.unchanged:
            return "unchanged"
        return "stale" if added.stale else "pending"

    def set_many(self, updates: Iterable[object], *, lane: Lane = "live") -> BulkResult:
        """Accept many updates, each (user id, attributes) or (user id, attributes, occurred_at).

        An invalid one is refused alone and returned with its reason; so is a new user when the buffer
        is full. When Redis fails midway the error passes through, and some may have been accepted:
        giving them all again is harmless.
        """
        result = BulkResult()
        numbered = enumerate(updates)
        names = self._names.get()
        while chunk := list(islice(numbered, MAX_UPDATES_PER_ADD)):
            self._add(chunk, lane, names, result)
        return result

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
        added = self._buffer.add(valid, lane=lane, max_pending=self._max_pending)
        for place in added.full:
            full = BufferFull(valid[place].user, self._max_pending)
            result.refused.append(Refusal(places[place], full.user, full.rule))
        result.accepted += added.accepted
        result.coalesced += added.coalesced
        result.unchanged += added.unchanged
        result.stale += added.stale


def _checked(given: object, names: frozenset[str]) -> Update:
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        kind = type(given).__name__
        raise InvalidUpdate("?", f"an update must be (user, attributes[, occurred_at]), got {kind}")
    return check_update(given[0], given[1], given[2] if len(given) == 3 else None, names)
