"""Send updates from asyncio: the same methods as `Producer`, with the same results, and nothing blocks the event loop.

producer = AsyncProducer("redis://localhost:6379/0", sdkappid=1400000000)

@app.post("/profile")                      # FastAPI, Django, aiohttp, ...
async def change(user: str, city: str):
    await producer.set(user, {"city": city})

await producer.aclose()                    # at shutdown; or use `async with`
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Self

from .clock import SystemClock
from .config import Settings
from .errors import BufferFull
from .models import MAX_AHEAD, Attributes, BulkResult, Update, UserId, check_update
from .producer import TIMEOUT, Accepted, Bulk, Lane, MemoryWatch, confirmation, fate_of, options_of
from .redis_url import RedisUrl, with_password_file
from .state import scripts
from .state.attribute_names import NamesCache
from .state.buffer import NOBODY_NEW, NOTHING_ADDED, Added, Guard, Known, add_arguments, add_keys, read_added
from .state.connection import AsyncRedis, ResponseError, TimeoutError, connect_async
from .state.keys import Keys

#: Maximum connections to Redis. Further calls wait for a free one.
CONNECTIONS = 16


class AsyncProducer:
    """Accepts updates. Many tasks of one event loop may share it; another loop needs its own."""

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
        """The arguments are those of `Producer`, except `timeout`.

        It is the longest, in seconds, that `set` or one chunk of `set_many` may take in all. If Redis is frozen, the call
        then raises `redis.TimeoutError`.
        """
        if password_file:
            redis_url = with_password_file(redis_url, os.fspath(password_file))
        self._keys, self._max_pending, self._timeout = Keys(sdkappid), max_pending, timeout
        key = self._keys.pending
        self._redis: AsyncRedis = connect_async(redis_url, key=key, timeout=timeout, connections=CONNECTIONS)
        self._confirmation, self._known = confirmation(replicas, timeout, fsync=replicas_fsync), Known()
        self._add: Any = self._redis.register_script(scripts.source("add"))
        self._add_keys, self._guard = add_keys(self._keys), Guard(max_ahead)
        self._cached, self._memory = NamesCache(SystemClock()), MemoryWatch(SystemClock())

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, timeout: float = TIMEOUT) -> Self:
        """Read the environment; see `Producer.from_env`."""
        settings = Settings.from_env(os.environ if environ is None else environ, "producer")
        return cls(settings.redis, settings.sdkappid, timeout=timeout, **options_of(settings))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections to Redis."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def set(self, user_id: UserId, attrs: Attributes, occurred_at: object = None) -> Accepted:
        """Accept one update; see `Producer.set`."""
        async with self._in_time():
            update = check_update(user_id, attrs, occurred_at, await self._names())
            added = await self._accept([update], "live")
        if added.full:
            raise BufferFull(user_id, self._limit())
        return fate_of(added, update)

    async def set_many(self, updates: Iterable[object], *, lane: Lane = "live") -> BulkResult:
        """Accept many updates; see `Producer.set_many`."""
        async with self._in_time():
            bulk = Bulk(updates, await self._names())
        for chunk in bulk.chunks():
            bulk.take(await self.add(chunk, lane=lane), self._limit())
        return bulk.result

    async def add(self, updates: Sequence[Update], *, lane: Lane = "live") -> Added:
        """Accept validated updates; see `Producer.add`."""
        async with self._in_time():
            return await self._accept(updates, lane)

    async def has_room(self, share: float = 0.0) -> bool:
        """Whether new users are accepted now; see `Producer.has_room`."""
        async with self._in_time():
            await self._read_memory()
            if self._memory.is_short:
                return False
            if not self._max_pending:
                return True
            pending: int = await self._redis.hlen(self._keys.pending)
            return pending < self._max_pending * (1 - share)

    async def names(self) -> frozenset[str]:
        """Return the app's attribute names to validate against; empty if they are not known."""
        async with self._in_time():
            return await self._names()

    async def now_ms(self) -> int:
        """Return Redis' clock, in ms since 1970."""
        async with self._in_time():
            seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """One deadline for everything a call asks of Redis, including the wait for a connection."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except builtins.TimeoutError:
            raise TimeoutError(f"Redis did not answer within {self._timeout:g} s") from None

    async def _accept(self, updates: Sequence[Update], lane: Lane) -> Added:
        await self._read_memory()
        if not updates:
            return NOTHING_ADDED
        limit = NOBODY_NEW if self._memory.is_short else self._max_pending
        arguments = add_arguments(updates, lane, limit, self._guard, self._known)
        if self._confirmation is None:
            added, known = read_added(await self._add(self._add_keys, arguments))
            self._known = max(self._known, known)
            return added
        reply, have = await self._confirmation.add_async(self._redis, self._add_keys, arguments)
        added, known = read_added(reply)
        self._known = max(self._known, known)
        self._confirmation.check(have)
        return added

    async def _names(self) -> frozenset[str]:
        # Two tasks may read them at once, which is harmless.
        if self._cached.is_stale():
            self._cached.keep(await self._redis.smembers(self._keys.names))
        return self._cached.names

    async def _read_memory(self) -> None:
        if self._memory.is_due():
            try:
                self._memory.keep(await self._redis.info("memory"))
            except ResponseError:
                self._memory.keep(None)

    def _limit(self) -> int | None:
        return None if self._memory.is_short else self._max_pending or None
