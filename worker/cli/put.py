"""`imattr put`: send one update."""

from __future__ import annotations

import click

from worker.cli.terminal import environment, explained, out
from worker.intake.import_source import event_time
from worker.producer import Producer


@click.command()
@click.argument("user")
@click.argument("attributes", nargs=-1, metavar="[NAME=VALUE...]")
@click.option("--remove", "removed", multiple=True, metavar="NAME", help="Remove this attribute.")
@click.option(
    "--occurred-at",
    metavar="TIME",
    help="When it happened: ISO 8601 with a time zone, or seconds since 1970.",
)
@explained
def put(user: str, attributes: tuple[str, ...], removed: tuple[str, ...], occurred_at: str | None) -> None:
    """Queue an update for USER."""
    attrs: dict[str, str | None] = {**_pairs(attributes)}
    if twice := attrs.keys() & removed:
        raise click.UsageError(f"attribute {min(twice)!r} is both set and removed")
    attrs |= dict.fromkeys(removed)
    if not attrs:
        raise click.UsageError("nothing to set and nothing to remove")
    moment = event_time(occurred_at) if occurred_at else None
    outcome = Producer.from_env(environment()).set(user, attrs, moment)
    out.print(f"accepted, {outcome}")


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    attrs: dict[str, str] = {}
    for place, text in enumerate(texts, 1):
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"attribute {place} is not NAME=VALUE")
        if name in attrs:
            raise click.UsageError(f"attribute {name!r} is given twice")
        attrs[name] = value
    return attrs
