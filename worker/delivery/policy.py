"""What every answer of the API means, and what to do about it. Pure: no Redis, no HTTP, no clock.

`TABLE` has a verdict for every documented code: those of the error code pages 1047/34348 and 269/1671, of the call's own
page 1047/37170, and of older tables for codes that some pages still show. Where the documents contradict each other, the
milder reading comes first. A code in no table is `UNKNOWN`: retried a few times, then isolated, never dropped.

`decide` turns the answer to a whole request into an action; `Policy.decide_user` turns an entry of `ErrorList`, or the
attempts a user has left, into that user's outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, assert_never

from worker.delivery.answers import TOO_MANY_REQUESTS, UNNUMBERED, Answer, NoReply
from worker.models import ClaimedUser, DeadLettered, Outcome, Retried, Snoozed


class Verdict(StrEnum):
    """What an error means."""

    TRANSIENT = "transient"  # the service's fault, may pass: retry the same users later
    RATE = "rate"  # too many calls: everyone pauses, no attempt is used
    CREDENTIAL = "credential"  # the UserSig is bad or expired: renew it
    STOP = "stop"  # configuration, permission or account: no call passes until a person acts
    SHAPE = "shape"  # this request is wrong as built: split it
    USER = "user"  # one user or value is wrong: find it and deliver the others
    UNKNOWN = "unknown"  # in no table, or belongs to other calls


class Rule(NamedTuple):
    """One row: the verdict, and the meaning in an operator's words."""

    verdict: Verdict
    meaning: str


_ROWS: dict[Verdict, dict[int, str]] = {
    Verdict.TRANSIENT: {
        10002: "internal error of the service",
        20004: "network error inside the service",
        20005: "internal error of the service",
        60008: "the service timed out, or could not read the request",
        60013: "the service could not read its own reply",
        60014: "the service timed out while checking the account",
        70169: "the service timed out",
        70202: "the service timed out",
        70500: "internal error of the service",
        90992: "internal error of the service",
        90994: "internal error of the service",
        90995: "internal error of the service",
        91000: "internal error of the service",
    },
    Verdict.RATE: {
        TOO_MANY_REQUESTS: "HTTP status 429: too many requests",
        60007: "call frequency over the limit",
        60011: "call frequency of the app over the limit",
        60018: "too many requests",
        60019: "too many requests",
    },
    Verdict.CREDENTIAL: {
        60004: "account or signature refused",
        60005: "account check failed",
        70001: "the UserSig has expired",
        70002: "the UserSig is empty",
        70003: "the UserSig is illegal or cut short",
        70005: "the UserSig is illegal",
        70052: "the UserSig was made invalid",
    },
    Verdict.STOP: {
        60002: "the service could not parse the HTTP request: check the URL",
        60006: "the SDKAppID is invalid",
        60009: "no such resource: check the URL",
        60010: "an administrator account is required",
        60012: "the SDKAppID is missing from the URL",
        60016: "the app is disabled",
        60017: "requests of the app are disabled",
        60020: "the plan has not been bought, has expired or is in arrears",
        60021: "this IP address is not allowed",
        60025: "a parameter of the URL is wrong",
        60026: "the domain does not match the region of the app",
        60027: "the app's product type may not use this API",
        60028: "the trial edition's daily volume is used up",
        70009: "the UserSig was made with the key of another app",
        70013: "the UserSig belongs to another account",
        70014: "the UserSig belongs to another app",
        70016: "the key does not exist: often the wrong region",
        70020: "the SDKAppID does not exist: often the wrong region",
        70050: "verification failed too often: wait a minute",
        70051: "the calling account is blocked",
        70346: "the old kind of signature failed",
        70347: "the old kind of signature failed",
        70348: "the old kind of signature failed",
        70398: "the trial edition's number of accounts is used up",
        70403: "an administrator account is required",
        72000: "daily active users over the quota",
        72002: "monthly active users over the quota",
        80005: "the service is deactivated: expired or in arrears",
        90009: "the calling account is not an administrator",
        90045: "push to all users is not enabled for the app",
    },
    Verdict.SHAPE: {
        60003: "the service could not parse the JSON",
        70206: "illegal number of accounts in a batch",
        70402: "illegal parameter",
        80002: "the body is too long",
        90001: "the service could not parse the JSON, or a field is missing",
        90018: "too many accounts in one request",
        90055: "the body is too long",
        90056: "the body is too long",
        93000: "the body is too long",
    },
    Verdict.USER: {
        60015: "the user id is not a string",
        70107: "the account does not exist: import it",
        70399: "the account was deleted and cannot be imported again yet",
        90003: "the account is missing or does not exist",
        90012: "the account is missing or does not exist",
        90030: "the attribute's length is not allowed",
        90033: "an attribute is invalid: its name is not set for the app, or its value is refused",
        90035: "the attribute belongs to the other type of account",
        90048: "the account does not exist",
    },
    Verdict.UNKNOWN: {
        UNNUMBERED: "failed without an error code",
        60022: "a code without documentation",
        60023: "a code without documentation",
        60024: "a code without documentation",
        40006: "a code of another call (account import)",
        40601: "a code of another call (account import)",
        70114: "a code of another call (restricted for security)",
        70404: "a code of another call (client version)",
        71000: "a code of another call (account deletion)",
        72001: "a code of another call (feature)",
        72010: "a code of another call (client login frequency)",
        72011: "a code of another call (feature)",
        72012: "a code of another call (feature)",
        90002: "a code of another call (push)",
        90005: "a code of another call (push)",
        90007: "a code of another call (push)",
        90010: "a code of another call (push)",
        90020: "a code of another call (tags)",
        90022: "a code of another call (push condition)",
        90024: "a code of another call (push interval)",
        90026: "a code of another call (offline time)",
        90032: "a code of another call (push condition)",
        90034: "a code of another call (tags)",
        90039: "a code of another call (push condition)",
        90040: "a code of another call (push condition)",
        90047: "a code of another call (push quota)",
        90057: "a code of another call (batch messages)",
    },
}

#: Every documented code.
TABLE = {code: Rule(verdict, text) for verdict, codes in _ROWS.items() for code, text in codes.items()}
_UNLISTED = Rule(Verdict.UNKNOWN, "an undocumented code")

#: Attempts after which users with an unlisted code are isolated. The usual, higher bound is for errors that pass.
UNKNOWN_ATTEMPTS = 3
#: Seconds the fleet pauses after a rate code: one full window of the API, so that its count starts over.
RATE_PAUSE = 1.0
#: The longest `Retry-After` that is believed, in seconds.
LONGEST_PAUSE = 60.0
#: Counted failures after which a user is suspected of spoiling any call it is in.
SUSPECT_AFTER = 2
#: Seconds until a user that the API refused by name, but with a code that is not about a user, is sent again.
STOP_WAIT = 30.0
#: Seconds to wait after 70050: retrying too soon is what causes it.
BLOCKED_WAIT = 60.0
#: Codes that may be caused by attribute names the app does not have.
_NAMES_MAY_BE_UNSET = {60015, 70402, 90033}


def rule_for(code: int) -> Rule:
    """Return the row of a code."""
    return TABLE.get(code, _UNLISTED)


@dataclass(frozen=True, slots=True)
class Deliver:
    """The request succeeded, except for the users in `ErrorList`."""


@dataclass(frozen=True, slots=True)
class RetryUncounted:
    """The service seems to have failed: retry the same users later.

    `hold` if it may still apply this call. A user pays an attempt only once a call made after this one has succeeded.
    """

    hold: bool


@dataclass(frozen=True, slots=True)
class RetryCounted:
    """It is unknown who is to blame: retry the same users later, at the cost of an attempt, `most` attempts in all."""

    most: int


@dataclass(frozen=True, slots=True)
class Pause:
    """The whole fleet stops sending for `seconds`, and then sends more slowly; the users go back at no cost."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RenewSignature:
    """The signature is bad: replace it, once for the fleet. If the new one is bad, too, stop the line."""


@dataclass(frozen=True, slots=True)
class Stop:
    """No call will pass: stop the line, and probe it after `seconds` at the earliest. Costs no attempt."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Bisect:
    """The API refuses something in this request for good: halve it to find out what.

    `names` if attribute names that the app does not have may be the reason.
    """

    names: bool


Action = Deliver | RetryUncounted | RetryCounted | Pause | RenewSignature | Stop | Bisect


def decide(answer: Answer) -> Action:
    """Return what to do about the answer to a whole request."""
    if isinstance(answer, NoReply):
        return RetryUncounted(hold=answer.sent)
    if answer.code == 0:
        return Deliver()
    verdict = rule_for(answer.code).verdict
    match verdict:
        case Verdict.TRANSIENT:
            return RetryUncounted(hold=False)
        case Verdict.UNKNOWN:
            return RetryCounted(UNKNOWN_ATTEMPTS)
        case Verdict.RATE:
            return Pause(min(max(RATE_PAUSE, answer.retry_after), LONGEST_PAUSE))
        case Verdict.CREDENTIAL:
            return RenewSignature()
        case Verdict.STOP:
            return Stop(BLOCKED_WAIT if answer.code == 70050 else 0.0)
        case Verdict.SHAPE | Verdict.USER:
            return Bisect(names=answer.code in _NAMES_MAY_BE_UNSET)
        case _:
            assert_never(verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The bounds that turn a decision about one user into its outcome. Times in seconds.

    `jitter` below is a number from 0 to 1 that spreads the users of a batch out.
    """

    max_attempts: int
    backoff_base: float
    backoff_max: float
    #: How long a call with an unknown outcome may still be applied.
    hold: float

    def exhausted(self, attempts: int, most: int | None = None) -> bool:
        """Whether one more failure uses up the attempts of a user who had `attempts` before."""
        return attempts + 1 >= min(self.max_attempts, most or self.max_attempts)

    def spent(self, attempts: int) -> bool:
        """Whether this many failures that were not the service's have used up a user's attempts."""
        return attempts >= self.max_attempts

    def suspects(self, user: ClaimedUser) -> bool:
        """Whether the user may spoil the call it is in, and so must not share one with users who do not."""
        return user.suspect or user.attempts >= min(SUSPECT_AFTER, self.max_attempts)

    def backoff(self, attempts: int, jitter: float) -> float:
        """Seconds until the next attempt: exponential, with full jitter."""
        # The exponent is bounded only so that the power cannot overflow.
        return jitter * min(self.backoff_max, self.backoff_base * 2.0 ** min(attempts, 60))

    def retry(self, attempts: int, jitter: float) -> Retried:
        """The outcome of a user who has attempts left."""
        return Retried(self.backoff(attempts, jitter))

    def retry_uncounted(self, action: RetryUncounted, attempts: int, jitter: float) -> Retried:
        """The outcome if the service may be to blame. After a hold, the old call can no longer land."""
        hold = self.hold if action.hold else 0.0
        return Retried(self.backoff(attempts, jitter) + hold, proven=False, unknown=action.hold)

    def decide_user(self, code: int, info: str, attempts: int, jitter: float) -> Outcome:
        """Return the outcome of a user that the API refused by name, in `ErrorList`."""
        verdict = rule_for(code).verdict
        match verdict:
            case Verdict.USER | Verdict.SHAPE:
                return dead_letter(code, info)
            case Verdict.RATE:
                return Snoozed(RATE_PAUSE)
            case Verdict.STOP | Verdict.CREDENTIAL:
                return Snoozed(STOP_WAIT)
            case Verdict.TRANSIENT | Verdict.UNKNOWN:
                most = UNKNOWN_ATTEMPTS if verdict is Verdict.UNKNOWN else None
                if self.exhausted(attempts, most):
                    return dead_letter(code, info)
                return self.retry(attempts, jitter)
            case _:
                assert_never(verdict)


def dead_letter(code: int, info: str) -> DeadLettered:
    """Return a dead letter in plain words, with the API's own words after ours."""
    meaning = rule_for(code).meaning
    # A lone surrogate in the API's words could not be stored.
    words = info[:200].encode(errors="replace").decode()
    return DeadLettered(code, f"{meaning} ({words})" if words else meaning)
