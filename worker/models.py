"""The values that travel through the product, and the rules they obey.

The rules are the API's own: user ids of 1 to 32 bytes of printable ASCII, names and values of 1 to 50 bytes, at most 10
attributes per app (Tencent Cloud Chat documents 1047/34953, 1047/37167 and 1047/37170). Bytes are those of the UTF-8 text,
so a value in Chinese or Thai has room for 16 characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, NewType

from .errors import InvalidUpdate

MAX_USER_ID_BYTES = 32
MAX_NAME_BYTES = 50
MAX_VALUE_BYTES = 50
MAX_ATTRIBUTES = 10

UserId = str
BatchId = NewType("BatchId", str)

#: Attribute name -> value, or None to remove the attribute.
Attributes = Mapping[str, str | None]

#: Seconds by which an event time may be ahead of Redis' clock, unless the settings say otherwise.
MAX_AHEAD = 300.0
#: The longest that anything delays a user, in seconds, unless the settings allow a longer back-off. Stops are probed more
#: often.
LONGEST_DELAY = 330.0
#: Seconds after which a call that was sent can no longer take effect, with the default timeouts.
LONGEST_CALL = 15.0

#: Event times outside these bounds (years 2001 and 2286, in ms) are taken to be in the wrong unit.
EARLIEST_MS, LATEST_MS = 1_000_000_000_000, 9_999_999_999_999


@dataclass(frozen=True, slots=True)
class Update:
    """A validated change of one user's attributes. `occurred_ms` 0 = now, on Redis' clock."""

    user: UserId
    attrs: Attributes
    occurred_ms: int = 0


class ClaimedUser(NamedTuple):
    """One user of a claimed batch: the values that are being sent."""

    user: UserId
    attrs: Attributes
    attempts: int
    since_ms: int
    #: Whether it may spoil the call it is in, and so must not share one with users who are not suspects.
    suspect: bool = False
    #: Whether only a backfill asked for it.
    backfill: bool = False
    #: Whether the last call with this user may have been applied: there was no answer to it.
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Users claimed together for one call, in the order in which they became due."""

    id: BatchId
    users: tuple[ClaimedUser, ...]
    claimed_ms: int
    #: If the line is stopped and this batch is its probe: the kind of the stop.
    probe: Literal["", "error", "outage", "data"] = ""
    #: Signatures older than this (seconds since 1970) are bad.
    signed_at: int = 0
    #: The fleet's count of claims, which shows when a failover has lost one.
    number: int = 0


# Outcomes: how one user of a batch is settled.


@dataclass(frozen=True, slots=True)
class Acked:
    """Delivered."""


@dataclass(frozen=True, slots=True)
class Retried:
    """Send again after `delay` seconds; costs an attempt.

    Unless `proven`, only once a call that was claimed later has succeeded: the service may be to blame. `unknown` if the call
    may have been applied.
    """

    delay: float
    proven: bool = True
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Snoozed:
    """Send again after `delay` seconds; costs nothing. A `suspect` is never sent together with others again."""

    delay: float = 0.0
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """Given up, kept for a person."""

    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Its record cannot be read: set aside, with its raw bytes."""


Outcome = Acked | Retried | Snoozed | DeadLettered | Quarantined


@dataclass(frozen=True, slots=True)
class Refusal:
    """An update that was refused. `index` is its place in the bulk call, from 0."""

    index: int
    user: str
    rule: str


@dataclass(slots=True)
class BulkResult:
    """What became of many updates; `accepted` and `refused` add up to the updates sent."""

    accepted: int = 0
    coalesced: int = 0
    unchanged: int = 0
    stale: int = 0
    refused: list[Refusal] = field(default_factory=list)


def _shorten(user: object) -> str:
    # Anything but an id may be the attributes, given in the wrong place.
    text = repr(user) if isinstance(user, str | int) else f"<{type(user).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_user(user: object) -> UserId:
    """Return the user id, or raise `InvalidUpdate`."""
    if type(user) is not str:
        raise InvalidUpdate(_shorten(user), f"user id must be a string, got {type(user).__name__}")
    # isascii and isprintable: exactly 0x20 to 0x7e, so the length is the number of bytes.
    if user.isascii() and user.isprintable() and 0 < len(user) <= MAX_USER_ID_BYTES:
        return user
    if not user:
        raise InvalidUpdate("''", "user id is empty")
    if not (user.isascii() and user.isprintable()):
        raise InvalidUpdate(_shorten(user), "user id must be printable ASCII")
    raise InvalidUpdate(_shorten(user), f"user id is {len(user)} bytes, at most {MAX_USER_ID_BYTES}")


def _check_text(user: UserId, what: str, text: object, limit: int) -> None:
    if type(text) is not str:
        raise InvalidUpdate(user, f"{what} must be a string, got {type(text).__name__}")
    if not text:
        raise InvalidUpdate(user, f"{what} is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidUpdate(user, f"{what} is not valid Unicode (it has a lone surrogate)") from None
    if size > limit:
        raise InvalidUpdate(user, f"{what} is {size} bytes, at most {limit}")


def check_attrs(user: UserId, attrs: object, names: frozenset[str] = frozenset()) -> Attributes:
    """Return the attributes, or raise `InvalidUpdate`; `names` are the app's, empty if not known.

    A value of None removes the attribute.
    """
    if not isinstance(attrs, Mapping):
        raise InvalidUpdate(user, f"attributes must be a mapping, got {type(attrs).__name__}")
    if not 0 < len(attrs) <= MAX_ATTRIBUTES:
        raise InvalidUpdate(user, f"{len(attrs)} attributes, must be 1 to {MAX_ATTRIBUTES}")
    for name, value in attrs.items():
        # Short ASCII text, the usual case, passes on these few comparisons alone.
        if not (type(name) is str and name.isascii() and 0 < len(name) <= MAX_NAME_BYTES):
            _check_text(user, "an attribute name", name, MAX_NAME_BYTES)
        if names and name not in names:
            known = ", ".join(sorted(names))
            raise InvalidUpdate(user, f"attribute {name!r} is not one of the app's ({known})")
        if value is None:
            continue
        if not (type(value) is str and value.isascii() and 0 < len(value) <= MAX_VALUE_BYTES):
            _check_text(user, f"the value of {name!r}", value, MAX_VALUE_BYTES)
    # JSON needs a plain dict, and the caller must not change what was checked.
    return dict(attrs)


def check_occurred_at(user: UserId, occurred_at: object) -> int:
    """Return an event time as ms since 1970, 0 for none.

    Takes a datetime with a time zone, ISO 8601 text with one, or seconds or milliseconds since 1970 (distinguished by size).
    """
    if occurred_at is None:
        return 0
    if isinstance(occurred_at, str):
        try:
            occurred_at = datetime.fromisoformat(occurred_at)
        except ValueError:
            raise InvalidUpdate(user, "occurred_at is not an ISO 8601 time") from None
    if isinstance(occurred_at, datetime):
        if occurred_at.tzinfo is None:
            raise InvalidUpdate(user, "occurred_at has no time zone")
        occurred_at = occurred_at.timestamp()
    if type(occurred_at) not in (int, float):
        kind = type(occurred_at).__name__
        raise InvalidUpdate(user, f"occurred_at must be a time, text or number, got {kind}")
    number: float = occurred_at  # type: ignore[assignment]  # narrowed by the line above
    if number == number and abs(number) < EARLIEST_MS:
        number *= 1000
    if not EARLIEST_MS <= number <= LATEST_MS:
        raise InvalidUpdate(user, "occurred_at is outside the years 2001 to 2286")
    return int(number)


def check_update(
    user: object, attrs: object, occurred_at: object = None, names: frozenset[str] = frozenset()
) -> Update:
    """Return a valid update, or raise `InvalidUpdate` with the user, the rule and the measured length."""
    checked = check_user(user)
    return Update(checked, check_attrs(checked, attrs, names), check_occurred_at(checked, occurred_at))


def check_names(names: Iterable[object]) -> frozenset[str]:
    """Return valid attribute names, or raise `ValueError` with the rule that is broken."""
    found = list(names)
    if len(found) > MAX_ATTRIBUTES:
        raise ValueError(f"{len(found)} attribute names, an app has at most {MAX_ATTRIBUTES}")
    for name in found:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"attribute name {_shorten(name)} must be 1 to {MAX_NAME_BYTES} bytes of text")
    return frozenset(str(name) for name in found)
