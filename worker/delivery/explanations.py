"""The API's answers in an operator's words, each with what to do about it."""

from __future__ import annotations

from worker import logs
from worker.delivery.answers import Answer, Failure, NoReply, Reply
from worker.delivery.policy import rule_for
from worker.errors import CallFailed

_CHECK_NETWORK = "check the network from here to the API, and IMATTR_REGION or IMATTR_API_URL"
CHECK_URL = "check IMATTR_API_URL: scheme and host only, the path is added to it"
_CHECK_APP = "check IMATTR_SDKAPPID"
_CHECK_KEY = "copy the app's whole secret key from the console again: IMATTR_SECRET_KEY"
_CHECK_BOTH = "IMATTR_SDKAPPID and IMATTR_SECRET_KEY belong to different apps: copy both from the same page of the console"
_CHECK_REGION = "check IMATTR_SDKAPPID, and set IMATTR_REGION to the region in which the app was created"
_CHECK_ADMIN = "make IMATTR_ADMIN an administrator of the app in the console, or set it to one"
_BUY = "buy or renew the plan in the console; it takes effect after about 5 minutes"
_SHARE = "another program is using the quota: stop it, or leave it a share by lowering IMATTR_QUOTA"
_ASK_WHY = "ask Tencent support why"
_ASK_TENCENT = "ask Tencent support, quoting the code"

#: What an operator can do about an error code.
FIXES = {
    60002: CHECK_URL,
    60006: _CHECK_APP,
    60007: _SHARE,
    60009: CHECK_URL,
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
    Failure.UNREADABLE: ("what answered is not Tencent's API", CHECK_URL),
}


def good(answer: Answer, *, with_info: bool = False) -> Reply:
    """Return a successful answer; raises `CallFailed`, with the API's own words after ours if `with_info`."""
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
    fix = CHECK_URL if ours else "wait until the service, or the proxy in front of it, has recovered"
    return f"HTTP status {answer.http_status} instead of an answer", fix
