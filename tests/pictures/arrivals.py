"""Calls as they arrive at the API, and how many there were in the last second: `docs/how/limiter.svg`, of a real run."""

from __future__ import annotations

import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import requests

from tests.pictures.svg import path, picture, text
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox

WIDTH, HEIGHT, LEFT = 760, 240, 24
#: Pixels a second, and seconds shown, in how many seconds of animation.
SCALE, SHOWN, PLAYED = 3600.0, 1.0, 36.0


def arrivals() -> list[float]:
    """When calls arrived at the API, in s, while two workers deliver a backlog at full rate."""
    plan = Plan(workers=2, concurrency=8, flower=False, names=("city",), persistent=False)
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), {}, plan) as sandbox:
        producer = Producer(sandbox.redis_url, int(SDKAPPID), timeout=10)
        producer.set_many((f"user{number}", {"city": "Shenzhen"}) for number in range(80_000))
        time.sleep(6)
        times: list[float] = requests.get(f"{sandbox.api_url}/simulator/arrivals", timeout=10).json()
    return times


def draw(times: Sequence[float]) -> str:
    """The SVG: the last `SHOWN` seconds of what arrived, and the second before."""
    end = times[-1]
    shown = [at - (end - SHOWN) for at in times if at >= end - SHOWN]
    counts = [bisect_right(times, at) - bisect_left(times, at - 1) for at in times if at >= end - SHOWN]
    right, axis = WIDTH - LEFT, 90
    gaps = [after - before for before, after in pairwise(shown)]

    def height(count: float) -> float:
        return 224 - (count - 90) * 8

    dots = "".join(f'<circle class="good" cx="{at * SCALE:.1f}" cy="{axis}" r="5"/>' for at in shown)
    apart = "".join(
        text(round((before + gap / 2) * SCALE, 1), axis - 9, f"{gap * 1000:.1f}", "gap middle faint")
        for before, gap in zip(shown, gaps, strict=False)
    )
    line = path([(at * SCALE, height(count)) for at, count in zip(shown, counts, strict=True)], "trace")
    parts = [
        text(LEFT, 28, "Calls as they arrive at the API: two workers, a quota of 100, 36 times slower"),
        text(
            LEFT,
            48,
            f"{min(gaps) * 1000:.1f} to {max(gaps) * 1000:.1f} ms apart, from slots that are 10.2 ms apart",
            "small faint",
        ),
        f'<path class="rule" d="M0 {axis}H{WIDTH}"/>',
        text(LEFT, 126, "how many in the last second", "small faint"),
        f'<path class="border" d="M0 {height(100):g}H{WIDTH}"/>',
        text(right, height(100) - 5, "quota: 100", "small limit end"),
        f'<path class="rule" d="M0 {height(90):g}H{WIDTH}"/>',
        text(right, height(96) + 4, f"{_range(counts)} calls", "small end"),
        f'<g clip-path="url(#all)"><g class="run">{dots}{apart}{line}</g></g>',
        f'<clipPath id="all"><rect width="{WIDTH}" height="{HEIGHT}" rx="8"/></clipPath>',
    ]
    travel = SHOWN * SCALE - WIDTH
    style = f"""
.gap {{ font-size: 10px; }}
.run {{ animation: run {PLAYED:g}s linear infinite alternate; }}
@keyframes run {{ to {{ transform: translateX(-{travel:.0f}px); }} }}
@media (prefers-reduced-motion: reduce) {{ .run {{ animation: none; }} }}
"""
    title = f"Calls arrive evenly; no second has more than {max(counts)} of the 100 that are allowed"
    return picture(WIDTH, HEIGHT, title, parts, style)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
