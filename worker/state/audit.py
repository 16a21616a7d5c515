"""What audits have found so far: users counted by verdict, over all workers and commands. Has no user ids and no values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis import Redis

from . import scripts
from .keys import Keys
from .scripts import number, text

#: What may become of a user that is checked.
COUNTED = ("as_delivered", "lost", "changed", "gone", "skipped")


@dataclass(frozen=True, slots=True)
class AuditTotals:
    """Users by what became of them. `since` and `at` are the first and the last time, in seconds since 1970; None = never."""

    as_delivered: int = 0
    lost: int = 0
    changed: int = 0
    gone: int = 0
    skipped: int = 0
    since: float | None = None
    at: float | None = None

    @property
    def checked(self) -> int:
        """Users who were judged."""
        return self.as_delivered + self.wrong

    @property
    def wrong(self) -> int:
        return self.lost + self.changed + self.gone


class AuditLog:
    """The totals of one app. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._key = redis, keys.audit
        self._record = scripts.load(redis, "record_audit")

    def add(self, counts: Mapping[str, int]) -> None:
        """Count users, by the names in `COUNTED`."""
        self._record([self._key], ["", *(counts.get(name, 0) for name in COUNTED)])

    def read(self) -> AuditTotals:
        """The totals; what cannot be read counts as 0."""
        raw: Any = self._redis.hgetall(self._key)
        found = {text(name): number(value) for name, value in raw.items()}
        # As in the ledger, no count is negative.
        counts = {name: max(0, found.get(name, 0)) for name in COUNTED}
        since, at = (found[name] / 1000 if found.get(name, 0) > 0 else None for name in ("since", "at"))
        return AuditTotals(**counts, since=since, at=at)
