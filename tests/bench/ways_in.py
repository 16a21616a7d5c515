"""The ways in: producers, Celery messages, the stream, files."""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import redis
import requests
from celery import Celery

from tests.bench import APP, ATTRS, Results, p95, server, state_of, users
from worker.clock import SystemClock
from worker.intake.stream import TERM, StreamConsumer
from worker.models import Acked
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.sandbox.processes import Plan, Sandbox
from worker.state.buffer import Buffer, new_batch_id
from worker.state.keys import Keys
from worker.state.refused import Refused


def enqueue(results: Results) -> None:
    """In bulk against Celery's delay(), one by one against the barest script there is."""
    with server() as running:
        client = redis.Redis.from_url(running.url)
        producer = Producer(running.url, APP)
        app = Celery(broker=running.url, set_as_current=False)

        @app.task(name="attributes.update")  # type: ignore[untyped-decorator]  # Celery has no type hints
        def task(user_id: str, attrs: dict[str, str]) -> None: ...

        bare = client.register_script("return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])")
        bulk, delayed, single, script = [], [], [], []
        for round_ in range(5):
            start = time.perf_counter()
            producer.set_many(users(40_000, round_ * 40_000))
            bulk.append(40_000 / (time.perf_counter() - start))
            start = time.perf_counter()
            for user, attrs in users(1000):
                task.delay(user, attrs)
            delayed.append(1000 / (time.perf_counter() - start))
        for round_ in range(20):
            given = list(users(500, 1_000_000 + round_ * 500))
            start = time.perf_counter()
            for user, attrs in given:
                producer.set(user, attrs)
            middle = time.perf_counter()
            for user, _ in given:
                bare(["bare"], [user, "x" * 60])
            single.append(middle - start)
            script.append(time.perf_counter() - middle)
        client.close()
    rate, delay = statistics.median(bulk), statistics.median(delayed)
    results.add("set_many", f"{rate:,.0f} updates/s", ">= 40,000", rate >= 40_000)
    results.add(
        "set_many against delay()", f"{rate / delay:.1f} x ({delay:,.0f}/s)", ">= 20 x", rate >= 20 * delay
    )
    ratio = statistics.median(script) / statistics.median(single)
    each = statistics.median(single) / 500 * 1e6
    results.add("set against a bare EVALSHA", f"{ratio:.2f} ({each:.0f} us)", ">= 0.70", ratio >= 0.7)


def stream(results: Results) -> None:
    """Entries of the stream, from other programs, until they are accepted."""
    count = 100_000
    rates = []
    for _ in range(3):
        with server() as running:
            client = redis.Redis.from_url(running.url)
            keys = Keys(APP)
            producer = Producer(running.url, APP)
            consumer = StreamConsumer(
                client, keys, producer, Refused(client, keys), SystemClock(), worker="bench"
            )
            consumer.turn()
            _fill_stream(client, keys, count)
            start = time.perf_counter()
            while client.xlen(keys.updates):
                consumer.turn()
            rates.append(count / (time.perf_counter() - start))
            client.close()
    rate = statistics.median(rates)
    results.add("stream, entries accepted", f"{rate:,.0f}/s", ">= 15,000", rate >= 15_000)


def ingest(results: Results) -> None:
    """Two workers, three rounds: deliveries alone, and beside a full stream."""
    options = ("--latency", "0.05", "--quota", "0", "--no-record")
    # Two, as a user would have: beside one worker, the second core was idle, and deliveries lost nothing that they lose here.
    plan = Plan(workers=2, concurrency=16, flower=False, simulator_options=options, names=tuple(ATTRS))
    rates: dict[str, list[float]] = {"alone": [], "a full stream": []}
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), {}, plan) as sandbox:
        client, keys = redis.Redis.from_url(sandbox.redis_url), Keys(APP)
        limiter = RateLimiter(client, keys, quota=100, patience=2.0, clock=SystemClock())
        limiter.pause(300, "filling the backlog")
        Producer(sandbox.redis_url, APP).set_many(users(800_000))
        # Somebody else acts, so nobody takes from the stream.
        client.set(keys.consumer, "nobody")
        time.sleep(TERM)
        _fill_stream(client, keys, 200_000)
        client.delete(keys.rate)

        def calls() -> int:
            state = requests.get(f"{sandbox.api_url}/simulator/state", timeout=10).json()
            return int(state["calls"])

        def measure(what: str) -> None:
            time.sleep(TERM + 0.5)
            before, start = calls(), time.monotonic()
            time.sleep(6)
            rates[what].append((calls() - before) / (time.monotonic() - start))

        for _ in range(3):
            measure("alone")
            client.delete(keys.consumer)
            measure("a full stream")
            client.set(keys.consumer, "nobody")
        held = client.zcard(keys.live) and client.xlen(keys.updates)
        client.close()
    alone = statistics.median(rates.pop("alone"))
    for what, beside in rates.items():
        rate = statistics.median(beside)
        results.add(
            f"deliveries beside {what} against alone",
            f"{rate / alone:.2f} ({rate:.1f}/s, {alone:.1f}/s)",
            ">= 0.95, with plenty left",
            rate >= 0.95 * alone and bool(held),
        )


def _fill_stream(client: redis.Redis, keys: Keys, count: int) -> None:
    with client.pipeline(transaction=False) as pipe:
        for user, attrs in users(count):
            pipe.xadd(keys.updates, {"user": user, "attrs": json.dumps(attrs)})
        pipe.execute()


def shadow(results: Results) -> None:
    """Updates of which four in five repeat the value that is there, with and without the shadow."""
    calls = {}
    for ttl in ("900", "0"):
        plan = Plan(workers=1, concurrency=16, flower=False, names=tuple(ATTRS))
        environ = {"IMATTR_SHADOW_TTL": ttl}
        with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), environ, plan) as sandbox:
            producer, client = Producer(sandbox.redis_url, APP), redis.Redis.from_url(sandbox.redis_url)
            buffer = Buffer(client, Keys(APP))
            for round_ in range(6):
                producer.set_many(
                    (user, ATTRS if number % 5 else {**ATTRS, "city": f"city {round_}"})
                    for number, (user, _) in enumerate(users(10_000))
                )
                while buffer.snapshot().pending or buffer.snapshot().in_flight:
                    time.sleep(0.05)
                if round_ == 0:
                    before = state_of(sandbox)["calls"]
            calls[ttl] = state_of(sandbox)["calls"] - before
            client.close()
    share = calls["900"] / calls["0"]
    results.add(
        "calls with the shadow, of those without it, 80 % repeated",
        f"{share:.2f} ({calls['900']} of {calls['0']})",
        "<= 0.3",
        share <= 0.3,
    )
    with server(persistent=False) as running, redis.Redis.from_url(running.url) as client:
        buffer, producer = Buffer(client, Keys(APP)), Producer(running.url, APP)
        before = client.info("memory")["used_memory"]
        producer.set_many(users(200_000))
        for _ in range(2000):
            ticket = new_batch_id()
            client.zadd(Keys(APP).tickets, {ticket: 1})
            buffer.claim(ticket, 100)
            buffer.settle(ticket, {}, rest=Acked())
        each = (client.info("memory")["used_memory"] - before) / 200_000
    results.add("memory a remembered user", f"{each:.0f} bytes", "<= 320", each <= 320)


def backfill(results: Results) -> None:
    """One live update every quarter of a second: in an idle system, and beside 200,000 users of a backfill."""
    plan = Plan(workers=2, concurrency=16, flower=False, names=tuple(ATTRS))
    with tempfile.TemporaryDirectory() as directory, Sandbox(Path(directory), {}, plan) as sandbox:
        producer = Producer(sandbox.redis_url, APP)
        accepted: dict[str, float] = {}

        def live(seconds: int) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                user = f"live{len(accepted):06d}"
                producer.set(user, ATTRS)
                accepted[user] = time.monotonic()
                time.sleep(0.25)

        live(15)
        idle_users = len(accepted)
        producer.set_many(users(200_000), lane="backfill")
        busy_from = time.monotonic()
        live(15)
        busy_until = time.monotonic()
        time.sleep(1)
        record = requests.get(f"{sandbox.api_url}/simulator/record", timeout=120).text.splitlines()
    writes = [(at, request, user) for at, request, user, _ in map(json.loads, record)]
    waits = {user: at - accepted[user] for at, _, user in writes if user in accepted}
    names = list(accepted)
    quiet = p95([waits[user] for user in names[:idle_users]])
    busy = p95([waits[user] for user in names[idle_users:]])
    within = [request for at, request, _ in writes if busy_from + 1 < at < busy_until]
    fill = len(within) / len(set(within))
    rate = len(set(within)) / (busy_until - busy_from - 1)
    results.add(
        "live updates during a backfill, p95",
        f"{busy:.3f} s, idle {quiet:.3f} s",
        "<= 1.5 x idle + a slot",
        busy <= 1.5 * quiet + 0.0102,
    )
    results.add(
        "seats and slots filled during it",
        f"{fill:.1f} users a call, {rate:.1f} calls/s",
        ">= 99, >= 95",
        fill >= 99 and rate >= 95,
    )


def bulk(results: Results) -> None:
    """`imattr import` as a process of its own: rate, and memory of a large file against a small one."""
    with tempfile.TemporaryDirectory() as directory, server() as running:
        environ = {**os.environ, "IMATTR_REDIS_URL": running.url, "IMATTR_SDKAPPID": str(APP)}
        rates, peaks = {}, {}
        for count in (2000, 600_000):
            file = Path(directory) / f"{count}.jsonl"
            with file.open("w") as lines:
                lines.writelines(json.dumps({"user": u, "attrs": a}) + "\n" for u, a in users(count))
            command = [sys.executable, "-c", _IMPORT, "import", "--json", str(file)]
            done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
            summary, peak = done.stdout.splitlines()
            rates[count] = json.loads(summary)["lines_per_second"]
            peaks[count] = int(peak) / 1024
    rate, growth = rates[600_000], peaks[600_000] - peaks[2000]
    results.add("import, JSON lines", f"{rate:,.0f}/s", ">= 25,000", rate >= 25_000)
    results.add("memory of 600,000 lines above that of 2,000", f"{growth:.1f} MB", "<= 8 MB", growth <= 8)


#: Runs the command line, then prints the most memory it had, kB.
_IMPORT = """
import contextlib, re
from pathlib import Path
from worker.cli.main import main
with contextlib.suppress(SystemExit):
    main()
# Not what getrusage says: that begins with the size of the process we were forked from.
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def queue_messages(client: redis.Redis, url: str, task: str, messages: list[list[Any]]) -> None:
    """Messages as a stranger's Celery client makes them, many times faster."""
    stranger = Celery(broker=url, set_as_current=False)
    stranger.send_task(task, [], queue="mould")
    [queued] = client.lrange("mould", 0, 0)
    mould = json.loads(queued)
    client.delete("mould")
    mould["properties"]["delivery_info"]["routing_key"] = "updates"
    with client.pipeline(transaction=False) as pipe:
        for arguments in messages:
            body = json.dumps([arguments, {}, {}]).encode()
            mould["headers"]["id"] = mould["properties"]["correlation_id"] = str(uuid.uuid4())
            mould["properties"]["delivery_tag"] = str(uuid.uuid4())
            pipe.lpush("updates", json.dumps(mould | {"body": base64.b64encode(body).decode()}))
        pipe.execute()
