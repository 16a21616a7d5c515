"""`imattr status`: what is happening, and whether the ledger balances."""

from __future__ import annotations

import time
from typing import Any

import click
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worker.cli.console import counted, echo_json, explained, out, state
from worker.operate import status


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
@explained
def show_status(as_json: bool, watch: bool) -> None:
    """Show the line, backlog, rate and ledger."""
    with state() as (client, settings):
        if not watch:
            _print_status(status.read(client, settings), as_json)
            return
        if as_json or not out.is_terminal:
            while True:
                _print_status(status.read(client, settings), as_json)
                time.sleep(1)
        with Live(console=out, auto_refresh=False) as live:
            while True:
                live.update(status_table(status.read(client, settings)), refresh=True)
                time.sleep(1)


def _print_status(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(state)
    else:
        out.print(status_table(state))


def status_table(state: dict[str, Any]) -> Table:
    line, pending, ledger, rate = state["line"], state["pending"], state["ledger"], state["rate"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("line", Text(line["words"], style="green" if line["state"] == "open" else "bold red"))
    waiting = pending["live"] + pending["backfill"] + pending["delayed"] + pending["waiting"]
    age = pending["oldest_age_s"]
    parts = ", ".join(f"{lane} {pending[lane]:,}" for lane in ("live", "backfill", "delayed", "waiting"))
    table.add_row(
        "pending",
        f"{counted(waiting, 'user')} ({parts})" + (f", oldest {age:.1f} s" if age is not None else ""),
    )
    table.add_row("in flight", counted(state["in_flight"], "user"))
    table.add_row("dead letters", Text(f"{state['dead']:,}", style="yellow" if state["dead"] else ""))
    if state["quarantine"]:
        words = f"{counted(state['quarantine'], 'record')} could not be read; see imattr quarantine list"
        table.add_row("quarantine", Text(words, style="yellow"))
    if lost := state["redis"]["updates_lost"]:
        words = f"{counted(lost, 'accepted update')} lost when Redis failed over or was restarted; see IMATTR_REPLICAS"
        table.add_row("redis", Text(words, style="yellow"))
    eta = _eta(state["eta_s"])
    table.add_row("rate", f"{rate['current']:g} of {rate['quota']} calls/s, {eta}")
    intake = ", ".join(f"{name} {count:,}" for name, count in state["intake"].items() if count)
    if intake:
        table.add_row("Celery queue", intake)
    counters = ", ".join(
        f"{name.replace('_', ' ')} {ledger[name]:,}" for name in ledger if name != "balanced"
    )
    table.add_row("ledger", counters)
    balance = (
        Text("balances", style="green") if ledger["balanced"] else Text("DOES NOT BALANCE", style="bold red")
    )
    table.add_row("", balance)
    return table


def _eta(seconds: float | None) -> str:
    if seconds is None:
        return "nothing is sent now"
    return f"all delivered in {seconds:.1f} s" if seconds else "nothing pending"
