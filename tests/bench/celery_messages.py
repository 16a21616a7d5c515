"""Celery's messages on two worker processes: how fast they are taken, what deliveries notice of it, and what a batch costs."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import redis
import requests
from celery import Celery

from tests.bench import APP, ATTRS, Results, console, cpu, p95, state_of, users
from tests.bench.growth import redis_cpu
from tests.bench.ways_in import queue_messages
from tests.chaos.brokers import RabbitMQ, find_rabbitmq
from tests.intake.messages import MALFORMED, encoded
from worker.clock import SystemClock
from worker.intake.celery_queue import TERM
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.sandbox.processes import Plan, Sandbox
from worker.state.keys import Keys

KEYS = Keys(APP)
#: Two workers of 16 threads, the API at 50 ms, which counts and refuses nothing.
OPTIONS = ("--latency", "0.05", "--quota", "0", "--no-record")


class Fleet:
    """Two workers as a user would start them, whose intake is held until it is let go."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.redis = redis.Redis.from_url(sandbox.redis_url)
        self.limiter = RateLimiter(self.redis, KEYS, quota=100, patience=2.0, clock=SystemClock())

    def hold(self) -> None:
        """Somebody else leads, so nobody takes messages."""
        self.redis.set(KEYS.queue_consumer, "nobody")
        time.sleep(TERM + 0.5)

    def backlog(self, count: int) -> None:
        """Have so many users pending before the first of them is sent."""
        self.limiter.pause(300, "filling the backlog")
        Producer(self.sandbox.redis_url, APP).set_many(users(count))
        self.redis.delete(KEYS.rate)
        time.sleep(3)

    def take(self, count: int) -> tuple[float, float, int]:
        """Let them take `count` messages; returns messages a second, calls a second, the worst second."""
        accepted = self.accepted()
        requests.post(f"{self.sandbox.api_url}/simulator/reset-arrivals", data="null", timeout=10)
        self.redis.delete(KEYS.queue_consumer)
        # From the first on: followers look every few seconds.
        while self.accepted() == accepted:
            time.sleep(0.005)
        start, calls = time.monotonic(), state_of(self.sandbox)["calls"]
        while self.accepted() < accepted + count:
            time.sleep(0.05)
        took, state = time.monotonic() - start, state_of(self.sandbox)
        return count / took, (state["calls"] - calls) / took, state["worst_rolling_second"]

    def accepted(self) -> int:
        return int(self.redis.hget(KEYS.ledger, "accepted") or 0)

    def pids(self) -> dict[str, int]:
        return {name: pid for name, pid in self.sandbox.pids().items() if name.startswith("worker")}


@contextlib.contextmanager
def fleet(*, options: Sequence[str] = OPTIONS, include: str = "", **environ: str) -> Iterator[Fleet]:
    plan = Plan(workers=0, concurrency=16, flower=False, names=tuple(ATTRS), simulator_options=options)
    settings = {f"IMATTR_{name}": value for name, value in environ.items()}
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), settings, plan) as sandbox:
        ready = [sandbox.start_worker(number, include=include) for number in (1, 2)]
        for check in ready:
            check()
        running = Fleet(sandbox)
        yield running
        running.redis.close()


def _fill(fleet: Fleet, count: int, start: int) -> None:
    for first in range(start, start + count, 20_000):
        updates = [[*update] for update in users(min(20_000, start + count - first), first)]
        queue_messages(fleet.redis, fleet.sandbox.redis_url, "attributes.update", updates)


def messages(results: Results) -> None:
    """`attributes.update` about different users, from a plain client: with nothing else to do, and beside a backlog."""
    nothing, idle, beside, calls, worst, costs = [], [], [], [], [], []
    for _ in range(3):
        with fleet(include="tests.bench.noop") as running:
            running.hold()
            queue_messages(running.redis, running.sandbox.redis_url, "noop", [["x", {}]] * 5000)
            start = time.monotonic()
            running.redis.rename("updates", "deliveries")
            while running.redis.llen("deliveries") or running.redis.hlen("unacked"):
                time.sleep(0.01)
            nothing.append(5000 / (time.monotonic() - start))
            _fill(running, 100_000, 1_000_000)
            rate, _, _ = running.take(100_000)
            idle.append(rate)
        with fleet() as running:
            running.hold()
            _fill(running, 60_000, 1_000_000)
            running.backlog(150_000)
            rate, called, second = running.take(60_000)
            beside.append(rate)
            calls.append(called)
            worst.append(second)
        costs.append(_cost_of_a_message())
        console.print(
            f"  no-op {nothing[-1]:,.0f}/s, idle {idle[-1]:,.0f}/s, beside a backlog {beside[-1]:,.0f}/s, "
            f"{calls[-1]:.1f} calls/s, {costs[-1] * 1e3:.3f} ms a message"
        )
    rate, ratio = statistics.median(idle), statistics.median(map(lambda a, b: a / b, idle, nothing))
    results.add("messages taken, idle fleet", f"{rate:,.0f}/s", ">= 20,000", rate >= 20_000)
    results.add(
        "the same against tasks that do nothing",
        f"{ratio:.1f} x ({statistics.median(nothing):,.0f}/s)",
        ">= 15 x",
        ratio >= 15,
    )
    rate, called = statistics.median(beside), statistics.median(calls)
    results.add("messages taken beside 150,000 users", f"{rate:,.0f}/s", ">= 10,000", rate >= 10_000)
    results.add(
        "deliveries meanwhile",
        f"{called:.1f} calls/s, worst second {max(worst)}",
        ">= 96, <= 100",
        called >= 96 and max(worst) <= 100,
    )
    cost = statistics.median(costs) * 1e3
    results.add("processor a message, worker and Redis", f"{cost:.3f} ms", "<= 0.05 ms", cost <= 0.05)


def _cost_of_a_message(count: int = 50_000) -> float:
    """Seconds of processor of everything that takes a message, while nothing is sent."""
    with fleet() as running:
        running.redis.hset(KEYS.line, mapping={"state": "paused", "reason": "measuring", "since": 1})
        running.hold()
        _fill(running, count, 1_000_000)
        takers = [child for pid in running.pids().values() for child in _children(pid)]
        used = redis_cpu(running.redis) + sum(map(cpu, takers))
        running.take(count)
        return (redis_cpu(running.redis) + sum(map(cpu, takers)) - used) / count


def _children(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def rabbitmq(results: Results) -> None:
    """The same with RabbitMQ as the broker, if it is installed."""
    if find_rabbitmq() is None:
        console.print("  RabbitMQ is not installed")
        return
    count, directory = 30_000, tempfile.mkdtemp()
    broker = RabbitMQ(Path(directory) / "rabbit")
    try:
        with fleet(BROKER_URL=broker.url) as running:
            running.hold()
            stranger = Celery(broker=broker.url, set_as_current=False)
            with stranger.producer_pool.acquire() as producer:
                for update in users(count, 1_000_000):
                    stranger.send_task("attributes.update", update, queue="updates", producer=producer)
            running.backlog(150_000)
            rate, calls, worst = running.take(count)
    finally:
        broker.stop()
    results.add(
        "messages taken from RabbitMQ beside 150,000 users", f"{rate:,.0f}/s", ">= 3,000", rate >= 3000
    )
    results.add(
        "deliveries meanwhile, RabbitMQ",
        f"{calls:.1f} calls/s, worst second {worst}",
        ">= 95, <= 100",
        calls >= 95 and worst <= 100,
    )


def batch(results: Results) -> None:
    """What a batch of 100 costs at full rate, and twice the quota on the same two cores."""
    with fleet() as running:
        running.backlog(300_000)
        before = _used(running)
        time.sleep(15)
        calls, worker, state, commands = (
            now - then for now, then in zip(_used(running), before, strict=True)
        )
        sent = _sent_by_clients(running, 3.0)
    worker, state = worker / calls * 1e3, state / calls * 1e3
    results.add("worker processor a batch of 100", f"{worker:.2f} ms", "<= 3.3 ms", worker <= 3.3)
    results.add("Redis processor a batch of 100", f"{state:.2f} ms", "<= 1.3 ms", state <= 1.3)
    results.add(
        "Redis commands a batch, sent by clients",
        f"{sent:.1f} ({commands / calls:.0f} with those of scripts)",
        "<= 15",
        sent <= 15,
    )
    with fleet(QUOTA="200") as running:
        running.backlog(300_000)
        requests.post(f"{running.sandbox.api_url}/simulator/reset-arrivals", data="null", timeout=10)
        first, start = state_of(running.sandbox)["calls"], time.monotonic()
        time.sleep(12)
        state_now = state_of(running.sandbox)
        rate = (state_now["calls"] - first) / (time.monotonic() - start)
        worst = state_now["worst_rolling_second"]
    results.add(
        "quota 200, the same two workers",
        f"{rate:.1f} calls/s, worst second {worst}",
        ">= 190, <= 200",
        rate >= 190 and worst <= 200,
    )


def _used(fleet: Fleet) -> tuple[int, float, float, int]:
    """Calls made; processor seconds of the workers, and of Redis; commands that Redis has carried out."""
    return (
        state_of(fleet.sandbox)["calls"],
        sum(map(cpu, fleet.pids().values())),
        redis_cpu(fleet.redis),
        int(fleet.redis.info("stats")["total_commands_processed"]),
    )


def _sent_by_clients(fleet: Fleet, seconds: float) -> float:
    """Commands a call, without those of scripts, as MONITOR sees them."""
    calls, commands = state_of(fleet.sandbox)["calls"], 0
    until = time.monotonic() + seconds
    with redis.Redis.from_url(fleet.sandbox.redis_url) as watching, watching.monitor() as monitor:
        while time.monotonic() < until:
            commands += monitor.next_command()["client_type"] != "lua"
    return commands / int(state_of(fleet.sandbox)["calls"] - calls)


def first(results: Results) -> None:
    """One update after a quiet time until it is applied, the API at 0 ms; and the calls that a trickle costs."""
    with fleet(options=("--latency", "0")) as running:
        producer, accepted = Producer(running.sandbox.redis_url, APP), {}
        for user, attrs in users(60):
            producer.set(user, attrs)
            accepted[user] = time.monotonic()
            time.sleep(0.4)
        time.sleep(0.5)
        record = requests.get(f"{running.sandbox.api_url}/simulator/record", timeout=10).text.splitlines()
        waits = [at - accepted[user] for at, _, user, _ in map(json.loads, record)]
        calls, start = state_of(running.sandbox)["calls"], time.monotonic()
        for number, (user, attrs) in enumerate(users(1000, 1000)):
            time.sleep(max(0.0, start + number / 100 - time.monotonic()))
            producer.set(user, attrs)
        time.sleep(0.5)
        calls = state_of(running.sandbox)["calls"] - calls
    half, most = statistics.median(waits), p95(waits)
    results.add(
        "idle, accepted to applied",
        f"p50 {half:.3f} s, p95 {most:.3f} s",
        "<= 0.04, <= 0.1",
        half <= 0.04 and most <= 0.1,
    )
    # Those who linger always would make a call each 0.25 s.
    results.add("calls for 10 s of 100 users a second", f"{calls}", "<= 41", calls <= 41)


def malformed(results: Results) -> None:
    """Every kind of malformed message, each with a good one behind it."""
    with fleet() as running:
        stranger = Celery(broker=running.sandbox.redis_url, set_as_current=False)
        for number, message in enumerate(MALFORMED.values()):
            running.redis.lpush("updates", message if isinstance(message, bytes) else encoded(message))
            stranger.send_task("attributes.update", [f"good{number}", ATTRS], queue="updates")
        until = time.monotonic() + 20
        while running.accepted() < len(MALFORMED) and time.monotonic() < until:
            time.sleep(0.1)
        kept, good = running.redis.xlen(KEYS.refused), running.accepted()
        alive = sum(Path(f"/proc/{pid}").exists() for pid in running.pids().values())
    results.add(
        f"{len(MALFORMED)} kinds of malformed messages",
        f"{2 - alive} workers ended, {kept} kept, {good} good ones accepted",
        "0 ended, all kept",
        alive == 2 and kept == good == len(MALFORMED),
    )
