"""What operating it costs: metrics, and replacing all workers while there is work."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import requests

from tests.bench import APP, ATTRS, Results, cpu, state_of, users
from worker.delivery.answers import Reply
from worker.delivery.meter import Summary
from worker.models import Acked, Batch, BatchId, ClaimedUser
from worker.operate.metrics import WorkerPage
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.sandbox.redis_server import free_port
from worker.state.buffer import Buffer
from worker.state.connection import connect
from worker.state.keys import Keys

#: Seconds that a worker is measured at full rate, and batches that are counted alone.
MEASURED, BATCHES = 20, 3000
#: Users that are pending when workers are replaced: enough for all of it.
BACKLOG = 900_000
#: Seconds between two scrapes; Prometheus' own default is four times as long.
SCRAPE_EVERY = 15


def metrics(results: Results) -> None:
    """What counting costs a worker at full rate: the processor of the counting alone, beside that of the whole worker."""
    port = free_port()
    plan = Plan(
        workers=1, concurrency=16, flower=False, names=tuple(ATTRS), simulator_options=("--no-record",)
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        Sandbox(Path(directory), {"IMATTR_HEALTH_PORT": str(port)}, plan) as sandbox,
    ):
        Producer(sandbox.redis_url, APP).set_many(users(100 * 100 * (MEASURED + 10)))
        time.sleep(3)
        pid, calls = sandbox.pids()["worker-1"], state_of(sandbox)["calls"]
        used, began = cpu(pid), time.monotonic()
        time.sleep(MEASURED)
        used, took = cpu(pid) - used, time.monotonic() - began
        calls = state_of(sandbox)["calls"] - calls
        series = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text.count("\n")
    page = WorkerPage(APP, None)
    counting = _counting(page) / BATCHES
    began = time.process_time()
    for _ in range(50):
        page.render("", leads=True, last_turn=0.0)
    scraping = (time.process_time() - began) / 50 / SCRAPE_EVERY / (calls / took)
    share = (counting + scraping) / (used / calls)
    results.add(
        "metrics of a worker at full rate",
        f"{share:.1%} of its processor: {1e6 * (counting + scraping):.0f} us of {1e6 * used / calls:.0f} us a batch "
        f"({calls / took:.0f} calls/s, {series} lines)",
        "< 2 %",
        share < 0.02,
    )


def _counting(page: WorkerPage) -> float:
    """Seconds of processor that counting `BATCHES` full batches takes."""
    batch = Batch(
        BatchId("b"),
        tuple(ClaimedUser(f"user{n}", ATTRS, 0, 1_000 + 7 * n) for n in range(100)),
        claimed_ms=5_000,
    )
    outcomes = {user.user: Acked() for user in batch.users}
    summary, answer = Summary(batch.id, "delivered", users=100), Reply(0)
    began = time.process_time()
    for _ in range(BATCHES):
        page.meter.waited(0.1)
        page.meter.permit("used")
        page.meter.call("set", answer, 0.05)
        page.meter.settled(batch, outcomes, 0.1)
        page.meter.ended(summary)
    return time.process_time() - began


def rollout(results: Results) -> None:
    """Six workers replaced one by one, by the signal that Kubernetes sends, under a full backlog; then three, then six again."""
    plan = Plan(
        workers=6, concurrency=6, flower=False, names=tuple(ATTRS), simulator_options=("--no-record",)
    )
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), {}, plan) as sandbox:
        Producer(sandbox.redis_url, APP).set_many(users(BACKLOG))
        time.sleep(5)
        watch = _Calls(sandbox)
        steady = watch.during(lambda: time.sleep(10))
        replaced = watch.during(lambda: _replace_all(sandbox))
        scaled = watch.during(lambda: _scale(sandbox))
        with connect(sandbox.redis_url, key=Keys(APP).pending) as client:
            buffer = Buffer(client, Keys(APP))
            while (seen := buffer.snapshot()).pending or seen.in_flight:
                time.sleep(0.5)
            balanced = (
                buffer.snapshot().balanced and seen.ledger["delivered"] == seen.ledger["accepted"] == BACKLOG
            )
        worst = state_of(sandbox)["worst_rolling_second"]
        watch.stop()
    for name, rates in (
        ("steady", steady),
        ("one replaced after another", replaced),
        ("scaled to 3 and to 6", scaled),
    ):
        results.add(
            f"6 workers, {name}",
            f"{statistics.mean(rates):.1f} calls/s, worst 5 s {min(rates):.1f}",
            "told",
            True,
        )
    results.add(
        "after it",
        f"{'nothing lost' if balanced else 'NOT balanced'}, worst second {worst}",
        "nothing lost, <= 100",
        balanced and worst <= 100,
    )


class _Calls:
    """Counts calls at the API, every second."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox, self._seen = sandbox, [(time.monotonic(), state_of(sandbox)["calls"])]
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stopped.wait(1):
            self._seen.append((time.monotonic(), state_of(self._sandbox)["calls"]))

    def stop(self) -> None:
        self._stopped.set()

    def during(self, work: Callable[[], object]) -> list[float]:
        """Calls a second in each five seconds, from the beginning to the end of something."""
        first = len(self._seen) - 1
        work()
        seen = self._seen[first:]
        return [
            (calls - calls_before) / (at - before)
            for (before, calls_before), (at, calls) in zip(seen, seen[5:], strict=False)
        ]


def _end(sandbox: Sandbox, number: int) -> None:
    os.kill(sandbox.pids()[f"worker-{number}"], signal.SIGTERM)
    sandbox.forget(f"worker-{number}")


def _replace_all(sandbox: Sandbox) -> None:
    """As a Deployment does with maxSurge 1: each new one is ready before an old one is told to end."""
    for number in range(1, 7):
        sandbox.start_worker(number + 10)()
        _end(sandbox, number)


def _scale(sandbox: Sandbox) -> None:
    for number in (11, 12, 13):
        _end(sandbox, number)
    time.sleep(5)
    for ready in [sandbox.start_worker(number) for number in (21, 22, 23)]:
        ready()
    time.sleep(5)
