"""`imattr faults`: make calls to the simulator fail on purpose."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.table import Table

from worker.cli.terminal import echo_json, environment, explained, out
from worker.config import PREFIX
from worker.errors import SandboxError
from worker.sandbox import faults as notation
from worker.sandbox.faults import Fault


def read_faults(texts: Sequence[str]) -> list[Fault]:
    try:
        return notation.read_faults(texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of {what, share, struck, meaning}.")
@click.pass_context
@explained
def faults(context: click.Context, as_json: bool) -> None:
    """Make calls to the simulator fail on purpose.

    Without a command, shows what is set at the sandbox's simulator (or at IMATTR_API_URL), and how many calls it has struck.
    """
    if context.invoked_subcommand is None:
        _show_faults(notation.set_at(_simulator()), as_json)


@faults.command("set")
@click.argument("wanted", nargs=-1, required=True, metavar="WHAT[:SHARE]|CODE@USER...")
@explained
def set_faults(wanted: tuple[str, ...]) -> None:
    """Make a share of all calls fail from now on.

    Replaces what was set. WHAT is an ErrorCode (91000), an HTTP status (502), timeout, reset, truncated, or lost; without
    SHARE, every call fails. CODE@USER makes every call refuse that user by name, and nobody else.

    \b
      imattr faults set 91000:0.1 timeout:0.05   some calls
      imattr faults set 502                      an outage
      imattr faults set 60020                    the plan has expired
      imattr faults set 70107@u9                 a user without an account
    """
    found = read_faults(wanted)
    notation.set_to(_simulator(), found)
    _show_faults(found, as_json=False)


@faults.command("clear")
@explained
def clear_faults() -> None:
    """Make no more calls fail."""
    notation.set_to(_simulator(), [])
    out.print("no call fails on purpose now")


def _simulator() -> str:
    """The simulator's URL; anything else at that URL refuses our requests."""
    url = environment().get(f"{PREFIX}API_URL")
    if not url:
        raise SandboxError("no simulator is known: start imattr up here, or set IMATTR_API_URL to one")
    return url.rstrip("/")


def _show_faults(found: list[Fault], as_json: bool) -> None:
    shown = notation.shown(found)
    if as_json:
        echo_json([each._asdict() for each in shown])
        return
    if not shown:
        out.print("no call fails on purpose")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("fails")
    table.add_column("share", justify="right")
    table.add_column("struck", justify="right")
    table.add_column("that is", overflow="fold")
    for each in shown:
        table.add_row(each.what, f"{each.share:.4g}", f"{each.struck:,}", each.meaning)
    out.print(table)
