"""Calls, users waiting, and what is allowed, over time: what an outage and a failover are drawn as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.fleet import Fleet
from tests.pictures.svg import WIDTH, bar, path, picture, text

LEFT, RIGHT = 14, 14
#: Seconds between two looks.
EVERY = 0.5


class Look(NamedTuple):
    """What was seen at one moment: the second, users who wait, and the state that the band shows."""

    at: float
    waiting: int
    state: str


class Span(NamedTuple):
    """A stretch of time with a name: from, until, and the look of what is behind the charts."""

    begin: float
    end: float
    name: str
    look: str


class Story(NamedTuple):
    """What happened, in seconds from the begin of what is shown."""

    arrivals: list[float]
    looks: list[Look]


def watch(running: Fleet, seconds: float, looks: list[Look], began: float, state: str | None = None) -> None:
    """Let time pass, and look now and then; the state is the line's, unless it is given."""
    world = running.world
    until = world.monotonic() + seconds
    while world.monotonic() < until:
        snapshot = running.snapshot()
        shown = running.line.read().state if state is None else state
        looks.append(Look(world.monotonic() - began, snapshot.pending + snapshot.in_flight, shown))
        running.wait(min(EVERY, until - world.monotonic()))


def draw(
    story: Story,
    *,
    name: str,
    band: str,
    spans: Sequence[Span],
    notes: Sequence[tuple[float, str]],
    title: str,
    marks: Sequence[float] = (),
) -> str:
    """The SVG. `band` says what the states below the charts are; `notes` are words at moments; `marks` are single calls."""
    last = story.looks[-1].at

    def x(at: float) -> float:
        return LEFT + at / last * (WIDTH - LEFT - RIGHT)

    rates_top, rates_bottom, users_top, users_bottom = 92, 170, 204, 262
    parts = [text(14, 26, name, "name")]
    for span in spans:
        parts += [
            bar(x(span.begin), 44, x(span.end) - x(span.begin), users_bottom - 44, span.look),
            text(x(span.begin) + 4, 58, span.name, "small"),
        ]
    per_second = [0] * (int(last) + 1)
    for at in story.arrivals:
        if 0 <= at < len(per_second):
            per_second[int(at)] += 1
    scale = (rates_bottom - rates_top) / 100
    parts += [text(14, rates_top - 12, "calls in each second", "small faint")]
    parts += [
        bar(x(second) + 0.3, rates_bottom - count * scale, x(1) - x(0) - 0.6, count * scale, "good")
        for second, count in enumerate(per_second)
        if count
    ]
    parts += [f'<circle class="mark" cx="{x(at):.1f}" cy="{rates_bottom - 6}" r="3.5"/>' for at in marks]
    if marks:
        parts.append(text(x(marks[0]), rates_bottom - 18, "probes, each of which fails", "small"))
    most = max(look.waiting for look in story.looks)
    parts += [
        f'<path class="border" d="M{LEFT} {rates_top}H{WIDTH - RIGHT}"/>',
        text(WIDTH - RIGHT, rates_top - 5, "quota", "small limit end"),
        f'<path class="rule" d="M{LEFT} {rates_bottom}H{WIDTH - RIGHT}"/>',
        text(14, users_top - 12, f"users waiting, {most:,} at most", "small faint"),
        path(
            [
                (x(look.at), users_bottom - look.waiting / most * (users_bottom - users_top))
                for look in story.looks
            ],
            "trace",
        ),
        f'<path class="rule" d="M{LEFT} {users_bottom}H{WIDTH - RIGHT}"/>',
        text(14, 282, band, "small faint"),
    ]
    begin = story.looks[0]
    for look, after in zip(story.looks, [*story.looks[1:], None], strict=True):
        if after is None or after.state != begin.state:
            end = after.at if after else look.at
            parts.append(bar(x(begin.at), 290, x(end) - x(begin.at), 14, f"state {begin.state}"))
            begin = after or look
    across = LEFT
    for state in dict.fromkeys(look.state for look in story.looks):
        parts += [bar(across, 314, 11, 11, f"state {state}"), text(across + 16, 324, state, "small faint")]
        across += 34 + 8 * len(state)
    parts.append(text(WIDTH - RIGHT, 324, f"{last:.0f} s", "small faint end"))
    height = 344 + 16 * len(notes)
    for place, (at, words) in enumerate(notes):
        parts.append(text(14, 348 + 16 * place, f"at {at:.1f} s: {words}", "small"))
    style = """
.mark { fill: var(--bad); } .trouble { fill: var(--bad); opacity: .13; } .quiet { fill: var(--limit); opacity: .14; }
.open, .granted { fill: var(--good); } .stopped { fill: var(--bad); } .probing { fill: var(--a); }
.paused { fill: var(--limit); }
"""
    return picture(height, title, parts, style)
