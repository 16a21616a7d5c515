"""A server whose memory is full, in every way that it can fill: what can drain drains by itself, and people are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import redis

from tests.conftest import SECRET_KEY
from tests.intake.messages import encoded, envelope
from tests.test_end_to_end import wait_until
from worker.errors import BufferFull
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.buffer import Buffer, Snapshot
from worker.state.keys import Keys

#: Each fills a server, and starts a worker on it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KEYS = Keys(int(SDKAPPID))
#: Bytes that the server may use: little, so that it fills in a second.
ROOM = 8_000_000
VALUE = "Paris" * 9


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "redis", options=("--maxmemory", str(ROOM)))
    yield server
    server.stop()


#: Puts entry number N somewhere.
Fill = Callable[["redis.client.Pipeline", int], object]

FILLS: dict[str, Fill] = {
    "stream": lambda pipe, n: pipe.xadd(
        KEYS.updates, {"user": f"user{n}", "attrs": json.dumps({"city": VALUE})}
    ),
    "queue": lambda pipe, n: pipe.lpush("updates", encoded(envelope(f"user{n}", {"city": VALUE}))),
    "pending": lambda pipe, n: (
        pipe.hset(KEYS.pending, f"user{n}", json.dumps({"t": n, "a": {"city": [VALUE, 1_700_000_000_000]}})),
        pipe.zadd(KEYS.live, {f"user{n}": n}),
        pipe.hincrby(KEYS.ledger, "accepted", 1),
    ),
    "shadow": lambda pipe, n: (
        pipe.hset(KEYS.shadow, f"old{n}", json.dumps({"t": n, "a": {"city": [VALUE, 1_700_000_000_000]}})),
        pipe.zadd(KEYS.shadow_at, {f"old{n}": 9_000_000_000_000}),
    ),
    "dead letters": lambda pipe, n: (
        pipe.hset(KEYS.dead, f"dead{n}", json.dumps({"t": n, "at": n, "a": {"city": [VALUE, n]}, "code": 1})),
        pipe.zadd(KEYS.dead_at, {f"dead{n}": n}),
    ),
    "another tenant": lambda pipe, n: pipe.set(f"other{n}", VALUE * 9),
}


def fill(client: redis.Redis, put: Fill) -> int:
    """Until there is no room; returns how many entries there are."""
    for number in count(0, 50):
        pipe = client.pipeline(transaction=False)
        for n in range(number, number + 50):
            put(pipe, n)
        if any(isinstance(reply, redis.OutOfMemoryError) for reply in pipe.execute(raise_on_error=False)):
            return number
    raise AssertionError


def snapshot(client: redis.Redis) -> Snapshot:
    return Buffer(client, KEYS).snapshot()


def imattr(sandbox: Sandbox, *arguments: str) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        env=os.environ | sandbox.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("what", FILLS)
def test_a_full_server_drains_and_says_so(what: str, server: EmbeddedServer, tmp_path: Path) -> None:
    client = redis.Redis.from_url(server.url)
    producer = Producer(server.url, int(SDKAPPID))
    before = [f"early{number}" for number in range(300)]
    producer.set_many((user, {"city": "Paris"}) for user in before)
    entries = fill(client, FILLS[what])
    assert entries > 1000
    with pytest.raises((BufferFull, redis.OutOfMemoryError)):
        producer.set("new", {"city": "Rome"})

    settings = {"IMATTR_REDIS_URL": server.url, "IMATTR_SECRET_KEY": SECRET_KEY}
    with Sandbox(tmp_path / "box", settings, Plan(workers=1, concurrency=8, flower=False)) as sandbox:
        wait_until(lambda: _drained(client), 90)
        status, told = imattr(sandbox, "status", "--json")
        _, advice = imattr(sandbox, "doctor")
        stuck = what in ("dead letters", "another tenant")
        if what == "dead letters":
            purged, words = imattr(sandbox, "dead", "purge", "--yes")
            assert purged == 0, words
            stuck = False
        if not stuck:
            wait_until(lambda: _takes_new_users(producer), 20)

    found = json.loads(told)
    assert status == 0
    assert found["ledger"]["balanced"]
    assert not found["pending"]["live"]
    if what in ("stream", "queue", "pending"):
        assert found["ledger"]["delivered"] >= entries
    if stuck or what == "dead letters":
        assert "maxmemory" in advice


def _drained(client: redis.Redis) -> bool:
    now = snapshot(client)
    waiting = client.xlen(KEYS.updates) + client.llen("updates") + client.llen("updates.taken")
    return not (now.pending or now.in_flight or waiting)


def _takes_new_users(producer: Producer) -> bool:
    try:
        producer.set("new", {"city": "Rome"})
    except (BufferFull, redis.OutOfMemoryError):
        return False
    return True
