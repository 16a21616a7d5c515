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

from worker.cli.terminal import echo_json, explained, out, state
from worker.config import Settings
from worker.operate import status
from worker.operate.status import span
from worker.operate.words import counted
from worker.state.connection import Redis, RedisError
from worker.state.keys import LEDGER

#: Seconds between two refreshes with `--watch`.
EVERY = 1.0
#: Parts of a curve's height.
_HEIGHTS = "▁▂▃▄▅▆▇█"


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C, even while Redis is away.")
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
    """Yield the latest state, again and again, and the error if it is not new."""
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
    age = (now - datetime.fromisoformat(found["at"])).total_seconds() if found else None
    return head + Text("no Redis" if age is None else f"no Redis, this is {span(age)} old", style="bold red")


def _tables(found: dict[str, Any] | None) -> list[Table]:
    return [] if found is None else [status_table(found)]


def status_table(state: dict[str, Any]) -> Table:
    """First the rows that are always there, in the same order, then the occasional ones, so that nothing jumps."""
    line, pending, ledger = state["line"], state["pending"], state["ledger"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("line", Text(line["words"], style="green" if line["state"] == "open" else "bold red"))
    lanes = ("live", "backfill", "delayed", "waiting")
    parts = ", ".join(f"{lane} {pending[lane]:,}" for lane in lanes)
    table.add_row("pending", f"{counted(sum(pending[lane] for lane in lanes), 'user')} ({parts})")
    age = pending["oldest_age_s"]
    oldest = "" if age is None else f"; the oldest pending user has waited {span(age)}"
    table.add_row("in flight", f"{counted(state['in_flight'], 'user')}{oldest}")
    table.add_row("measured", _measured(state))
    table.add_row(
        "permitted", f"{state['rate']['current']:g} of {state['rate']['quota']} calls/s; {_eta(state)}"
    )
    calls, left = state["series"]["calls_per_s"], state["series"]["users_left"]
    table.add_row("last 15 min", f"{_curve(calls, state['rate']['quota'])}  calls/s")
    table.add_row("", f"{_curve(left, max([1.0, *(one for one in left if one is not None)]))}  users left")
    table.add_row("workers", _workers(state))
    table.add_row("came in", _listed(state["ways"]["accepted"]))
    waiting = {"Celery queue": state["intake"]["waiting"], "stream": state["stream"]}
    waiting["scheduled messages"] = state["intake"]["scheduled"]
    table.add_row("to be taken", _listed(waiting))
    kept = {"dead letters": state["dead"], "refused updates": state["refused"]}
    table.add_row("kept", Text(_listed(kept, zeros=True), style="yellow" if any(kept.values()) else ""))
    table.add_row("ledger", _listed({name: ledger[name] for name in LEDGER}, zeros=True))
    balance = (
        Text("balances", style="green")
        if ledger["balanced"]
        else Text(f"DOES NOT BALANCE, by {ledger['imbalance']:,}", style="bold red")
    )
    table.add_row("", balance)
    for name, words, style in _now_and_then(state):
        table.add_row(name, Text(words, style=style))
    return table


def _now_and_then(state: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Rows shown only when there is something to say: name, words, style."""
    for one in state["imports"]:
        yield "import", _import(one), ""
    if audit := _audit(state):
        yield "read back", audit, ""
    if state["quarantine"]:
        words = f"{counted(state['quarantine'], 'record')} could not be read; see imattr quarantine list"
        yield "quarantine", words, "yellow"
    if lost := state["redis"]["updates_lost"]:
        words = f"{counted(lost, 'accepted update')} lost when Redis failed over or was restarted; see IMATTR_REPLICAS"
        yield "redis", words, "yellow"
    for stop in state["stops"]:
        code = f" ({stop['code']})" if stop["code"] else ""
        yield "last stops", f"{stop['at'][:19].replace('T', ' ')} UTC: {stop['reason']}{code}", "dim"


def _audit(state: dict[str, Any]) -> str:
    """What audits have found so far; empty if there were none."""
    found = state["audit"]
    if not found["at"]:
        return ""
    last = datetime.fromisoformat(state["at"]) - datetime.fromisoformat(found["at"])
    since = f" since {found['since'][:10]}" if found["since"] else ""
    wrong = {name: found[name] for name in ("lost", "changed", "gone") if found[name]}
    verdict = _listed(wrong) if wrong else "all as delivered"
    return f"{counted(found['checked'], 'user')}{since}, {verdict}; last {span(last.total_seconds())} ago"


def _measured(state: dict[str, Any]) -> str:
    measured = state["measured"]
    if measured["1min"]["calls_per_s"] is None:
        return "nothing yet" if state["workers"] else "nothing: no worker runs"
    calls = "/".join(f"{one['calls_per_s'] or 0:.0f}" for one in measured.values())
    users = "/".join(f"{one['users_per_s'] or 0:,.0f}" for one in measured.values())
    return f"{calls} calls/s, {users} users/s (10 s/1 min/15 min)"


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
    pause = one["paused"]
    paused = f", paused by {pause['by']}: {pause['reason']}" if pause else ""
    if one.get("lines") is None:
        return f"{one['name']}: begun, no report yet{paused}"
    share = f", {one['share']:.0%} of the file" if one["share"] is not None else ""
    eta = f", done in {span(one['eta_s'])}" if one["eta_s"] is not None else ""
    old = f", last report {span(one['seen_s'])} ago" if (one["seen_s"] or 0) > 10 else ""
    return f"{one['name']}: {one['state']}, {one['lines']:,} lines{share}{eta}{old}{paused}"


def _listed(counts: dict[str, int], *, zeros: bool = False) -> str:
    shown = [f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count or zeros]
    return ", ".join(shown) or "nothing"


def _curve(points: Sequence[float | None], most: float) -> str:
    """A line of blocks, each as high as its point; a dot where nothing is known."""
    top = len(_HEIGHTS) - 1
    return "".join("·" if one is None else _HEIGHTS[min(top, round(top * one / most))] for one in points)
