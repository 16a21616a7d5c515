"""The dispatcher: turns "there is work" into tickets, one Celery message each.

Every worker runs one in a thread of its own; a short term in Redis elects which of them acts. All
decisions are made in one script (`lua/dispatch.lua`), so a turn costs one call, and two dispatchers that
both believe to act cannot issue too much. A ticket that is lost costs nothing but time: the users stay
in their lanes, and the next turn issues another.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable

import structlog

from worker.models import BatchId
from worker.state.buffer import Buffer
from worker.state.connection import RedisError

log = structlog.get_logger()

#: Longest time between two turns, seconds: how late the first update after a quiet time is noticed.
TURN = 0.05
#: Seconds a dispatcher stays elected without renewing; how long a killed one is missed.
TERM = 2.0
#: Age at which an unclaimed ticket counts as lost, seconds. Longer than it should ever wait.
TICKET_TTL = 10.0
#: Seconds between two looks for expired leases.
RECLAIM_EVERY = 1.0
#: Seconds between two tries when Redis or the broker does not answer.
RETRY_AFTER = 1.0


class Dispatcher:
    """One worker's dispatcher: `run` until `stop`."""

    def __init__(
        self,
        buffer: Buffer,
        publish: Callable[[BatchId], None],
        *,
        worker: str,
        batch_size: int,
        linger: float,
        quota: float,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`publish` sends one ticket on its way; `linger` in seconds, `quota` in calls a second.

        `on_turn` is called before every turn, also while Redis is away: the sign of life.
        """
        self._buffer, self._publish, self._worker = buffer, publish, worker
        self._on_turn = on_turn
        # Unclaimed tickets for one second of full speed keep the line busy while a new dispatcher is
        # elected, and few enough that each still finds a slot within patience.
        self._most = max(2, round(quota))
        self._batch_size, self._linger = batch_size, linger
        self._stopped = threading.Event()
        self._failing = False
        self._reclaim_in = 0.0

    def run(self) -> None:
        """Take turns until `stop`; outlives any outage of Redis and the broker."""
        while not self._stopped.is_set():
            self._on_turn()
            try:
                pause = self.turn()
                self._failing = False
            # A publishing failure may be of any kind, by the broker in use. The thread must survive it.
            except Exception as error:
                pause = RETRY_AFTER
                if not self._failing:
                    log.warning("dispatcher_waits", reason=type(error).__name__)
                self._failing = True
            self._stopped.wait(pause)
        # Without it the term ends by itself.
        with contextlib.suppress(RedisError):
            self._buffer.step_down(self._worker)

    def stop(self) -> None:
        """End `run` soon."""
        self._stopped.set()

    def turn(self) -> float:
        """Look once, issue what is due; returns the seconds until the next look."""
        tick = self._buffer.tick(
            self._worker,
            term=TERM,
            size=self._batch_size,
            linger=self._linger,
            ticket_ttl=TICKET_TTL,
            most=self._most,
        )
        if not tick.acting:
            # Followers do not all look at the same moment.
            return min(TERM, tick.next_due or 0.0) + random.uniform(0.01, 0.1)
        for position, ticket in enumerate(tick.tickets):
            try:
                self._publish(ticket)
            except Exception:
                self._buffer.release_tickets(tick.tickets[position:])
                raise
        pause = TURN if tick.next_due is None else min(TURN, tick.next_due)
        self._reclaim_in -= pause
        if self._reclaim_in <= 0:
            self._reclaim_in = RECLAIM_EVERY
            self._reclaim()
        return pause

    def _reclaim(self) -> None:
        # Bounded: at full speed a dead fleet leaves a hundred batches or so.
        for _ in range(200):
            batch = self._buffer.reclaim()
            if batch is None:
                return
            log.warning("lease_reclaimed", batch=batch)
