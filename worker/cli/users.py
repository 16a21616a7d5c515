"""`imattr why` and `imattr user`: where one user's update is."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from worker.cli.terminal import echo_json, explained, out, state
from worker.models import check_user
from worker.operate import status
from worker.operate.why import explain, facts, refusals_of
from worker.state.keys import Keys
from worker.state.users import look


@click.command()
@click.argument("user")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def why(user: str, name: str, as_json: bool) -> None:
    """Say where USER's attribute NAME is, and why.

    Whether the API has the newest value, why not if it does not, and the evidence. Values are not shown; see imattr user show
    --values.
    """
    with state() as (redis, settings):
        keys = Keys(settings.sdkappid)
        known = look(redis, keys, check_user(user))
        answer = explain(
            known, name, status.read(redis, settings), refusals_of(redis, keys, user), settings.shadow_ttl
        )
    if as_json:
        echo_json({"answer": answer.sentence, "proof": answer.proof})
        return
    out.print(Text(answer.sentence, style="bold"))
    for line in answer.proof:
        out.print(Text(f"  {line}", style="dim"))


@click.group("user")
def users() -> None:
    """Show what is known about one user."""


@users.command("show")
@click.argument("user")
@click.option("--values", is_flag=True, help="Show the values, too, which are personal data.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def show(user: str, values: bool, as_json: bool) -> None:
    """Show where USER's update is.

    Its lane, attempts, batch, deliveries, dead letter and versions.
    """
    with state() as (redis, settings):
        found = facts(look(redis, Keys(settings.sdkappid), check_user(user)), values=values)
    if as_json:
        echo_json(found)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for place in ("pending", "in_flight", "delivered", "dead"):
        table.add_row(place.replace("_", " "), Text(_words(found[place])))
    for damaged in found["damaged"]:
        table.add_row("damaged", Text(f"what is stored as {damaged} cannot be read", style="yellow"))
    out.print(table)


def _words(about: dict[str, Any] | None) -> str:
    if about is None:
        return "-"
    lines = []
    for name, value in about.items():
        if name == "attributes":
            lines += [f"{attribute}: {_attribute(found)}" for attribute, found in value.items()]
        elif value:
            lines.append(f"{name.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines)


def _attribute(found: Any) -> str:
    if isinstance(found, str):
        return f"as of {found}"
    return f"{'(removed)' if found['value'] is None else found['value']}, as of {found['as_of']}"
