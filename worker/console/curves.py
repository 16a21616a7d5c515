"""What was done and what was left over time, from the fleet's samples: values for the charts, None where unknown."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from worker.state.fleet import EVERY, Fleet, Sample

Values = list[float | None]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time up to now: its length, that of its parts, and that of a gap between two samples, in seconds."""

    name: str
    words: str
    seconds: int
    part: int
    hole: float

    @property
    def parts(self) -> int:
        return self.seconds // self.part


WINDOWS = {
    window.name: window
    for window in (
        Window("15min", "15 minutes", 900, 10, 3 * EVERY),
        Window("6h", "6 hours", 6 * 3600, 240, 180.0),
        Window("24h", "24 hours", 24 * 3600, 900, 180.0),
    )
}


@dataclass(frozen=True, slots=True)
class Curves:
    """The values in each part of a window, the newest last. `oldest` in seconds."""

    window: Window
    end: float
    calls: Values
    users: Values
    left: Values
    oldest: Values


def curves(samples: Sequence[Sample], window: Window, now: float) -> Curves:
    """The curves of a window that ends now. Rates are differences of counters; of what is left, each part has the maximum."""
    # Parts begin at round times, so that a curve moves as a whole and its parts do not change.
    end = (now // window.part + 1) * window.part
    start = end - window.parts * window.part
    took, calls, users = ([0.0] * window.parts for _ in range(3))
    left: Values = [None] * window.parts
    oldest: Values = [None] * window.parts
    for before, sample in pairwise(samples):
        place = int((sample.at - start) // window.part)
        seconds = sample.at - before.at
        done, sent = sample.calls - before.calls, sample.delivered - before.delivered
        # Counters that fell belong to another server, and nothing is counted while no worker runs.
        if 0 <= place < window.parts and 0 < seconds < window.hole and done >= 0 and sent >= 0:
            took[place] += seconds
            calls[place] += done
            users[place] += sent
    for sample in samples:
        place = int((sample.at - start) // window.part)
        if 0 <= place < window.parts:
            left[place] = max(left[place] or 0.0, float(sample.pending + sample.in_flight))
            if sample.oldest is not None:
                oldest[place] = max(oldest[place] or 0.0, sample.oldest)
    return Curves(window, end, _rates(calls, took), _rates(users, took), left, oldest)


def _rates(counts: Sequence[float], took: Sequence[float]) -> Values:
    return [count / seconds if seconds else None for count, seconds in zip(counts, took, strict=True)]


class Remembered:
    """The samples of the last day; only new ones are read. Thread-safe."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._lock = fleet, threading.Lock()
        self._recent: list[Sample] = []
        self._minutes: list[Sample] = []

    def look(self, now: float) -> None:
        """Read the new samples. `now` is Redis' clock."""
        with self._lock:
            for window, kept, read in (
                (WINDOWS["15min"], self._recent, self._fleet.samples_since),
                (WINDOWS["24h"], self._minutes, self._fleet.minutes_since),
            ):
                oldest = now - window.seconds - window.part - window.hole
                # After the clock was set back, or on another server, none would be new.
                if kept and kept[-1].at > now + 60:
                    kept.clear()
                kept += read(max([oldest, *(sample.at for sample in kept[-1:])]))
                while kept and kept[0].at < oldest:
                    kept.pop(0)

    def curves(self, window: Window, now: float) -> Curves:
        with self._lock:
            return curves(self._recent if window.name == "15min" else self._minutes, window, now)
