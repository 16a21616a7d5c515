"""Comparing a whole file with the API, beside deliveries at the full rate."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import requests

from tests.bench import APP, ATTRS, Results, console
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.state.buffer import Buffer
from worker.state.keys import Keys

#: Users of the file; `PLAN_USERS=20000 make bench PARTS=plan` takes a minute.
USERS = int(os.environ.get("PLAN_USERS", "1000000"))
#: Calls a second for reads alone; 0 = they share the quota of deliveries.
READ_QUOTA = os.environ.get("PLAN_READ_QUOTA", "100")
#: Differences that are planted in it.
DIFFERENCES = min(1000, USERS // 20)
#: Seconds for which deliveries are measured alone.
ALONE = 20
#: Other users, who are delivered meanwhile, and how many of them wait at any time.
OTHERS, WAITING = 300_000, 40_000
#: Megabytes that a plan may take, whatever the size of the file.
MOST_MEMORY = 200


@dataclass
class Ended:
    """A command of ours that has ended; `memory` in MB at its highest."""

    output: Any
    seconds: float
    memory: float


def _imattr(environ: dict[str, str], directory: Path, *arguments: str) -> Ended:
    start = time.monotonic()
    # An operator's machine is not the workers': here it must not take the processor from them.
    command = ["nice", "-n", "10", sys.executable, "-m", "worker.cli", *arguments, "--json"]
    with open(directory / "output", "w+") as output:
        process = subprocess.Popen(
            command, env=os.environ | environ, stdout=output, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (directory / "output").read_text()
        output.seek(0)
        return Ended(json.load(output), time.monotonic() - start, usage.ru_maxrss / 1024)


@contextlib.contextmanager
def _fed(sandbox: Sandbox, client: redis.Redis) -> Iterator[None]:
    """Deliveries at the full rate: always enough users are pending."""
    ended, keys = threading.Event(), Keys(APP)

    def feed() -> None:
        producer, number = Producer(sandbox.redis_url, APP), 0
        while not ended.wait(0.1):
            while client.hlen(keys.pending) < WAITING and not ended.is_set():
                values = ATTRS | {"level": str(number // OTHERS)}
                producer.set_many((f"other{(number + n) % OTHERS}", values) for n in range(2000))
                number += 2000

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _plant(sandbox: Sandbox, path: Path) -> set[str]:
    """Let the API have what the file says, but for the differences; returns the users who differ."""
    names = [f"user{n:07d}" for n in range(USERS)]
    differing = set(random.Random(7).sample(names, DIFFERENCES))
    with open(path, "w") as file:
        file.write("user," + ",".join(ATTRS) + "\n")
        for first in range(0, USERS, 5000):
            page = names[first : first + 5000]
            file.writelines(f"{name},{','.join(ATTRS.values())}\n" for name in page)
            have = {
                name: ATTRS | {"city": "Somewhere"} if name in differing else dict(ATTRS) for name in page
            }
            requests.post(f"{sandbox.api_url}/simulator/users", json=have, timeout=60).raise_for_status()
    return differing


def plan(results: Results) -> None:
    """A file of a million users, of whom a thousand differ: found, repaired, and found no more."""
    options = ("--latency", "0.05", "--quota", "100", "--no-record")
    sandbox_plan = Plan(
        workers=2, concurrency=16, flower=False, simulator_options=options, names=tuple(ATTRS)
    )
    environ = {"IMATTR_READ_QUOTA": READ_QUOTA}
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox(Path(folder) / "sandbox", environ, sandbox_plan) as sandbox,
    ):
        directory, client = Path(folder), redis.Redis.from_url(sandbox.redis_url)
        buffer = Buffer(client, Keys(APP))
        url = f"{sandbox.api_url}/simulator"
        reads = "apart" if READ_QUOTA != "0" else "shared"
        requests.post(f"{url}/quirks", json={"reads": reads}, timeout=10).raise_for_status()
        differing = _plant(sandbox, directory / "users.csv")

        def calls() -> int:
            return buffer.snapshot().calls

        with _fed(sandbox, client):
            while calls() < 200:
                time.sleep(0.05)
            first, start = calls(), time.monotonic()
            time.sleep(ALONE)
            alone = (calls() - first) / (time.monotonic() - start)
            first, start = calls(), time.monotonic()
            found = _imattr(sandbox.environ, directory, "plan", str(directory / "users.csv"))
            beside = (calls() - first) / (time.monotonic() - start)
            kept = (directory / "users.csv.plan").read_text().splitlines()
            exact = {line["user"] for line in map(json.loads, kept) if "changes" in line} == differing
            applied = _imattr(
                sandbox.environ, directory, "apply", str(directory / "users.csv.plan"), "--yes"
            ).output
        while buffer.snapshot().pending or buffer.snapshot().in_flight:
            time.sleep(0.1)
        again = _imattr(sandbox.environ, directory, "plan", str(directory / "users.csv"))
        state = requests.get(f"{url}/state", timeout=60).json()
        balanced = buffer.snapshot().balanced
        client.close()
    facts = found.output
    worst = max(state["worst_rolling_second"], state["reads_apart"]["worst_rolling_second"])
    console.print("  plan", json.dumps({name: facts[name] for name in ("calls", "seconds", "users_by_fate")}))
    wanted = -(-USERS // 100)
    # Reads that share the quota get a twentieth of it.
    least = 0.98 if READ_QUOTA != "0" else 0.98 * 0.95
    results.add(
        f"{USERS:,} users planned beside full-rate deliveries",
        f"{facts['calls']:,} calls, {found.seconds / 60:.1f} min",
        f"{wanted:,} calls",
        facts["calls"] == wanted,
    )
    results.add("memory of it", f"{found.memory:.0f} MB", f"<= {MOST_MEMORY}", found.memory <= MOST_MEMORY)
    results.add(
        "deliveries meanwhile, and without",
        f"{beside:.1f} and {alone:.1f} calls/s",
        f">= {100 * least:.0f} % of it",
        beside >= least * alone,
    )
    results.add("worst rolling second at the API", f"{worst}", "<= 100", worst <= 100)
    results.add(
        "differences planted, found, queued, and left after it",
        f"{DIFFERENCES:,}, {facts['change']:,}, {applied['queued']:,}, {again.output['change']:,}",
        "exactly those, then none",
        exact
        and facts["users_by_fate"]["differs"] == applied["queued"] == DIFFERENCES
        and again.output["users_by_fate"]["same"] == USERS
        and balanced,
    )
