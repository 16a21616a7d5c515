"""The parts of `docs/operate/monitoring.md` that come from elsewhere: the catalogue, and the last `make alerts`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from tests.monitoring.record import recordings
from tests.monitoring.rules import FACTOR
from worker.operate.metric_catalog import FLEET, WORKER, Metric

PAGE = Path(__file__).parent.parent.parent / "docs" / "operate" / "monitoring.md"


def played() -> str:
    """What fired in each scenario, with the rules' time in which it did."""
    lines = ["| scenario | | fired, and after how long |", "|---|---|---|"]
    for one in recordings():
        fired = "<br>".join(
            f"{alert}, {severity}: {_minutes((at - one.began) * FACTOR)}"
            for (alert, severity), at in sorted(one.fired.items(), key=lambda item: item[1])
        )
        lines.append(f"| {one.name} | {one.what} | {fired or 'nothing'} |")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def series() -> str:
    """How many series there are at most."""
    fleet, worker = _series(FLEET), _series(WORKER)
    at_start = _series(metric for metric in WORKER if "code" not in metric.label_names)
    apart = worker - at_start
    return (
        f"An app has {fleet} from the exporter, and each worker has {at_start}; a series with an error code begins with the first\n"
        f"error of that code ({apart} more if every code there is had come up)."
    )


def _series(metrics: Iterable[Metric]) -> int:
    return sum(
        math.prod(len(values) or 1 for _, values in metric.labels)
        * (len(metric.bounds) + 3 if metric.kind == "histogram" else 1)
        for metric in metrics
    )


def monitoring() -> str:
    """The page, with those parts as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in (("played", played()), ("series", series())):
        pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda _, part=part: f"{part}\n", text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, name
    return text
