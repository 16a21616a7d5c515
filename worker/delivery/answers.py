"""What the API answers, as values.

Facts: Tencent Cloud Chat documents 1047/37170 (`im_set_attr`), 1047/37169 (`im_get_attr`), 1047/60565
(`timpush/set_attr`) and 1047/34620 (rules for all calls). The API answers HTTP 200 even on failure; the truth is in
`ErrorCode` and, under a successful `ErrorCode`, in `ErrorList`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from worker.models import UserId

#: Our own code for HTTP status 429, which gateways return in place of the API's own 60007.
TOO_MANY_REQUESTS = 429
#: Anything beyond these, larger and longer than any code or text of the API, is cut.
MAX_CODE, MAX_INFO = 2**31 - 1, 1000
#: `ActionStatus` is FAIL, or missing, under `ErrorCode` 0: a failure that the API did not number.
UNNUMBERED = -1


@dataclass(frozen=True, slots=True)
class UserError:
    """One entry of `ErrorList`. `code` is `UNNUMBERED` when the entry has none."""

    code: int
    info: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A readable answer. `code` 0 means success for every user not in `errors`.

    `info` and the entries' `info` are the API's own words. They may quote values, so they go into dead letters, never
    into logs.
    """

    code: int
    info: str = ""
    errors: Mapping[UserId, UserError] = field(default_factory=dict)
    request_id: str = ""
    #: The app's attribute names, if the call asked for those.
    names: frozenset[str] = frozenset()
    #: What the users have, name -> value, if the call asked for that. Users the API does not know are not in it.
    values: Mapping[UserId, Mapping[str, str]] = field(default_factory=dict)
    #: When the UserSig of the call was made, seconds since 1970.
    signed_at: int = field(default=0, compare=False)
    #: Seconds that the other side asks to wait.
    retry_after: float = 0.0
    #: The API's own time, from its `Date` header.
    date: str = field(default="", compare=False)


class Failure(StrEnum):
    """Why there is no readable answer."""

    UNREACHABLE = "unreachable"  # no connection: the request never left
    TIMEOUT = "timeout"
    BROKEN = "connection broken"
    HTTP_STATUS = "http status"
    UNREADABLE = "unreadable reply"


@dataclass(frozen=True, slots=True)
class NoReply:
    """No readable answer. Unless `sent` is False, the API may have applied the call, or may still do so."""

    failure: Failure
    sent: bool = True
    http_status: int | None = None
    #: Seconds that the other side asks to wait.
    retry_after: float = 0.0


Answer = Reply | NoReply

#: Nothing left this machine.
UNREACHABLE = NoReply(Failure.UNREACHABLE, sent=False)


def read_reply(body: bytes) -> Answer:
    """Read the body of an answer with HTTP status 200 by its documented fields; unknown fields are ignored."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return NoReply(Failure.UNREADABLE)
    if not isinstance(answer, dict) or type(answer.get("ErrorCode")) is not int:
        return NoReply(Failure.UNREADABLE)
    entries, names = answer.get("ErrorList") or [], answer.get("AttrNames") or {}
    values = _values(answer.get("UserAttrs") or [])
    if not isinstance(entries, list) or not isinstance(names, dict) or values is None:
        return NoReply(Failure.UNREADABLE)
    code = _code(answer["ErrorCode"])
    if code == 0 and answer.get("ActionStatus") != "OK":
        code = UNNUMBERED
    return Reply(
        code=code,
        info=_words(answer.get("ErrorInfo")),
        errors=dict(filter(None, map(_user_error, entries))),
        request_id=_words(answer.get("RequestId")),
        names=frozenset(name for name in names.values() if isinstance(name, str)),
        values=values,
    )


def _values(entries: Any) -> dict[UserId, Mapping[str, str]] | None:
    """What `im_get_attr` says about each user (1047/37169), in any order; None if any part of it is malformed.

    Half an answer is worse than none: users missing from it would seem unknown to the API.
    """
    found: dict[UserId, Mapping[str, str]] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        user, attrs = (
            (entry.get("To_Account"), entry.get("Attrs")) if isinstance(entry, dict) else (None, None)
        )
        attrs = {} if attrs is None else attrs
        if not isinstance(user, str) or not isinstance(attrs, dict):
            return None
        if not all(isinstance(value, str) for value in attrs.values()):
            return None
        found[user] = attrs
    return found


def _user_error(entry: Any) -> tuple[UserId, UserError] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("To_Account"), str):
        return None
    code = entry.get("ErrorCode")
    if code == 0:
        return None
    return entry["To_Account"], UserError(_code(code), _words(entry.get("ErrorInfo")))


def _code(code: Any) -> int:
    return code if type(code) is int and abs(code) <= MAX_CODE else UNNUMBERED


def _words(info: Any) -> str:
    """The API's words as text that can be stored: cut, and without lone surrogates."""
    text = info if isinstance(info, str) else "" if info is None else str(info)
    return text[:MAX_INFO].encode(errors="replace").decode()
