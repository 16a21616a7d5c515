"""Reads what users have at the API: up to 100 of them with one call, in a slot of its own.

`im_get_attr` (1047/37169) answers in any order, and with fewer users than it was asked for. It never changes anything, so
after a passing failure it is simply called again. The slots are those that deliveries leave free, or those of a quota for
reads alone: the limiter given here decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from worker.clock import Clock
from worker.delivery.answers import Answer, NoReply, Reply
from worker.delivery.api import ChatApi
from worker.delivery.explanations import good
from worker.delivery.plan import letter_of
from worker.delivery.policy import (
    Bisect,
    Deliver,
    Pause,
    RenewSignature,
    RetryCounted,
    RetryUncounted,
    Stop,
    Verdict,
    decide,
    rule_for,
)
from worker.errors import CallFailed
from worker.models import UserId
from worker.ratelimit import Permit, RateLimiter

#: Failures in a row after which a person must look, and the longest time between two attempts, seconds.
MOST_FAILURES, LONGEST_WAIT = 8, 30.0
#: Seconds between two attempts to get a slot.
TRY_AGAIN = 0.1
#: Seconds after which a call that waits for its slot is prepared again: its connection may have been closed.
FRESH = 5.0

Values = Mapping[str, str]


class ReadingStopped(Exception):
    """Raised by a read if its caller wants to stop."""


class Reader:
    """Reads users, one call at a time. Not thread-safe."""

    def __init__(
        self,
        api: ChatApi,
        limiter: RateLimiter,
        clock: Clock,
        *,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._api, self._limiter, self._clock, self._stopping = api, limiter, clock, stopping
        #: Calls made so far.
        self.calls = 0
        self._failures, self._renewed = 0, False

    def read(self, users: Sequence[UserId]) -> dict[UserId, Values | None]:
        """Return what up to 100 users have, None for one that the API does not know or refuses by name.

        Takes as long as it must, to get a slot, or while the API is away for some minutes. Raises `CallFailed` for errors
        that a person must fix, and `ReadingStopped`.
        """
        found: dict[UserId, Values | None] = {}
        left = [tuple(dict.fromkeys(users))] if users else []
        while left:
            part = left.pop()
            answer, permit = self._ask(part)
            action = decide(answer)
            match action:
                case Deliver():
                    again = tuple(user for user in part if _passes(answer, user))
                    found |= _found(answer, [user for user in part if user not in again])
                    if again:
                        self._failed(answer)
                        left.append(again)
                    else:
                        self._failures, self._renewed = 0, False
                case Bisect() if len(part) > 1:
                    middle = len(part) // 2
                    left += [part[middle:], part[:middle]]
                case Bisect():
                    found[part[0]] = None
                case RetryUncounted() | RetryCounted():
                    self._failed(answer)
                    left.append(part)
                case Pause(seconds):
                    code = letter_of(answer).code
                    self._limiter.pause(seconds, rule_for(code).meaning, code, refused=permit)
                    self._failed(answer)
                    left.append(part)
                case RenewSignature() if not self._renewed:
                    self._renewed = True
                    self._api.renew_signature()
                    left.append(part)
                case RenewSignature() | Stop():
                    good(answer)
                case _:
                    assert_never(action)
        return {user: found[user] for user in users}

    def _ask(self, users: Sequence[UserId]) -> tuple[Answer, Permit | None]:
        """Make one call in a slot of its own."""
        while True:
            call = self._api.prepare_get(users)
            if isinstance(call, NoReply):
                return call, None
            permit, give_up_at = None, self._clock.monotonic() + FRESH
            while permit is None and self._clock.monotonic() < give_up_at:
                if self._stopping():
                    call.abandon()
                    raise ReadingStopped
                permit = self._limiter.take()
                if permit is None:
                    self._clock.sleep(TRY_AGAIN)
            if permit is None:
                call.abandon()
                continue
            call.send()
            self._limiter.sent(permit)
            self.calls += 1
            return call.answer(), permit

    def _failed(self, answer: Answer) -> None:
        """Wait before the next attempt; raises `CallFailed` after too many in a row."""
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            good(answer)
            raise CallFailed("the API keeps refusing users for reasons that should pass", "try again later")
        ends_at = self._clock.monotonic() + min(LONGEST_WAIT, 0.5 * 2.0**self._failures)
        while (left := ends_at - self._clock.monotonic()) > 0:
            if self._stopping():
                raise ReadingStopped
            self._clock.sleep(min(left, 0.5))


def _passes(answer: Answer, user: UserId) -> bool:
    """Whether a user was refused by name for a reason that will pass."""
    error = answer.errors.get(user) if isinstance(answer, Reply) else None
    return error is not None and rule_for(error.code).verdict not in (Verdict.USER, Verdict.SHAPE)


def _found(answer: Answer, users: Sequence[UserId]) -> dict[UserId, Values | None]:
    values_of = answer.values if isinstance(answer, Reply) else {}
    # An API that ignores the case of ids may answer with the case in which it stores them.
    folded = {user.lower(): values for user, values in values_of.items()}
    return {user: values_of.get(user, folded.get(user.lower())) for user in users}
