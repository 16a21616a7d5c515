"""`imattr refused`: updates that were refused after leaving their sender."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.table import Table

from worker.cli.terminal import FAILED, actor, echo_json, explained, fail, out, state
from worker.operate.kept import refused_facts
from worker.operate.words import counted, plain
from worker.state.keys import Keys
from worker.state.refused import Refused


@click.group("refused")
def refused_updates() -> None:
    """List, show or purge refused updates.

    Updates in Celery messages and stream entries, whose sender was gone when they broke a rule.
    """


@contextmanager
def _refused() -> Iterator[Refused]:
    with state() as (client, settings):
        yield Refused(client, Keys(settings.sdkappid))


@refused_updates.command("list")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Show at most this many, newest first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@explained
def list_refused(limit: int, as_json: bool) -> None:
    """List refused updates, without their content."""
    with _refused() as refused:
        facts = [refused_facts(kept) for kept in refused.newest(limit)]
        count = refused.count()
    if as_json:
        for fact in facts:
            echo_json(fact)
        return
    table = Table("id", "refused at", "source", "user", "rule", box=None, header_style="bold")
    for fact in facts:
        table.add_row(*(plain(value or "") for value in fact.values()))
    out.print(table if facts else "no refused updates")
    if len(facts) == limit < count:
        out.print(f"... {count:,} in all; see --limit", style="dim")


@refused_updates.command("show")
@click.argument("id")
@explained
def show_refused(id: str) -> None:
    """Show the refused update ID with its content, as JSON."""
    with _refused() as refused:
        kept = refused.find(id)
    if kept is None:
        fail(FAILED, f"there is no refused update with id {id}")
    echo_json(refused_facts(kept) | {"payload": kept.payload}, indent=2)


@refused_updates.command("purge")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@explained
def purge_refused(yes: bool) -> None:
    """Delete all refused updates for good."""
    with _refused() as refused:
        newest = refused.newest(1)
        count = refused.count()
        if count and not yes:
            click.confirm(f"Delete {counted(count, 'refused update')} for good?", abort=True)
        # Those that came after the question stay.
        purged = refused.purge(newest[0].id, by=actor()) if newest else 0
        out.print(f"{purged:,} deleted")
