"""An outage from its first failure to the last user delivered: `docs/how/outage.svg`, of a real run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import requests

from tests.pictures.svg import path, picture, text
from worker.config import Settings
from worker.operate import status
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.state.connection import connect

WIDTH, HEIGHT, LEFT, RIGHT = 760, 330, 96, 20
#: Users, and seconds: until the API fails, until it recovers, and between two looks.
USERS, FAILS, RECOVERS, EVERY = 230_000, 8.0, 26.0, 0.25


class Look(NamedTuple):
    """What was seen: seconds since the first call, calls so far, users pending, and the state of the line."""

    at: float
    calls: int
    pending: int
    line: str


def looks() -> list[Look]:
    """Let the API answer every call with 502 for a while, and look until everything is delivered."""
    environ: dict[str, str] = {}
    plan = Plan(workers=2, flower=False, names=("city",), persistent=False)
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), environ, plan) as sandbox:
        Producer(sandbox.redis_url, int(SDKAPPID), timeout=10).set_many(
            (f"user{number}", {"city": "Shenzhen"}) for number in range(USERS)
        )
        settings, seen = Settings.from_env(environ, "producer"), list[Look]()
        faults: list[tuple[float, list[object]]] = [
            (FAILS, [{"kind": "status", "code": 502, "times": None}]),
            (RECOVERS, []),
        ]
        began = time.monotonic()
        with connect(sandbox.redis_url) as redis:
            while not seen or seen[-1].pending:
                at = time.monotonic() - began
                if faults and at >= faults[0][0]:
                    url = f"{sandbox.api_url}/simulator/faults"
                    requests.post(url, json=faults.pop(0)[1], timeout=10).raise_for_status()
                calls = requests.get(f"{sandbox.api_url}/simulator/state", timeout=10).json()["calls"]
                state = status.read(redis, settings)
                pending = state["pending"]
                waiting = pending["live"] + pending["backfill"] + pending["delayed"] + state["in_flight"]
                seen.append(Look(at, calls, waiting, state["line"]["state"]))
                if at > 120:
                    raise TimeoutError("not delivered after two minutes")
                time.sleep(max(0.0, began + EVERY * len(seen) - time.monotonic()))
    return seen


def draw(seen: Sequence[Look]) -> str:
    """The SVG."""
    last = seen[-1].at

    def x(at: float) -> float:
        return LEFT + at / last * (WIDTH - LEFT - RIGHT)

    bands = {"calls a second": (60, 150), "users pending": (180, 250)}
    window = 4
    rates = [
        (now.at, (now.calls - then.calls) / (now.at - then.at))
        for then, now in zip(seen, seen[window:], strict=False)
    ]
    most = max(look.pending for look in seen)
    top, bottom = bands["calls a second"]
    parts = [
        text(16, 28, f"The API answers every call with 502 from second {FAILS:g} to second {RECOVERS:g}")
    ]
    parts.append(
        f'<rect class="trouble" x="{x(FAILS):.1f}" y="44" width="{x(RECOVERS) - x(FAILS):.1f}" height="{HEIGHT - 74}"/>'
    )
    for name, (high, low) in bands.items():
        parts += [
            text(16, (high + low) / 2 + 4, name, "small"),
            f'<path class="rule" d="M{LEFT} {low}H{WIDTH - RIGHT}"/>',
        ]
    parts += [
        text(LEFT - 6, top + 4, "100", "small faint end"),
        path([(x(at), bottom - min(rate, 105) / 100 * (bottom - top)) for at, rate in rates], "trace"),
    ]
    top, bottom = bands["users pending"]
    parts += [
        text(LEFT - 6, top + 4, f"{most:,}", "small faint end"),
        path([(x(look.at), bottom - look.pending / most * (bottom - top)) for look in seen], "trace"),
        text(16, 280, "line", "small"),
    ]
    began = seen[0]
    for now, after in zip(seen, [*seen[1:], None], strict=True):
        if after is None or after.line != began.line:
            look = {"open": "open", "stopped": "stopped", "probing": "probing"}.get(began.line, "stopped")
            until = after.at if after else now.at
            parts.append(
                f'<rect class="{look}" x="{x(began.at):.1f}" y="268" width="{x(until) - x(began.at):.1f}" height="16"/>'
            )
            began = after or now
    for name, place in (("open", 0), ("stopped", 80), ("probing", 176)):
        parts += [
            f'<rect class="{name}" x="{LEFT + place}" y="302" width="12" height="12"/>',
            text(LEFT + place + 18, 312, name, "small faint"),
        ]
    parts.append(text(WIDTH - RIGHT, 312, f"{last:.0f} s", "small faint end"))
    style = """
.trouble { fill: var(--bad); opacity: .1; } .open { fill: var(--good); } .stopped { fill: var(--bad); } .probing { fill: var(--limit); }
"""
    title = "During an outage the line stops and probes; afterwards everything that waited is delivered"
    return picture(WIDTH, HEIGHT, title, parts, style)
