"""The command line. Holds no logic of its own: it reads arguments, calls, and shows."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import click
import redis
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worker import simulator, status
from worker.config import PREFIX, Settings
from worker.deadletters import PAGE, DeadLetters, Filter, Letter, Redriven, as_updates
from worker.errors import BufferFull, ConfigError, InvalidUpdate, SandboxError
from worker.keys import Keys
from worker.line import Line
from worker.producer import Producer
from worker.sandbox import Plan, Sandbox

#: Exit codes; 2 is click's own for wrong usage.
FAILED, USAGE, REFUSED, UNREACHABLE, FULL, NO_SANDBOX = 1, 2, 3, 4, 5, 6

SANDBOX = Path(".imattr")
SETTINGS_FILE = "settings.env"

P = ParamSpec("P")

# A pipe has no width: lines are then as long as they need to be.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)

EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 update refused,
4 Redis not reachable, 5 buffer full, 6 a sandbox part failed to start.

\b
Examples:
  imattr up                                    everything, on this machine
  imattr put u1 city=Paris level=Gold          one update
  imattr status --watch                        what is going on
"""


def _fail(code: int, message: str) -> NoReturn:
    err.print(Text("error: ", style="bold red") + Text(message))
    sys.exit(code)


def _explained(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a user can mend into one clear line and an exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ConfigError as error:
            mistakes = "".join(f"\n  {mistake}" for mistake in error.mistakes)
            _fail(USAGE, f"these settings are wrong or missing:{mistakes}")
        except InvalidUpdate as error:
            _fail(REFUSED, f"refused, {error}")
        except BufferFull as error:
            _fail(FULL, str(error))
        except SandboxError as error:
            _fail(NO_SANDBOX, str(error))
        except redis.RedisError as error:
            # Its text names the host and never the password.
            _fail(UNREACHABLE, f"Redis does not answer: {error}")
        except KeyboardInterrupt:
            sys.exit(130)

    return run


def _environ() -> dict[str, str]:
    """The environment; without a Redis in it, that of the sandbox that `imattr up` started here."""
    environ = dict(os.environ)
    path = SANDBOX / SETTINGS_FILE
    if environ.get(f"{PREFIX}REDIS_URL") or not path.exists():
        return environ
    settings = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    err.print(f"[dim]using the sandbox in {SANDBOX}[/dim]")
    return settings | environ


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imattr")
def main() -> None:
    """Deliver user attributes to Tencent Cloud Chat: coalesced, rate limited, nothing lost."""


@main.command()
@click.argument("user")
@click.argument("attributes", nargs=-1, required=True, metavar="NAME=VALUE...")
@click.option("--occurred-at", metavar="TIME", help="When it happened: ISO 8601 with a time zone, or epoch.")
@_explained
def put(user: str, attributes: tuple[str, ...], occurred_at: str | None) -> None:
    """Accept one update of USER's attributes."""
    attrs = _pairs(attributes)
    moment: object = occurred_at
    if occurred_at and occurred_at.replace(".", "", 1).isdecimal():
        moment = float(occurred_at)
    outcome = Producer.from_env(_environ()).set(user, attrs, moment)
    out.print(f"accepted, {outcome}")


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    attrs: dict[str, str] = {}
    for place, text in enumerate(texts, 1):
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"attribute {place} is no NAME=VALUE")
        if name in attrs:
            raise click.UsageError(f"attribute {name!r} is given twice")
        attrs[name] = value
    return attrs


@main.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Show again every second, until Ctrl-C.")
@_explained
def show_status(as_json: bool, watch: bool) -> None:
    """Show what is going on, and whether the ledger balances."""
    settings = Settings.from_env(_environ(), "producer")
    with redis.Redis.from_url(settings.redis_url.reveal(), socket_connect_timeout=3) as client:
        if not watch:
            _print_status(status.read(client, settings), as_json)
            return
        if as_json or not out.is_terminal:
            while True:
                _print_status(status.read(client, settings), as_json)
                time.sleep(1)
        with Live(console=out, auto_refresh=False) as live:
            while True:
                live.update(_status_table(status.read(client, settings)), refresh=True)
                time.sleep(1)


def _print_status(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(state))
    else:
        out.print(_status_table(state))


def _status_table(state: dict[str, Any]) -> Table:
    line, pending, ledger, rate = state["line"], state["pending"], state["ledger"], state["rate"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if line["state"] == "open":
        table.add_row("line", Text("open", style="green"))
    else:
        code = f" ({line['code']})" if line["code"] else ""
        probe = f", next call {line['next_probe']}" if line["next_probe"] else ""
        reason = f"{line['state']}: {line['reason']}{code}, since {line['since']}{probe}"
        table.add_row("line", Text(reason, style="bold red"))
    waiting = pending["live"] + pending["backfill"] + pending["delayed"] + pending["waiting"]
    age = pending["oldest_age_s"]
    parts = ", ".join(f"{lane} {pending[lane]:,}" for lane in ("live", "backfill", "delayed", "waiting"))
    table.add_row(
        "pending", f"{waiting:,} users ({parts})" + (f", oldest {age:.1f} s" if age is not None else "")
    )
    table.add_row("in flight", f"{state['in_flight']:,} users")
    table.add_row("dead letters", Text(f"{state['dead']:,}", style="yellow" if state["dead"] else ""))
    eta = "-" if state["eta_s"] is None else f"{state['eta_s']:.1f} s"
    table.add_row("rate", f"{rate['current']:g} of {rate['quota']} calls/s, all delivered in {eta}")
    counters = ", ".join(
        f"{name.replace('_', ' ')} {ledger[name]:,}" for name in ledger if name != "balanced"
    )
    table.add_row("ledger", counters)
    balance = (
        Text("balances", style="green") if ledger["balanced"] else Text("DOES NOT BALANCE", style="bold red")
    )
    table.add_row("", balance)
    return table


@main.group()
def dead() -> None:
    """Look at dead letters, put them back, or throw them away."""


def _filtered(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose dead letters."""
    for option in (
        click.option("--user", help="This user only."),
        click.option("--code", type=int, help="With this error code only."),
        click.option("--older-than", type=float, metavar="SECONDS", help="Dead for longer than this only."),
    ):
        command = option(command)
    return command


@contextmanager
def _letters(
    user: str | None = None, code: int | None = None, older_than: float | None = None
) -> Iterator[tuple[DeadLetters, Filter]]:
    settings = Settings.from_env(_environ(), "producer")
    with redis.Redis.from_url(settings.redis_url.reveal(), socket_connect_timeout=3) as client:
        letters = DeadLetters(client, Keys(settings.sdkappid))
        before = None if older_than is None else letters.now_ms() - round(older_than * 1000)
        yield letters, Filter(user, code, before)


def _facts(letter: Letter) -> dict[str, Any]:
    return {
        "user": letter.user,
        "code": letter.code,
        "message": letter.message,
        "attempts": letter.attempts,
        "first_update": status.iso(letter.since_ms / 1000),
        "dead_since": status.iso(letter.at_ms / 1000),
        "attributes": sorted(letter.values),
    }


@dead.command("list")
@_filtered
@click.option("--limit", default=100, show_default=True, help="At most this many, oldest first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@_explained
def list_letters(
    user: str | None, code: int | None, older_than: float | None, limit: int, as_json: bool
) -> None:
    """List dead letters, without the values."""
    with _letters(user, code, older_than) as (letters, wanted):
        facts = [_facts(letter) for letter in islice(letters.find(wanted), limit)]
        count = letters.count()
    if as_json:
        for fact in facts:
            click.echo(json.dumps(fact))
        return
    table = Table("user", "code", "attempts", "dead since", "message", box=None, header_style="bold")
    for fact in facts:
        columns = (fact["user"], fact["code"], fact["attempts"], fact["dead_since"], fact["message"])
        table.add_row(*map(str, columns))
    out.print(table if facts else "no dead letters" + (" fit" if count else ""))
    if len(facts) == limit < count:
        out.print(f"[dim]... of {count:,} in all; see --limit[/dim]")


@dead.command("show")
@click.argument("user")
@_explained
def show_letter(user: str) -> None:
    """Show USER's dead letter with its values, as JSON."""
    with _letters(user) as (letters, wanted):
        for letter in letters.find(wanted):
            values = {name: value for name, (value, _) in letter.values.items()}
            click.echo(json.dumps(_facts(letter) | {"attributes": values}, ensure_ascii=False, indent=2))
            return
    _fail(FAILED, f"user {user} has no dead letter")


@dead.command("export")
@_filtered
@_explained
def export_letters(user: str | None, code: int | None, older_than: float | None) -> None:
    """Print dead letters as updates, one JSON object a line, with the times of their values."""
    with _letters(user, code, older_than) as (letters, wanted):
        for letter in letters.find(wanted):
            for update in as_updates(letter):
                click.echo(json.dumps(update, ensure_ascii=False))


@dead.command("redrive")
@_filtered
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@_explained
def redrive_letters(user: str | None, code: int | None, older_than: float | None, dry_run: bool) -> None:
    """Put dead letters back to pending, under anything newer.

    Without options all of them. They take the spare seats: live updates go first.
    """
    with _letters(user, code, older_than) as (letters, wanted):
        if dry_run:
            out.print(f"{sum(1 for _ in letters.find(wanted)):,} would be put back")
            return
        total = Redriven()
        for page in _pages(letters, wanted):
            done = letters.redrive(page)
            total.redriven += done.redriven
            total.outdated += done.outdated
    outdated = f", {total.outdated:,} of them outdated by newer values" if total.outdated else ""
    out.print(f"{total.redriven:,} put back{outdated}")


@dead.command("purge")
@_filtered
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_explained
def purge_letters(
    user: str | None, code: int | None, older_than: float | None, dry_run: bool, yes: bool
) -> None:
    """Throw dead letters away for good."""
    with _letters(user, code, older_than) as (letters, wanted):
        count = sum(1 for _ in letters.find(wanted))
        if dry_run:
            out.print(f"{count:,} would be thrown away")
            return
        if count and not yes:
            click.confirm(f"Throw {count:,} dead letters away for good?", abort=True)
        purged = sum(letters.purge(page) for page in _pages(letters, wanted))
    out.print(f"{purged:,} thrown away")


def _pages(letters: DeadLetters, wanted: Filter) -> Iterator[list[str]]:
    found = letters.find(wanted)
    while page := [letter.user for letter in islice(found, PAGE)]:
        yield page


@main.command()
@click.option("--reason", required=True, help="Shown to everyone who asks for the status.")
@_explained
def pause(reason: str) -> None:
    """Stop sending until `imattr resume`; updates are accepted and coalesced as ever."""
    with _line() as line:
        line.pause(reason)
    out.print("paused; what is in flight is finished")


@main.command()
@_explained
def resume() -> None:
    """Send again, whatever kept the line: a pause, or a stop whose cause is mended."""
    with _line() as line:
        out.print("resumed" if line.resume() else "the line was open")


@contextmanager
def _line() -> Iterator[Line]:
    settings = Settings.from_env(_environ(), "producer")
    with redis.Redis.from_url(settings.redis_url.reveal(), socket_connect_timeout=3) as client:
        yield Line(client, Keys(settings.sdkappid))


@main.command()
@click.option("--port", default=9000, show_default=True, help="Port on the loopback interface.")
@click.option("--name", "names", multiple=True, help="An attribute name of the app; none = any is good.")
@click.option("--latency", default=0.05, show_default=True, help="Seconds until a reply.")
@click.option("--quota", default=100, show_default=True, help="Calls a second allowed; 0 = no limit.")
@click.option("--record/--no-record", default=True, show_default=True, help="Keep every applied write.")
@_explained
def simulate(port: int, names: tuple[str, ...], latency: float, quota: int, record: bool) -> None:
    """Run the API simulator alone.

    It serves the app in IMATTR_SDKAPPID, with the key in IMATTR_SECRET_KEY.

    Ours, beside the API: GET /simulator/state, users, record; POST /simulator/quirks, faults.
    """
    environ = {f"{PREFIX}REDIS_URL": "redis://unused", f"{PREFIX}API_URL": "http://unused"} | dict(os.environ)
    environ.pop(f"{PREFIX}REGION", None)
    settings = Settings.from_env(environ)
    quirks = simulator.Quirks(quota=quota, latency=latency, record=record)
    administrators = [settings.admin]
    key = settings.secret_key.reveal()
    api = simulator.Api(settings.sdkappid, key, administrators=administrators, names=names, quirks=quirks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    url = f"http://127.0.0.1:{port}"
    try:
        simulator.serve(
            api, port=port, ready=lambda: out.print(f"simulating app {settings.sdkappid} at {url}")
        )
    except OSError as error:
        _fail(NO_SANDBOX, f"port {port}: {error.strerror}")


@main.command()
@click.option("--workers", default=2, show_default=True, help="Worker processes.")
@click.option("--concurrency", default=16, show_default=True, help="Threads or processes a worker.")
@click.option(
    "--pool",
    type=click.Choice(["threads", "prefork"]),
    default="threads",
    show_default=True,
    help="Celery's pool.",
)
@click.option("--flower/--no-flower", default=True, show_default=True, help="Start Flower.")
@click.option(
    "--directory", type=click.Path(path_type=Path), default=SANDBOX, show_default=True, help="Data and logs."
)
@_explained
def up(workers: int, concurrency: int, pool: str, flower: bool, directory: Path) -> None:
    """Run everything on this machine until Ctrl-C.

    What is configured is used (IMATTR_REDIS_URL; IMATTR_API_URL or IMATTR_REGION). An embedded Redis,
    whose data stays in the directory, and an API simulator stand in for what is not.
    """
    environ = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    with _until_stopped() as stopped:
        plan = Plan(workers=workers, concurrency=concurrency, pool=pool, flower=flower)
        out.print("starting ...")
        with Sandbox(directory, environ, plan) as sandbox:
            path = directory / SETTINGS_FILE
            _write_private(path, "".join(f"{name}={value}\n" for name, value in sorted(environ.items())))
            try:
                _announce(sandbox, directory)
                while not stopped():
                    sandbox.check()
                    time.sleep(0.5)
            finally:
                path.unlink(missing_ok=True)
                out.print("stopping: workers finish what is in flight ...")
    out.print("stopped")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


@contextmanager
def _until_stopped() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag for as long as it lasts."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(sandbox: Sandbox, directory: Path) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for stand_in in sandbox.stand_ins:
        table.add_row(Text("sandboxed", style="yellow"), stand_in)
    table.add_row("workers", f"{sandbox.plan.workers} x {sandbox.plan.concurrency} {sandbox.plan.pool}")
    table.add_row("flower", sandbox.flower_url or "-")
    table.add_row("logs", str(directory))
    out.print(table)
    out.print()
    out.print("try, in another terminal:  imattr put u1 city=Paris level=Gold   and   imattr status --watch")
    out.print("Ctrl-C stops everything.")


@main.command()
@click.option("--workers", default=2, show_default=True, help="Worker processes.")
@click.option("--flower/--no-flower", default=True, show_default=True, help="Start Flower.")
@click.option("--seed", default=2026, show_default=True, help="Another seed, other events.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=SANDBOX / "demo",
    show_default=True,
    help="Emptied first; data and logs.",
)
@_explained
def demo(workers: int, flower: bool, seed: int, directory: Path) -> None:
    """Deliver 60,000 events in a sandbox and check the result.

    Some calls fail on purpose. Only IMATTR_REDIS_URL is used of what is configured. Ends with 0 if every check holds, else with 1.
    """
    try:
        from worker import demo as job
        from worker import demo_events
    except ModuleNotFoundError as error:
        _fail(NO_SANDBOX, f"the demo needs the package {error.name}: pip install 'imattr[sandbox]'")
    out.print("making events ...")
    lines = list(demo_events.events(seed))
    with _progress() as show:
        report = job.run(
            directory,
            os.environ.get(f"{PREFIX}REDIS_URL", ""),
            lines=lines,
            say=lambda text: out.print(Text(text)),
            show=lambda progress: show(_progress_line(progress)),
            workers=workers,
            flower=flower,
        )
    table = Table.grid(padding=(0, 2))
    for name, text in report.rows:
        table.add_row(Text(name, style="dim"), Text(text))
    out.print(table)
    for name, good, text in report.checks:
        mark = ("✓ ", "green") if good else ("✗ FAILED: ", "bold red")
        out.print(Text.assemble(mark, name, (f"  ({text})", "dim" if good else "bold red")), soft_wrap=True)
    out.print("\n[bold green]all of it holds[/]" if report.passed else "\n[bold red]NOT all of it holds[/]")
    sys.exit(0 if report.passed else FAILED)


@contextmanager
def _progress() -> Iterator[Callable[[Text], None]]:
    """A line that is rewritten on a terminal, and printed every two seconds elsewhere."""
    if out.is_terminal:
        with Live(console=out, auto_refresh=False, transient=True) as live:
            yield lambda text: live.update(text, refresh=True)
        return
    shown = [time.monotonic()]

    def show(text: Text) -> None:
        if time.monotonic() - shown[0] >= 2:
            shown[0] = time.monotonic()
            out.print(text)

    yield show


def _progress_line(progress: Any) -> Text:
    snapshot = progress.snapshot
    done = progress.lines / progress.total
    bar = "━" * round(20 * done)
    return Text.assemble(
        (f"{bar:<20}", "green"),
        f" {progress.lines:>6,} events",
        f"  pending {snapshot.pending:>6,}",
        f"  in flight {snapshot.in_flight:>4}",
        f"  delivered {snapshot.ledger['delivered']:>6,}",
        f"  calls {progress.calls:>4}",
        f"  worst second {progress.worst:>3}",
    )


if __name__ == "__main__":
    main()
