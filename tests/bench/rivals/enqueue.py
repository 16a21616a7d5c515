"""Enqueues a file of events, one JSON array [user, attributes, ms] a line, and prints the seconds it took.

python -m tests.bench.rivals.enqueue MODULE FILE [wait]

With `wait`, it begins when a line comes on its standard input, so that several can begin at once.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path


def main(module: str, file: str, wait: str = "") -> None:
    contestant = importlib.import_module(module)
    events = [tuple(json.loads(line)) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    if wait:
        print("ready", flush=True)
        sys.stdin.readline()
    start = time.perf_counter()
    contestant.enqueue(events)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
