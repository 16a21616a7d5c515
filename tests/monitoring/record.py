"""What a scenario's real run has left: the series that the rules use, and which alerts fired. Kept for the tests.

A file of `recorded/` is a play for promtool: it replays the series, a sample a second, on the faster rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.monitoring import rules
from tests.monitoring.promtool import Firing, Play
from tests.monitoring.scenarios import Scenario
from tests.monitoring.server import INTERVAL, Labels, Prometheus

RECORDED = Path(__file__).parent / "recorded"

#: Seconds for which alerts must have been the same around a moment that a test looks at.
STEADY = 4

#: Labels of a target that say nothing to the rules; the ports differ from run to run.
_DROPPED = {"job", "__name__", "instance"}


@dataclass(frozen=True, slots=True)
class Recording:
    """One scenario's run. Times in seconds since its begin."""

    name: str
    what: str
    seconds: int
    #: When what goes wrong began.
    began: int
    expected: frozenset[Firing]
    #: Each alert that fired, with when it did first.
    fired: Mapping[Firing, int]
    #: The play, for promtool.
    document: Mapping[str, Any]

    @property
    def held(self) -> bool:
        return self.expected == self.fired.keys()

    def write(self) -> None:
        """Keep it for the tests: a series a line."""
        RECORDED.mkdir(exist_ok=True)
        about = {
            "scenario": self.name,
            "what": self.what,
            "seconds": self.seconds,
            "began": self.began,
            "expected": sorted(map(list, self.expected)),
            "fired": sorted([*firing, at] for firing, at in self.fired.items()),
        }
        lines = [json.dumps(series) for series in self.document["input_series"]]
        tests = [json.dumps(test) for test in self.document["promql_expr_test"]]
        text = (
            f'{{"about": {json.dumps(about)},\n"play": {{"name": {json.dumps(self.name)}, "interval": "{INTERVAL}s",\n'
            f'"input_series": [\n{_joined(lines)}\n],\n"promql_expr_test": [\n{_joined(tests)}\n]}}}}\n'
        )
        path = RECORDED / f"{re.sub('[^a-z]+', '_', self.name.lower())}.json"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recording:
        found = json.loads(path.read_text(encoding="utf-8"))
        about = found["about"]
        return cls(
            about["scenario"],
            about["what"],
            about["seconds"],
            about["began"],
            frozenset((alert, severity) for alert, severity in about["expected"]),
            {(alert, severity): at for alert, severity, at in about["fired"]},
            found["play"],
        )


def _joined(lines: Iterable[str]) -> str:
    return ",\n".join(lines)


def recordings() -> list[Recording]:
    """All that are kept, in order of their names."""
    return [Recording.read(path) for path in sorted(RECORDED.glob("*.json"))]


def record(
    prometheus: Prometheus, scenario: Scenario, sdkappid: int, begin: float, began: float, end: float
) -> Recording:
    """Ask Prometheus what it has seen of an app."""
    begin, end = float(int(begin)), float(int(end))
    seconds = int(end - begin)
    firing = _firing(prometheus, sdkappid, begin, end)
    fired: dict[Firing, int] = {}
    for at, alerts in firing.items():
        for alert in alerts:
            fired.setdefault(alert, at)
    play = Play(scenario.name, INTERVAL, dict(_series(prometheus, sdkappid, begin, end)), _moments(firing))
    what = (scenario.play.__doc__ or "").strip()
    return Recording(
        scenario.name, what, seconds, int(began - begin), scenario.expected, fired, play.document()
    )


def _firing(prometheus: Prometheus, sdkappid: int, begin: float, end: float) -> dict[int, frozenset[Firing]]:
    """Which alerts fired, at each second."""
    expr = f'ALERTS{{alertstate="firing",sdkappid="{sdkappid}"}}'
    found: dict[int, set[Firing]] = {at: set() for at in range(int(end - begin) + 1)}
    for labels, samples in prometheus.over(expr, begin, end).items():
        named = dict(labels)
        for at in samples:
            found[int(at - begin)].add((named["alertname"], named["severity"]))
    return {at: frozenset(alerts) for at, alerts in found.items()}


def _moments(firing: Mapping[int, frozenset[Firing]]) -> dict[int, frozenset[Firing]]:
    """Moments in the midst of times in which nothing changed, with what fired: the last of each such time."""
    moments: dict[int, frozenset[Firing]] = {}
    for at in firing:
        around = {firing.get(at + step, firing[at]) for step in range(-STEADY, STEADY + 1)}
        changes = firing.get(at + STEADY + 1, None) != firing[at]
        if len(around) == 1 and changes and at >= STEADY:
            moments[at] = firing[at]
    return moments


def _series(
    prometheus: Prometheus, sdkappid: int, begin: float, end: float
) -> Iterator[tuple[str, Sequence[float | None]]]:
    used = [
        (name, held_to)
        for group in rules.read().values()
        for rule in group
        for name, held_to in rules.selectors(rules.faster(rule.expr))
        if not name.startswith("sdkappid:")
    ]
    instances: dict[str, str] = {}
    for name in sorted({name for name, _ in used}):
        found = prometheus.over(f'{name}{{sdkappid="{sdkappid}"}}', begin, end)
        for labels, samples in sorted(found.items()):
            if not any(_fits(labels, held_to) for other, held_to in used if other == name):
                continue
            named = dict(labels)
            part = named["job"].removeprefix("imattr-")
            instance = instances.setdefault(named["instance"], f"{part}-{len(instances) + 1}")
            kept = {label: value for label, value in labels if label not in _DROPPED} | {"instance": instance}
            shown = ",".join(f'{label}="{value}"' for label, value in sorted(kept.items()))
            values = [samples.get(begin + at) for at in range(int(end - begin) + 1)]
            # Prometheus' time is promtool's plus the begin.
            if name.endswith("_timestamp_seconds"):
                values = [round(value - begin, 3) if value else value for value in values]
            yield f"{name}{{{shown}}}", values


def _fits(labels: Labels, held_to: Mapping[str, str]) -> bool:
    named = dict(labels)
    return all(re.fullmatch(pattern, named.get(label, "")) for label, pattern in held_to.items())
