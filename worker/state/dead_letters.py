"""Dead letters: users whose update was given up, kept for a person to inspect, redrive or delete.

There is one record per user. A newer update removes the attributes it replaces from the record (in the script that accepts
it), and redriving merges under anything newer, so an old value can never come back. Records are read in pages, oldest first:
a hundred thousand of them are never in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from ..models import UserId
from . import scripts
from .keys import Keys
from .line import SOMEBODY
from .scripts import text

#: Records read, redriven or deleted at a time.
PAGE = 500


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. `values` is name -> (value or None, version); times are ms since 1970."""

    user: UserId
    values: Mapping[str, tuple[str | None, int]]
    code: int
    message: str
    attempts: int
    since_ms: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects letters; all of them by default. Times in ms, on Redis' clock."""

    user: UserId | None = None
    code: int | None = None
    before_ms: int | None = None
    since_ms: int | None = None

    def fits(self, letter: Letter) -> bool:
        return (
            (self.user is None or letter.user == self.user)
            and (self.code is None or letter.code == self.code)
            and (self.before_ms is None or letter.at_ms < self.before_ms)
            and (self.since_ms is None or letter.at_ms >= self.since_ms)
        )


#: No condition at all.
EVERYTHING = Filter()

#: Letters as somebody has seen them: user -> ms at which it became a letter.
Chosen = Mapping[UserId, int]


@dataclass(slots=True)
class Redriven:
    """What became of redriven letters; for `outdated` ones, everything was newer elsewhere."""

    redriven: int = 0
    outdated: int = 0


class DeadLetters:
    """The dead letters of one app."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys
        self._redrive = scripts.load(redis, "redrive")
        self._purge = scripts.load(redis, "purge")
        k = keys
        self._redrive_keys = [k.pending, k.backfill, k.flight, k.shadow, k.dead, k.dead_at, k.ledger]
        self._redrive_keys += [k.live, k.delayed, k.quarantine, k.history]

    def now_ms(self) -> int:
        """Redis' clock."""
        seconds, micros = self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def count(self) -> int:
        """How many there are."""
        return int(self._redis.hlen(self._keys.dead))

    def find(self, wanted: Filter = EVERYTHING) -> Iterator[Letter]:
        """Yield the letters, oldest first. Those added or removed meanwhile may be missed."""
        if wanted.user is not None:
            yield from self._read([wanted.user], wanted)
            return
        latest = "+inf" if wanted.before_ms is None else f"({wanted.before_ms}"
        earliest = "-inf" if wanted.since_ms is None else str(wanted.since_ms)
        seen: set[UserId] = set()
        while True:
            page: Any = self._redis.zrangebyscore(
                self._keys.dead_at, earliest, latest, start=0, num=PAGE + len(seen), withscores=True
            )
            fresh = [(text(user), score) for user, score in page if text(user) not in seen]
            if not fresh:
                return
            # The next page begins at the time of this one's last letter, so some of its letters were seen already.
            last = fresh[-1][1]
            seen = {user for user, score in fresh if score == last} | (
                seen if earliest == f"{last:.0f}" else set()
            )
            earliest = f"{last:.0f}"
            yield from self._read([user for user, _ in fresh], wanted)

    def _read(self, users: Sequence[UserId], wanted: Filter) -> Iterator[Letter]:
        for user, packed in zip(users, self._redis.hmget(self._keys.dead, users), strict=True):
            letter = None if packed is None else read_letter(user, packed)
            if letter and wanted.fits(letter):
                yield letter

    def choose(self, wanted: Filter = EVERYTHING) -> Chosen:
        """Return the letters as they are now, to act on exactly these: user -> ms at which it became a letter."""
        if wanted == EVERYTHING:
            # Includes those that cannot be read: redriving sets them aside.
            everybody: Any = self._redis.zscan_iter(self._keys.dead_at, count=PAGE)
            return {text(user): int(at) for user, at in everybody}
        return {letter.user: letter.at_ms for letter in self.find(wanted)}

    def redrive(self, chosen: Chosen, *, by: str = SOMEBODY) -> Redriven:
        """Put these letters back to pending, in the lane for spare seats; skip those that have changed since."""
        total = Redriven()
        for page in scripts.pages(chosen.items(), PAGE):
            redriven, outdated = self._redrive(self._redrive_keys, ["", json.dumps(page), by])
            total.redriven += redriven
            total.outdated += outdated
        return total

    def purge(self, chosen: Chosen, *, by: str = SOMEBODY) -> int:
        """Delete these letters for good; returns how many there were. Those that have changed since stay."""
        keys = [self._keys.dead, self._keys.dead_at, self._keys.history]
        pages = scripts.pages(chosen.items(), PAGE)
        return sum(int(self._purge(keys, [json.dumps(page), by])) for page in pages)


def read_letter(user: UserId, packed: bytes | str) -> Letter | None:
    """One letter; None if it cannot be read. Redriving sets it aside."""
    try:
        raw = json.loads(packed)
        values = {name: (value or None, int(version)) for name, (value, version) in raw["a"].items()}
        code, attempts, since, at = (int(raw[field]) for field in ("code", "attempts", "t", "at"))
        return Letter(user, values, code, str(raw["message"]), attempts, since, at)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def as_updates(letter: Letter) -> Iterator[dict[str, Any]]:
    """Yield the letter as updates that can be sent again: one for each time at which its values were set."""
    for version in sorted({version for _, version in letter.values.values()}):
        attrs = {name: value for name, (value, at) in letter.values.items() if at == version}
        yield {"user": letter.user, "attrs": attrs, "occurred_at": version}
