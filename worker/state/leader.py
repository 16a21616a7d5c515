"""Leaders: some work is done by one worker of the fleet at a time, until its term ends.

A leader renews its term well before the end. A killed worker is missed for one term; one that ends cleanly steps down, so
that no other has to wait. Two workers may both believe they lead for a moment, after one of them was suspended: what a leader
does must be safe then, too.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading

import structlog
from redis import Redis, RedisError

from ..clock import Clock
from . import scripts
from .buffer import Lead
from .scripts import text

log = structlog.get_logger()

#: Seconds between two attempts when Redis, or the broker, does not answer.
RETRY_AFTER = 1.0


class Leader:
    """One worker's candidacy for one role."""

    def __init__(self, redis: Redis, key: str, worker: str, clock: Clock, *, term: float) -> None:
        """`key` is where the role's leader is named; `term` in seconds."""
        self._redis, self._key, self._worker, self._clock, self.term = redis, key, worker, clock, term
        self._campaign = scripts.load(redis, "campaign")
        self._elected_at = -math.inf

    def campaign(self) -> float:
        """Become or remain the leader; returns 0.0, or the seconds until another worker's term ends."""
        now = self._clock.monotonic()
        if now - self._elected_at < self.term / 3:
            return 0.0
        other_leads_for: int = self._campaign([self._key], [self._worker, round(self.term * 1000)])
        self._elected_at = -math.inf if other_leads_for else now
        return other_leads_for / 1000

    @property
    def leads(self) -> bool:
        """Whether the term still runs: a machine that slept meanwhile leads no longer."""
        return self._clock.monotonic() - self._elected_at < self.term

    @property
    def lead(self) -> Lead:
        """What Redis can check while this worker acts: only Redis knows of a term that ended elsewhere."""
        return Lead(self._key, self._worker)

    def forget(self) -> None:
        """Campaign at once next time."""
        self._elected_at = -math.inf

    def step_down(self) -> None:
        """End the term, if this worker leads."""
        self.forget()
        # Not atomic, and need not be: at worst another worker's term ends early.
        if current_leader(self._redis, self._key) == self._worker:
            self._redis.delete(self._key)


def current_leader(redis: Redis, key: str) -> str | None:
    """Return the name of the worker that leads, if any."""
    name = redis.get(key)
    return None if name is None else text(name)


class LeaderLoop:
    """Takes turns for as long as this worker leads: `run` until `stop`. Its subclasses say what a turn is."""

    #: The log's event when turns begin to fail.
    interrupted = "turns_interrupted"

    def __init__(self, leader: Leader) -> None:
        self.leader = leader
        self._stopped = threading.Event()
        #: Why turns have failed since the last good one: each reason is logged once.
        self._told: set[str] = set()

    def run(self) -> None:
        """Take turns until `stop`; outlives any outage of Redis and the broker."""
        while not self._stopped.is_set():
            self._stopped.wait(self._try())
        # Otherwise the term ends by itself.
        with contextlib.suppress(RedisError):
            self.leader.step_down()

    def stop(self) -> None:
        """End `run` soon."""
        self._stopped.set()

    def _try(self) -> float:
        self.sign_of_life()
        try:
            pause = self.turn()
        # The thread must survive any error: nobody replaces it while it is elected.
        except Exception as error:
            reason = type(error).__name__
            if reason not in self._told:
                log.warning(self.interrupted, reason=reason)
            self._told.add(reason)
            self.leader.forget()
            self.follow()
            return RETRY_AFTER
        self._told.clear()
        self.answered()
        return pause

    def turn(self) -> float:
        """Campaign and, if this worker leads, take a turn; returns the seconds until the next one."""
        if other_leads_for := self.leader.campaign():
            self.follow()
            # So that followers do not all campaign at the same moment.
            return min(self.leader.term, other_leads_for) + random.uniform(0.01, 0.1)
        return self.lead()

    def sign_of_life(self) -> None:
        """Called before every turn, also while Redis is away."""

    def answered(self) -> None:
        """Called after every turn that did not fail, as the leader or not."""

    def follow(self) -> None:
        """Called when another worker leads, or a turn has failed."""

    def lead(self) -> float:
        """Take a turn as the leader; returns the seconds until the next one."""
        raise NotImplementedError
