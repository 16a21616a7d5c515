"""What goes wrong on purpose at the simulator, and how people write it.

A fault is text: what happens, and its share of all calls, such as ``91000:0.1`` (one call in ten is refused with ErrorCode
91000), ``502:0.05`` (HTTP status), ``timeout`` (every call).
"""

from __future__ import annotations

import dataclasses
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

from worker.delivery.policy import rule_for
from worker.errors import SandboxError

#: Seconds after which nobody waits for a reply any longer.
TOO_LATE = 60.0
#: Seconds in which the simulator must say what is set.
PATIENCE = 5.0


@dataclass(slots=True)
class Fault:
    """Something that goes wrong on purpose; the first fault that matches a request strikes.

    kind: `status` (HTTP status `code`, HTML body), `reset` (connection reset), `slow` (the reply comes
    `delay` s late), `truncated` (JSON cut short), `late_write` (connection reset, applied `delay` s later),
    `code` (refused with ErrorCode `code`), `user_code` (`user` refused with `code`, as `bad_user` says),
    `extra_fields`, `lost` (answered as if applied, but not applied). `applied` says whether the write of a `status` or
    `reset` took place.
    """

    kind: Literal[
        "status", "reset", "slow", "truncated", "late_write", "code", "user_code", "extra_fields", "lost"
    ]
    code: int = 0
    user: str = ""
    #: How many requests it strikes; None = all.
    times: int | None = 1
    chance: float = 1.0
    delay: float = 0.0
    applied: bool = False
    #: How many requests it has struck.
    struck: int = 0


class Faults:
    """The faults that wait for a request."""

    def __init__(self, faults: Iterable[Fault] = (), seed: int = 0) -> None:
        self._faults = list(faults)
        self.rng = random.Random(seed)

    def replace(self, faults: Iterable[Fault]) -> None:
        self._faults = list(faults)

    def strike(self, body: bytes) -> Fault | None:
        """Return the fault for this request, used up by one."""
        for fault in self._faults:
            if fault.times == 0 or (fault.user and f'"{fault.user}"'.encode() not in body):
                continue
            if fault.chance < 1 and self.rng.random() >= fault.chance:
                continue
            if fault.times is not None:
                fault.times -= 1
            fault.struck += 1
            return fault
        return None

    def as_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(fault) for fault in self._faults]


#: Faults with names, and what they mean; all others are numbers.
_NAMED = {
    "timeout": (Fault("slow", times=None, delay=TOO_LATE), "applied, and answered too late"),
    "reset": (Fault("reset", times=None), "not applied, and the connection reset"),
    "truncated": (Fault("truncated", times=None), "applied, and the answer cut short"),
    "lost": (Fault("lost", times=None), "not applied, and answered as if it were"),
}


def read_faults(texts: Iterable[str]) -> list[Fault]:
    """Return the faults that texts name. Raises `ValueError`, which quotes the text, for one that cannot be read."""
    faults, left = [], 1.0
    for text in texts:
        code, at, user = text.partition("@")
        if at:
            # The user is refused in every call that it is in, which takes no share of the calls from other faults.
            faults.append(_refused_user(text, code, user))
            continue
        what, colon, number = text.partition(":")
        share = _share(text, number) if colon else 1.0
        if share > left + 1e-9:
            raise ValueError(f"{text}: the shares must not add up to more than 1")
        # Each fault sees only the calls that the ones before it let pass.
        faults.append(dataclasses.replace(_fault(text, what), chance=min(1.0, share / left)))
        left -= share
        if left < 1e-9:
            left = 0.0
    return faults


def _share(text: str, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{text}: the share of the calls must be a number above 0, and at most 1")
    return share


def _refused_user(text: str, code: str, user: str) -> Fault:
    if not (_is_error_code(code) and user):
        raise ValueError(f"{text}: must be CODE@USER, with an ErrorCode of five digits and a user id")
    return Fault("user_code", code=int(code), user=user, times=None)


def _is_error_code(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) == 5 and text[0] != "0"


def _fault(text: str, what: str) -> Fault:
    if what in _NAMED:
        return _NAMED[what][0]
    if _is_error_code(what):
        return Fault("code", code=int(what), times=None)
    if what.isascii() and what.isdecimal() and len(what) == 3 and 400 <= int(what) <= 599:
        return Fault("status", code=int(what), times=None)
    raise ValueError(
        f"{text}: must be WHAT or WHAT:SHARE, with WHAT an ErrorCode of five digits, an HTTP status from 400 to 599, "
        f"or one of {', '.join(_NAMED)}; or CODE@USER"
    )


class Shown(NamedTuple):
    """A fault that is set, as people write it."""

    what: str
    #: Of all calls.
    share: float
    struck: int
    meaning: str


def shown(faults: Iterable[Fault]) -> list[Shown]:
    """Return what is set and not used up yet."""
    found, left = [], 1.0
    for fault in faults:
        if fault.times == 0:
            continue
        share = left * fault.chance
        left -= 0 if fault.user else share
        found.append(_in_words(fault, share))
    return found


def _in_words(fault: Fault, share: float) -> Shown:
    if fault.kind == "code":
        return Shown(str(fault.code), share, fault.struck, rule_for(fault.code).meaning)
    if fault.kind == "user_code":
        return Shown(f"{fault.code}@{fault.user}", 1.0, fault.struck, rule_for(fault.code).meaning)
    if fault.kind == "status":
        code = fault.code or 502
        phrase = next((f", {status.phrase}" for status in HTTPStatus if status == code), "")
        return Shown(str(code), share, fault.struck, f"HTTP status{phrase}")
    for name, (named, meaning) in _NAMED.items():
        if (named.kind, named.delay) == (fault.kind, fault.delay):
            return Shown(name, share, fault.struck, meaning)
    return Shown(fault.kind, share, fault.struck, "")


def set_at(api_url: str) -> list[Fault]:
    """Return what is set at the simulator with this URL; raises `SandboxError` if there is none."""
    found = _ask(api_url)
    # The real API answers any request, with an object.
    if not isinstance(found, list):
        raise SandboxError(f"{api_url} is not a simulator")
    return [Fault(**each) for each in found]


def set_to(api_url: str, faults: Sequence[Fault]) -> None:
    """Replace all faults of a simulator; raises `SandboxError` if it is not one."""
    # Anything else at this URL gets nothing.
    set_at(api_url)
    _ask(api_url, json.dumps([dataclasses.asdict(fault) for fault in faults]).encode())


#: This machine is asked directly, not through a proxy that the environment may name.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask(api_url: str, body: bytes | None = None) -> Any:
    try:
        with _direct.open(f"{api_url}/simulator/faults", body, timeout=PATIENCE) as reply:
            return json.load(reply)
    except (urllib.error.HTTPError, ValueError):
        raise SandboxError(f"{api_url} is not a simulator") from None
    except OSError as error:
        raise SandboxError(f"{api_url} does not answer: {getattr(error, 'reason', error)}") from None
