"""What watching it costs: the processor that metrics take, and how many there are."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import requests

from tests.bench import APP, ATTRS, Results, cpu, state_of, users
from worker.config import Settings
from worker.delivery.answers import Reply
from worker.delivery.meter import Summary
from worker.models import Acked, Batch, BatchId, ClaimedUser
from worker.operate import exporter
from worker.operate.metrics import WorkerPage
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.sandbox.redis_server import free_port
from worker.state.buffer import Buffer
from worker.state.connection import connect
from worker.state.keys import Keys

#: Seconds that a worker is measured at full rate, and batches that are counted alone.
MEASURED, BATCHES = 20, 3000
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


def cardinality(results: Results) -> None:
    """How many series there are, before and after a million users have been delivered."""
    count, port = 1_000_000, free_port()
    environ = {"IMATTR_HEALTH_PORT": str(port)}
    plan = Plan(
        workers=1, concurrency=32, flower=False, names=tuple(ATTRS), simulator_options=("--no-record",)
    )
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), environ, plan) as sandbox:
        settings = Settings.from_env(environ, "producer")
        with connect(sandbox.redis_url, key=Keys(APP).pending) as redis:
            fleet = exporter.pages(redis, settings)["/metrics"]

            def series() -> tuple[int, int]:
                worker = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
                return tuple(  # type: ignore[return-value]
                    sum(not line.startswith("#") for line in text.splitlines())
                    for text in (worker, fleet("").body.decode())
                )

            producer, buffer = Producer(sandbox.redis_url, APP), Buffer(redis, Keys(APP))
            producer.set_many(users(100))
            while buffer.snapshot().ledger["delivered"] < 100:
                time.sleep(0.1)
            before = series()
            producer.set_many(users(count, 100))
            while buffer.snapshot().ledger["delivered"] < count:
                time.sleep(0.5)
            after = series()
    results.add(
        "series of a worker, and of the exporter",
        f"{after[0]} and {after[1]} after {count:,} users; {before[0]} and {before[1]} after 100",
        "the same",
        after == before,
    )
