"""Four workers on one clock: `docs/how/limiter.svg`, of a run in virtual time, ten times slower.

Each row is a thread. It claims a batch, waits for its slot, and makes its call, which arrives a few milliseconds later.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

from tests.pictures.fleet import watched
from tests.pictures.svg import WIDTH, bar, path, picture, text
from tests.scenarios import people
from tests.schedules.wire import Wire
from worker.ratelimit import Permit, RateLimiter
from worker.state.buffer import Buffer

WORKERS, THREADS = 4, 4
#: Seconds before the part that is shown, of that part, and of its animation; pixels a second.
BEFORE, SHOWN, PLAYED, SCALE = 3.0, 1.6, 16.0, 1000.0
TOP, ROW = 92, 11


class Turn(NamedTuple):
    """What one thread did with one batch, in seconds: its row, the claim, the slot, the arrival of the call, the answer."""

    row: int
    claimed: float
    slot: float
    arrived: float
    answered: float


class Run(NamedTuple):
    """What is shown, from second 0 on, and when calls arrived, also in the second before."""

    turns: list[Turn]
    arrivals: list[float]


def run(wire: Wire | None = None) -> Run:
    """Let a backlog be delivered, over a network that delays calls by 1 to 7 ms."""
    turns: list[Turn] = []
    rng = random.Random(1)
    with watched(workers=WORKERS, threads=THREADS, wire=wire) as running:
        world = running.world
        # Threads begin in the order in which they are made: those of a worker, then its dispatcher.
        rows = {
            task: number // (THREADS + 1) * THREADS + number % (THREADS + 1)
            for number, task in enumerate(world._living)
        }
        running.stall = lambda: rng.uniform(0.001, 0.007)
        claims: dict[int, float] = {}
        slots: dict[int, float] = {}
        claim, redeem, read = Buffer.claim, RateLimiter.redeem, running.read

        def note_claim(buffer: Buffer, *args: Any, **how: Any) -> Any:
            claims[rows[world.running]] = world.monotonic()
            return claim(buffer, *args, **how)

        def note_slot(limiter: RateLimiter, permit: Permit) -> bool:
            slots[rows[world.running]] = permit.due
            return redeem(limiter, permit)

        def note_answer(call: Any) -> Any:
            row, answer = rows[world.running], read(call)
            turns.append(Turn(row, claims[row], slots[row], call.request.at, world.monotonic()))
            return answer

        with (
            mock.patch.object(Buffer, "claim", note_claim),
            mock.patch.object(RateLimiter, "redeem", note_slot),
            mock.patch.object(running, "read", note_answer),
        ):
            # Users of whom all calls are full until the end.
            running.add(people(round((BEFORE + SHOWN + 1) * 9800)))
            begin = world.monotonic() + BEFORE
            running.wait(BEFORE + SHOWN + 0.3)
    shown = [
        Turn(it.row, *(at - begin for at in it[1:]))
        for it in turns
        if it.answered > begin and it.claimed < begin + SHOWN
    ]
    arrivals = [it.arrived - begin for it in turns if it.arrived > begin - 1]
    return Run(shown, arrivals)


def draw(seen: Run) -> str:
    """The SVG."""
    arrivals = seen.arrivals
    in_window = [at for at in arrivals if 0 <= at <= SHOWN]
    counts = [bisect_right(arrivals, at) - bisect_left(arrivals, at - 1) for at in in_window]
    line = TOP + ROW * WORKERS * THREADS + 46
    quota = line + 40

    def level(count: float) -> float:
        return quota + (100 - count) * 6

    height = quota + 74
    moving = []
    for turn in seen.turns:
        colour, y = "abcd"[turn.row // THREADS], TOP + ROW * turn.row + turn.row // THREADS * 3
        claimed, slot, answered = turn.claimed * SCALE, turn.slot * SCALE, turn.answered * SCALE
        moving.append(bar(claimed, y + 3, slot - claimed, ROW - 7, f"wait {colour}"))
        moving.append(bar(slot, y, answered - slot, ROW - 2, colour))
    moving += [
        f'<path class="slot {"abcd"[turn.row // THREADS]}s" d="M{turn.slot * SCALE:.1f} 66v10"/>'
        for turn in seen.turns
    ]
    moving += [f'<circle class="good" cx="{at * SCALE:.1f}" cy="{line}" r="3"/>' for at in in_window]
    steps, before = list[tuple[float, float]](), counts[0]
    for at, count in zip(in_window, counts, strict=True):
        steps += [(at * SCALE, level(before)), (at * SCALE, level(count))]
        before = count
    moving.append(path(steps, "trace"))
    gaps = [(after - before) * 1000 for before, after in pairwise(in_window)]
    parts = [
        text(14, 26, f"{WORKERS} workers, one clock", "name"),
        *(
            f'<rect class="{colour}" x="{290 + 46 * place}" y="17" width="10" height="10" rx="2"/>'
            + text(304 + 46 * place, 26, f"w{place + 1}", "small faint")
            for place, colour in enumerate("abcd")
        ),
        text(14, 54, "slots of the shared clock, 10.2 ms apart; ten times slower", "small faint"),
        f'<path class="rule" d="M1 76H{WIDTH - 1}"/>',
        f'<path class="rule" d="M1 {line}H{WIDTH - 1}"/>',
        f'<path class="border" d="M1 {level(100):g}H{WIDTH - 1}"/>',
        f'<clipPath id="all"><rect x="1" width="{WIDTH - 2}" height="{height}" rx="8"/></clipPath>',
        f'<g clip-path="url(#all)"><g class="run">{"".join(moving)}</g></g>',
        text(
            14, line - 12, f"arrivals at the API, {min(gaps):.1f} to {max(gaps):.1f} ms apart", "small over"
        ),
        text(14, level(100) - 6, "quota: 100", "small limit over"),
        text(
            WIDTH - 14,
            level(min(counts)) + 20,
            f"{_range(counts)} calls in the last second",
            "small end over",
        ),
        text(
            14,
            height - 16,
            "thin: claimed, waits for its slot; thick: the call, until it is answered",
            "small faint",
        ),
    ]
    travel = SHOWN * SCALE - WIDTH
    style = f"""
.a {{ fill: var(--a); }} .b {{ fill: var(--b); }} .c {{ fill: var(--c); }} .d {{ fill: var(--d); }} .wait {{ opacity: .35; }}
.slot {{ stroke-width: 2; }}
.as {{ stroke: var(--a); }} .bs {{ stroke: var(--b); }} .cs {{ stroke: var(--c); }} .ds {{ stroke: var(--d); }}
.over {{ paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }}
.run {{ animation: run {PLAYED:g}s linear infinite; }}
@keyframes run {{ to {{ transform: translateX(-{travel:.0f}px); }} }}
@media (prefers-reduced-motion: reduce) {{ .run {{ animation: none; }} }}
"""
    title = (
        f"{WORKERS} workers claim batches for slots of one clock; "
        f"the API never counts more than {max(counts)} of the 100 calls that it allows in a second"
    )
    return picture(height, title, parts, style)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
