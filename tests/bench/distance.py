"""What it costs if Redis is far away: calls a second of two workers, by round trip and threads."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.bench import APP, ATTRS, Results, server, state_of, users
from tests.chaos.proxy import Proxy
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.sandbox.redis_server import free_port

#: Seconds until all threads have tickets and slots, and seconds that are measured then.
SETTLES, MEASURED = 30, 30
#: Round trip in seconds, threads a worker, least calls a second; 0 = told, not judged.
DISTANCES = ((0.0, 16, 0.0), (0.08, 16, 0.0), (0.08, 32, 0.0), (0.08, 48, 95.0))


def distance(results: Results) -> None:
    """State and broker behind a proxy that delays every answer, a call of 50 ms, from a backlog."""
    for seconds, threads, least in DISTANCES:
        plan = Plan(
            workers=2,
            concurrency=threads,
            flower=False,
            simulator_options=("--latency", "0.05", "--no-record"),
            names=tuple(ATTRS),
        )
        with (
            tempfile.TemporaryDirectory() as directory,
            server() as running,
            Proxy(free_port(), int(running.url.rpartition(":")[2].partition("/")[0])) as proxy,
        ):
            Producer(running.url, APP, timeout=10).set_many(users(100 * 100 * (SETTLES + MEASURED + 10)))
            proxy.tell(f"delay {seconds}")
            url = f"redis://127.0.0.1:{proxy.port}/0"
            with Sandbox(Path(directory), {"IMATTR_REDIS_URL": url}, plan) as sandbox:
                time.sleep(SETTLES)
                before, began = state_of(sandbox), time.monotonic()
                time.sleep(MEASURED)
                after, took = state_of(sandbox), time.monotonic() - began
        rate = (after["calls"] - before["calls"]) / took
        results.add(
            f"Redis {seconds * 1000:.0f} ms away, 2 x {threads} threads",
            f"{rate:.1f} calls/s, worst second {after['worst_rolling_second']}",
            f">= {least:g}, <= 100" if least else "<= 100",
            rate >= least and after["worst_rolling_second"] <= 100,
        )
