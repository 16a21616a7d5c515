"""What the commands share: the consoles, exit codes, errors in words, settings and Redis."""

from __future__ import annotations

import getpass
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from worker.config import PREFIX, Settings
from worker.errors import (
    BufferFull,
    CallFailed,
    CannotImport,
    ConfigError,
    InvalidUpdate,
    NotConfirmed,
    SandboxError,
    UnusablePlan,
)
from worker.operate.words import json_text, plain
from worker.state.connection import Redis, RedisError, connect
from worker.state.keys import Keys

#: Exit codes; 2 is click's own for wrong usage.
FAILED, USAGE, REFUSED, UNREACHABLE, FULL, NO_SANDBOX, NO_PERMIT, WRONG = 1, 2, 3, 4, 5, 6, 7, 8
#: The exit code that shells use for Ctrl-C.
STOPPED = 130

REDIS_URL = f"{PREFIX}REDIS_URL"
SANDBOX = Path(".imattr")
SETTINGS_FILE = "settings.env"

P = ParamSpec("P")


class _SafeConsole(Console):
    """Shows text as it is: markup in it has no effect, and unprintable characters are shown as codes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


# A pipe has no width: lines are as long as they need to be.
out = _SafeConsole(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
err = _SafeConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def echo_json(value: object, *, indent: int | None = None) -> None:
    """Print a value as JSON that every terminal and encoding leaves intact."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json_text(value, indent=indent, ascii_only=not utf8))


def replace_what_cannot_be_encoded() -> None:
    """Keep characters that the output's encoding lacks from ending a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


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
        except (CannotImport, UnusablePlan) as error:
            fail(FAILED, str(error))
        except SandboxError as error:
            fail(NO_SANDBOX, str(error))
        except NotConfirmed as error:
            fail(UNREACHABLE, str(error))
        except RedisError as error:
            # Its text names the host, never the password.
            fail(UNREACHABLE, f"Redis does not answer: {error}")
        except KeyboardInterrupt:
            sys.exit(STOPPED)

    return run


#: Where a command keeps the sandbox that it was told to use.
_CHOSEN = "imattr.directory"


def with_directory(command: click.Command) -> click.Command:
    """Give a command, and those inside it, the option that names a sandbox."""
    option = click.Option(
        ["--directory"],
        type=click.Path(path_type=Path),
        metavar="DIR",
        expose_value=False,
        callback=_choose,
        help=f"Use the sandbox that imattr up started with this directory.  [default: {SANDBOX}, if there is one]",
    )
    command.params.append(option)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            with_directory(inner)
    return command


def _choose(context: click.Context, _option: click.Parameter, directory: Path | None) -> None:
    if directory is not None:
        context.meta[_CHOSEN] = directory


def environment() -> dict[str, str]:
    """The environment, with the settings of a running sandbox.

    Those of a sandbox that was named take precedence. Those of `.imattr` here fill the gaps of an environment that names no
    other Redis.
    """
    environ = dict(os.environ)
    context = click.get_current_context(silent=True)
    chosen: Path | None = context.meta.get(_CHOSEN) if context else None
    directory = chosen or SANDBOX
    try:
        lines = (directory / SETTINGS_FILE).read_text().splitlines()
    except OSError:
        if chosen:
            fail(USAGE, f"no sandbox runs in {chosen}; imattr up --directory {chosen} starts one")
        return environ
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    given = {name: value for name, value in environ.items() if value}
    if not chosen and given.get(REDIS_URL) not in (None, settings.get(REDIS_URL)):
        return environ
    err.print(f"using the sandbox in {directory}", style="dim")
    return given | settings if chosen else settings | given


def actor() -> str:
    """Who runs this command, for the history."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


@contextmanager
def state() -> Iterator[tuple[Redis, Settings]]:
    """A connection to the state, with a producer's settings: no API credentials."""
    settings = Settings.from_env(environment(), "producer")
    with connect(settings.redis, key=Keys(settings.sdkappid).pending) as redis:
        yield redis, settings


class Stopped:
    """Whether this process was asked to stop, and how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> bool:
        return self.times > 0

    def twice(self) -> bool:
        return self.times > 1


@contextmanager
def until_stopped() -> Iterator[Stopped]:
    """Turn the signals that ask for an end, including that of a closing terminal, into a flag while the block runs."""
    stopped = Stopped()

    def note(*_: object) -> None:
        stopped.times += 1

    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in asking}
    # Under nohup the closing of the terminal is ignored, and stays so.
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, note)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(console: Console = out, every: float = 2) -> Iterator[Callable[[Text], None]]:
    """A line that is rewritten on a terminal, and printed every `every` seconds elsewhere."""
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
