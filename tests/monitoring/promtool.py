"""Unit tests of rules, as promtool reads them, and promtool itself."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

#: For a test that needs promtool; Debian has it in the package `prometheus`.
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus has it)"
)

#: All alerts that fire, with how many of each: a test of this says that no other does.
FIRING = 'count by (alertname, severity) (ALERTS{alertstate="firing"})'

#: An alert and its severity.
Firing = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Play:
    """Series, and which alerts fire at which moments (seconds). A sample every `interval` seconds, None = no sample."""

    name: str
    interval: int
    series: Mapping[str, Sequence[float | None]]
    firing: Mapping[int, Iterable[Firing]]

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "interval": f"{self.interval}s",
            "input_series": [
                {"series": series, "values": notation(values)} for series, values in self.series.items()
            ],
            "promql_expr_test": [
                {
                    "expr": FIRING,
                    "eval_time": f"{at}s",
                    "exp_samples": [
                        {"labels": f'{{alertname="{alert}",severity="{severity}"}}', "value": 1}
                        for alert, severity in sorted(firing)
                    ],
                }
                for at, firing in self.firing.items()
            ],
        }


def notation(values: Sequence[float | None]) -> str:
    """Samples in promtool's notation, even steps as one word."""
    words: list[str] = []
    at = 0
    while at < len(values):
        first = values[at]
        end = at + 1
        if first is None:
            while end < len(values) and values[end] is None:
                end += 1
            words.append("_" if end - at == 1 else f"_x{end - at}")
        else:
            step = _step(values, at)
            while step is not None and end < len(values) and _step(values, end - 1) == step:
                end += 1
            words.append(_word(first, step or 0.0, end - at))
        at = end
    return " ".join(words)


def _step(values: Sequence[float | None], at: int) -> float | None:
    """By how much the next sample is more, if both are plain numbers."""
    if at + 1 >= len(values):
        return None
    one, other = values[at], values[at + 1]
    if one is None or other is None or not math.isfinite(one) or not math.isfinite(other):
        return None
    return round(other - one, 6)


def _word(first: float, step: float, count: int) -> str:
    if not math.isfinite(first):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(first, "NaN")
    start = f"{first:.15g}"
    if count == 1:
        return start
    return f"{start}x{count - 1}" if not step else f"{start}{step:+.15g}x{count - 1}"


def run_tests(directory: Path, rules: str, plays: Iterable[Play], evaluation: int) -> str:
    """Let promtool try plays on rules; returns what it complains about, empty if nothing."""
    (directory / "rules.json").write_text(rules, encoding="utf-8")
    document = {
        "rule_files": ["rules.json"],
        "evaluation_interval": f"{evaluation}s",
        "tests": [play.document() for play in plays],
    }
    path = directory / "tests.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return promtool("test", "rules", str(path))


def promtool(*arguments: str) -> str:
    """Run promtool; returns what it complains about."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr
