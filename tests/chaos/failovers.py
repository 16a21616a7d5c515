"""Fails over again and again under a full load of writers, and tells how long deliveries stopped and what was lost.

python -m tests.chaos.failovers --redis sentinel --replicas 1
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import redis
from rich.console import Console
from rich.table import Table

from tests.chaos.__main__ import by_answer, judge, settle
from tests.chaos.faults import FLEET, NOTHING, Fault, Struck
from tests.chaos.system import SETTINGS, Store, System, running
from tests.history import worst_second
from worker.state.connection import connect
from worker.state.scripts import number, text

#: Seconds within which deliveries should go on.
USUAL = 5.0
#: Seconds of undisturbed work before each failover, and that mending one may take.
WORK, PATIENCE = 2.0, 60.0

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def fail_over(system: System, times: int, faults: list[Fault]) -> dict[tuple[str, str], list[float]]:
    """Let every kind of fault strike in turn.

    Returns seconds from when the new primary was there to the first batch claimed on it, by kind of fault, and by what else
    there is to say of it.
    """
    seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    done = 0
    # Some faults do not strike everywhere.
    for fault in itertools.islice(itertools.cycle(faults), times * len(faults)):
        if done == times:
            break
        _work(system, WORK)
        watch, before = _Watch(system), len(system.promotions)
        struck = fault(system)
        if struck is NOTHING:
            continue
        done += 1
        there = system.promotions[-1].at if len(system.promotions) > before else time.monotonic()
        waited = watch.until_next_claim(there)
        words = ", it was behind" if watch.behind else ""
        # By itself: Sentinel took the new primary for dead as well.
        words += ", and another followed" if watch.servers > 1 else ""
        seconds[fault.__name__, words].append(waited)
        console.print(f"{done:3}  {fault.__name__:28} deliveries go on after {waited:4.1f} s{words}")
        # Beyond the usual, it is worth knowing what was waited for.
        if waited > USUAL:
            console.print(f"     held since the new primary was there: {watch.held(there)}")
        _work(system, struck.seconds)
        _mend(struck)
    assert done == times, "none of these faults strikes there"
    return seconds


def _work(system: System, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(redis.RedisError):
            system.turn()
        time.sleep(0.1)


class _Watch:
    """Looks on, from before a failover, until deliveries go on after it."""

    def __init__(self, system: System) -> None:
        self._system = system
        #: When each reason for which the fleet was held was first seen.
        self._reasons: list[tuple[float, str]] = []
        self._before, _, _, _ = self._look()
        self._next_claim = 0.0
        self.behind = False
        #: How many servers have taken over.
        self.servers = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _look(self) -> tuple[bytes, int, int, int]:
        key, fields = self._system.keys.server, ("id", "claims", "gap_to", "behind")
        with connect(self._system.fleet.url, key=key, timeout=1, connect_timeout=1) as client:
            id, *others = client.hmget(key, fields)
            rate = self._system.keys.rate
            reason = client.hget(rate, "reason")
        words = text(reason or b"?")
        if not self._reasons or self._reasons[-1][1] != words:
            self._reasons.append((time.monotonic(), words))
        return (id, *map(number, others))

    def _run(self) -> None:
        deadline, last = time.monotonic() + PATIENCE, self._before
        while not self._next_claim and time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError):
                id, claims, gap, behind = self._look()
                if id != last:
                    last, self.servers = id, self.servers + 1
                if id != self._before:
                    self.behind = self.behind or bool(behind)
                    # The numbers in the gap are those that another server may have given.
                    if claims > gap:
                        self._next_claim = time.monotonic()
            time.sleep(0.02)

    def held(self, there: float) -> str:
        """Why the fleet was held, and from when on."""
        return "; ".join(f"{at - there:.1f} s: {reason}" for at, reason in self._reasons[1:])

    def until_next_claim(self, there: float) -> float:
        """Seconds from when the new primary was there."""
        self._thread.join()
        assert self._next_claim, "deliveries did not go on"
        return max(0.0, self._next_claim - there)


def _mend(struck: Struck) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            struck.mend()
        except redis.RedisError:
            assert time.monotonic() < deadline, "the fleet did not recover"
            time.sleep(0.5)
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.failovers", description=__doc__)
    parser.add_argument("--times", type=int, default=30, help="how many failovers [30]")
    parser.add_argument("--redis", choices=["sentinel", "cluster"], default="sentinel", help="[sentinel]")
    parser.add_argument("--replicas", type=int, default=0, help="IMATTR_REPLICAS [0]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="FAULT", help="these kinds only")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep logs and notes there")
    options = parser.parse_args()
    faults = [fault for fault in FLEET if not options.only or fault.__name__ in options.only]
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        good = run(directory, options.seed, options.redis, options.replicas, options.times, faults)
    sys.exit(0 if good else 1)


def run(directory: Path, seed: int, store: Store, replicas: int, times: int, faults: list[Fault]) -> bool:
    """Whether everything held."""
    console.print(f"Redis: {store}, IMATTR_REPLICAS={replicas}")
    with running(directory, seed, workers=2, store=store, replicas=replicas, settings=SETTINGS) as system:
        seconds = fail_over(system, times, faults)
        settled = settle(system)
        seen, found = judge(system)
        told = system.buffer.snapshot()
    table = Table(
        "what happened", "times", "median", "worst", box=None, header_style="bold", padding=(0, 2, 0, 0)
    )
    for (name, words), waits in sorted(seconds.items()):
        words = name.replace("_", " ") + words
        table.add_row(words, f"{len(waits)}", f"{statistics.median(waits):.1f} s", f"{max(waits):.1f} s")
    console.print(table)
    lost = sum(promotion.lost or 0 for promotion in system.promotions)
    console.print(f"updates: {len(seen.offers):,} attributes offered: {by_answer(seen)}")
    console.print(
        f"lost with servers, by their counters: {lost:,}; told by imattr status: {told.lost_with_servers:,}"
    )
    console.print(f"worst rolling second: {worst_second(seen.calls)} calls; balanced: {told.balanced}")
    for violation in found:
        console.out(f"✗ {violation}", style="red", highlight=False)
    good = settled and not found and told.balanced
    console.print(
        "[green]✓[/] every promise was kept" if good else "[red]✗[/] broken, or not all was delivered"
    )
    return good


if __name__ == "__main__":
    main()
