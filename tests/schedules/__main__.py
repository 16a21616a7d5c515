"""Plays schedules, many at a time, and tells what they found: `make schedules`.

One process for each processor, each with a private server. Ends with 1 when a promise is broken, and says
how to see it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

from rich.console import Console
from rich.table import Table

from tests.schedules.pool import results, wire
from tests.schedules.run import Result, run


def retell(seed: int, console: Console) -> bool:
    """Play one schedule, and print every step of it; whether all promises were kept."""
    with wire() as connected:
        result = run(seed, connected, telling=True)
    for line in result.trace:
        console.out(line, highlight=False)
    for violation in result.violations:
        console.out(f"\n{violation}", highlight=False)
    console.out(
        f"\nseed {seed}: digest {result.digest}, {len(result.violations)} violations", highlight=False
    )
    return not result.violations


def summarize(first: int, seeds: int, processes: int, console: Console) -> bool:
    """Play many schedules, and print the totals; whether all promises were kept."""
    began = time.monotonic()
    faults, broken, steps = Counter[str](), list[Result](), Counter[str]()
    for result in results(first, seeds, processes):
        faults += result.faults
        steps["scripts"] += result.scripts
        steps["requests"] += result.requests
        if result.violations:
            broken.append(result)
            console.out(f"seed {result.seed} is broken: {', '.join(v.rule for v in result.violations)}")
    minutes = (time.monotonic() - began) / 60
    table = Table("fault", "times", box=None, header_style="bold", padding=(0, 1))
    for fault, times in sorted(faults.items()):
        table.add_row(fault, f"{times:,}")
    console.print(table)
    for result in sorted(broken, key=lambda result: result.seed)[:5]:
        for violation in result.violations:
            console.out(f"\nseed {result.seed}: {violation}", highlight=False)
        console.out(f"again, step by step: python -m tests.schedules --seed {result.seed}", highlight=False)
    console.out(
        f"\n{seeds:,} schedules, {seeds / minutes:,.0f} a minute with {processes} processes; "
        f"{steps['scripts']:,} scripts, {steps['requests']:,} requests, {faults.total():,} faults; "
        f"{len(broken)} schedules with violations",
        highlight=False,
    )
    return not broken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.schedules", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5000, help="how many schedules")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="only this one, telling every step")
    asked = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if asked.seed is not None:
        good = retell(asked.seed, console)
    else:
        good = summarize(asked.first, asked.seeds, asked.processes, console)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
