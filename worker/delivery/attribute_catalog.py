"""The app's attribute names at the API itself: read and added on an operator's request.

Such a call waits for a slot of the shared clock like any other. Failures are explained in words that an operator
understands, each with what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker import logs
from worker.clock import Clock
from worker.delivery.answers import Answer, Failure, NoReply, Reply
from worker.delivery.api import Call, ChatApi
from worker.delivery.policy import rule_for
from worker.errors import CallFailed
from worker.models import MAX_ATTRIBUTES
from worker.ratelimit import RateLimiter
from worker.state.attribute_names import AttributeNames

#: Slots to try for one call, and seconds between two tries while all slots are taken.
TRIES, TRY_AGAIN_AFTER = 5, 0.5

_BUSY = "try again later; imattr status shows what is happening"
_CHECK_NETWORK = "check the network from here to the API, and IMATTR_REGION or IMATTR_API_URL"
_CHECK_URL = "check IMATTR_API_URL: scheme and host only, the path is added to it"
_CHECK_APP = "check IMATTR_SDKAPPID"
_CHECK_KEY = "copy the app's whole secret key from the console again: IMATTR_SECRET_KEY"
_CHECK_BOTH = "IMATTR_SDKAPPID and IMATTR_SECRET_KEY belong to different apps: copy both from the same page of the console"
_CHECK_REGION = "check IMATTR_SDKAPPID, and set IMATTR_REGION to the region in which the app was created"
_CHECK_ADMIN = "make IMATTR_ADMIN an administrator of the app in the console, or name one that is"
_BUY = "buy or renew the plan in the console; it takes effect after about 5 minutes"
_SHARE = "another program is using up the quota: stop it, or leave it a share by lowering IMATTR_QUOTA"
_ASK_WHY = "ask Tencent support why"
_ASK_TENCENT = "ask Tencent support, quoting the code"

#: What an operator can do about an error code.
FIXES = {
    60002: _CHECK_URL,
    60006: _CHECK_APP,
    60007: _SHARE,
    60009: _CHECK_URL,
    60010: _CHECK_ADMIN,
    60011: _SHARE,
    60012: _CHECK_APP,
    60016: _ASK_WHY,
    60017: _ASK_WHY,
    60018: _SHARE,
    60019: _SHARE,
    60020: _BUY,
    60021: "ask Tencent support to allow this machine's IP address",
    60026: _CHECK_REGION,
    60027: "set IMATTR_API to the product the app uses, chat or push",
    70001: "set this machine's clock: the UserSig was only just made",
    70003: _CHECK_KEY,
    70005: _CHECK_KEY,
    70009: _CHECK_BOTH,
    70013: "check IMATTR_ADMIN: upper and lower case and spaces matter",
    70014: _CHECK_BOTH,
    70016: _CHECK_REGION,
    70020: _CHECK_REGION,
    70050: "fix what made the signature fail, and wait a minute before you try again",
    80005: _BUY,
    90009: _CHECK_ADMIN,
    90033: "compare with the names the app has: imattr names list",
    90045: "turn it on in the console: Feature Configuration, Login and Messages, Push to all users",
}

#: What is wrong, and what to do about it, when there is no readable answer.
_FAILURES = {
    Failure.UNREACHABLE: ("the API cannot be reached", _CHECK_NETWORK),
    Failure.TIMEOUT: ("the API did not answer in time", _CHECK_NETWORK),
    Failure.BROKEN: ("the connection to the API broke", _CHECK_NETWORK),
    Failure.UNREADABLE: ("what answered is not Tencent's API", _CHECK_URL),
}


class NoPermit(CallFailed):
    """Raised when no slot came free. Nothing is wrong with the API: it was not asked."""

    def __init__(self) -> None:
        super().__init__("not asked: every slot is taken, or the rate is paused", _BUSY)


class AttributeCatalog:
    """Reads and adds names, one call at a time; each answer updates what validation knows."""

    def __init__(self, api: ChatApi, limiter: RateLimiter, known: AttributeNames, clock: Clock) -> None:
        self._api, self._limiter, self._known, self._clock = api, limiter, known, clock

    def ask(self) -> Answer:
        """Ask the API once; raises `NoPermit` when no slot came free."""
        return self._call(self._api.prepare_get_names)

    def learn(self, answer: Answer) -> frozenset[str]:
        """Keep and return the names in an answer; raises `CallFailed` when it has none."""
        names = _good(answer).names
        try:
            self._known.set(names)
        except ValueError as broken:
            found = f"the API answered with names that no app can have: {broken}"
            raise CallFailed(found, _CHECK_URL) from None
        return names

    def read(self) -> frozenset[str]:
        """Return the app's names; raises `CallFailed`."""
        return self.learn(self.ask())

    def add(self, wanted: Sequence[str]) -> list[str]:
        """Add the names that the app does not have yet, and return them; raises `CallFailed`."""
        have = self.read()
        new = [name for name in dict.fromkeys(wanted) if name not in have]
        if len(have) + len(new) > MAX_ATTRIBUTES:
            raise CallFailed(
                f"the app has {len(have)} of at most {MAX_ATTRIBUTES} names, no room for {len(new)} more",
                f"use one that it has: {', '.join(sorted(have))}",
            )
        if new:
            answer = self._call(lambda: self._api.prepare_set_names(new, first=len(have)))
            _good(answer, with_info=True)
            self._known.set(have.union(new))
        return new

    def _call(self, prepare: Callable[[], Call | NoReply]) -> Answer:
        call: Call | NoReply | None = None
        for _ in range(TRIES):
            permit = self._limiter.reserve()
            if permit is None:
                self._clock.sleep(TRY_AGAIN_AFTER)
                continue
            # Once: for a slot that was missed, the next one will do.
            call = call or prepare()
            if isinstance(call, NoReply):
                return call
            if self._limiter.redeem(permit):
                call.send()
                self._limiter.sent(permit)
                return call.answer()
        if call and not isinstance(call, NoReply):
            call.abandon()
        raise NoPermit


def _good(answer: Answer, *, with_info: bool = False) -> Reply:
    """Return a successful answer; raises `CallFailed`, `with_info` with the API's own words after ours."""
    if isinstance(answer, NoReply):
        raise CallFailed(*_no_reply(answer))
    if answer.code:
        words = f": {logs.scrub(answer.info[:200])}" if with_info and answer.info else ""
        found = f"the API refused with {answer.code}, {rule_for(answer.code).meaning}{words}"
        raise CallFailed(found, FIXES.get(answer.code, _ASK_TENCENT))
    return answer


def _no_reply(answer: NoReply) -> tuple[str, str]:
    if answer.failure is not Failure.HTTP_STATUS:
        return _FAILURES[answer.failure]
    ours = (answer.http_status or 0) < 500
    fix = _CHECK_URL if ours else "wait until the service, or the proxy in front of it, has recovered"
    return f"HTTP status {answer.http_status} instead of an answer", fix
