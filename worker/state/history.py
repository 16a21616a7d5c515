"""What happened to the line and the fleet, and who did it: the newest events, in a capped stream.

An event is written by the same script as the step that it records, so there is never one without the other. No event has a
user or a value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis import Redis, RedisError

from .keys import Keys
from .scripts import text

#: About this many are kept.
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `details` are figures and words by name, all text."""

    at_ms: int
    event: str
    by: str
    details: Mapping[str, str]
    #: What distinguishes it from others of the same millisecond.
    id: str = ""


class History:
    """The history of one app. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._key = redis, keys.history

    def newest(
        self, limit: int, *, since_ms: int = 0, event: str | None = None, before: str | None = None
    ) -> list[Event]:
        """Up to `limit` events, newest first; with `event`, of that kind only; older than the one whose id is `before`."""
        found: list[Event] = []
        before = f"({before}" if before else "+"
        while len(found) < limit:
            page: Any = self._redis.xrevrange(self._key, before, max(0, since_ms), count=max(limit, 100))
            found += [one for one in map(_event, page) if event in (None, one.event)]
            if not page:
                break
            before = f"({text(page[-1][0])}"
        return found[:limit]

    def note(self, event: str, by: str, **details: object) -> None:
        """Write an event that no script writes. What it records goes on even if Redis is away."""
        fields: dict[Any, Any] = {
            "event": event,
            "by": by,
            **{name: str(value) for name, value in details.items()},
        }
        with contextlib.suppress(RedisError):
            self._redis.xadd(self._key, fields, maxlen=MOST)


def _event(entry: Any) -> Event:
    id, fields = entry
    found = {text(name): text(value) for name, value in fields.items()}
    event, by = found.pop("event", "?"), found.pop("by", "?")
    details = {name: value for name, value in found.items() if value}
    return Event(int(text(id).partition("-")[0]), event, by, details, text(id))
