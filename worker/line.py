"""The line: whether anything is sent for this app, decided once for the whole fleet.

::

    open ──stop(code)──▶ stopped ──next probe is due──▶ probing ──it passed──▶ open
      │                     ▲                              │
      └──pause──▶ paused    └──────── it failed: twice the wait ──┘

A stop is made by an error that no retry can mend (settings, permission, account). Nothing is lost by it:
the users go back to pending at no cost, updates are accepted and coalesced as ever, and one batch is sent
as a probe now and then. A pause is made by a person, and only a person ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import redis

from worker import scripts
from worker.keys import Keys
from worker.models import BatchId
from worker.scripts import text

#: Seconds between two probes at most: how late an account that was put in order is noticed.
LONGEST_WAIT = 300.0

State = Literal["open", "stopped", "probing", "paused"]


@dataclass(frozen=True, slots=True)
class LineState:
    """What the line does and why. Times are seconds since 1970 on Redis' clock."""

    state: State = "open"
    reason: str | None = None
    code: int | None = None
    since: float | None = None
    next_probe: float | None = None


class Line:
    """The line of one app. Thread-safe."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._redis, self._key = client, keys.line
        self._stop = scripts.load(client, "stop")
        self._reopen = scripts.load(client, "reopen")

    def stop(
        self, batch: BatchId, code: int, reason: str, first_wait: float, *, now_ms: int | None = None
    ) -> float | None:
        """Stop sending because of what `batch` met; returns the seconds until the next probe.

        None when nothing has changed: the line was stopped, or paused, already.
        """
        waits = (round(first_wait * 1000), round(LONGEST_WAIT * 1000))
        args = ("" if now_ms is None else now_ms, batch, code, reason, *waits)
        wait_ms: int = self._stop([self._key], args)
        return wait_ms / 1000 if wait_ms else None

    def reopen(self, batch: BatchId) -> bool:
        """Open the line because its probe `batch` has passed; False when it is not the probe any more."""
        return bool(self._reopen([self._key], [batch]))

    def pause(self, reason: str) -> None:
        """Stop sending until `resume`, by a person's wish."""
        seconds, _ = self._redis.time()
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._key)
            pipe.hset(self._key, mapping={"state": "paused", "reason": reason, "since": int(seconds) * 1000})
            pipe.execute()

    def resume(self) -> bool:
        """Open the line, whatever kept it; False when it was open."""
        return bool(self._redis.delete(self._key))

    def read(self) -> LineState:
        """What the line does now."""
        fields = ("state", "reason", "code", "since", "next_probe", "probe")
        state, reason, code, since, next_probe, probe = self._redis.hmget(self._key, fields)
        if state is None:
            return LineState()
        stopped = text(state) == "stopped"
        return LineState(
            state="paused" if not stopped else "probing" if probe else "stopped",
            reason=text(reason or b""),
            code=int(code) if code else None,
            since=int(since) / 1000 if since else None,
            next_probe=int(next_probe) / 1000 if next_probe else None,
        )
