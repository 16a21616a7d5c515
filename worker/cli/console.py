"""What the commands share: the consoles, exit codes, errors in words, settings and Redis."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worker.config import PREFIX, Settings
from worker.errors import BufferFull, CallFailed, CannotImport, ConfigError, InvalidUpdate, SandboxError
from worker.state.connection import Redis, RedisError, connect

#: Exit codes; 2 is click's own for wrong usage.
FAILED, USAGE, REFUSED, UNREACHABLE, FULL, NO_SANDBOX, NO_PERMIT = 1, 2, 3, 4, 5, 6, 7
#: What shells use for Ctrl-C.
STOPPED = 130

SANDBOX = Path(".imattr")
SETTINGS_FILE = "settings.env"

P = ParamSpec("P")

# A pipe has no width: lines are then as long as they need to be.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(code: int, message: str) -> NoReturn:
    err.print(Text("error: ", style="bold red") + Text(message))
    sys.exit(code)


def explained(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a user can fix into one clear line and an exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ConfigError as error:
            mistakes = "".join(f"\n  {mistake}" for mistake in error.mistakes)
            fail(USAGE, f"settings are wrong or missing:{mistakes}")
        except InvalidUpdate as error:
            fail(REFUSED, f"refused, {error}")
        except BufferFull as error:
            fail(FULL, str(error))
        except CallFailed as error:
            fail(FAILED, f"{error.found}\n  {error.fix}")
        except CannotImport as error:
            fail(FAILED, str(error))
        except SandboxError as error:
            fail(NO_SANDBOX, str(error))
        except RedisError as error:
            # Its text names the host, never the password.
            fail(UNREACHABLE, f"Redis does not answer: {error}")
        except KeyboardInterrupt:
            sys.exit(STOPPED)

    return run


def environment() -> dict[str, str]:
    """The environment or, if it names no Redis, that of the sandbox that `imattr up` started here."""
    environ = dict(os.environ)
    path = SANDBOX / SETTINGS_FILE
    if environ.get(f"{PREFIX}REDIS_URL") or not path.exists():
        return environ
    settings = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    err.print(f"[dim]using the sandbox in {SANDBOX}[/dim]")
    return settings | environ


@contextmanager
def state() -> Iterator[tuple[Redis, Settings]]:
    """A connection to the state, with the settings of a producer: no credentials of the API."""
    settings = Settings.from_env(environment(), "producer")
    with connect(settings.redis_url.reveal()) as redis:
        yield redis, settings


@contextmanager
def until_stopped() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag while the block runs."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(console: Console = out, every: float = 2) -> Iterator[Callable[[Text], None]]:
    """A line that is rewritten on a terminal, and printed every so many seconds elsewhere."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda text: live.update(text, refresh=True)
        return
    shown = [time.monotonic()]

    def show(text: Text) -> None:
        if time.monotonic() - shown[0] >= every:
            shown[0] = time.monotonic()
            console.print(text)

    yield show


def print_rows(*rows: tuple[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    out.print(table)


def as_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
