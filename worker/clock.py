"""Time as an argument, so that tests can hold it still.

Only durations are measured here, on a clock of the machine that never jumps. Times that several workers must agree on (due times,
leases, permits) always come from Redis' own clock, inside the scripts.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """What the delivery loop and the limiter need to know about time, in seconds."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps, and keeps running while the machine is suspended."""

    def sleep(self, seconds: float) -> None:
        """Wait that many seconds; return at once for zero or less."""


def _since_boot() -> float:
    """Seconds since the machine started, including time suspended."""
    # Leases keep running while this machine sleeps; CLOCK_MONOTONIC, all that systems other than Linux have, does not.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class SystemClock:
    """The machine's own time."""

    def monotonic(self) -> float:
        return _since_boot()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)
