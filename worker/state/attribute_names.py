"""The app's attribute names, as far as they are known: an API call with an unknown one is refused.

Kept in Redis so that producers, which have no credentials for the API, can check at the door.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from redis import Redis

from ..clock import Clock
from ..models import check_names
from .keys import Keys
from .scripts import text

#: Seconds for which a reader trusts what it read.
FRESH_FOR = 30.0
#: Seconds for which nobody in the fleet asks the API for them again.
READ_EVERY = 60


class AttributeNames:
    """Reads the names with one call every `FRESH_FOR` seconds. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys, clock: Clock) -> None:
        self._redis, self._key, self._clock = redis, keys.names, clock
        self._read_key = keys.names_read
        self._lock = threading.Lock()
        self._names: frozenset[str] = frozenset()
        self._read_at: float | None = None

    def get(self) -> frozenset[str]:
        """The app's names; empty when they are not known, and any name is good."""
        with self._lock:
            now = self._clock.monotonic()
            if self._read_at is None or now - self._read_at > FRESH_FOR:
                self._names = frozenset(map(text, self._redis.smembers(self._key)))
                self._read_at = now
            return self._names

    def known_lately(self) -> frozenset[str] | None:
        """The names, when somebody has read them from the API within `READ_EVERY`, else None."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.exists(self._read_key)
            pipe.smembers(self._key)
            read, names = pipe.execute()
        return frozenset(map(text, names)) if read else None

    def set(self, names: Iterable[str]) -> None:
        """Replace what is known by what the API says; raises `ValueError` for names that no app can have."""
        checked = check_names(names)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._key)
            if checked:
                pipe.sadd(self._key, *checked)
            pipe.set(self._read_key, 1, ex=READ_EVERY)
            pipe.execute()
        with self._lock:
            self._read_at = None
