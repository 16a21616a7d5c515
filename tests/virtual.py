"""Time that passes only when everybody sleeps: threads take turns, and the scripts' clock follows.

A `World` runs real code (the delivery loop, the dispatcher, scripts on a real server) in threads of which
exactly one runs at any time, until it sleeps; then the one that wakes first goes on, and the clock jumps
there. An hour takes seconds, and the same seed gives the same run.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

from worker import scripts

#: What the servers' clock shows when the world's clock shows 0, us since 1970.
EPOCH_US = 1_700_000_000_000_000
#: Scripts that reckon in microseconds, and those that take no time.
_MICROSECONDS, _TIMELESS = {"reserve", "pause", "reopen"}, {"redrive"}


@contextmanager
def scripts_on(us: Callable[[], int]) -> Iterator[None]:
    """Scripts loaded inside take `us()` for the server's clock."""
    load = scripts.load

    def on_our_clock(client: redis.Redis, name: str) -> scripts.Script:
        script = load(client, name)
        if name in _TIMELESS:
            return script

        def call(keys: Sequence[str], args: Sequence[scripts.Argument]) -> Any:
            now, *others = args
            if now == "":
                now = us() if name in _MICROSECONDS else us() // 1000
            return script(keys, (now, *others))

        return call

    scripts.load = on_our_clock
    try:
        yield
    finally:
        scripts.load = load


class _Ended(BaseException):
    """Raised in every sleeper when the world ends."""


class World:
    """A clock (`worker.clock.Clock`) and the threads that live by it. The thread that makes it is one."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self._now = 1000.0
        self._sleepers: list[tuple[float, float, threading.Event]] = []
        self._parked: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._failure: BaseException | None = None

    def monotonic(self) -> float:
        return self._now

    def us(self) -> int:
        """The servers' clock."""
        return EPOCH_US + round(self._now * 1e6)

    def wall(self) -> float:
        """Seconds since 1970."""
        return self.us() / 1e6

    def sleep(self, seconds: float) -> None:
        """Let the others live for so long."""
        if seconds > 0:
            event = threading.Event()
            self._wake_at(self._now + seconds, event)
            self._hand_over(event)

    def park(self) -> None:
        """Sleep until somebody calls `unpark`."""
        event = threading.Event()
        self._parked.append(event)
        self._hand_over(event)

    def unpark(self) -> None:
        """Wake one of the parked, if any."""
        if self._parked:
            self._wake_at(self._now, self._parked.pop(self.rng.randrange(len(self._parked))))

    def spawn(self, body: Callable[[], None]) -> None:
        """Begin a thread at its first turn, after the present one sleeps."""
        event = threading.Event()
        thread = threading.Thread(target=self._live, args=(body, event), daemon=True)
        self._threads.append(thread)
        self._wake_at(self._now, event)
        thread.start()

    def later(self, seconds: float, body: Callable[[], None]) -> None:
        """Run `body` once, so many seconds from now."""

        def live() -> None:
            self.sleep(seconds)
            body()

        self.spawn(live)

    def end(self) -> None:
        """Wake everybody for the last time; raises what any of them failed with."""
        self._ended = True
        for _, _, event in self._sleepers:
            event.set()
        for event in self._parked:
            event.set()
        for thread in self._threads:
            thread.join(30)
        if self._failure:
            raise self._failure

    def _live(self, body: Callable[[], None], event: threading.Event) -> None:
        try:
            event.wait()
            if not self._ended:
                body()
        except _Ended:
            return
        except BaseException as failure:
            self._failure = failure
        if not self._ended:
            self._wake_next()

    def _wake_at(self, moment: float, event: threading.Event) -> None:
        # Who wakes at the same moment goes in an order that only the seed knows.
        heapq.heappush(self._sleepers, (moment, self.rng.random(), event))

    def _hand_over(self, event: threading.Event) -> None:
        self._wake_next()
        event.wait()
        if self._ended:
            raise _Ended
        if self._failure and threading.current_thread() not in self._threads:
            raise self._failure

    def _wake_next(self) -> None:
        moment, _, event = heapq.heappop(self._sleepers)
        self._now = max(self._now, moment)
        event.set()
