"""Charts as SVG, drawn here: a curve, its scale in words, and the same as a table for people who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup

from worker.operate.status import span

#: Height of the drawing in units; its width is the number of values. It is stretched to fit its place.
HEIGHT = 100.0
#: Rows of the table.
ROWS = 15


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn. `values` are for equal parts of the time up to `end`, each `part` seconds long, the newest last."""

    id: str
    title: str
    values: Sequence[float | None]
    end: float
    part: float
    #: The unit of a value: "calls/s", or "" for a duration.
    unit: str
    #: A horizontal line, such as the quota.
    limit: float | None = None

    @property
    def top(self) -> float:
        """The value at the upper edge: a round number not below any value."""
        most = max([0.0, *(value for value in self.values if value is not None), self.limit or 0.0])
        return _round_up(most) if self.unit else max(1.0, most)

    @property
    def now(self) -> str:
        """The newest value in words. A part that has just begun may have none yet."""
        return next(
            (self.words(value) for value in reversed(self.values[-2:]) if value is not None), "unknown"
        )

    def words(self, value: float | None) -> str:
        if value is None:
            return "unknown"
        if not self.unit:
            return span(value)
        return (
            f"{value:,.0f} {self.unit}" if value >= 10 or value == int(value) else f"{value:.1f} {self.unit}"
        )

    @property
    def label(self) -> str:
        """The chart in a sentence."""
        known = [value for value in self.values if value is not None]
        if not known:
            return f"{self.title}: nothing is known"
        return f"{self.title}: now {self.now}, least {self.words(min(known))}, most {self.words(max(known))}"

    @property
    def table(self) -> list[tuple[float, str]]:
        """The maximum of each of a few equal parts: when the part began, in seconds since 1970, and the words."""
        size = math.ceil(len(self.values) / ROWS)
        start = self.end - len(self.values) * self.part
        rows = []
        for place in range(0, len(self.values), size):
            known = [value for value in self.values[place : place + size] if value is not None]
            rows.append((start + place * self.part, self.words(max(known, default=None))))
        return rows

    @property
    def begin_words(self) -> str:
        begin = datetime.fromtimestamp(self.end - len(self.values) * self.part, UTC)
        return f"{begin:%H:%M}"

    @property
    def svg(self) -> Markup:
        """The drawing. Numbers and our own words only."""
        width = max(1, len(self.values) - 1)
        areas, lines = [], []
        for first, heights in _runs(self.values, self.top):
            points = [f"{first + place:g},{HEIGHT - height:.1f}" for place, height in enumerate(heights)]
            last = first + len(heights) - 1
            if len(points) == 1:
                # A single value would be a point without a size.
                points.append(f"{first + 0.6:g},{HEIGHT - heights[0]:.1f}")
                last = first
            lines.append(f"M{' '.join(points)}")
            areas.append(f"M{first:g},{HEIGHT:g} {' '.join(points)} {max(last, first + 0.6):g},{HEIGHT:g}Z")
        limit = (
            Markup('<path class="limit" d="M0,{y} H{width}"/>').format(
                y=f"{HEIGHT - HEIGHT * self.limit / self.top:.1f}", width=width
            )
            if self.limit
            else ""
        )
        return Markup(
            '<svg class="chart" role="img" aria-label="{label}" viewBox="0 -2 {width} {height}" '
            'preserveAspectRatio="none" focusable="false"><path class="grid" d="M0,0 H{width} M0,50 H{width} M0,100 H{width}"/>'
            '{limit}<path class="area" d="{areas}"/><path class="curve" d="{lines}"/></svg>'
        ).format(
            label=self.label,
            width=width,
            height=f"{HEIGHT + 4:g}",
            limit=limit,
            areas="".join(areas),
            lines="".join(lines),
        )


def _runs(values: Sequence[float | None], top: float) -> Iterator[tuple[int, list[float]]]:
    """Stretches without gaps: where each begins, and its heights."""
    begin, heights = 0, list[float]()
    for place, value in enumerate([*values, None]):
        if value is not None:
            begin = begin if heights else place
            heights.append(HEIGHT * min(1.0, max(0.0, value / top)))
        elif heights:
            yield begin, heights
            heights = []


def _round_up(most: float) -> float:
    """Round up to 1, 2, 2.5 or 5 times a power of ten, at least 1."""
    if most <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= most * 0.999999)
