"""The app's attribute names at the API itself: read and added on an operator's request.

Such a call waits for a slot of the shared clock like any other. Failures are explained in an operator's words, each with what
to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker.clock import Clock
from worker.delivery.answers import Answer, NoReply
from worker.delivery.api import Call, ChatApi
from worker.delivery.explanations import CHECK_URL, good
from worker.errors import CallFailed
from worker.models import MAX_ATTRIBUTES
from worker.ratelimit import RateLimiter
from worker.state.attribute_names import AttributeNames

#: Slots to try for one call, and seconds between two attempts while all slots are taken.
TRIES, TRY_AGAIN_AFTER = 5, 0.5

_BUSY = "try again later; imattr status shows what is happening"


class NoPermit(CallFailed):
    """Raised when no slot was free. Nothing is wrong with the API: it was not asked."""

    def __init__(self) -> None:
        super().__init__("not asked: every slot is taken, or the rate is paused", _BUSY)


class AttributeCatalog:
    """Reads and adds names, one call at a time; each answer updates what validation knows."""

    def __init__(self, api: ChatApi, limiter: RateLimiter, known: AttributeNames, clock: Clock) -> None:
        self._api, self._limiter, self._known, self._clock = api, limiter, known, clock

    def ask(self) -> Answer:
        """Ask the API once; raises `NoPermit` when no slot was free."""
        return self._call(self._api.prepare_get_names)

    def learn(self, answer: Answer) -> frozenset[str]:
        """Keep and return the names in an answer; raises `CallFailed` when it has none."""
        names = good(answer).names
        try:
            self._known.set(names)
        except ValueError as broken:
            found = f"the API answered with names that no app can have: {broken}"
            raise CallFailed(found, CHECK_URL) from None
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
            good(answer, with_info=True)
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
