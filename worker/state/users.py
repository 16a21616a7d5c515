"""Everything known about one user, for a person who asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from ..models import UserId
from . import scripts
from .dead_letters import Letter, read_letter
from .keys import Keys
from .scripts import number, text

#: Attribute name -> (value, version in ms). The value is None for one to be removed.
Values = Mapping[str, tuple[str | None, int]]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is accepted and not delivered yet. Times in ms since 1970."""

    values: Values
    since_ms: int
    attempts: int
    suspect: bool


@dataclass(frozen=True, slots=True)
class Delivered:
    """What was delivered last, if remembered. `unknown` are the names whose value at the API nobody knows.

    `call` is the number of the batch, as in its log line; 0 if it is not known.
    """

    values: Values
    unknown: frozenset[str]
    at_ms: int
    call: int


@dataclass(frozen=True, slots=True)
class UserState:
    """One user at one instant. Times in ms since 1970, on Redis' clock."""

    user: UserId
    now_ms: int
    pending: Waiting | None = None
    in_flight: Waiting | None = None
    delivered: Delivered | None = None
    dead: Letter | None = None
    #: "live" or "backfill", with the number of users before it; None if it is in neither.
    lane: str | None = None
    place: int = 0
    delayed_until_ms: int | None = None
    batch: str | None = None
    lease_ends_ms: int | None = None
    #: What is stored but cannot be read; it is set aside when it is next touched.
    damaged: tuple[str, ...] = field(default=())


def look(redis: Redis, keys: Keys, user: UserId) -> UserState:
    """Return what is known about a user."""
    k = keys
    script = scripts.load(redis, "look")
    tables = [
        k.pending,
        k.live,
        k.backfill,
        k.delayed,
        k.flight,
        k.batches,
        k.leases,
        k.shadow,
        k.shadow_at,
        k.dead,
    ]
    now, waiting, sent, memory, dead, live, backfill, until, delivered_at, batch, lease = script(
        tables, [user]
    )
    places = {"live": live, "backfill": backfill}
    lane = next((name for name, place in places.items() if place is not None), None)
    pending, in_flight, delivered = (
        _waiting(waiting),
        _waiting(sent),
        _delivered(memory, _whole(delivered_at) or 0),
    )
    letter = read_letter(user, dead) if dead else None
    stored: dict[str, tuple[Any, Any]] = {"pending": (waiting, pending), "in_flight": (sent, in_flight)}
    stored |= {"delivered": (memory, delivered), "dead": (dead, letter)}
    return UserState(
        user,
        now,
        pending,
        in_flight,
        delivered,
        letter,
        lane=lane,
        place=places[lane] if lane else 0,
        delayed_until_ms=_whole(until),
        batch=text(batch) if batch else None,
        lease_ends_ms=_whole(lease),
        damaged=tuple(name for name, (packed, read) in stored.items() if packed and read is None),
    )


def _whole(score: Any) -> int | None:
    return None if score is None else int(float(score))


def _waiting(packed: bytes | None) -> Waiting | None:
    try:
        raw = json.loads(packed or b"null")
        return Waiting(_values(raw["a"]), int(raw["t"]), int(raw.get("n", 0)), "s" in raw)
    except _UNREADABLE:
        return None


def _delivered(packed: bytes | None, at_ms: int) -> Delivered | None:
    try:
        raw = json.loads(packed or b"null")
        unknown = frozenset(name for name, (value, _) in raw["a"].items() if value is None)
        return Delivered(_values(raw["a"]), unknown, at_ms, number(str(raw.get("c", 0))))
    except _UNREADABLE:
        return None


_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def _values(attributes: Any) -> Values:
    return {str(name): (value or None, int(version)) for name, (value, version) in attributes.items()}
