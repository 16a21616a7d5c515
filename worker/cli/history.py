"""`imattr history`: what happened to the line and the fleet, and who did it."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from worker.cli.terminal import echo_json, explained, out, state
from worker.operate import status
from worker.operate.words import details, moment, plain
from worker.state.history import History
from worker.state.keys import Keys


def _since(given: str, now: float) -> float:
    try:
        return moment(given, now)
    except ValueError:
        raise click.BadParameter(
            "must be an age such as 90m, 12h or 2d, or an ISO 8601 time", param_hint="--since"
        ) from None


@click.command()
@click.option("--since", help="Only what happened since: an age (90m, 12h, 2d) or an ISO 8601 time.")
@click.option("--event", help="Only this kind, such as stopped or paused.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Show at most this many, newest first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@explained
def history(since: str | None, event: str | None, limit: int, as_json: bool) -> None:
    """Show what happened to the line and the fleet, and who did it.

    Stops, probes, pauses, changes of the rate, failovers, reclaimed leases, redrives, purges, imports and audits; about the last
    10,000 are kept.
    """
    with state() as (redis, settings):
        seconds, micros = redis.time()
        earliest = 0.0 if since is None else _since(since, seconds + micros / 1e6)
        found = History(redis, Keys(settings.sdkappid)).newest(
            limit, since_ms=round(1000 * earliest), event=event
        )
    if as_json:
        for one in found:
            echo_json({"at": status.iso(one.at_ms / 1000), "event": one.event, "by": one.by, **one.details})
        return
    if not found:
        out.print("nothing has happened")
        return
    table = Table("at (UTC)", "event", "by", "what", box=None, header_style="bold")
    for one in found:
        at = (status.iso(one.at_ms / 1000) or "")[:19].replace("T", " ")
        table.add_row(at, one.event.replace("_", " "), plain(one.by), Text(plain(details(one))))
    out.print(table)
