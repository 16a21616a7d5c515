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
from dataclasses import dataclass
from typing import Any

from redis import Redis

from worker.state import scripts

#: What the servers' clock shows when the world's clock shows 0, us since 1970.
EPOCH_US = 1_700_000_000_000_000
#: Scripts that reckon in microseconds, and those that take no time.
_MICROSECONDS, _TIMELESS = (
    {"reserve", "pause", "reopen"},
    {"redrive", "campaign", "keep", "record_failure", "make_group", "repair"},
)

#: Put before the election: the term ends by our clock, too, which comes as one more argument.
_TERM_BY_OUR_CLOCK = """
local server, redis = redis, {}
function redis.call(verb, key, ...)
  if key ~= KEYS[1] then
    return server.call(verb, key, ...)
  end
  local ends = key .. ':ends'
  if verb == 'SET' then
    local worker, _, term = ...
    server.call('SET', ends, string.format('%.0f', ARGV[3] + term))
    return server.call('SET', key, worker)
  end
  local left = (tonumber(server.call('GET', ends)) or 0) - ARGV[3]
  if verb == 'PTTL' then
    return left
  end
  return left > 0 and server.call(verb, key)
end
"""


def now_for(script: str, us: int) -> int | None:
    """What a script is given for `now`; None when it takes no time."""
    return None if script in _TIMELESS else us if script in _MICROSECONDS else us // 1000


@contextmanager
def terms_on_our_clock() -> Iterator[None]:
    """Scripts loaded inside take the time they are given for terms, too, which end by the server's otherwise."""
    source = scripts.source

    def with_our_term(name: str) -> str:
        return _TERM_BY_OUR_CLOCK + source(name) if name == "campaign" else source(name)

    scripts.source = with_our_term
    try:
        yield
    finally:
        scripts.source = source


@contextmanager
def scripts_on(us: Callable[[], int]) -> Iterator[None]:
    """Scripts loaded inside take `us()` for the server's clock."""
    load = scripts.load

    def on_our_clock(redis: Redis, name: str) -> scripts.Script:
        script = load(redis, name)

        def call(keys: Sequence[str], args: Sequence[scripts.Argument]) -> Any:
            if name == "campaign":
                return script(keys, (*args, us() // 1000))
            now = now_for(name, us())
            if now is not None and args[0] == "":
                args = (now, *args[1:])
            return script(keys, args)

        return call

    scripts.load = on_our_clock
    try:
        with terms_on_our_clock():
            yield
    finally:
        scripts.load = load


class _Ended(BaseException):
    """Raised in every sleeper when the world ends."""


class Killed(BaseException):
    """Raised in every thread of a process that was killed; like the real thing, nothing may catch it."""


@dataclass(eq=False, slots=True)
class Process:
    """Threads that die, and are stopped, together."""

    name: str
    dead: bool = False
    #: None of its threads runs before this time.
    frozen_until: float = 0.0


class _Thread:
    """A thread of this machine, used by one task after another: starting one costs twenty script calls."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.turn.acquire()
        self.body: Callable[[], None]
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        while True:
            self.turn.acquire()
            self.body()


_idle: list[_Thread] = []


@dataclass(eq=False, slots=True)
class Task:
    """One thread of a world. `turn` is released by whoever hands over to it."""

    name: str
    process: Process | None
    turn: threading.Lock


class World:
    """A clock (`worker.clock.Clock`) and the threads that live by it. The thread that makes it is one."""

    def __init__(self, seed: int | str = 0) -> None:
        self.rng = random.Random(seed)
        #: By how much the servers' clock is ahead, us.
        self.jumped_us = 0
        self._now = 1000.0
        self._alarms: list[tuple[float, float, Task | Callable[[], None]]] = []
        self._parked: list[Task] = []
        self.main = Task("main", None, threading.Lock())
        self.main.turn.acquire()
        #: The task that runs now.
        self.running = self.main
        self._living: list[Task] = []
        self._ended = False
        self._failure: BaseException | None = None

    def monotonic(self) -> float:
        return self._now

    def us(self) -> int:
        """The servers' clock."""
        return EPOCH_US + round(self._now * 1e6) + self.jumped_us

    def wall(self) -> float:
        """Seconds since 1970, on the clock of the other machines."""
        return EPOCH_US / 1e6 + self._now

    def sleep(self, seconds: float) -> None:
        """Let the others live for so long."""
        if seconds > 0:
            self._wake_at(self._now + seconds, self.running)
            self._hand_over()

    def pause(self) -> None:
        """Let all those live who wake now."""
        self._wake_at(self._now, self.running)
        self._hand_over()

    def park(self) -> None:
        """Sleep until somebody calls `unpark`."""
        self._parked.append(self.running)
        self._hand_over()

    def unpark(self) -> None:
        """Wake one of the parked, if any."""
        if self._parked:
            self._wake_at(self._now, self._parked.pop(self.rng.randrange(len(self._parked))))

    def spawn(self, body: Callable[[], None], name: str = "", process: Process | None = None) -> None:
        """Begin a thread at its first turn, after the present one sleeps."""
        thread = _idle.pop() if _idle else _Thread()
        task = Task(name, process, thread.turn)
        thread.body = lambda: self._live(thread, task, body)
        self._living.append(task)
        self._wake_at(self._now, task)

    def later(self, seconds: float, body: Callable[[], None]) -> None:
        """Run `body`, which must not sleep, once, so many seconds from now."""
        self._wake_at(self._now + seconds, body)

    def kill(self, process: Process) -> None:
        """End all threads of a process where they are; the one that runs now, at its next `check`."""
        process.dead = True
        for task in [task for task in self._parked if task.process is process]:
            self._parked.remove(task)
            self._wake_at(self._now, task)

    def freeze(self, process: Process, seconds: float) -> None:
        """Stop all threads of a process, as SIGSTOP does, for so long; the one that runs, at its next `check`."""
        process.frozen_until = max(process.frozen_until, self._now + seconds)

    def end(self) -> None:
        """Wake everybody for the last time; raises what any of them failed with."""
        self._ended = True
        while self._living:
            self.running = self._living[0]
            self.running.turn.release()
            self.main.turn.acquire()
        self.running = self.main
        if self._failure:
            raise self._failure

    def _live(self, thread: _Thread, task: Task, body: Callable[[], None]) -> None:
        try:
            self.check()
            body()
        except (_Ended, Killed):
            pass
        except BaseException as failure:
            self._failure = self._failure or failure
        self._living.remove(task)
        _idle.append(thread)
        self.running = self.main if self._ended else self._next()
        self.running.turn.release()

    def _wake_at(self, moment: float, what: Task | Callable[[], None]) -> None:
        # Who wakes at the same moment goes in an order that only the seed knows.
        heapq.heappush(self._alarms, (moment, self.rng.random(), what))

    def _next(self) -> Task:
        """The task that wakes next; the clock is then at its time."""
        while True:
            # What fails in the world must be heard by who made it, however long that one sleeps.
            if self._failure and self.running is not self.main:
                return self.main
            moment, _, what = heapq.heappop(self._alarms)
            self._now = max(self._now, moment)
            if isinstance(what, Task):
                return what
            try:
                what()
            except BaseException as failure:
                self._failure = self._failure or failure

    def _hand_over(self) -> None:
        task = self.running
        if not self._ended and (coming := self._next()) is not task:
            self.running = coming
            coming.turn.release()
            task.turn.acquire()
        self.check()

    def check(self) -> None:
        """Whether the running task may go on: raises when it may not, and sleeps while it must."""
        task = self.running
        if self._ended and task is not self.main:
            raise _Ended
        if self._failure and task is self.main:
            raise self._failure
        if (process := task.process) is None:
            return
        if process.dead:
            raise Killed
        if process.frozen_until > self._now:
            self._wake_at(process.frozen_until, task)
            self._hand_over()
