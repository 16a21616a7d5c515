"""The shadow: what is remembered as delivered, and should be what the API has.

For comparing with what is read from the API. Only users with nothing under way can be compared, and only if the same is
remembered before and after reading: `look` tells both, at one instant for all users.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

from redis import Redis

from ..models import UserId
from . import scripts
from .keys import Keys
from .scripts import text

#: About how many users a step through all of them takes.
SOME = 1000


class _Unknown(Enum):
    UNKNOWN = "unknown"


#: In place of a value that the API may or may not have.
UNKNOWN: Final = _Unknown.UNKNOWN
#: A value; None if it was removed.
Remembered = str | None | Literal[_Unknown.UNKNOWN]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about one user at one instant."""

    #: Whether something is pending or in flight.
    in_motion: bool
    #: What was delivered last: attribute name -> (value, version in ms).
    values: Mapping[str, tuple[Remembered, int]]
    #: The number of the claim that delivered last, 0 if it is not known.
    claim: int
    #: Changes whenever anything about this memory does. It contains the values: not for logs.
    mark: str


class Shadow:
    """The memory of one app's deliveries. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._shadow, self._shadow_at = redis, keys.shadow, keys.shadow_at
        self._forgotten_at = keys.forgotten_at
        self._tables = [keys.pending, keys.flight, keys.shadow, keys.shadow_at, keys.server]
        self._recall = scripts.load(redis, "recall")
        self._correct = scripts.load(redis, "correct")

    def look(self, users: Sequence[UserId]) -> tuple[int, dict[UserId, Known]]:
        """Return Redis' time in ms, and what is known about up to 1000 users at that time."""
        if not users:
            return 0, {}
        now, *found = self._recall(self._tables, [json.dumps(users)])
        rows = (found[place : place + 3] for place in range(0, len(found), 3))
        return now, {
            user: _known(bool(moving), packed, bool(trusted))
            for user, (moving, packed, trusted) in zip(users, rows, strict=True)
        }

    def draw(self, count: int) -> list[UserId]:
        """Return up to `count` distinct users with something remembered: a new random draw each time."""
        found: Any = self._redis.hrandfield(self._shadow, count)
        return [text(user) for user in found or []]

    def size(self) -> int:
        """The number of users with something remembered."""
        return int(self._redis.hlen(self._shadow))

    def everybody(self) -> Iterator[list[UserId]]:
        """Yield the users with something remembered, some at a time; a few may come twice."""
        cursor, begun = 0, False
        while cursor or not begun:
            found: Any = self._redis.zscan(self._shadow_at, cursor, count=SOME)
            cursor, begun = int(found[0]), True
            yield [text(user) for user, _ in found[1]]

    def forgotten_ms(self) -> int:
        """Return when the newest forgotten value was delivered, in ms; 0 if none was forgotten."""
        return scripts.number(self._redis.get(self._forgotten_at))

    def correct(
        self, found: Mapping[UserId, tuple[str, Mapping[str, str | None]]], *, now_ms: int | None = None
    ) -> list[UserId]:
        """Remember what the API was found to have; returns the users for whom that is remembered now.

        `found` has, for each of up to 1000 users, the mark of the `look` before reading, and what was read, None where there
        is nothing. A user in motion, or whose mark has changed, is left alone.
        """
        if not found:
            return []
        entries = [
            [user, mark, {name: False if value is None else value for name, value in values.items()}]
            for user, (mark, values) in found.items()
        ]
        args = ["" if now_ms is None else now_ms, _bytes(json.dumps(entries, ensure_ascii=False))]
        users = list(found)
        return [users[place - 1] for place in self._correct(self._tables, args)]


def _bytes(text: str) -> bytes:
    """As UTF-8: with the bytes of a mark that was no text, and without halves of characters."""
    halves = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text)
    return halves.encode(errors="surrogateescape")


def _known(in_motion: bool, packed: bytes | None, trusted: bool) -> Known:
    mark = (packed or b"").decode(errors="surrogateescape")
    try:
        raw = json.loads(packed or b'{"a":{}}')
        values: dict[str, tuple[Remembered, int]] = {}
        for name, (value, version) in raw["a"].items():
            known = trusted and (value is False or isinstance(value, str))
            values[name] = ((value or None) if known else UNKNOWN, int(version))
        claim = raw.get("c", 0)
        return Known(in_motion, values, claim if type(claim) is int else 0, mark)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        # The next script that touches it sets it aside.
        return Known(in_motion, {}, 0, mark)
