"""A server in cluster mode refuses a script whose keys are not of one slot: every step must pass there.

Clusters of several nodes are not tried here. That all keys of an app share one slot is what they ask for.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.conftest import ManualClock, new_keys
from tests.test_end_to_end import updates, wait_until
from worker.errors import InvalidUpdate
from worker.intake.stream import StreamConsumer
from worker.models import Acked, DeadLettered, Update
from worker.producer import Producer
from worker.ratelimit import Permit, RateLimiter
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.sandbox.redis_server import find_server, free_port
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer, new_batch_id
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.refused import Refused

SLOTS = 16_384


#: A cluster takes seconds to form, and a real worker to start.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """One node that owns every slot."""
    port = next(filter(_has_bus, iter(free_port, 0)))
    directory = tmp_path_factory.mktemp("cluster")
    options = {"port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "cluster-enabled": "yes"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    log = Path(directory) / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen([find_server(), *arguments], stdout=output, stderr=output)
    try:
        with redis.Redis.from_url(f"redis://127.0.0.1:{port}/0") as client:
            while b"Ready to accept connections" not in log.read_bytes():
                assert process.poll() is None, log.read_text()
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
            while not _is_up(client):
                assert process.poll() is None, log.read_text()
            yield client
    finally:
        process.terminate()
        process.wait()


def _has_bus(port: int) -> bool:
    """Whether the port 10,000 above, on which nodes talk to each other, is one, and free."""
    if port + 10_000 > 65_535:
        return False
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port + 10_000)) != 0


def _is_up(client: redis.Redis) -> bool:
    try:
        client.get("x")
    except redis.exceptions.ClusterDownError:
        return False
    return True


def test_a_script_with_keys_of_two_slots_is_refused(cluster: redis.Redis) -> None:
    with pytest.raises(redis.ResponseError, match="same slot"):
        cluster.eval("return redis.call('GET', KEYS[1])", 2, "a", "b")


def test_every_step_of_the_buffer_passes(cluster: redis.Redis) -> None:
    keys = new_keys()
    buffer = Buffer(cluster, keys)
    buffer.add([Update(f"u{number}", {"city": "Paris"}) for number in range(200)])
    [first, second] = buffer.tick(size=100, linger=0, ticket_ttl=10, quota=10, horizon=1.0).tickets

    batch = buffer.claim(first, 100)
    assert batch is not None
    assert buffer.extend(first) == "held"
    refused = DeadLettered(70107, "no such account")
    assert buffer.settle(first, {batch.users[0].user: refused}, rest=Acked()) == (100, False)
    letters = DeadLetters(cluster, keys)
    assert letters.redrive(letters.choose()).redriven == 1
    assert Buffer(cluster, keys, lease=0.0).claim(second, 100) is not None
    assert buffer.reclaim() == second
    assert buffer.snapshot().balanced


def test_limiter_line_stream_and_refused_pass(cluster: redis.Redis, clock: ManualClock) -> None:
    keys = new_keys()
    limiter = RateLimiter(cluster, keys, quota=100, patience=2.0, clock=clock)
    assert isinstance(limiter.reserve(), Permit)
    assert isinstance(limiter.reserve_isolating(), Permit)
    assert limiter.pause(1.0, "testing")

    line, batch = Line(cluster, keys), new_batch_id()
    assert not line.record_dead_letters(70107, 1)
    assert line.record_failure() == 1
    assert line.renew_signature(1) is not None
    assert line.stop(batch, "error", 90009, "testing")
    line.reopen(batch, quota=100, dwell=1.5)
    line.resume()
    AttributeNames(cluster, keys, clock).set(frozenset({"city"}))

    refused = Refused(cluster, keys)
    refused.keep("stream", [(InvalidUpdate("u1", "a rule"), {})])
    port = cluster.get_connection_kwargs()["port"]
    producer = Producer(f"redis://127.0.0.1:{port}/0", keys.sdkappid)
    consumer = StreamConsumer(cluster, keys, producer, refused, clock, worker="w")
    consumer.turn()
    cluster.xadd(keys.updates, {"user": "u1", "attrs": '{"city":"Paris"}'})
    consumer.turn()
    assert cluster.xlen(keys.updates) == 0
    assert Buffer(cluster, keys).snapshot().pending == 1


def test_a_worker_delivers_when_its_broker_is_there_too(cluster: redis.Redis, tmp_path: Path) -> None:
    port = cluster.get_connection_kwargs()["port"]
    # Celery gives commands for several of its keys at once; one hash tag in front puts them in one slot.
    environ = {"IMATTR_REDIS_URL": f"redis://127.0.0.1:{port}/0", "IMATTR_BROKER_PREFIX": "{imattr}"}
    with Sandbox(tmp_path, environ, Plan(workers=1, concurrency=4, flower=False)) as sandbox:
        Producer(sandbox.redis_url, int(SDKAPPID)).set_many(updates(500))
        buffer = Buffer(cluster, Keys(int(SDKAPPID)))
        wait_until(lambda: buffer.snapshot().ledger["delivered"] == 500)


def test_two_apps_may_live_on_different_nodes(cluster: redis.Redis) -> None:
    first, second = Keys(1400000000), Keys(1400000001)
    asked = (first.pending, first.shadow_at, second.pending)
    one, same, other = (cluster.cluster("keyslot", key) for key in asked)

    assert one == same != other
