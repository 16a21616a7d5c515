"""The picture of `docs/`, drawn from the stored results: the same file each time, for light and dark pages.

python -m tests.bench.rivals.picture
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tests.bench.rivals import page
from tests.bench.rivals.contestants import CONTESTANTS
from tests.bench.rivals.results import CEILING, OURS, Report

PICTURE = page.RESULTS.with_suffix(".svg")

#: The ink is replaced by the page's own colour of text, so that it can be read on light and dark.
_INK = "#010203"
_OURS, _OTHERS, _LIMIT = "#1a7f64", "#8c959f", "#d1572f"
_STYLE = (
    "<style>svg{color:#1f2328}@media (prefers-color-scheme:dark){svg{color:#e6edf3}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif!important}</style>"
)


def draw(report: Report) -> str:
    """The SVG."""
    options = {"svg.fonttype": "none", "svg.hashsalt": "imattr", "font.size": 11, "text.color": _INK}
    with matplotlib.rc_context(options):
        measured = {
            name: (figures.kill, figures.job)
            for name, figures in report.figures.items()
            if figures.kill and figures.job
        }
        present = [it for it in reversed(CONTESTANTS) if it.name in measured]
        figure = Figure(figsize=(10, 0.9 + 0.55 * len(present)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        titles = [textwrap.fill(it.title, 18) for it in present]
        colours = [_OURS if it.name == OURS else _OTHERS for it in present]
        rates = [measured[it.name][0].users_per_second for it in present]
        worst = [measured[it.name][1].worst for it in present]
        quota = report.setup["quota"]
        _bars(left, titles, rates, colours, CEILING, "users delivered a second", "the quota's ceiling")
        _bars(right, titles, worst, colours, quota, "calls in the worst rolling second", "the quota")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, _, rest = buffer.getvalue().replace(_INK, "currentColor").partition("<defs>")
    # Without what a browser does not need, and trailing blanks.
    svg = head[head.index("<svg") :].partition("<metadata>")[0] + _STYLE + "\n<defs>" + rest
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def _bars(
    axes: Any,
    titles: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    limit: float,
    title: str,
    what: str,
) -> None:
    """One panel: horizontal bars with their values, and the limit as a line."""
    furthest = max(*values, limit)
    axes.barh(titles, values, color=colours, height=0.62)
    axes.axvline(limit, color=_LIMIT, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.text(limit, len(titles) - 0.42, what, color=_LIMIT, ha="right", va="bottom", fontsize=9.5)
    for row, value in enumerate(values):
        # A long bar has its value inside.
        inside = value > 0.8 * furthest
        axes.text(
            value + (-0.012 if inside else 0.012) * furthest,
            row,
            f"{value:,.0f}",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else _INK,
        )
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=18)
    axes.set_xlim(0, furthest * 1.02)
    axes.set_ylim(-0.5, len(titles) - 0.3)
    axes.tick_params(length=0, colors=_INK)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_OTHERS)


def write() -> None:
    """Write page and picture from the stored results."""
    page.write()
    PICTURE.write_text(draw(Report.read(page.RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    write()
