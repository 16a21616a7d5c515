"""Restarts parts of a sandbox that end, within bounds.

It does not matter here what a part is: anything with a name and a log that is started, becomes ready, and may end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from worker.clock import Clock, SystemClock
from worker.errors import SandboxError

#: Starts of a part in a row that may fail before it is given up. A start that was ready for `LASTING` did not fail.
MOST_FAILURES = 5
LASTING = 60.0
#: Seconds until a part is restarted: doubled with every failure, up to the second number.
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0
#: Seconds in which a part must be ready.
PATIENCE = 60.0
#: The exit code of all our programs, and Python, for wrong settings: the next start would end the same way.
WRONG_SETTINGS = 2
#: Bytes of a log that are searched, and characters of a line that are shown.
TAIL, LONGEST_LINE = 65_536, 240


class Part(Protocol):
    """A process that can be started more than once."""

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> Path: ...

    def start(self) -> None:
        """Start it; raises `OSError` or `SandboxError`."""

    def status(self) -> int | None:
        """None while it runs, else how it ended, as in `Popen.returncode`."""

    def is_ready(self) -> bool: ...

    def said(self) -> str:
        """What it has logged since its last start."""

    def kill(self) -> None:
        """Kill it, with everything that it has started."""


@dataclass(slots=True)
class _Watched:
    part: Part
    started: float
    #: When it became ready.
    ready: float | None = None
    #: When to start it again; None while it runs.
    again: float | None = None
    failures: int = 0


class Supervisor:
    """Watches parts. `tell` gets a sentence about everything that happens to one."""

    def __init__(self, tell: Callable[[str], None], clock: Clock | None = None) -> None:
        self._tell, self._clock = tell, clock or SystemClock()
        self._watched: dict[str, _Watched] = {}

    def watch(self, part: Part) -> None:
        """Watch a part that was just started."""
        self._watched[part.name] = _Watched(part, self._clock.monotonic())

    def is_ready(self, part: Part) -> bool:
        watched = self._watched[part.name]
        return watched.again is None and watched.ready is not None

    def turn(self) -> bool:
        """Check every part once; returns whether one was started. Raises `SandboxError` if one is given up."""
        started = [self._look(watched, self._clock.monotonic()) for watched in self._watched.values()]
        return any(started)

    def _look(self, watched: _Watched, now: float) -> bool:
        if watched.again is not None:
            return now >= watched.again and self._start(watched, now)
        status = watched.part.status()
        if status is not None:
            # Its children, such as a pool's processes, may have outlived it.
            watched.part.kill()
            in_vain = status == WRONG_SETTINGS and watched.ready is None
            self._failed(watched, how_it_ended(status), now, in_vain=in_vain)
        elif watched.ready is None:
            self._wait(watched, now)
        elif watched.failures and now - watched.ready >= LASTING:
            watched.failures = 0
        return False

    def _start(self, watched: _Watched, now: float) -> bool:
        watched.again, watched.started, watched.ready = None, now, None
        try:
            watched.part.start()
        except (OSError, SandboxError) as error:
            self._failed(watched, f"could not be started ({error})", now)
            return False
        return True

    def _wait(self, watched: _Watched, now: float) -> None:
        if watched.part.is_ready():
            watched.ready = now
            if watched.failures:
                self._tell(f"{watched.part.name} is ready again")
        elif now - watched.started >= PATIENCE:
            watched.part.kill()
            self._failed(watched, f"was not ready after {PATIENCE:.0f} s and was ended", now)

    def _failed(self, watched: _Watched, how: str, now: float, *, in_vain: bool = False) -> None:
        part = watched.part
        watched.failures += 1
        if in_vain:
            raise SandboxError(f"{part.name} {how}{where_to_look(part)}")
        if watched.failures > MOST_FAILURES:
            raise SandboxError(
                f"{part.name} is given up, {watched.failures} ends in a row: it {how}{where_to_look(part)}"
            )
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (watched.failures - 1))
        watched.again = now + delay
        self._tell(f"{part.name} {how}, and is started again in {delay:.0f} s{where_to_look(part)}")


def how_it_ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def where_to_look(part: Part) -> str:
    """The log of a part, and its last line, if it has logged anything."""
    lines = part.said().strip().splitlines()[-3:]
    words = "".join(
        f"\n  {line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + ' ...'}" for line in lines
    )
    return f", see {part.log}" + (f":{words}" if words else "")


def end_of(log: Path, begin: int) -> str:
    """The end of what was added to a log since it had `begin` bytes."""
    try:
        with log.open("rb") as file:
            file.seek(max(begin, file.seek(0, os.SEEK_END) - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
