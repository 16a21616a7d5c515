"""The line: the fleet-wide circuit breaker of one app. It decides whether anything is sent; *open* means sending.

::

    open ──stop──▶ stopped ──next probe is due──▶ probing ──it passed──▶ open, the rate climbing
      │               ▲                              │
      └──pause──▶ paused    └──── it failed: twice the wait ────┘

A stop is of one of three kinds. An *error* in settings, permission or account, which a person must fix: no retry can. An
*outage*: call after call fails and none succeeds, which is the service's fault, not the users'. Or the *data*: too many users
become dead letters, as after a bad deployment. None of them loses anything: users go back to pending at no cost, updates are
still accepted and coalesced, and one batch at a time is sent as a probe. A pause is made by a person, and only a person ends
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redis import Redis

from ..models import BatchId
from . import scripts
from .keys import Keys
from .scripts import number, text

Kind = Literal["error", "outage", "data"]
State = Literal["open", "stopped", "probing", "paused"]

#: Seconds until the first probe, and at most between two probes: how late a recovery is noticed.
WAITS: dict[Kind, tuple[float, float]] = {
    "error": (30.0, 300.0),
    "outage": (1.0, 60.0),
    "data": (30.0, 300.0),
}
#: Calls of the whole fleet that must fail in a row to count as an outage.
OUTAGE_AFTER = 5
#: Dead letters with one code that stop the line: this many in a row with nobody delivered in between; or at least this many
#: within a window (seconds), if they are this share of all its users.
DEAD_IN_A_ROW, DEAD_IN_WINDOW, DEAD_PART, DEAD_WINDOW = 20, 50, 0.2, 60.0
#: Seconds for which a code is ignored after a person has opened a line that the data had stopped.
IGNORED_FOR = 3600.0


#: Who did something, unless said otherwise.
SOMEBODY = "somebody"


@dataclass(frozen=True, slots=True)
class LineState:
    """What the line does, and why. Times are seconds since 1970 on Redis' clock."""

    state: State = "open"
    reason: str | None = None
    code: int | None = None
    since: float | None = None
    next_probe: float | None = None
    kind: Kind | None = None
    failed_probes: int = 0
    #: Who paused it.
    by: str | None = None


class Line:
    """The line of one app. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys
        self._stop = scripts.load(redis, "stop")
        self._reopen = scripts.load(redis, "reopen")
        self._pause = scripts.load(redis, "pause_line")
        self._resume = scripts.load(redis, "resume")
        self._renew_signature = scripts.load(redis, "renew_signature")
        self._record_failure = scripts.load(redis, "record_failure")
        self._record_dead_letters = scripts.load(redis, "record_dead_letters")

    def stop(
        self,
        batch: BatchId,
        kind: Kind,
        code: int,
        reason: str,
        *,
        first_wait: float = 0.0,
        now_ms: int | None = None,
    ) -> float | None:
        """Stop sending because of what `batch` met; returns the seconds until the next probe.

        `first_wait` seconds if the reason needs more than usual; `code` 0 = none; an empty `reason` keeps the one that the
        line was stopped for. Returns 0.0 if the line was stopped or paused already, and None if a person has allowed the code.
        """
        first, longest = WAITS[kind]
        waits = (round(max(first, first_wait) * 1000), round(longest * 1000))
        args = ("" if now_ms is None else now_ms, batch, kind, code, reason, *waits)
        wait_ms: int = self._stop([self._keys.line, self._keys.health, self._keys.history], args)
        return None if wait_ms < 0 else wait_ms / 1000

    def record_failure(self) -> int:
        """Count a call that failed through the service's fault; returns how many have in a row.

        Settling users as delivered starts the row over.
        """
        return int(self._record_failure([self._keys.health], ()))

    def failures(self) -> int:
        """Return how many calls have failed in a row."""
        return number(self._redis.hget(self._keys.health, "failures"))

    def record_dead_letters(self, code: int, users: int, *, now_ms: int | None = None) -> bool:
        """Count users that became dead letters; returns whether there are too many."""
        bounds = (DEAD_IN_A_ROW, DEAD_IN_WINDOW, DEAD_PART, round(DEAD_WINDOW * 1000))
        args = ("" if now_ms is None else now_ms, code, users, *bounds)
        return bool(self._record_dead_letters([self._keys.health, self._keys.ledger], args))

    def renew_signature(self, refused_at: int, *, now_ms: int | None = None) -> int | None:
        """Return the time (s) with which everyone signs from now on, after a signature of `refused_at` was refused.

        None if a new signature was refused already, so that renewing it again cannot help.
        """
        args = ("" if now_ms is None else now_ms, refused_at)
        return int(self._renew_signature([self._keys.health], args)) or None

    def reopen(
        self, batch: BatchId, *, quota: int, dwell: float, signed_at: int = 0, now_us: int | None = None
    ) -> bool:
        """Open the line because its probe `batch` has passed; False if it is no longer the probe.

        The rate climbs to `quota` again, each step tried for `dwell` seconds. Signatures made before the probe's, at
        `signed_at`, may be bad.
        """
        args = ("" if now_us is None else now_us, batch, quota, round(dwell * 1e6), signed_at)
        keys = [self._keys.line, self._keys.health, self._keys.rate, self._keys.history]
        return bool(self._reopen(keys, args))

    def pause(self, reason: str, *, by: str = SOMEBODY, now_ms: int | None = None) -> bool:
        """Stop sending until `resume`, at a person's request; False if the line was paused already."""
        args = ("" if now_ms is None else now_ms, reason, by)
        return bool(self._pause([self._keys.line, self._keys.history], args))

    def resume(self, *, by: str = SOMEBODY, now_ms: int | None = None) -> bool:
        """Open the line, whatever stopped it; False if it was open.

        If the data stopped it, that code is ignored for `IGNORED_FOR`, and its users become dead letters.
        """
        args = ("" if now_ms is None else now_ms, round(IGNORED_FOR * 1000), by)
        return bool(self._resume([self._keys.line, self._keys.health, self._keys.history], args))

    def read(self) -> LineState:
        """Return what the line does now."""
        fields = ("state", "reason", "code", "since", "next_probe", "probe", "kind", "failed", "by")
        found = self._redis.hmget(self._keys.line, fields)
        state, reason, code, since, next_probe, probe, kind, failed, by = found
        if state is None:
            return LineState()
        stopped = text(state) != "paused"
        return LineState(
            state="paused" if not stopped else "probing" if probe else "stopped",
            reason=text(reason or b""),
            code=number(code) or None,
            since=number(since) / 1000 if since else None,
            next_probe=number(next_probe) / 1000 if next_probe else None,
            kind=text(kind) if kind else None,  # type: ignore[arg-type]
            failed_probes=number(failed),
            by=text(by) if by else None,
        )
