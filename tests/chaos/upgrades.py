"""Upgrades a fleet of the version before, worker by worker, under a full load of writers, and downgrades it again.

One of the writers is of the version before, the others are of this one: each writes to workers of both. In the end one worker is
upgraded once more, because messages with a countdown that this version has taken wait for it. Once with each broker.

python -m tests.chaos.upgrades
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path

import redis
from rich.console import Console

from tests.chaos.__main__ import by_answer, judge, previous_version, settle
from tests.chaos.brokers import find_rabbitmq
from tests.chaos.system import System, running
from tests.history import worst_second

#: Workers, and seconds between two of them, and in the middle, when all are of one version.
WORKERS, EACH, BETWEEN = 3, 4.0, 6.0

#: Calls a second that the API allows.
QUOTA = 100

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def replace(system: System, number: int) -> None:
    """End a worker in order; another one comes in its place, of the version that `system.old` says."""
    name = f"worker-{number}"
    pid = system.workers()[name]
    system.end_workers({name})
    while system.workers().get(name, pid) == pid:
        work(system, 0.2)
    work(system, EACH)


def work(system: System, seconds: float) -> None:
    """Let everything go on, a person reopening a line that is stopped included."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(redis.RedisError):
            system.turn()
        time.sleep(0.1)


def run(directory: Path, seed: int, workers: int = WORKERS, *, rabbitmq: bool = False) -> bool | None:
    """Upgrade and downgrade, and print the verdict: whether all promises held. None if the version before is not to be had."""
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(previous_version(directory / "previous"))
        if before is None:
            return None
        numbers = range(workers)
        system = stack.enter_context(
            running(
                directory,
                seed,
                workers=workers - 1,
                previous=before,
                old=numbers,
                old_ways={"set"},
                rabbitmq=rabbitmq,
            )
        )
        console.print(f"{'RabbitMQ' if rabbitmq else 'Redis'}; {workers} workers of the version before")
        work(system, BETWEEN)
        for number in numbers:
            system.old.discard(number)
            replace(system, number)
        console.print("upgraded, one after the other")
        work(system, BETWEEN)
        for number in numbers:
            system.old.add(number)
            replace(system, number)
        console.print("downgraded, one after the other")
        work(system, BETWEEN)
        system.old.discard(0)
        replace(system, 0)
        settled = settle(system)
        seen, found = judge(system)
        # On a machine that has just stood still, workers of 0.1 may let a call or two more arrive in a second.
        if worst_second(seen.calls) <= QUOTA + 2:
            found = [violation for violation in found if violation.rule != "quota"]
        for violation in found[:5]:
            console.print(f"\n{violation}", markup=False)
        console.print(
            f"{by_answer(seen)}; {len(seen.applied):,} writes in {len(seen.calls):,} calls, worst second "
            f"{worst_second(seen.calls)}; {len(found)} violations at {len(seen.ledgers):,} looks at the ledger, "
            f"{'everything' if settled else 'NOT everything'} delivered, {system.hung} workers hung"
        )
        return settled and not found and not system.hung


def main() -> None:
    # Whoever ends us early wants everything that we started to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    good = True
    for rabbitmq in (False, True) if find_rabbitmq() else (False,):
        with tempfile.TemporaryDirectory() as directory:
            held = run(Path(directory), seed=18, rabbitmq=rabbitmq)
        if held is None:
            sys.exit("the version before is not in this repository's history")
        good = good and held
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
