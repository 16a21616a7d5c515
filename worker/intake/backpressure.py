"""Back-pressure where tasks take the updates: while there is no room for new users, updates stay in the broker's queue.

Only with a broker whose messages cannot be taken in bulk (`celery_queue.py` has its own).
A task that finds the buffer full cannot wait: its thread is one of those that deliver, and so make room. It puts its update
back, and this module stops the worker from taking more, so that updates do not circulate.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from worker.clock import Clock
from worker.state.connection import RedisError

log = structlog.get_logger()

#: Seconds between two checks.
LOOK_EVERY = 0.25
#: The share of the room that must be free before updates are taken again.
FREE_SHARE = 0.1


class Backpressure:
    """Decides whether this worker takes updates from the broker."""

    def __init__(self, has_room: Callable[[float], bool], take: Callable[[bool], None], clock: Clock) -> None:
        """`take` starts or stops taking updates. It is called at every check, because a reconnect may undo it."""
        self._has_room, self._take, self._clock = has_room, take, clock
        self._open = True
        self._look_at = clock.monotonic()

    def look(self) -> None:
        """Start or stop taking updates, if a check is due. Raises nothing."""
        now = self._clock.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        wanted = self._is_room()
        if wanted != self._open:
            log.warning("intake_opened" if wanted else "intake_closed")
        self._open = wanted
        self._take(wanted)

    def _is_room(self) -> bool:
        try:
            return self._has_room(0.0 if self._open else FREE_SHARE)
        except RedisError:
            # Any update taken now could only be put back.
            return False
