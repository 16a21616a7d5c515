"""The way out: claiming, pacing, delivering."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis
import requests

from tests.bench import APP, ATTRS, Results, console, cpu, server, users
from tests.simulation import set_at_once
from worker.clock import SystemClock
from worker.delivery.answers import Reply
from worker.delivery.api import ChatApi
from worker.delivery.usersig import Signer
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.sandbox.processes import Plan, Sandbox
from worker.state.keys import Keys


def _greedy(url: str, until: float, queue: Any) -> None:
    limiter = RateLimiter(redis.Redis.from_url(url), Keys(APP), quota=100, patience=2.0, clock=SystemClock())
    sent: list[float] = []

    def take() -> None:
        while time.monotonic() < until:
            permit = limiter.reserve()
            if permit and limiter.redeem(permit):
                sent.append(time.monotonic())

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(sent)


def permits(results: Results) -> None:
    """The limiter alone, with 32 greedy threads in two processes."""
    with server(persistent=False) as running:
        client = redis.Redis.from_url(running.url)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        until = time.monotonic() + 8
        processes = [context.Process(target=_greedy, args=(running.url, until, queue)) for _ in range(2)]
        for process in processes:
            process.start()
        sent = sorted(queue.get(timeout=60) + queue.get(timeout=60))
        for process in processes:
            process.join()
        calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        client.close()
    worst = max(
        sum(first <= other < first + 1 for other in sent[i : i + 300]) for i, first in enumerate(sent)
    )
    rate = (len(sent) - 1) / (sent[-1] - sent[0])
    results.add("Redis calls a permit", f"{calls / len(sent):.2f}", "<= 1.1", calls <= 1.1 * len(sent))
    results.add(
        "permits, 32 greedy threads", f"{rate:.1f}/s, worst second {worst}", "worst <= 100", worst <= 100
    )


def delivery(results: Results) -> None:
    """Three times 20 s from a backlog of 200,000 users, the API at 50 ms, two worker processes."""
    runs = []
    for run in range(3):
        options = ("--latency", "0.05", "--quota", "0", "--no-record")
        plan = Plan(workers=2, concurrency=16, flower=False, simulator_options=options, names=tuple(ATTRS))
        with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), {}, plan) as sandbox:
            client = redis.Redis.from_url(sandbox.redis_url)
            keys = Keys(APP)
            limiter = RateLimiter(client, keys, quota=100, patience=2.0, clock=SystemClock())
            # Nothing is sent while the backlog builds up.
            limiter.pause(300, "filling the backlog")
            Producer(sandbox.redis_url, APP).set_many(users(200_000))
            time.sleep(1)
            client.delete(keys.rate)

            def state(api: str = sandbox.api_url) -> Any:
                return requests.get(f"{api}/simulator/state", timeout=10).json()

            while state()["calls"] < 2:
                time.sleep(0.01)
            pids = [pid for name, pid in sandbox.pids().items() if name.startswith("worker")]
            first, used = state(), sum(map(cpu, pids))
            start = time.monotonic()
            time.sleep(20 - (first["calls"] / 98))
            last, used = state(), sum(map(cpu, pids)) - used
            took = time.monotonic() - start
            client.close()
        calls = last["calls"] - first["calls"]
        runs.append(
            {
                "rate": calls / took,
                "fill": last["users"] / last["applied_requests"],
                "worst": last["worst_rolling_second"],
                "cpu": used / calls * 1000,
            }
        )
        console.print(
            "  run", run + 1, json.dumps({name: round(value, 2) for name, value in runs[-1].items()})
        )
    rate, fill, busy = (statistics.median(run[name] for run in runs) for name in ("rate", "fill", "cpu"))
    worst = max(run["worst"] for run in runs)
    results.add("delivery from a backlog", f"{rate:.2f} calls/s", ">= 97", rate >= 97)
    results.add("fill", f"{fill:.2f} users a call", ">= 99.9", fill >= 99.9)
    results.add("worst rolling second at the API, of all runs", f"{worst}", "<= 100", worst <= 100)
    results.add("worker CPU a batch of 100", f"{busy:.2f} ms", "<= 8 ms", busy <= 8)


def instrument(results: Results) -> None:
    """The simulator itself: it must never be what a measurement measures."""
    options = ("--latency", "0", "--quota", "0")
    plan = Plan(workers=0, flower=False, simulator_options=options, names=tuple(ATTRS))
    environ = {"IMATTR_SECRET_KEY": "k" * 64}
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), environ, plan) as sandbox:
        signer = Signer(lambda: "k" * 64, "administrator", APP)
        client = ChatApi(sandbox.api_url, signer, sdkappid=APP, identifier="administrator")
        body = list(users(100))
        pid, calls = sandbox.pids()["simulator"], 1500
        set_at_once(client, body)
        used = cpu(pid)
        good = sum(set_at_once(client, body) == Reply(0) for _ in range(calls))
        used = cpu(pid) - used
    rate = calls / used
    results.add(
        "simulator, calls of 100 users", f"{rate:,.0f}/s of one core", ">= 500", good == calls and rate >= 500
    )
