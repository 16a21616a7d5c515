"""`imattr import`: send the updates in a file, and show the progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.text import Text

from worker.cli.terminal import (
    REFUSED,
    STOPPED,
    as_duration,
    echo_json,
    environment,
    err,
    explained,
    out,
    print_rows,
    progress,
    until_stopped,
)
from worker.config import Settings
from worker.errors import CannotImport, InvalidUpdate, NotConfirmed
from worker.intake import importer
from worker.intake.import_progress import ImportOptions
from worker.intake.import_source import event_time
from worker.models import Update, check_occurred_at
from worker.operate import status
from worker.state.connection import RedisError, connect
from worker.state.keys import Keys

F = TypeVar("F", bound=Callable[..., Any])


def as_of_option(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """Read `--as-of`: ms since 1970, None if it is not given."""
    try:
        return None if text is None else check_occurred_at("", event_time(text))
    except InvalidUpdate as error:
        raise click.UsageError(error.rule.replace("occurred_at", "--as-of")) from None


def with_source(began: str) -> Callable[[F], F]:
    """Give a command the file that it reads, and the options that say how. `began` is as of when it counts by default."""
    options = (
        click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)),
        click.option(
            "--format", type=click.Choice(["jsonl", "csv"]), help="Input format. [default: detected]"
        ),
        click.option(
            "--user-column",
            default="user",
            show_default=True,
            help="CSV: the column that holds the user ids.",
        ),
        click.option(
            "--null", metavar="TEXT", help="CSV: text in a cell that means no value, as an empty cell does."
        ),
        click.option(
            "--as-of",
            metavar="TIME",
            callback=as_of_option,
            help="The time at which the file was true: ISO 8601 with a time zone, or seconds since 1970. "
            f"[default: {began}]",
        ),
    )

    def give(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return give


@click.command("import")
@with_source("when the import began")
@click.option("--lane", type=click.Choice(["backfill", "live"]), default="backfill", show_default=True)
@click.option(
    "--refused",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for refused lines; overwritten if it exists. [default: FILE.refused.jsonl]",
)
@click.option(
    "--progress",
    "progress_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the progress, for resuming. [default: FILE.import-progress]",
)
@click.option("--abandon", is_flag=True, help="Abandon an interrupted import; send nothing.")
@click.option("--restart", is_flag=True, help="Start over instead of resuming an earlier run.")
@click.option("--dry-run", is_flag=True, help="Check the whole file and estimate the work; send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@explained
def import_file(
    file: Path,
    format: Any,
    user_column: str,
    null: str | None,
    as_of: int | None,
    lane: Any,
    refused: Path | None,
    progress_file: Path | None,
    abandon: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Queue the updates in FILE, or - for stdin.

    JSON lines, or CSV with a header, in UTF-8; either may be compressed with gzip. --dry-run shows how it reads the first
    lines.

    \b
    {"user": "u1", "attrs": {"city": "Paris"}}     and "occurred_at", if known
    user,city,level                                an empty cell changes nothing

    Imports fill the seats that live updates leave free. A line without an event time counts as of the start of the import, or
    of --as-of: it never replaces anything newer.

    Refused lines do not stop the import; they are listed with line, user and rule. While the buffer is full, the import
    waits. After an interruption (Ctrl-C, a kill, a failure), the same command resumes after the last accepted line. After
    a kill, up to 200 lines may be sent twice, which changes nothing.

    Exits with 3 if lines were refused, with 130 if stopped.
    """
    options = ImportOptions(
        path=None if str(file) == "-" else file,
        format=format,
        user_column=user_column,
        null=null,
        progress=progress_file,
        lane=lane,
        as_of_ms=as_of,
        refused=refused,
        restart=restart,
    )
    settings = Settings.from_env(environment(), "producer")
    if abandon:
        begun = importer.Importer(settings, options).abandon()
        out.print("abandoned; what was accepted stays" if begun else "no import of this file was interrupted")
        return
    with until_stopped() as stopped, _import_shown(settings, options, err if as_json else out) as show:
        run = importer.Importer(settings, options, stopped=stopped, show=show)
        done = run.rehearse() if dry_run else run.run()
    if isinstance(done, importer.Estimate):
        _print_estimate(done, settings, as_json)
    else:
        _print_import(done, options, as_json)
    sys.exit(_exit_code(done))


def _exit_code(done: importer.Estimate | importer.ImportStatus) -> int:
    if done.state == "stopped":
        return STOPPED
    refused = done.refused if isinstance(done, importer.Estimate) else done.progress.refused
    return REFUSED if refused else 0


class _ImportScreen:
    """Shows an import's progress: how far it is, ten times a second, and what is pending, once a second."""

    def __init__(self, settings: Settings, console: Console, line: Callable[[Text], None]) -> None:
        self._settings, self._console, self._line = settings, console, line
        self._redis = connect(settings.redis, key=Keys(settings.sdkappid).pending)
        self._line_at = self._eta_at = 0.0
        self._eta: float | None = None
        self.last: importer.ImportStatus | None = None

    def __call__(self, view: importer.ImportStatus) -> None:
        if self.last is None and view.resumed_after:
            self._console.print(f"resuming after line {view.resumed_after:,}, where an earlier run ended")
        self.last = view
        if view.state != "checking" and view.seconds >= self._eta_at:
            self._eta_at = view.seconds + 1
            self._eta = status.read(self._redis, self._settings)["eta_s"]
        if view.seconds >= self._line_at:
            self._line_at = view.seconds + 0.1
            self._line(_import_line(view, self._eta))


@contextmanager
def _import_shown(settings: Settings, options: ImportOptions, console: Console) -> Iterator[_ImportScreen]:
    """Show an import's progress and, if it fails, how far it got."""
    with progress(console, every=5) as line:
        screen = _ImportScreen(settings, console, line)
        try:
            yield screen
        except (RedisError, NotConfirmed, CannotImport):
            if screen.last:
                err.print(_how_far(screen.last, options))
            raise


def _how_far(view: importer.ImportStatus, options: ImportOptions) -> str:
    progress = view.progress
    done = f"{progress.accepted:,} lines accepted, all up to line {progress.line:,}"
    return f"{done}; the same command resumes there" if options.resumable else done


def _import_line(view: importer.ImportStatus, delivery: float | None) -> Text:
    bar = "" if view.share is None else f"{'━' * round(20 * view.share):<20} "
    refused = f"  refused {view.progress.refused:,}" if view.progress.refused else ""
    waiting = "  waiting for room" if view.state == "waiting for room" else ""
    if view.pause:
        waiting = f"  paused by {view.pause.by}: {view.pause.reason}"
    done = "checked" if view.state == "checking" else "accepted"
    end = "" if view.eta is None else f"  {done} in {as_duration(view.eta)}"
    delivered = "" if delivery is None else f"  delivered in {as_duration(delivery)}"
    return Text.assemble(
        (bar, "green"),
        f"{view.progress.lines:,} lines  {view.lines_per_second:,.0f}/s",
        (refused + waiting, "yellow"),
        end + delivered,
    )


def _print_import(view: importer.ImportStatus, options: ImportOptions, as_json: bool) -> None:
    progress = view.progress
    refused_file = str(options.refused_path) if progress.refused else None
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
        "notes": view.notes,
        "resumed_after": view.resumed_after,
        "seconds": round(view.seconds, 3),
        "lines_per_second": round(view.lines_per_second),
    }
    if as_json:
        echo_json(facts)
    else:
        parts = ", ".join(f"{facts[name]:,} {name}" for name in ("coalesced", "unchanged", "stale"))
        print_rows(
            (
                "lines",
                f"{progress.lines:,}, this run {view.lines_per_second:,.0f}/s for {view.seconds:.1f} s",
            ),
            ("accepted", f"{progress.accepted:,}, of them {parts}"),
            ("refused", f"{progress.refused:,}" + (f", listed in {refused_file}" if refused_file else "")),
            ("as of", f"{facts['as_of']}, for lines without a time"),
            *(("read as", note) for note in view.notes),
        )
    if view.state == "stopped":
        err.print(f"stopped: {_how_far(view, options)}")


def _attributes_in_words(update: Update) -> str:
    values = ", ".join(
        f"{name} removed" if value is None else f"{name}={value}" for name, value in update.attrs.items()
    )
    return f"{values}  as of {status.iso(update.occurred_ms / 1000)}"


def _print_estimate(estimate: importer.Estimate, settings: Settings, as_json: bool) -> None:
    if as_json:
        refusals = [refusal._asdict() for refusal in estimate.refusals]
        samples = [
            {"line": line, "user": update.user, "attrs": update.attrs, "occurred_at": update.occurred_ms}
            for line, update in estimate.samples
        ]
        echo_json(estimate._asdict() | {"refusals": refusals, "samples": samples})
        return
    print_rows(
        ("lines", f"{estimate.lines:,}" + (", then stopped" if estimate.state == "stopped" else "")),
        *(("read as", note) for note in estimate.notes),
        *(
            (f"line {line:,}", f"{update.user}: {_attributes_in_words(update)}")
            for line, update in estimate.samples
        ),
        ("users", f"about {estimate.users:,}"),
        ("refused", f"{estimate.refused:,}"),
        *(("", f"line {line:,}: user {user}: {rule}") for line, user, rule in estimate.refusals),
        ("calls", f"{estimate.calls:,}"),
        ("time", f"{as_duration(estimate.seconds)} at {settings.quota} calls/s if nothing else is sent"),
    )
