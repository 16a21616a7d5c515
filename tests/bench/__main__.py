"""Runs the parts named on the command line, or all."""

from __future__ import annotations

import sys

from tests.bench import (
    Results,
    celery_messages,
    console,
    distance,
    growth,
    monitoring,
    network,
    operators,
    plans,
    ways_in,
    ways_out,
)
from tests.bench.rivals.page import rivals

_CELERY = (
    celery_messages.messages,
    celery_messages.rabbitmq,
    celery_messages.batch,
    celery_messages.first,
    celery_messages.malformed,
)
_IN = (ways_in.enqueue, ways_in.stream, ways_in.ingest, ways_in.bulk, ways_in.shadow)
_OUT = (ways_out.permits, ways_out.delivery, ways_in.backfill, ways_out.instrument, network.network)
_GROWTH = (growth.growth, growth.workers, growth.rolling, growth.latency, distance.distance)
_SEEN = (monitoring.metrics, monitoring.cardinality, operators.console, plans.plan)
PARTS = {part.__name__: part for part in (*_CELERY, *_IN, *_OUT, *_GROWTH, *_SEEN, rivals)}


def main() -> None:
    results = Results()
    for name in sys.argv[1:] or PARTS:
        console.print(f"[bold]{name}[/]: {PARTS[name].__doc__}")
        PARTS[name](results)
    console.print(results.table)
    sys.exit(0 if results.held else 1)


if __name__ == "__main__":
    main()
