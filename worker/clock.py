"""Time as an argument, so that tests can hold it still.

Only durations are measured here, on a clock of the machine that never jumps. Times that several workers must agree on (due times,
leases, permits) always come from Redis' own clock, inside the scripts.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """What the delivery loop and the limiter need to know about time, in seconds."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps, and that runs on while the machine is suspended."""

    def sleep(self, seconds: float) -> None:
        """Let that many seconds pass; nothing for zero or less."""


def _since_boot() -> float:
    """Seconds since the machine started, the time in which it was suspended included."""
    # Leases run on elsewhere while this machine sleeps; CLOCK_MONOTONIC, which is all that others than Linux have, does not.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class SystemClock:
    """The machine's own time."""

    def monotonic(self) -> float:
        return _since_boot()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)
