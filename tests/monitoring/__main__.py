"""Plays everything that can go wrong on real systems, under a real Prometheus, and shows which alerts fire: `make alerts`.

Each scenario must have its own alerts, and no other. `--record` keeps the series for the tests.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.monitoring import rules
from tests.monitoring.promtool import Firing
from tests.monitoring.record import Recording, record
from tests.monitoring.scenarios import GROUPS, Scenario, wait
from tests.monitoring.server import prometheus
from tests.monitoring.system import System

FIRST_APP = 1_400_000_001

console = Console(width=150)


def play_group(directory: Path, scenarios: Sequence[Scenario], first_app: int) -> list[Recording]:
    """Play scenarios side by side, each with an app of its own, under one Prometheus."""
    with ExitStack() as stack, ThreadPoolExecutor(len(scenarios)) as pool:
        systems = [
            System(directory / f"{app}", app, settings=scenario.settings, **dict(scenario.system))  # type: ignore[arg-type]
            for app, scenario in enumerate(scenarios, first_app)
        ]
        # Two at a time: each starts four processes.
        with ThreadPoolExecutor(2) as starters:
            list(starters.map(stack.enter_context, systems))
        targets: dict[str, list[str]] = {}
        for system, scenario in zip(systems, scenarios, strict=True):
            for job, found in system.targets(workers=scenario.scraped).items():
                targets.setdefault(job, []).extend(found)
        server = stack.enter_context(prometheus(directory, targets))
        begin = time.time() + 1

        def played(system: System, scenario: Scenario) -> tuple[float, float]:
            system.keep_sending(scenario.traffic)
            wait(scenario.calm)
            began = time.time()
            scenario.play(system)
            return began, time.time()

        times = list(pool.map(played, systems, scenarios))
        texts = server.broken_alerts()
        assert not texts, texts
        return [
            record(server, scenario, system.sdkappid, begin, began, end)
            for system, scenario, (began, end) in zip(systems, scenarios, times, strict=True)
        ]


def shown(firing: Sequence[Firing]) -> str:
    return ", ".join(f"{alert} ({severity})" for alert, severity in sorted(firing)) or "none"


def table(recordings: Sequence[Recording]) -> Table:
    found = Table(
        "", "scenario", "fired, and after how many seconds", "and should not have", "should have", box=None
    )
    for one in recordings:
        mark = Text("✓", "green") if one.held else Text("✗", "bold red")
        fired = ", ".join(
            f"{alert} ({severity}) {at - one.began}" for (alert, severity), at in sorted(one.fired.items())
        )
        wrong, missing = one.fired.keys() - one.expected, one.expected - one.fired.keys()
        found.add_row(
            mark,
            one.name,
            fired or "none",
            shown([*wrong]) if wrong else "",
            shown([*missing]) if missing else "",
        )
    return found  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Play what can go wrong, and see which alerts fire.")
    parser.add_argument(
        "--only",
        default="",
        help="Only scenarios whose name has one of these texts, with commas between them.",
    )
    parser.add_argument("--record", action="store_true", help="Keep the series for the tests.")
    parser.add_argument("--keep", type=Path, help="A directory for logs and data.")
    asked = parser.parse_args()
    # Ended from outside, it ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = asked.only.split(",")
    groups = [[one for one in group if any(text in one.name for text in wanted)] for group in GROUPS]
    found: list[Recording] = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, group in enumerate(filter(None, groups)):
            console.print(f"{', '.join(one.name for one in group)} ...")
            directory = (asked.keep or Path(temporary)) / f"{number}"
            directory.mkdir(parents=True)
            recordings = play_group(directory, group, FIRST_APP + 10 * number)
            console.print(table(recordings))
            found += recordings
            for recording in recordings if asked.record else []:
                recording.write()
    console.print(f"\neverything {rules.FACTOR} times as fast: 10 s are two minutes for the rules")
    console.print(table(found))
    sys.exit(0 if all(recording.held for recording in found) else 1)


if __name__ == "__main__":
    main()
