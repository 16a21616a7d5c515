"""What a network between the workers and the API costs: calls a second, and how many the API refuses."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import redis
import requests

from tests.bench import APP, ATTRS, Results, server, state_of, users
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.state.keys import Keys

#: Seconds until the rate has settled, and seconds that are measured then.
SETTLES, MEASURED = 60, 60
#: Network, least calls a second; None where a refusal now and then is cheaper than slots that are far enough apart.
NETWORKS = (
    ("", 97.9),
    ("uniform:0.02", 96.0),
    ("uniform:0.05", 94.0),
    ("normal:0.03", None),
    ("bursts:0.2", None),
    ("reordered:0.03", None),
)


def network(results: Results) -> None:
    """Two minutes on each network, from a backlog; the second minute is measured, refusals are those of both."""
    options = ("--latency", "0.05", "--no-record")
    for kind, least in NETWORKS:
        plan = Plan(
            workers=2,
            concurrency=16,
            flower=False,
            simulator_options=(*options, "--network", kind),
            names=tuple(ATTRS),
        )
        with tempfile.TemporaryDirectory() as directory, server() as running:
            # Enqueuing during the run would take the processor that the workers need.
            Producer(running.url, APP).set_many(users(100 * 100 * (SETTLES + MEASURED + 5)))
            with Sandbox(Path(directory), {"IMATTR_REDIS_URL": running.url}, plan) as sandbox:
                time.sleep(SETTLES)
                requests.post(f"{sandbox.api_url}/simulator/reset-arrivals", json={}, timeout=10)
                before, began = state_of(sandbox), time.monotonic()
                time.sleep(MEASURED)
                after, took = state_of(sandbox), time.monotonic() - began
            with redis.Redis.from_url(running.url) as client:
                spacing = int(client.hget(Keys(APP).rate, "apart") or 0) / 1e4
        rate = (after["calls"] - before["calls"]) / took
        refused = after["refused"].get("60007", 0)
        results.add(
            f"network {kind or 'without delays'}",
            f"{rate:.1f} calls/s, {refused} of {after['calls']:,} refused, worst second "
            f"{after['worst_rolling_second']}, slots {spacing:.3f} of an even share apart",
            f">= {least:g}, <= 1 in 5,000, <= 100" if least else "anything",
            least is None
            or (rate >= least and refused <= after["calls"] / 5000 and after["worst_rolling_second"] <= 100),
        )
