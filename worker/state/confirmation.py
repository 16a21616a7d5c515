"""Confirmation: an update counts as accepted only once enough replicas have it, too."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import NotConfirmed
from . import scripts
from .connection import AsyncRedis, NoScriptError, Redis


@functools.cache
def _add() -> tuple[str, str]:
    text = scripts.source("add")
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Confirmation:
    """How many replicas must have an update, and how many seconds to wait for them.

    With `fsync`, they must have it on disk (WAITAOF, Redis 7.2 and newer).
    """

    replicas: int
    seconds: float
    fsync: bool = False

    def _fill(self, pipe: Any, keys: Sequence[str], args: Sequence[scripts.Argument]) -> Any:
        """Put both commands into one round trip on one connection, since WAIT covers only its own connection's writes."""
        pipe.evalsha(_add()[1], len(keys), *keys, *args)
        wait = max(1, round(self.seconds * 1000))
        if self.fsync:
            pipe.execute_command("WAITAOF", 0, self.replicas, wait)
        else:
            pipe.execute_command("WAIT", self.replicas, wait)
        return pipe

    def add(self, redis: Redis, keys: Sequence[str], args: Sequence[scripts.Argument]) -> tuple[Any, int]:
        """Run the script `add` and wait; returns its reply, and how many replicas have what it wrote."""
        with redis.pipeline(transaction=False) as pipe:
            try:
                return _read(self._fill(pipe, keys, args).execute())
            except NoScriptError:
                redis.script_load(_add()[0])
                return _read(self._fill(pipe, keys, args).execute())

    async def add_async(
        self, redis: AsyncRedis, keys: Sequence[str], args: Sequence[scripts.Argument]
    ) -> tuple[Any, int]:
        """The same with asyncio."""
        async with redis.pipeline(transaction=False) as pipe:
            try:
                return _read(await self._fill(pipe, keys, args).execute())
            except NoScriptError:
                await redis.script_load(_add()[0])
                return _read(await self._fill(pipe, keys, args).execute())

    def check(self, have: int) -> None:
        """Raise `NotConfirmed` if `have` replicas are too few."""
        if have < self.replicas:
            raise NotConfirmed(have, self.replicas, self.seconds)


def _read(replies: Sequence[Any]) -> tuple[Any, int]:
    reply, have = replies
    # WAITAOF answers with the primary's own copy, then the replicas'.
    return reply, int(have[1] if isinstance(have, list) else have)
