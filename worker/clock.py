"""Time as an argument, so that tests can hold it still.

Only durations are measured here, on the machine's monotonic clock. Times that several workers must agree on (due times,
leases, permits) always come from Redis' own clock, inside the scripts.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """What the delivery loop and the limiter need to know about time, in seconds."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps."""

    def sleep(self, seconds: float) -> None:
        """Let that many seconds pass; nothing for zero or less."""


class SystemClock:
    """The machine's own time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)
