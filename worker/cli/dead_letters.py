"""`imattr dead`: dead letters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import click
from rich.table import Table

from worker.cli.terminal import FAILED, actor, echo_json, explained, fail, out, state
from worker.operate.kept import letter_facts
from worker.operate.words import counted, plain
from worker.state.dead_letters import DeadLetters, Filter, as_updates
from worker.state.keys import Keys


@click.group()
def dead() -> None:
    """List, redrive, export or purge dead letters."""


def _filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Options that select dead letters."""
    for option in (
        click.option("--user", help="Only this user."),
        click.option("--code", type=int, help="Only letters with this error code."),
        click.option("--older-than", type=float, metavar="SECONDS", help="Only letters older than this."),
    ):
        command = option(command)
    return command


@contextmanager
def _letters(
    user: str | None = None, code: int | None = None, older_than: float | None = None
) -> Iterator[tuple[DeadLetters, Filter]]:
    with state() as (client, settings):
        letters = DeadLetters(client, Keys(settings.sdkappid))
        before = None if older_than is None else letters.now_ms() - round(older_than * 1000)
        yield letters, Filter(user, code, before)


@dead.command("list")
@_filtered
@click.option("--limit", default=100, show_default=True, help="Show at most this many, oldest first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@explained
def list_letters(
    user: str | None, code: int | None, older_than: float | None, limit: int, as_json: bool
) -> None:
    """List dead letters, without their values."""
    with _letters(user, code, older_than) as (letters, wanted):
        facts = [letter_facts(letter) for letter in islice(letters.find(wanted), limit)]
        count = letters.count()
    if as_json:
        for fact in facts:
            echo_json(fact)
        return
    table = Table("user", "code", "attempts", "dead since", "message", box=None, header_style="bold")
    for fact in facts:
        columns = (fact["user"], fact["code"], fact["attempts"], fact["dead_since"], fact["message"])
        table.add_row(*map(plain, columns))
    out.print(table if facts else "no dead letters" + (" match" if count else ""))
    if len(facts) == limit < count:
        out.print(f"... {count:,} in all; see --limit", style="dim")


@dead.command("show")
@click.argument("user")
@explained
def show_letter(user: str) -> None:
    """Show USER's dead letter with its values, as JSON."""
    with _letters(user) as (letters, wanted):
        for letter in letters.find(wanted):
            values = {name: value for name, (value, _) in letter.values.items()}
            echo_json(letter_facts(letter) | {"attributes": values}, indent=2)
            return
    fail(FAILED, f"user {user} has no dead letter")


@dead.command("export")
@_filtered
@explained
def export_letters(user: str | None, code: int | None, older_than: float | None) -> None:
    """Print dead letters as updates, as JSON lines.

    Each keeps the time of its values, so importing them never replaces anything newer.
    """
    with _letters(user, code, older_than) as (letters, wanted):
        for letter in letters.find(wanted):
            for update in as_updates(letter):
                echo_json(update)


@dead.command("redrive")
@_filtered
@click.option("--dry-run", is_flag=True, help="Only print how many it would be.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@explained
def redrive_letters(
    user: str | None, code: int | None, older_than: float | None, dry_run: bool, yes: bool
) -> None:
    """Put dead letters back to pending.

    Without options, all of them, after asking. Newer values win, and live updates go first.
    """
    with _letters(user, code, older_than) as (letters, wanted):
        chosen = letters.choose(wanted)
        if dry_run:
            out.print(f"{len(chosen):,} would be redriven")
            return
        if chosen and wanted == Filter() and not yes:
            click.confirm(f"Redrive all {counted(len(chosen), 'dead letter')}?", abort=True)
        total = letters.redrive(chosen, by=actor())
    outdated = f", {total.outdated:,} of them superseded by newer values" if total.outdated else ""
    out.print(f"{total.redriven:,} redriven{outdated}")


@dead.command("purge")
@_filtered
@click.option("--dry-run", is_flag=True, help="Only print how many it would be.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@explained
def purge_letters(
    user: str | None, code: int | None, older_than: float | None, dry_run: bool, yes: bool
) -> None:
    """Delete dead letters for good."""
    with _letters(user, code, older_than) as (letters, wanted):
        chosen = letters.choose(wanted)
        if dry_run:
            out.print(f"{len(chosen):,} would be deleted")
            return
        if chosen and not yes:
            click.confirm(f"Delete {counted(len(chosen), 'dead letter')} for good?", abort=True)
        purged = letters.purge(chosen, by=actor())
    out.print(f"{purged:,} deleted")
