"""What every answer of the API means, and what is done about it. Pure: no Redis, no HTTP, no clock.

`TABLE` has a verdict for every documented code (error code pages 1047/34348 and 269/1671, the call's own
page 1047/37170, older tables for codes that some pages still show). Where the documents contradict each
other the milder reading stands first. A code in no table is `UNKNOWN`: retried within a small bound, then
isolated, never dropped.

`decide` turns an answer to a whole request into an action, `decide_user` an entry of `ErrorList` or the
attempts a user has left into that user's outcome.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, assert_never

from worker.delivery.api import UNNUMBERED, NoReply, Reply
from worker.models import ClaimedUser, DeadLettered, Outcome, Retried, Snoozed


class Verdict(StrEnum):
    """What an error means; decides the reaction."""

    TRANSIENT = "transient"  # the service's fault, may pass: the same users again, later
    RATE = "rate"  # too many calls: everyone pauses, no attempt is used
    CREDENTIAL = "credential"  # the UserSig is bad or old: sign again
    STOP = "stop"  # configuration, permission or account: nothing will pass until a person acts
    SHAPE = "shape"  # this request is wrong as built: split it
    USER = "user"  # one user or value is wrong: find it, deliver the others
    UNKNOWN = "unknown"  # in no table, or belongs to other calls


class Rule(NamedTuple):
    """One row: the verdict, and the meaning in words an operator understands."""

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
_UNLISTED = Rule(Verdict.UNKNOWN, "a code in no document")

#: Attempts after which an unlisted code's users are isolated; the usual bound is for what will pass.
UNKNOWN_ATTEMPTS = 3
#: Seconds everyone pauses after a rate code: one full window of the API, so that it counts anew.
RATE_PAUSE = 1.0
#: Failures that count after which a user is suspected to spoil whatever call it is in.
SUSPECT_AFTER = 2
#: Seconds until a user whom the API refused by name, with a code that is about no user, is sent again.
STOP_WAIT = 30.0
#: Seconds for which 70050 must be left alone: trying again too soon causes it.
BLOCKED_WAIT = 60.0
#: Codes that attribute names which are not set for the app may be behind.
_NAMES_MAY_BE_UNSET = {60015, 70402, 90033}


def rule_for(code: int) -> Rule:
    """The row of a code."""
    return TABLE.get(code, _UNLISTED)


@dataclass(frozen=True, slots=True)
class Deliver:
    """The request succeeded, except for the users in `ErrorList`."""


@dataclass(frozen=True, slots=True)
class Again:
    """The service's fault, as it seems: the same users later; `hold` when it may still apply the call."""

    hold: bool


@dataclass(frozen=True, slots=True)
class Retry:
    """Nobody knows whose fault: the same users later, at most so often, at the cost of an attempt each time."""

    most: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Nobody in the fleet sends for `seconds`, and then more slowly; the users go back at no cost."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SignAgain:
    """The signature is bad: make a new one, once for the fleet; if that is bad, too, stop the line."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing will pass: stop the line, with a first probe after at least `seconds`; it costs no attempt."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Split:
    """Something in this request is refused for good: halve it to find out what.

    `names` when attribute names that the app does not have may be the reason.
    """

    names: bool


Action = Deliver | Again | Retry | Pause | SignAgain | Stop | Split


def decide(answer: Reply | NoReply) -> Action:
    """What to do about the answer to a whole request."""
    if isinstance(answer, NoReply):
        return Again(hold=answer.sent)
    if answer.code == 0:
        return Deliver()
    verdict = rule_for(answer.code).verdict
    match verdict:
        case Verdict.TRANSIENT:
            return Again(hold=False)
        case Verdict.UNKNOWN:
            return Retry(UNKNOWN_ATTEMPTS)
        case Verdict.RATE:
            return Pause(RATE_PAUSE)
        case Verdict.CREDENTIAL:
            return SignAgain()
        case Verdict.STOP:
            return Stop(BLOCKED_WAIT if answer.code == 70050 else 0.0)
        case Verdict.SHAPE | Verdict.USER:
            return Split(names=answer.code in _NAMES_MAY_BE_UNSET)
        case _:
            assert_never(verdict)


class Policy:
    """The bounds and the randomness that turn a decision about one user into its outcome."""

    def __init__(
        self, *, max_attempts: int, backoff_base: float, backoff_max: float, hold: float, rng: random.Random
    ) -> None:
        """`backoff_base`, `backoff_max` and `hold` in seconds."""
        self._max_attempts = max_attempts
        self._base, self._max = backoff_base, backoff_max
        #: Seconds in which a call with an unknown outcome may still be applied.
        self.hold = hold
        self._rng = rng

    def exhausted(self, attempts: int, most: int | None = None) -> bool:
        """Whether one more failure uses up the attempts of a user who had `attempts` before."""
        return attempts + 1 >= min(self._max_attempts, most or self._max_attempts)

    def spent(self, attempts: int) -> bool:
        """Whether so many failures that were not the service's have used up a user's attempts."""
        return attempts >= self._max_attempts

    def suspects(self, user: ClaimedUser) -> bool:
        """Whether the user may spoil the call it is in, and must not share one with those who may not."""
        return user.suspect or user.attempts >= min(SUSPECT_AFTER, self._max_attempts)

    def backoff(self, attempts: int) -> float:
        """Seconds until the next attempt: exponential, with full jitter so that users spread out."""
        # The exponent is bounded only so that the power cannot overflow.
        return self._rng.uniform(0, min(self._max, self._base * 2 ** min(attempts, 60)))

    def retry(self, attempts: int) -> Retried:
        """The outcome of a user who has attempts left."""
        return Retried(self.backoff(attempts))

    def again(self, action: Again, attempts: int) -> Retried:
        """The same when it may have been the service's fault. After a hold, the old call can land no more."""
        return Retried(self.backoff(attempts) + (self.hold if action.hold else 0.0), proven=False)

    def decide_user(self, code: int, info: str, attempts: int) -> Outcome:
        """What to do about one user that the API refused by name, in `ErrorList` or in a batch of one."""
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
                return self.retry(attempts)
            case _:
                assert_never(verdict)


def dead_letter(code: int, info: str) -> DeadLettered:
    """A dead letter in plain words, the API's own behind ours."""
    meaning = rule_for(code).meaning
    # Half a character (a lone surrogate) in the API's words could not be stored.
    words = info[:200].encode(errors="replace").decode()
    return DeadLettered(code, f"{meaning} ({words})" if words else meaning)
