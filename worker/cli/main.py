"""The command line. Holds no logic of its own: it reads arguments, calls, and shows."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worker import runtime
from worker.config import PREFIX, Settings
from worker.delivery.attribute_catalog import AttributeCatalog
from worker.errors import BufferFull, CallFailed, CannotImport, ConfigError, InvalidUpdate, SandboxError
from worker.intake import importer
from worker.intake.import_source import event_time
from worker.models import check_names, check_occurred_at
from worker.operate import doctor, status
from worker.operate.doctor import Finding
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.sandbox import simulator
from worker.sandbox.processes import Plan, Sandbox
from worker.state.connection import RedisError, connect
from worker.state.dead_letters import PAGE, DeadLetters, Filter, Letter, Redriven, as_updates
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.refused import Refused, RefusedUpdate
from worker.version import VERSION

#: Exit codes; 2 is click's own for wrong usage.
FAILED, USAGE, REFUSED, UNREACHABLE, FULL, NO_SANDBOX, NO_PERMIT = 1, 2, 3, 4, 5, 6, 7
#: As shells have it for Ctrl-C.
STOPPED = 130

SANDBOX = Path(".imattr")
SETTINGS_FILE = "settings.env"

P = ParamSpec("P")

# A pipe has no width: lines are then as long as they need to be.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)

EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 update refused,
4 Redis not reachable, 5 buffer full, 6 a sandbox part failed to start,
7 no permit came in time, 130 stopped by Ctrl-C.

\b
Examples:
  imattr up                                    everything, on this machine
  imattr put u1 city=Paris --remove level      one update
  imattr import users.csv                      a whole file
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
        except CallFailed as error:
            _fail(FAILED, f"{error.found}\n  {error.fix}")
        except CannotImport as error:
            _fail(FAILED, str(error))
        except SandboxError as error:
            _fail(NO_SANDBOX, str(error))
        except RedisError as error:
            # Its text names the host and never the password.
            _fail(UNREACHABLE, f"Redis does not answer: {error}")
        except KeyboardInterrupt:
            sys.exit(STOPPED)

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
@click.version_option(VERSION, prog_name="imattr")
def main() -> None:
    """Deliver user attributes to Tencent Cloud Chat: coalesced, rate limited, nothing lost."""


@main.command()
@click.argument("user")
@click.argument("attributes", nargs=-1, metavar="[NAME=VALUE...]")
@click.option("--remove", "removed", multiple=True, metavar="NAME", help="An attribute to remove.")
@click.option("--occurred-at", metavar="TIME", help="When it happened: ISO 8601 with a time zone, or epoch.")
@_explained
def put(user: str, attributes: tuple[str, ...], removed: tuple[str, ...], occurred_at: str | None) -> None:
    """Accept one update of USER's attributes."""
    attrs: dict[str, str | None] = {**_pairs(attributes)}
    if twice := attrs.keys() & removed:
        raise click.UsageError(f"attribute {min(twice)!r} is both set and removed")
    attrs |= dict.fromkeys(removed)
    if not attrs:
        raise click.UsageError("nothing to set and nothing to remove")
    moment = event_time(occurred_at) if occurred_at else None
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


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--format", type=click.Choice(["jsonl", "csv"]), help="Instead of finding it out.")
@click.option("--user-column", default="user", show_default=True, help="CSV: the column of the user ids.")
@click.option(
    "--as-of",
    metavar="TIME",
    help="How old the file is: ISO 8601 with a time zone, or epoch. [default: when the import was begun]",
)
@click.option("--lane", type=click.Choice(["backfill", "live"]), default="backfill", show_default=True)
@click.option(
    "--refused",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where refused lines go, replaced if it is there. [default: FILE.refused.jsonl]",
)
@click.option("--restart", is_flag=True, help="Do not go on where an earlier run stopped.")
@click.option("--dry-run", is_flag=True, help="Check all of it and say what it would take; accept nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_explained
def import_file(
    file: Path,
    format: Any,
    user_column: str,
    as_of: str | None,
    lane: Any,
    refused: Path | None,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Accept the updates in FILE, or - for stdin: JSON lines, or CSV with a header; also packed with gzip.

    \b
    {"user": "u1", "attrs": {"city": "Paris"}}        and "occurred_at", if known
    user,city,level                                   an empty cell says nothing

    They take the spare seats: live updates go first. A line without an event time counts as of the moment
    when the import was begun, or --as-of: it never replaces what has happened since.

    Refused lines stop nothing; they are listed with line, user and rule. While the buffer is full, it waits.
    Interrupted (Ctrl-C, a kill, a failure), the same command goes on after the last line accepted; only
    after a kill up to 200 lines may be offered twice, which changes nothing.

    Ends with 3 if lines were refused, with 130 if it was stopped.
    """
    job = importer.ImportOptions(
        path=None if str(file) == "-" else file,
        format=format,
        user_column=user_column,
        lane=lane,
        as_of_ms=_as_of(as_of),
        refused=refused,
        restart=restart,
    )
    settings = Settings.from_env(_environ(), "producer")
    with _until_stopped() as stopped, _import_shown(settings, job, err if as_json else out) as show:
        run = importer.Importer(settings, job, stopped=stopped, show=show)
        done = run.rehearse() if dry_run else run.run()
    if isinstance(done, importer.Estimate):
        _print_estimate(done, settings, as_json)
        refused_lines = done.refused
    else:
        _print_import(done, job, as_json)
        refused_lines = done.progress.refused
    sys.exit(STOPPED if done.state == "stopped" else REFUSED if refused_lines else 0)


def _as_of(text: str | None) -> int | None:
    try:
        return None if text is None else check_occurred_at("", event_time(text))
    except InvalidUpdate as error:
        raise click.UsageError(error.rule.replace("occurred_at", "--as-of")) from None


class _ImportScreen:
    """Shows an import as it goes: asks ten times a second how far it is, once a second what is pending."""

    def __init__(self, settings: Settings, console: Console, line: Callable[[Text], None]) -> None:
        self._settings, self._console, self._line = settings, console, line
        url = settings.redis_url.reveal()
        self._redis = connect(url)
        self._line_at = self._eta_at = 0.0
        self._eta: float | None = None
        self.last: importer.ImportStatus | None = None

    def __call__(self, view: importer.ImportStatus) -> None:
        if self.last is None and view.resumed_after:
            self._console.print(f"going on after line {view.resumed_after:,}, where an earlier run ended")
        self.last = view
        if view.state != "checking" and view.seconds >= self._eta_at:
            self._eta_at = view.seconds + 1
            self._eta = status.read(self._redis, self._settings)["eta_s"]
        if view.seconds >= self._line_at:
            self._line_at = view.seconds + 0.1
            self._line(_import_line(view, self._eta))


@contextmanager
def _import_shown(
    settings: Settings, job: importer.ImportOptions, console: Console
) -> Iterator[_ImportScreen]:
    """Shows an import, and how far it came when it fails."""
    with _progress(console, every=5) as line:
        screen = _ImportScreen(settings, console, line)
        try:
            yield screen
        except (RedisError, CannotImport):
            if screen.last:
                err.print(_how_far(screen.last, job))
            raise


def _how_far(view: importer.ImportStatus, job: importer.ImportOptions) -> str:
    progress = view.progress
    done = f"{progress.accepted:,} lines are accepted, all up to line {progress.line:,}"
    return f"{done}; the same command goes on after it" if job.resumable else done


def _import_line(view: importer.ImportStatus, delivery: float | None) -> Text:
    bar = "" if view.share is None else f"{'━' * round(20 * view.share):<20} "
    refused = f"  refused {view.progress.refused:,}" if view.progress.refused else ""
    waiting = "  waits for room" if view.state == "waiting for room" else ""
    done = "checked" if view.state == "checking" else "accepted"
    end = "" if view.eta is None else f"  {done} in {_duration(view.eta)}"
    delivered = "" if delivery is None else f"  delivered in {_duration(delivery)}"
    return Text.assemble(
        (bar, "green"),
        f"{view.progress.lines:,} lines  {view.lines_per_second:,.0f}/s",
        (refused + waiting, "yellow"),
        end + delivered,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _print_import(view: importer.ImportStatus, job: importer.ImportOptions, as_json: bool) -> None:
    progress = view.progress
    refused_file = str(job.refused_path) if progress.refused else None
    facts = {
        "state": view.state,
        "lines": progress.lines,
        "accepted": progress.accepted,
        "coalesced": progress.coalesced,
        "unchanged": progress.unchanged,
        "stale": progress.stale,
        "refused": progress.refused,
        "refused_file": refused_file,
        "as_of": status.iso(progress.as_of_ms / 1000),
        "resumed_after": view.resumed_after,
        "seconds": round(view.seconds, 3),
        "lines_per_second": round(view.lines_per_second),
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        parts = ", ".join(f"{facts[name]:,} {name}" for name in ("coalesced", "unchanged", "stale"))
        _print_rows(
            (
                "lines",
                f"{progress.lines:,}, this run {view.lines_per_second:,.0f}/s for {view.seconds:.1f} s",
            ),
            ("accepted", f"{progress.accepted:,}, of them {parts}"),
            ("refused", f"{progress.refused:,}" + (f", listed in {refused_file}" if refused_file else "")),
            ("as of", f"{facts['as_of']}, where a line does not say"),
        )
    if view.state == "stopped":
        err.print(f"stopped: {_how_far(view, job)}")


def _print_estimate(estimate: importer.Estimate, settings: Settings, as_json: bool) -> None:
    if as_json:
        refusals = [refusal._asdict() for refusal in estimate.refusals]
        click.echo(json.dumps(estimate._asdict() | {"refusals": refusals}, ensure_ascii=False))
        return
    _print_rows(
        ("lines", f"{estimate.lines:,}" + (", then stopped" if estimate.state == "stopped" else "")),
        ("users", f"about {estimate.users:,}"),
        ("refused", f"{estimate.refused:,}"),
        *(("", f"line {line:,}: user {user}: {rule}") for line, user, rule in estimate.refusals),
        ("calls", f"{estimate.calls:,}"),
        ("time", f"{_duration(estimate.seconds)} at {settings.quota} calls/s, if nothing else is sent"),
    )


def _print_rows(*rows: tuple[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    out.print(table)


@main.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Show again every second, until Ctrl-C.")
@_explained
def show_status(as_json: bool, watch: bool) -> None:
    """Show what is going on, and whether the ledger balances."""
    settings = Settings.from_env(_environ(), "producer")
    with connect(settings.redis_url.reveal()) as client:
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
    table.add_row("line", Text(line["words"], style="green" if line["state"] == "open" else "bold red"))
    waiting = pending["live"] + pending["backfill"] + pending["delayed"] + pending["waiting"]
    age = pending["oldest_age_s"]
    parts = ", ".join(f"{lane} {pending[lane]:,}" for lane in ("live", "backfill", "delayed", "waiting"))
    table.add_row(
        "pending", f"{waiting:,} users ({parts})" + (f", oldest {age:.1f} s" if age is not None else "")
    )
    table.add_row("in flight", f"{state['in_flight']:,} users")
    table.add_row("dead letters", Text(f"{state['dead']:,}", style="yellow" if state["dead"] else ""))
    eta = "nothing is sent now" if state["eta_s"] is None else f"all delivered in {state['eta_s']:.1f} s"
    table.add_row("rate", f"{rate['current']:g} of {rate['quota']} calls/s, {eta}")
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
    with connect(settings.redis_url.reveal()) as client:
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


@main.group("refused")
def refused_updates() -> None:
    """Look at updates refused after they had left their sender: Celery messages and stream entries."""


@contextmanager
def _refused() -> Iterator[Refused]:
    settings = Settings.from_env(_environ(), "producer")
    with connect(settings.redis_url.reveal()) as client:
        yield Refused(client, Keys(settings.sdkappid))


def _refused_facts(kept: RefusedUpdate) -> dict[str, str | None]:
    return {
        "id": kept.id,
        "refused_at": status.iso(kept.at_ms / 1000),
        "source": kept.source,
        "user": kept.user,
        "rule": kept.rule,
    }


@refused_updates.command("list")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most this many, newest first."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@_explained
def list_refused(limit: int, as_json: bool) -> None:
    """List refused updates, without what was in them."""
    with _refused() as refused:
        facts = [_refused_facts(kept) for kept in refused.newest(limit)]
        count = refused.count()
    if as_json:
        for fact in facts:
            click.echo(json.dumps(fact, ensure_ascii=False))
        return
    table = Table("id", "refused at", "source", "user", "rule", box=None, header_style="bold")
    for fact in facts:
        table.add_row(*(Text(value or "") for value in fact.values()))
    out.print(table if facts else "no refused updates")
    if len(facts) == limit < count:
        out.print(f"[dim]... of {count:,} in all; see --limit[/dim]")


@refused_updates.command("show")
@click.argument("id")
@_explained
def show_refused(id: str) -> None:
    """Show the refused update ID with what was in it, as JSON."""
    with _refused() as refused:
        kept = refused.find(id)
    if kept is None:
        _fail(FAILED, f"no refused update has the id {id}")
    click.echo(json.dumps(_refused_facts(kept) | {"payload": kept.payload}, ensure_ascii=False, indent=2))


@refused_updates.command("purge")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_explained
def purge_refused(yes: bool) -> None:
    """Throw all refused updates away for good."""
    with _refused() as refused:
        count = refused.count()
        if count and not yes:
            click.confirm(f"Throw {count:,} refused updates away for good?", abort=True)
        out.print(f"{refused.purge():,} thrown away")


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


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--wait", default=2.0, show_default=True, help="Seconds to wait for a slot at most.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@_explained
def permit(wait: float, command: tuple[str, ...]) -> None:
    """Wait for a slot of the shared rate, then run COMMAND, or just end.

    For scripts that call the API themselves: one permit, one call. Ends with 7 when no slot is free in time.
    """
    settings = Settings.from_env(_environ(), "producer")
    limiter = RateLimiter.connect(
        settings.redis_url.reveal(), settings.sdkappid, quota=settings.quota, patience=wait
    )
    if not limiter.acquire():
        _fail(NO_PERMIT, f"no slot was free within {wait:g} s")
    if command:
        try:
            os.execvp(command[0], command)
        except OSError as error:
            _fail(FAILED, f"{command[0]}: {error.strerror}")


@contextmanager
def _line() -> Iterator[Line]:
    settings = Settings.from_env(_environ(), "producer")
    with connect(settings.redis_url.reveal()) as client:
        yield Line(client, Keys(settings.sdkappid))


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of {check, level, found, fix}.")
@_explained
def show_findings(as_json: bool) -> None:
    """Look at settings, Redis, broker, workers, line and API, and say what is wrong and how to mend it.

    Makes one call of the API, which changes nothing there, in a slot of the shared rate.

    Ends with 0 if nothing is an error (warnings allowed), else with 1.
    """
    findings = []
    for finding in doctor.examine(_environ()):
        findings.append(finding)
        if not as_json:
            out.print(_finding_row(finding))
    count = Counter(finding.level for finding in findings)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    else:
        out.print(f"\ngood: {count['ok']}, warnings: {count['warning']}, errors: {count['error']}")
    sys.exit(FAILED if count["error"] else 0)


_MARKS = {"ok": Text("✓", "green"), "warning": Text("!", "bold yellow"), "error": Text("✗", "bold red")}


def _finding_row(finding: Finding) -> Table:
    """One finding, shown as soon as it is there; the columns of all have one width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=17, style="bold")
    table.add_column(overflow="fold")
    table.add_row(_MARKS[finding.level], finding.check, Text(finding.found))
    if finding.fix:
        table.add_row("", "", Text(f"→ {finding.fix}", "dim"))
    return table


@main.group()
def names() -> None:
    """Look at the app's attribute names at the API, or add some."""


@contextmanager
def _app_names() -> Iterator[AttributeCatalog]:
    settings = Settings.from_env(_environ())
    with runtime.connect(settings) as client:
        yield runtime.build_attribute_catalog(settings, client)


@names.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@_explained
def list_names(as_json: bool) -> None:
    """Ask the API for the app's attribute names, and let the local door know them."""
    with _app_names() as app:
        found = sorted(app.read())
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        out.print(Text("\n".join(found) or "the app has no attribute names; see imattr names set"))


@names.command("set")
@click.argument("wanted", nargs=-1, required=True, metavar="NAME...")
@_explained
def set_names(wanted: tuple[str, ...]) -> None:
    """Give the app the attribute names that it does not have yet.

    An app has at most 10, of 1 to 50 bytes each.
    """
    try:
        check_names(wanted)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with _app_names() as app:
        added = app.add(wanted)
    there = [name for name in dict.fromkeys(wanted) if name not in added]
    for what, some in (("added", added), ("there already", there)):
        if some:
            out.print(Text(f"{what}: {', '.join(some)}"))


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
        from worker.sandbox import demo as job
        from worker.sandbox import demo_events
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
def _progress(console: Console = out, every: float = 2) -> Iterator[Callable[[Text], None]]:
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
