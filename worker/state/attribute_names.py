"""The app's attribute names, if known: the API refuses a call with an unknown one.

They are kept in Redis so that producers, which have no credentials for the API, can validate against them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from redis import Redis

from ..clock import Clock
from ..models import check_names
from .keys import Keys
from .scripts import text

#: Seconds for which a reader trusts what it last read.
FRESH_FOR = 30.0
#: Seconds for which nobody in the fleet asks the API for them again.
READ_EVERY = 60


class NamesCache:
    """The names last read, and whether they must be read again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.names: frozenset[str] = frozenset()
        self._read_at: float | None = None

    def is_stale(self) -> bool:
        return self._read_at is None or self._clock.monotonic() - self._read_at > FRESH_FOR

    def keep(self, members: Iterable[bytes | str]) -> frozenset[str]:
        """Keep what Redis answered."""
        self.names, self._read_at = frozenset(map(text, members)), self._clock.monotonic()
        return self.names

    def expire(self) -> None:
        self._read_at = None


class AttributeNames:
    """Reads the names with one command every `FRESH_FOR` seconds. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys, clock: Clock) -> None:
        self._redis, self._key, self._read_key = redis, keys.names, keys.names_read
        self._lock = threading.Lock()
        self._cache = NamesCache(clock)

    def get(self) -> frozenset[str]:
        """Return the app's names; empty if they are not known: then any name passes."""
        with self._lock:
            if self._cache.is_stale():
                self._cache.keep(self._redis.smembers(self._key))
            return self._cache.names

    def known_lately(self) -> frozenset[str] | None:
        """Return the names if somebody has read them from the API within `READ_EVERY`, else None."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.pttl(self._read_key)
            pipe.smembers(self._key)
            left, names = pipe.execute()
        # Longer than it can be: from before the server's clock was set back.
        return frozenset(map(text, names)) if 0 < left <= READ_EVERY * 1000 else None

    def set(self, names: Iterable[str]) -> None:
        """Replace the names with the API's; raises `ValueError` for names that no app can have."""
        checked = check_names(names)
        gone = {text(name) for name in self._redis.smembers(self._key)} - set(checked)
        # New names are added before old ones are removed: without a set, any name would pass.
        with self._redis.pipeline(transaction=False) as pipe:
            if checked:
                pipe.sadd(self._key, *checked)
            if gone:
                pipe.srem(self._key, *gone)
            pipe.set(self._read_key, 1, ex=READ_EVERY)
            pipe.execute()
        with self._lock:
            self._cache.expire()
