"""Updates that were refused after their sender was gone, kept for a person.

A program that calls `Producer.set` gets the error at once. One that sent a Celery message or a stream entry is gone by then,
so what it sent is kept here: the newest ones, in a capped stream. The payload may have attribute values; like pending ones,
they are only in Redis, never in a log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from redis import Redis

from ..errors import InvalidUpdate
from . import scripts
from .history import History
from .keys import Keys
from .line import SOMEBODY
from .scripts import text

#: About this many are kept.
MOST = 10_000
#: How many are read, or deleted, at a time.
PAGE = 500
#: Characters of a payload that are kept.
MAX_PAYLOAD = 1000

#: No scheduled updates.
NOTHING: Mapping[str, int] = MappingProxyType({})

Source = Literal["celery", "stream"]

_ID = re.compile(r"\d{1,19}-\d{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RefusedUpdate:
    """A refused update. `payload` is its JSON, cut if it is long."""

    id: str
    source: str
    user: str
    rule: str
    payload: str

    @property
    def at_ms(self) -> int:
        """When it was refused, on Redis' clock."""
        return int(self.id.partition("-")[0])

    @classmethod
    def _of(cls, entry: Any) -> Self:
        key, fields = entry
        texts = {text(name): text(value) for name, value in fields.items()}
        return cls(key.decode(), *(texts.get(name, "?") for name in ("source", "user", "rule", "payload")))


def _text(update: object) -> str:
    if isinstance(update, str):
        # The beginning of a message that could not be read.
        return update
    try:
        return json.dumps(update, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        # Keys that are not text, or too deep: JSON cannot hold it.
        return f"<{type(update).__name__}>"


class Refused:
    """The refused updates of one app. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._key, self._keys = redis, keys.refused, [keys.refused, keys.scheduled, keys.intake]
        self._keep = scripts.load(redis, "keep")
        self._history = History(redis, keys)

    def keep(
        self,
        source: Source,
        refused: Sequence[tuple[InvalidUpdate, object]],
        scheduled: Mapping[str, int] = NOTHING,
    ) -> None:
        """Keep any updates, each with its reason; and scheduled ones, each with the ms until which it waits."""
        updates = [
            # It may have been refused for a lone surrogate.
            [part.encode(errors="replace").decode() for part in (source, error.user, error.rule, text)]
            for error, update in refused
            for text in [_text(update)[:MAX_PAYLOAD]]
        ]
        if updates or scheduled:
            self._keep(self._keys, [json.dumps(updates), json.dumps(list(scheduled.items())), MOST])

    def newest(self, limit: int) -> list[RefusedUpdate]:
        """Return up to `limit` of them, newest first."""
        return [RefusedUpdate._of(entry) for entry in self._redis.xrevrange(self._key, count=limit) or ()]

    def everyone(self, *, before_ms: int | None = None, since_ms: int = 0) -> Iterator[RefusedUpdate]:
        """Yield those refused in [since, before), newest first, a page at a time."""
        latest = "+" if before_ms is None else f"({max(1, before_ms)}-0"
        while True:
            page: Any = self._redis.xrevrange(self._key, latest, max(0, since_ms), count=PAGE)
            if not page:
                return
            yield from map(RefusedUpdate._of, page)
            latest = f"({text(page[-1][0])}"

    def find(self, id: str) -> RefusedUpdate | None:
        """Return the one with this id, if it is still kept."""
        if not _ID.fullmatch(id):
            return None
        found = self._redis.xrange(self._key, id, id)
        return RefusedUpdate._of(found[0]) if found else None

    def now_ms(self) -> int:
        """Redis' clock."""
        seconds, micros = self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def count(self) -> int:
        return int(self._redis.xlen(self._key))

    def purge_these(self, ids: Iterable[str], *, by: str = SOMEBODY) -> int:
        """Delete these; returns how many of them were still there."""
        purged = sum(int(self._redis.xdel(self._key, *page)) for page in scripts.pages(ids, PAGE))
        if purged:
            self._history.note("refused_purged", by, updates=purged)
        return purged

    def purge(self, newest: str, *, by: str = SOMEBODY) -> int:
        """Delete those up to this id; returns how many there were."""
        at, _, number = newest.partition("-")
        purged = int(self._redis.xtrim(self._key, minid=f"{at}-{int(number) + 1}", approximate=False))
        if purged:
            self._history.note("refused_purged", by, updates=purged)
        return purged
