"""`imattr names`: the app's attribute names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.text import Text

from worker import runtime
from worker.cli.terminal import echo_json, environment, explained, out
from worker.config import Settings
from worker.delivery.attribute_catalog import AttributeCatalog
from worker.models import check_names


@click.group()
def names() -> None:
    """List or add the app's attribute names."""


@contextmanager
def _app_names() -> Iterator[AttributeCatalog]:
    settings = Settings.from_env(environment())
    with runtime.connect(settings) as client:
        yield runtime.build_attribute_catalog(settings, client)


@names.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@explained
def list_names(as_json: bool) -> None:
    """Read the app's attribute names from the API.

    From then on, updates are validated against them.
    """
    with _app_names() as app:
        found = sorted(app.read())
    if as_json:
        echo_json(found)
    else:
        out.print(Text("\n".join(found) or "the app has no attribute names; see imattr names set"))


@names.command("set")
@click.argument("wanted", nargs=-1, required=True, metavar="NAME...")
@explained
def set_names(wanted: tuple[str, ...]) -> None:
    """Add attribute names that the app does not have.

    An app has at most 10, of 1 to 50 bytes each.
    """
    try:
        check_names(wanted)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with _app_names() as app:
        added = app.add(wanted)
    there = [name for name in dict.fromkeys(wanted) if name not in added]
    for what, some in (("added", added), ("already there", there)):
        if some:
            out.print(Text(f"{what}: {', '.join(some)}"))
