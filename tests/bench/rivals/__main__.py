"""Measures imattr beside what a user would pick instead, and prints one table.

Ends with 1 when imattr is behind on a line for which there is no reason.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.bench import console
from tests.bench.rivals.contestants import CONTESTANTS
from tests.bench.rivals.measure import Scale, measure
from tests.bench.rivals.page import LATEST, RESULTS, show
from tests.bench.rivals.results import PARTS, Report, judge


def main() -> None:
    full = Scale()
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rivals", description=__doc__)
    parser.add_argument("--only", nargs="*", default=(), choices=[it.name for it in CONTESTANTS])
    parser.add_argument("--parts", nargs="*", default=(), choices=list(PARTS), help="what is measured [all]")
    parser.add_argument("--events", type=int, default=full.events, help="events of the job")
    parser.add_argument("--cap", type=float, default=full.cap, help="seconds the job may take")
    parser.add_argument("--rest", type=float, default=full.rest, help="part of the users of the other runs")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="measure nothing: take the figures from there"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="store the figures, and make page and picture"
    )
    given = parser.parse_args()
    # Ended from outside, it ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.read:
        report = Report.read(given.read)
    else:
        scale = Scale(given.events, given.cap, given.rest)
        report = measure(scale, lambda text: console.print(f"  {text}"), given.only, given.parts, file=LATEST)
    for table in show(report):
        console.print(table)
    if given.write_docs:
        report.write(RESULTS)
        # Only here: matplotlib comes with the extra `bench`.
        from tests.bench.rivals import picture

        picture.write()
    sys.exit(0 if all(judgement.holds for judgement in judge(report)) else 1)


if __name__ == "__main__":
    main()
