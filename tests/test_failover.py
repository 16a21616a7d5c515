"""Every client of ours follows the primary, and says what is not confirmed: on real fleets, one for all tests here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from tests.conftest import new_keys
from tests.redis_fleet import ClusterFleet, Node, SentinelFleet
from worker.async_producer import AsyncProducer
from worker.clock import SystemClock
from worker.errors import NotConfirmed
from worker.intake.stream import StreamConsumer
from worker.producer import Producer
from worker.sandbox.redis_server import find_server
from worker.state.buffer import Buffer
from worker.state.connection import connect
from worker.state.keys import Keys
from worker.state.refused import Refused

#: A fleet takes seconds to form, and to fail over.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

#: Seconds in which clients must find the new primary.
WITHIN = 5.0

T = TypeVar("T")
Fleet = SentinelFleet | ClusterFleet


@pytest.fixture(scope="module", params=[SentinelFleet, ClusterFleet], ids=["sentinel", "cluster"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with request.param(tmp_path_factory.mktemp("fleet")) as found:
        yield found


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelFleet]:
    with SentinelFleet(tmp_path_factory.mktemp("sentinels")) as found:
        yield found


@pytest.fixture
def keys() -> Keys:
    return new_keys()


def soon(call: Callable[[], T]) -> T:
    """What the call returns once it works again."""
    deadline = time.monotonic() + WITHIN
    while True:
        try:
            return call()
        except redis.RedisError:
            assert time.monotonic() < deadline, "it did not find the new primary"
            time.sleep(0.1)


def snapshot(fleet: Fleet, keys: Keys) -> Any:
    with connect(fleet.url, key=keys.pending) as client:
        return soon(Buffer(client, keys).snapshot)


@pytest.mark.parametrize("how", [None, Node.kill, Node.suspend], ids=["by hand", "killed", "suspended"])
def test_whoever_is_connected_goes_on(fleet: Fleet, keys: Keys, how: Callable[[Node], None] | None) -> None:
    producer = Producer(fleet.url, keys.sdkappid)
    Producer(fleet.url, keys.sdkappid, replicas=1, timeout=10).set("ann", {"city": "Paris"})

    async def asynchronously() -> None:
        async with AsyncProducer(fleet.url, keys.sdkappid, timeout=1) as other:
            await other.set("bob", {"city": "Paris"})
            fail_over()
            deadline = time.monotonic() + WITHIN
            while True:
                try:
                    await other.set("bob", {"city": "Rome"})
                    return
                except redis.RedisError:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.1)

    old = fleet.primary(keys.pending)

    def fail_over() -> None:
        fleet.fail_over(keys.pending, how)

    try:
        asyncio.run(asynchronously())
        soon(lambda: producer.set("ann", {"city": "Rome"}))
        soon(lambda: imattr(fleet, keys, "put", "cem", "city=Izmir"))
        status = json.loads(imattr(fleet, keys, "status", "--json"))
    finally:
        if how is Node.suspend:
            old.wake()
        fleet.recover()
    # The old primary is a replica now, and nobody asks it any more.
    assert status["redis"]["servers"] == 2
    soon(lambda: producer.set("dee", {"city": "Oslo"}))
    now = snapshot(fleet, keys)
    assert now.live >= 3
    assert now.balanced


def imattr(fleet: Fleet, keys: Keys, *arguments: str) -> str:
    settings = {
        "IMATTR_REDIS_URL": fleet.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_SECRET_KEY": "x" * 64,
    }
    run = subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        env=os.environ | settings | {"IMATTR_API_URL": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if run.returncode:
        raise redis.ConnectionError(run.stdout + run.stderr)
    return run.stdout


def test_a_slot_moves_to_another_node(keys: Keys, fleet: Fleet) -> None:
    if isinstance(fleet, SentinelFleet):
        pytest.skip("sentinels know no slots")
    producer = Producer(fleet.url, keys.sdkappid)
    producer.set_many((f"user{number}", {"city": "Paris"}) for number in range(500))
    old = fleet.primary(keys.pending)

    assert fleet.reshard(keys.pending) is not old

    soon(lambda: producer.set("ann", {"city": "Rome"}))
    assert fleet.primary(keys.pending) is not old
    assert snapshot(fleet, keys).live == 501


@contextlib.contextmanager
def silent_replicas(fleet: SentinelFleet) -> Iterator[None]:
    """Replicas that do not answer, for less time than it takes to call them down."""
    replicas = [node for node in fleet.servers if node is not fleet.primary()]
    for node in replicas:
        node.suspend()
    try:
        yield
    finally:
        for node in replicas:
            node.wake()


def test_what_replicas_do_not_have_is_not_confirmed(sentinels: SentinelFleet, keys: Keys) -> None:
    sure = Producer(sentinels.url, keys.sdkappid, replicas=2, timeout=2)
    plain = Producer(sentinels.url, keys.sdkappid, timeout=2)
    assert sure.set("ann", {"city": "Paris"}) == "pending"

    with silent_replicas(sentinels):
        with pytest.raises(NotConfirmed, match=r"0 of 2 replicas have the update after 1\.6 s"):
            sure.set("ann", {"city": "Rome"})
        with pytest.raises(NotConfirmed):
            sure.set_many([("bob", {"city": "Oslo"})])
        assert plain.set("cem", {"city": "Izmir"}) == "pending"

    # It was accepted all the same, and offering it again is harmless.
    assert sure.set("ann", {"city": "Rome"}) == "coalesced"
    assert snapshot(sentinels, keys).live == 3

    async def asynchronously() -> None:
        async with AsyncProducer(sentinels.url, keys.sdkappid, replicas=2, timeout=2) as other:
            assert await other.set("ann", {"city": "Bern"}) == "coalesced"
            with silent_replicas(sentinels), pytest.raises(NotConfirmed):
                await other.set("ann", {"city": "Rome"})

    asyncio.run(asynchronously())


def test_a_stream_keeps_what_is_not_confirmed(sentinels: SentinelFleet, keys: Keys) -> None:
    with connect(sentinels.url, key=keys.pending) as client:
        producer = Producer(sentinels.url, keys.sdkappid, replicas=2, timeout=2)
        consumer = StreamConsumer(client, keys, producer, Refused(client, keys), SystemClock(), worker="one")
        consumer.turn()
        client.xadd(keys.updates, {"user": "ann", "attrs": '{"city": "Paris"}'})

        with silent_replicas(sentinels), pytest.raises(NotConfirmed):
            consumer.turn()
        consumer.follow()
        assert client.xlen(keys.updates) == 1

        consumer.turn()
        assert client.xlen(keys.updates) == 0
        assert Buffer(client, keys).snapshot().live == 1


def test_a_confirmation_on_disk_needs_a_server_that_can(sentinels: SentinelFleet, keys: Keys) -> None:
    version = subprocess.run([find_server(), "--version"], capture_output=True, text=True, check=True).stdout
    producer = Producer(sentinels.url, keys.sdkappid, replicas=1, replicas_fsync=True)
    if "v=7.0" in version or "v=6" in version:
        with pytest.raises(redis.ResponseError, match="WAITAOF"):
            producer.set("ann", {"city": "Paris"})
    else:
        assert producer.set("ann", {"city": "Paris"}) == "pending"


def test_sentinels_that_know_nothing_are_named(tmp_path: Path, keys: Keys) -> None:
    producer = Producer("redis+sentinel://127.0.0.1:1,127.0.0.1:2/main", keys.sdkappid)

    with pytest.raises(redis.ConnectionError, match="none of the sentinels answers"):
        producer.set("ann", {"city": "Paris"})
