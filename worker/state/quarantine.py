"""The quarantine: what cannot be read in Redis, kept with its raw bytes for a person.

Nothing leaves it by itself. A user's record can be recognised in its bytes, and sent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from redis import Redis

from .history import History
from .keys import Keys
from .line import SOMEBODY
from .scripts import number, text

#: Entries read or dropped at a time.
PAGE = 500


@dataclass(frozen=True, slots=True)
class Unreadable:
    """One entry: the table it was in, whose it was, its bytes, and when it was found, in ms since 1970."""

    id: bytes
    table: str
    user: str
    at_ms: int
    raw: bytes

    @classmethod
    def of(cls, id: bytes, raw: bytes) -> Self:
        table, _, rest = id.partition(b":")
        at, _, user = rest.partition(b":")
        return cls(id, text(table), text(user), number(at), raw)


class Quarantine:
    """The quarantine of one app."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._key, self._history = redis, keys.quarantine, History(redis, keys)

    def count(self) -> int:
        return int(self._redis.hlen(self._key))

    def find(self) -> Iterator[Unreadable]:
        """Yield the entries, in no particular order; those added meanwhile may be missed."""
        found: Any = self._redis.hscan_iter(self._key, count=PAGE)
        for id, raw in found:
            yield Unreadable.of(id, raw)

    def drop(self, ids: Sequence[bytes], *, by: str = SOMEBODY) -> int:
        """Delete these for good; returns how many there were."""
        pages = (ids[at : at + PAGE] for at in range(0, len(ids), PAGE))
        dropped = sum(int(self._redis.hdel(self._key, *page)) for page in pages)
        if dropped:
            self._history.note("quarantine_dropped", by, records=dropped)
        return dropped
