"""`imattr refused`: updates that were refused after they had left their sender."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.table import Table
from rich.text import Text

from worker.cli.console import FAILED, explained, fail, out, state
from worker.operate import status
from worker.state.keys import Keys
from worker.state.refused import Refused, RefusedUpdate


@click.group("refused")
def refused_updates() -> None:
    """List, show or purge refused updates.

    Celery messages and stream entries that broke a rule after their sender was gone.
    """


@contextmanager
def _refused() -> Iterator[Refused]:
    with state() as (client, settings):
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
        out.print(f"[dim]... {count:,} in all; see --limit[/dim]")


@refused_updates.command("show")
@click.argument("id")
@explained
def show_refused(id: str) -> None:
    """Show the refused update ID with its content, as JSON."""
    with _refused() as refused:
        kept = refused.find(id)
    if kept is None:
        fail(FAILED, f"there is no refused update with id {id}")
    click.echo(json.dumps(_refused_facts(kept) | {"payload": kept.payload}, ensure_ascii=False, indent=2))


@refused_updates.command("purge")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@explained
def purge_refused(yes: bool) -> None:
    """Delete all refused updates for good."""
    with _refused() as refused:
        count = refused.count()
        if count and not yes:
            click.confirm(f"Delete {count:,} refused updates for good?", abort=True)
        out.print(f"{refused.purge():,} deleted")
