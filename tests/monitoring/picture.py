"""Draws the dashboard into `docs/operate/dashboard.svg`, with the data of a real run: `python -m tests.monitoring.picture`.

Not a photograph of Grafana, which is not needed here: the layout is the dashboard's, every curve is what a real Prometheus
answers to the dashboard's own query. Needs matplotlib (`make bench` installs it).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.monitoring import dashboard
from tests.monitoring.dashboard import ROWS, Panel
from tests.monitoring.scenarios import wait
from tests.monitoring.server import Prometheus, prometheus
from tests.monitoring.system import System

PICTURE = Path(__file__).parent.parent.parent / "docs" / "operate" / "dashboard.svg"

#: Seconds between two points, and of the windows of rates.
STEP, WINDOW = 4, "10s"

#: What a query answers: value by time, by the series' names in the legend. Times in seconds since the begin.
Curves = dict[str, list[tuple[float, float]]]
#: The curves of each panel.
Data = dict[str, Curves]


def story(system: System) -> None:
    """A few minutes in which much happens."""
    system.keep_sending(400.0)
    with system.redis() as client:
        system.repeat(
            lambda _, number: client.xadd(
                system.keys.updates, {"user": f"stream{number}", "attrs": '{"level": "Gold"}'}
            )
        )
        wait(30)
        # An import, which fills the quota.
        system.send(800_000, prefix="import", lane="backfill")
        wait(10)
        # A quarter of the quota is somebody else's, for a while.
        system.control("quirks", {"quota": 75})
        wait(30)
        system.control("quirks", {"quota": 100})
        wait(60)
        # The service fails.
        system.control("faults", [{"kind": "status", "code": 502, "times": None}])
        wait(25)
        system.control("faults", [])
        wait(40)
        # A producer sends users who have no account.
        strangers = [f"stranger{number}" for number in range(40)]
        faults = [{"kind": "user_code", "user": user, "code": 70107, "times": None} for user in strangers]
        system.control("quirks", {"bad_user": "list"})
        system.control("faults", faults)
        client.xadd(system.keys.updates, {"user": "refused", "attrs": "no JSON"})
        for user in strangers:
            client.xadd(system.keys.updates, {"user": user, "attrs": '{"level": "Gold"}'})
            wait(0.4)
        system.control("faults", [])
        wait(15)
        # A person.
        system.imattr("pause", "--reason", "maintenance")
        wait(15)
        system.imattr("resume")
        wait(40)


def run(directory: Path) -> Data:
    """Play the story, and ask Prometheus every query of the dashboard."""
    with System(directory / "system", 1_400_000_000, workers=2, concurrency=16, latency=0.05) as system:
        with system.redis() as client:
            client.config_set("maxmemory", 512_000_000)
        with prometheus(directory, system.targets(), factor=1) as server:
            begin = float(int(time.time()) + 8)
            wait(5)
            story(system)
            return {
                f"{row.title} {panel.title} {panel.shape}": _curves(server, panel, begin, time.time())
                for row in ROWS
                for panel in row.panels
            }


def _curves(server: Prometheus, panel: Panel, begin: float, end: float) -> Curves:
    curves: Curves = {}
    for query in panel.queries:
        expr = dashboard.filled_in(query.expr, "1400000000", WINDOW)
        for labels, samples in server.over(expr, begin, end, STEP).items():
            named = dict(labels)
            name = re.sub(r"{{(\w+)}}", lambda found, named=named: named.get(found[1], ""), query.name)  # type: ignore[misc]
            curves[name] = [(at - begin, value) for at, value in sorted(samples.items())]
    return curves


# Drawing.

_INK, _FAINT = "#010203", "#8c959f"
_COLOURS = {"green": "#56a64b", "yellow": "#e0b400", "red": "#e02f44", "blue": "#3274d9"}
_PALETTE = (
    "#3274d9",
    "#e0b400",
    "#56a64b",
    "#fa6400",
    "#8f3bb8",
    "#e02f44",
    "#37872d",
    "#5794f2",
    "#ff9830",
    "#b877d9",
    "#96d98d",
)
_STYLE = (
    "<style>svg{color:#1f2328}@media (prefers-color-scheme:dark){svg{color:#e6edf3}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif!important}</style>"
)  # fmt: skip
CAPTION = "imattr: the panels of docker/grafana/imattr.json, drawn from the dashboard's own queries over a real run. Not by Grafana."
#: Inches of a column and of a row of Grafana's grid.
WIDTH, HEIGHT = 0.58, 0.24


def draw(data: Data) -> str:
    """The SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    document = dashboard.dashboard()["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in document) + 2
    options = {
        "svg.fonttype": "none",
        "svg.hashsalt": "imattr",
        "font.size": 7.5,
        "text.color": _INK,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(options):  # fmt: skip
        figure = Figure(figsize=(24 * WIDTH, rows * HEIGHT))
        figure.patch.set_alpha(0)
        figure.text(0.004, 1 - 0.8 / rows, CAPTION, fontsize=9, color=_INK)
        found = {panel["title"] + panel["type"]: panel for panel in document}
        for row in ROWS:
            at = found[row.title + "row"]["gridPos"]
            figure.text(
                0.004, 1 - (at["y"] + 2.6) / rows, row.title, fontsize=11, fontweight="bold", color=_INK
            )
            for panel in row.panels:
                place = found[panel.title + panel.shape]["gridPos"]
                curves = data[f"{row.title} {panel.title} {panel.shape}"]
                _panel(figure, panel, place, rows, curves, _end(data))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    head, _, rest = buffer.getvalue().replace(_INK, "currentColor").partition("<defs>")
    svg = head[head.index("<svg") :].partition("<metadata>")[0] + _STYLE + "\n<defs>" + rest
    svg = re.sub(r"('[^';\"]+', )+(sans-serif|'sans-serif')", "sans-serif", svg)
    # Tenths of a point are enough for the eye.
    svg = re.sub(
        r"\d+\.\d{2,}",
        lambda found: f"{float(found[0]):.4g}" if float(found[0]) < 1 else f"{float(found[0]):.1f}",
        svg,
    )
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"  # fmt: skip


def _end(data: Data) -> float:
    return max(at for curves in data.values() for points in curves.values() for at, _ in points)


def _panel(
    figure: Any, panel: Panel, place: Mapping[str, int], rows: int, curves: Curves, end: float
) -> None:
    left, width = place["x"] / 24, place["w"] / 24
    bottom, height = 1 - (place["y"] + 2 + place["h"]) / rows, place["h"] / rows
    figure.text(left + 0.006, bottom + height - 1.0 / rows, panel.title, fontsize=8.5, color=_INK)
    if panel.shape == "stat":
        axes = figure.add_axes((left + 0.005, bottom + 0.3 / rows, width - 0.01, height - 1.5 / rows))
        _stat(axes, panel, curves)
        return
    margin = 0.035 if panel.shape == "timeseries" else 0.05
    legend = 1.6 if panel.shape == "timeseries" else 0.2
    axes = figure.add_axes(
        (left + margin, bottom + (0.9 + legend) / rows, width - margin - 0.01, height - (2.3 + legend) / rows)
    )
    axes.set_xlim(0, end)
    axes.tick_params(length=2, colors=_FAINT, labelsize=6.5)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds / 60:.0f} min")
    axes.set_xticks(range(0, int(end) + 1, 60))
    if panel.shape == "state-timeline":
        _timeline(axes, panel, curves)
    else:
        _graph(axes, panel, curves)


def _stat(axes: Any, panel: Panel, curves: Curves) -> None:
    value = next((points[-1][1] for points in curves.values() if points), math.nan)
    if panel.words:
        words, colour = panel.words[value]
    else:
        words = _shown(panel.unit)(value) if math.isfinite(value) else "never"
        reached = [colour for bound, colour in panel.steps if bound is None or value >= bound]
        colour = reached[-1]
    axes.set_facecolor(_COLOURS[colour])
    axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=15, color="white", fontweight="bold")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _timeline(axes: Any, panel: Panel, curves: Curves) -> None:
    names = [name for name in panel.colours if curves.get(name)]
    for row, name in enumerate(reversed(names)):
        for begin, end in _runs([at for at, _ in curves[name]]):
            axes.barh(row, end - begin + STEP, left=begin, height=0.75, color=_COLOURS[panel.colours[name]])
    axes.set_yticks(range(len(names)), list(reversed(names)))


def _runs(times: Sequence[float]) -> list[tuple[float, float]]:
    runs: list[tuple[float, float]] = []
    for at in times:
        if runs and at - runs[-1][1] <= STEP:
            runs[-1] = (runs[-1][0], at)
        else:
            runs.append((at, at))
    return runs


def _graph(axes: Any, panel: Panel, curves: Curves) -> None:
    finite = {
        name: [(at, value) for at, value in points if math.isfinite(value)] for name, points in curves.items()
    }
    # A legend of what is always 0 helps nobody.
    shown = {name: points for name, points in finite.items() if any(value for _, value in points)}
    shown = shown or dict(list(finite.items())[:3])
    colours = {name: _COLOURS.get(colour, colour) for name, colour in panel.colours.items() if name in shown}
    left = [colour for colour in _PALETTE if colour not in colours.values()]
    colours |= dict(zip((name for name in shown if name not in colours), left * 5, strict=False))
    if panel.stacked:
        times = sorted({at for points in shown.values() for at, _ in points})
        values = [[dict(points).get(at, 0.0) for at in times] for points in shown.values()]
        axes.stackplot(
            times,
            values,
            labels=list(shown),
            colors=[colours[name] for name in shown],
            alpha=0.75,
            linewidth=0,
        )
    else:
        for name, points in shown.items():
            # Nothing is drawn where there is nothing.
            for number, piece in enumerate(_pieces(points)):
                axes.plot(
                    *zip(*piece, strict=True),
                    color=colours[name],
                    linewidth=1.1,
                    label="" if number else name,
                    marker="" if len(piece) > 1 else ".",
                )
    axes.yaxis.set_major_formatter(lambda value, _: _shown(panel.unit)(value))
    axes.yaxis.set_major_locator(_ticks(5))
    low, high = axes.get_ylim()
    bottom = low if panel.least is None else panel.least
    axes.set_ylim(bottom, panel.most or max(high * 1.05, bottom + 1e-3))
    axes.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.5)
    if shown:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.1, -0.18), ncols=min(5, len(shown)), fontsize=6.5, frameon=False,
            handlelength=1, columnspacing=0.9, borderpad=0, handletextpad=0.4,
        )  # fmt: skip


def _ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = []
    for point in points:
        if pieces and point[0] - pieces[-1][-1][0] <= STEP:
            pieces[-1].append(point)
        else:
            pieces.append([point])
    return pieces


def _shown(unit: str) -> Callable[[float], str]:
    """How a value of this unit is written."""
    if unit == "percentunit":
        return lambda value: f"{value * 100:.3g} %"
    if unit == "s":
        return lambda value: (
            f"{value / 60:.3g} min"
            if value >= 60
            else f"{value:.2g} s"
            if value >= 1 or not value
            else f"{value * 1000:.3g} ms"
        )
    if unit == "bytes":
        return lambda value: f"{value / 1e6:.3g} MB"
    return lambda value: f"{value / 1000:.3g} k" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the dashboard with the data of a real run.")
    parser.add_argument("--data", type=Path, help="Keep the data there, or draw what is there.")
    asked = parser.parse_args()
    if asked.data and asked.data.exists():
        data: Data = json.loads(asked.data.read_text())
    else:
        with tempfile.TemporaryDirectory() as directory:
            data = run(Path(directory))
        if asked.data:
            asked.data.write_text(json.dumps(data))
    PICTURE.write_text(draw(data), encoding="utf-8")


if __name__ == "__main__":
    main()
