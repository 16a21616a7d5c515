"""The dispatcher: turns "there is work" into tickets, one Celery message each.

Every worker runs one in a thread of its own; the leader among them acts. All decisions are made in one script
(`state/lua/dispatch.lua`), so a turn costs one call, and two dispatchers that both believe they lead cannot issue too many. A
lost ticket costs nothing but time: the users stay in their lanes, and the next turn issues another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from worker.delivery.meter import Meter
from worker.models import BatchId
from worker.state.buffer import Buffer
from worker.state.fleet import EVERY, Fleet
from worker.state.leader import Leader, LeaderLoop

log = structlog.get_logger()

#: Longest time between two turns, seconds: how late the first update after a quiet time is noticed.
TURN = 0.02
#: Seconds for which a dispatcher stays elected without renewing; how long a killed one is missed.
TERM = 2.0
#: Age at which an unclaimed ticket counts as lost, seconds. Longer than any should ever wait.
TICKET_TTL = 10.0
#: Tickets are issued for this many seconds of slots. That keeps enough threads waiting to fill every slot; more tickets would
#: grow old in the queue, since a worker that carries on with the next batch needs none.
HORIZON = 0.5
#: Seconds between two searches for expired leases, and between two rounds of forgetting old deliveries.
RECLAIM_EVERY, FORGET_EVERY = 1.0, 0.1
#: Seconds between two checks that ledger and lanes agree with the records: keys may have been deleted or evicted.
REPAIR_EVERY = 10.0


@dataclass(slots=True)
class _Chore:
    """Something that the leader does regularly, every given number of seconds of its turns."""

    every: float
    do: Callable[[], object]
    due_in: float = 0.0

    def after(self, seconds: float) -> None:
        self.due_in -= seconds
        if self.due_in <= 0:
            self.due_in = self.every
            self.do()


class Dispatcher(LeaderLoop):
    """One worker's dispatcher."""

    interrupted = "dispatcher_interrupted"

    def __init__(
        self,
        leader: Leader,
        buffer: Buffer,
        fleet: Fleet,
        publish: Callable[[BatchId], None],
        *,
        batch_size: int,
        linger: float,
        quota: float,
        is_short_of_memory: Callable[[], bool] = lambda: False,
        on_turn: Callable[[], None] = lambda: None,
        on_answer: Callable[[], None] = lambda: None,
        meter: Meter | None = None,
    ) -> None:
        """`publish` sends one ticket; `linger` in seconds, `quota` in calls a second.

        While Redis `is_short_of_memory`, what was delivered is forgotten early. `on_turn` is called before every turn, even
        while Redis is away, and `on_answer` after every turn in which it was not.
        """
        super().__init__(leader)
        self._buffer, self._fleet, self._publish = buffer, fleet, publish
        self._on_turn, self._on_answer = on_turn, on_answer
        self._quota = max(1, round(quota))
        self._batch_size, self._linger = batch_size, linger
        self._is_short_of_memory, self._meter = is_short_of_memory, meter or Meter()
        self._chores = [
            _Chore(RECLAIM_EVERY, self._reclaim),
            _Chore(FORGET_EVERY, self._forget),
            _Chore(REPAIR_EVERY, self._repair),
            _Chore(EVERY, self._fleet.sample),
        ]

    def sign_of_life(self) -> None:
        self._on_turn()

    def answered(self) -> None:
        self._on_answer()

    def lead(self) -> float:
        """Issue the tickets that are due, and do the chores that are."""
        tick = self._buffer.tick(
            size=self._batch_size,
            linger=self._linger,
            ticket_ttl=TICKET_TTL,
            quota=self._quota,
            horizon=HORIZON,
        )
        for position, ticket in enumerate(tick.tickets):
            try:
                self._publish(ticket)
            except Exception:
                self._buffer.release_tickets(tick.tickets[position:])
                raise
        pause = TURN if tick.next_due is None else min(TURN, tick.next_due)
        for chore in self._chores:
            chore.after(pause)
        return pause

    def _forget(self) -> None:
        self._buffer.forget(make_room=self._is_short_of_memory())

    def _repair(self) -> None:
        lost, joined = self._buffer.repair()
        if lost or joined:
            log.error("state_repaired", updates_lost=lost, users_put_back=joined)

    def _reclaim(self) -> None:
        # Bounded: at full speed a dead fleet leaves about a hundred batches.
        for _ in range(200):
            batch = self._buffer.reclaim()
            if batch is None:
                return
            self._meter.reclaimed()
            log.warning("lease_reclaimed", batch=batch)
