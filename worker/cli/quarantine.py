"""`imattr quarantine`: what could not be read in Redis."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import click
from rich.table import Table

from worker.cli.terminal import FAILED, actor, echo_json, explained, fail, out, state
from worker.operate import status
from worker.operate.words import counted, plain
from worker.state.keys import Keys
from worker.state.quarantine import Quarantine, Unreadable


@click.group("quarantine")
def quarantine() -> None:
    """List, show or drop what could not be read.

    Damaged records in Redis. They are set aside with their bytes, and get in nobody's way.
    """


@contextmanager
def _quarantine() -> Iterator[Quarantine]:
    with state() as (client, settings):
        yield Quarantine(client, Keys(settings.sdkappid))


def _facts(entry: Unreadable) -> dict[str, str | int | None]:
    return {
        "user": entry.user,
        "found_in": entry.table,
        "found_at": status.iso(entry.at_ms / 1000),
        "bytes": len(entry.raw),
    }


@quarantine.command("list")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="Show at most this many."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@explained
def list_entries(limit: int, as_json: bool) -> None:
    """List what was set aside, without its content."""
    with _quarantine() as kept:
        facts = [_facts(entry) for entry in islice(kept.find(), limit)]
        count = kept.count()
    if as_json:
        for fact in facts:
            echo_json(fact)
        return
    table = Table("user", "found in", "found at", "bytes", box=None, header_style="bold")
    for fact in facts:
        table.add_row(*map(plain, fact.values()))
    out.print(table if facts else "nothing is in quarantine")
    if len(facts) < count:
        out.print(f"... {count:,} in all; see --limit", style="dim")


@quarantine.command("show")
@click.argument("user", required=False)
@explained
def show_entries(user: str | None) -> None:
    """Print what was set aside, all of it or USER's, as JSON lines.

    "raw" has the bytes as text, with \\x.. for those that are not text; "base64" has them exactly.
    """
    found = False
    with _quarantine() as kept:
        for entry in kept.find():
            if user in (None, entry.user):
                found = True
                raw = entry.raw.decode(errors="backslashreplace")
                echo_json(_facts(entry) | {"raw": raw, "base64": base64.b64encode(entry.raw).decode()})
    if not found:
        fail(FAILED, f"nothing of user {user} is in quarantine" if user else "nothing is in quarantine")


@quarantine.command("drop")
@click.argument("user", required=False)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@explained
def drop_entries(user: str | None, yes: bool) -> None:
    """Delete what was set aside for good, all of it or USER's."""
    with _quarantine() as kept:
        ids = [entry.id for entry in kept.find() if user in (None, entry.user)]
        if ids and not yes:
            click.confirm(f"Delete {counted(len(ids), 'record')} for good?", abort=True)
        out.print(f"{kept.drop(ids, by=actor()):,} deleted")
