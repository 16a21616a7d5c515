"""A shared view: however many browsers are open, Redis is read at most every two seconds, and not at all while nobody
looks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from worker.clock import Clock
from worker.state.connection import RedisError

T = TypeVar("T")

#: Seconds for which a result is shown again; even that Redis did not answer, so that callers do not queue for it.
EVERY = 2.0


class Look(Generic[T]):
    """The latest result of a function. Thread-safe."""

    def __init__(self, see: Callable[[], T], clock: Clock) -> None:
        self._see, self._clock, self._lock = see, clock, threading.Lock()
        self._seen: list[T] = []
        self._error: RedisError | None = None
        self._until = float("-inf")

    def now(self) -> T:
        """Return the result, at most `EVERY` seconds old; raises what redis raised."""
        with self._lock:
            if self._clock.monotonic() >= self._until:
                try:
                    self._seen, self._error = [self._see()], None
                except RedisError as error:
                    self._error = error
                self._until = self._clock.monotonic() + EVERY
            if self._error:
                raise type(self._error)(*self._error.args)
            return self._seen[0]

    def forget(self) -> None:
        """Read again next time, because something was done."""
        with self._lock:
            self._until = float("-inf")
