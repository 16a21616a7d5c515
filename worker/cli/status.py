"""`imattr status`: what is happening, and whether the ledger balances."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from worker.cli.console import counted, echo_json, explained, out, state
from worker.config import Settings
from worker.operate import status
from worker.operate.status import span
from worker.state.connection import Redis, RedisError
from worker.state.keys import LEDGER

#: Seconds between two looks with `--watch`.
EVERY = 1.0
#: Parts of a curve's height.
_HEIGHTS = "▁▂▃▄▅▆▇█"


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C, also while Redis is away.")
@explained
def show_status(as_json: bool, watch: bool) -> None:
    """Show the line, backlog, pace, workers and ledger.

    Calls and users a second are measured, over the last 10 seconds, minute and quarter of an hour.
    """
    with state() as (client, settings):
        if not watch:
            _print(status.read(client, settings), None, as_json)
        elif as_json or not out.is_terminal:
            for found, error in _looks(client, settings):
                _print(found, error, as_json)
        else:
            with Live(console=out, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
                for found, error in _looks(client, settings):
                    live.update(Group(_clock(settings, found, error), *_tables(found)), refresh=True)


def _looks(client: Redis, settings: Settings) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """What was last seen, again and again, and why that is not new."""
    found: dict[str, Any] | None = None
    while True:
        try:
            found, error = status.read(client, settings), None
        except RedisError as failure:
            error = type(failure).__name__
        yield found, error
        time.sleep(EVERY)


def _print(found: dict[str, Any] | None, error: str | None, as_json: bool) -> None:
    if error:
        words = f"Redis does not answer: {error}"
        if as_json:
            echo_json({"error": words})
        else:
            out.print(words)
    elif as_json:
        echo_json(found)
    else:
        out.print(*_tables(found), sep="\n")


def _clock(settings: Settings, found: dict[str, Any] | None, error: str | None) -> Text:
    """The first line: the time, and how old everything below is."""
    now = datetime.now(UTC)
    head = Text(f"imattr {settings.sdkappid}   {now:%Y-%m-%d %H:%M:%S} UTC   ", style="bold")
    if error is None:
        return head
    age = (
        f", data of {span((now - datetime.fromisoformat(found['at'])).total_seconds())} ago" if found else ""
    )
    return head + Text(f"Redis does not answer: {error}{age}", style="bold red")


def _tables(found: dict[str, Any] | None) -> list[Table]:
    return [] if found is None else [status_table(found)]


def status_table(state: dict[str, Any]) -> Table:
    """Everything, a row each, in the same order always: what is quiet keeps its line."""
    line, pending, ledger = state["line"], state["pending"], state["ledger"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("line", Text(line["words"], style="green" if line["state"] == "open" else "bold red"))
    lanes = ("live", "backfill", "delayed", "waiting")
    age = pending["oldest_age_s"]
    parts = ", ".join(f"{lane} {pending[lane]:,}" for lane in lanes)
    table.add_row("pending", f"{counted(sum(pending[lane] for lane in lanes), 'user')} ({parts})")
    in_flight = counted(state["in_flight"], "user")
    table.add_row(
        "in flight", in_flight + (f"; the oldest pending is {span(age)} old" if age is not None else "")
    )
    table.add_row("pace", _pace(state))
    curve = _curve(state["series"]["calls_per_s"], state["rate"]["quota"])
    table.add_row("", f"{curve}  calls/s, 15 min")
    left = state["series"]["users_left"]
    table.add_row("", f"{_curve(left, max([1.0, *(one for one in left if one is not None)]))}  users left")
    table.add_row("workers", _workers(state))
    table.add_row("came in", _listed(state["ways"]["accepted"]))
    intake = {**state["intake"], "queue": state["intake"]["waiting"], "stream": state["stream"]}
    table.add_row("to be taken", _listed({name: intake[name] for name in ("queue", "stream", "scheduled")}))
    table.add_row(
        "Celery queue", _listed({name: count for name, count in state["intake"].items() if name != "waiting"})
    )
    for one in state["imports"]:
        table.add_row("import", _import(one))
    kept = {"dead letters": state["dead"], "refused updates": state["refused"]}
    table.add_row("kept", Text(_listed(kept, zeros=True), style="yellow" if any(kept.values()) else ""))
    if state["quarantine"]:
        words = f"{counted(state['quarantine'], 'record')} could not be read; see imattr quarantine list"
        table.add_row("quarantine", Text(words, style="yellow"))
    if lost := state["redis"]["updates_lost"]:
        words = f"{counted(lost, 'accepted update')} lost when Redis failed over or was restarted; see IMATTR_REPLICAS"
        table.add_row("redis", Text(words, style="yellow"))
    for stop in state["stops"]:
        code = f" ({stop['code']})" if stop["code"] else ""
        table.add_row("stopped", f"{stop['at'][:19].replace('T', ' ')} UTC: {stop['reason']}{code}")
    table.add_row("ledger", _listed({name: ledger[name] for name in LEDGER}, zeros=True))
    balance = (
        Text("balances", style="green")
        if ledger["balanced"]
        else Text(f"DOES NOT BALANCE, by {ledger['imbalance']:,}", style="bold red")
    )
    table.add_row("", balance)
    return table


def _pace(state: dict[str, Any]) -> str:
    measured, rate = state["measured"], state["rate"]
    if measured["1min"]["calls_per_s"] is None:
        done = "not measured: no worker has run for a minute" if not state["workers"] else "not measured yet"
    else:
        calls = "/".join(f"{one['calls_per_s'] or 0:.0f}" for one in measured.values())
        users = "/".join(f"{one['users_per_s'] or 0:,.0f}" for one in measured.values())
        done = f"{calls} calls/s, {users} users/s (10 s/1 min/15 min)"
    return f"{done}; {rate['current']:g} of {rate['quota']} calls/s permitted; {_eta(state)}"


def _eta(state: dict[str, Any]) -> str:
    seconds = state["eta_s"]
    if seconds is None:
        return "nothing is delivered now"
    return f"all delivered in {span(seconds)}" if seconds else "nothing pending"


def _workers(state: dict[str, Any]) -> Text:
    workers = state["workers"]
    if not workers:
        return Text("none alive", style="bold red")
    threads, busy = (sum(worker[name] for worker in workers) for name in ("threads", "busy"))
    versions = sorted({worker["version"] for worker in workers})
    words = f"{counted(len(workers), 'worker')}, {busy} of {threads} threads busy, {state['threads_wanted']} wanted"
    return Text(f"{words}; {', '.join(versions)}", style="" if len(versions) == 1 else "yellow")


def _import(one: dict[str, Any]) -> str:
    if one.get("lines") is None:
        return f"{one['name']}: begun, nothing heard of it"
    share = f", {one['share']:.0%} of the file" if one["share"] is not None else ""
    eta = f", done in {span(one['eta_s'])}" if one["eta_s"] is not None else ""
    old = f", last heard of {span(one['seen_s'])} ago" if (one["seen_s"] or 0) > 10 else ""
    return f"{one['name']}: {one['state']}, {one['lines']:,} lines{share}{eta}{old}"


def _listed(counts: dict[str, int], *, zeros: bool = False) -> str:
    shown = [f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count or zeros]
    return ", ".join(shown) or "nothing"


def _curve(points: Sequence[float | None], most: float) -> str:
    """A line of blocks, as high as each point is; a dot where nothing is known."""
    top = len(_HEIGHTS) - 1
    return "".join("·" if one is None else _HEIGHTS[min(top, round(top * one / most))] for one in points)
