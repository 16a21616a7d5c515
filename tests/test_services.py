"""Managed Redis services: everything works behind the restrictions of each, as a proxy imitates them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from tests.conftest import SECRET_KEY, ManualClock, drawn, new_keys
from tests.intake.messages import encoded, envelope
from tests.services import FORGETS_EVERY, SERVICES, STRICTEST, WITHOUT_SCRIPTS, Profile, Service
from tests.simulation import Simulation, simulation
from tests.state.test_state_machine import run_machine
from tests.test_end_to_end import updates, wait_until
from worker import transport
from worker.async_producer import AsyncProducer
from worker.cli.main import main
from worker.clock import SystemClock
from worker.errors import InvalidUpdate, NotConfirmed
from worker.intake.brokers import RedisQueue
from worker.intake.celery_queue import QueueConsumer
from worker.intake.stream import StreamConsumer
from worker.models import Acked, DeadLettered, Update
from worker.producer import Producer
from worker.ratelimit import Permit, RateLimiter
from worker.sandbox.processes import Plan, Sandbox
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer, new_batch_id
from worker.state.connection import Redis, connect
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.quarantine import Quarantine
from worker.state.refused import Refused

#: Servers start, a cluster forms, and real workers run.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ALL = [*SERVICES, STRICTEST]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A primary with a replica."""
    with EmbeddedServer(
        tmp_path_factory.mktemp("single"), options=["--repl-diskless-sync-delay", "0"]
    ) as primary:
        follows = ["--replicaof", f"127.0.0.1 {primary.port}"]
        with (
            EmbeddedServer(tmp_path_factory.mktemp("replica"), options=follows),
            connect(primary.url) as client,
        ):
            wait_until(lambda: client.wait(1, 100) == 1)
            yield primary


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A cluster of one node, which has every slot."""
    # Nodes talk to each other by the port 10,000 above.
    port = next(port for port in iter(free_port, 0) if port < 55_000)
    options = ["--cluster-enabled", "yes"]
    with EmbeddedServer(tmp_path_factory.mktemp("cluster"), port=port, options=options) as node:
        with connect(node.url) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
            wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
        yield node


@contextlib.contextmanager
def behind(profile: Profile, single: EmbeddedServer, cluster: EmbeddedServer) -> Iterator[Service]:
    with Service(profile, (cluster if profile.is_cluster else single).port) as service:
        yield service


@pytest.fixture(params=ALL, ids=lambda profile: profile.name)
def service(request: Any, single: EmbeddedServer, cluster: EmbeddedServer) -> Iterator[Service]:
    with behind(request.param, single, cluster) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[Redis]:
    with connect(service.url) as connected:
        yield connected


# The proxy itself.


def test_what_a_service_refuses_is_refused(single: EmbeddedServer, cluster: EmbeddedServer) -> None:
    with behind(STRICTEST, single, cluster) as service, connect(service.url) as client:
        for command, words in [
            (("HELLO", "3"), "unknown command 'HELLO'"),
            (("CONFIG", "GET", "*"), "unknown command 'CONFIG'"),
            (("SELECT", "0"), "unknown command 'SELECT'"),
            (("WAIT", 0, 1), "unknown command 'WAIT'"),
            (("MULTI",), "must begin with WATCH"),
            (("EVAL", "return redis.call('GET', ARGV[1])", 1, "a", "a"), "KEYS array"),
            (("SCRIPT LOAD", "local key = KEYS[1]"), "in expression"),
            (("EVAL", "return 1", 0), "number of keys"),
            (("DEL", *map(str, range(4000))), "number of arguments"),
            (("DEL", "a", "b"), "same slot"),
        ]:
            with pytest.raises(redis.ResponseError, match=words):
                client.execute_command(*command)
        assert client.info("persistence") == {}
        assert client.ping()


def test_answers_come_in_order_whatever_is_refused(single: EmbeddedServer, cluster: EmbeddedServer) -> None:
    with behind(STRICTEST, single, cluster) as service, connect(service.url) as client:
        with client.pipeline(transaction=False) as pipe:
            for number in range(50):
                pipe.set("{a}" + str(number), number).config_get("x").get("{a}" + str(number))
            answers = pipe.execute(raise_on_error=False)

        assert answers[::3] == [True] * 50
        assert all("CONFIG" in str(answer) for answer in answers[1::3])
        assert answers[2::3] == [str(number).encode() for number in range(50)]


def test_a_transaction_after_a_watch_passes(single: EmbeddedServer, cluster: EmbeddedServer) -> None:
    [tencent] = [profile for profile in SERVICES if profile.name == "TencentDB, cluster"]
    with behind(tencent, single, cluster) as service, connect(service.url) as client:
        assert client.transaction(lambda pipe: (pipe.get("a"), pipe.multi(), pipe.set("a", 1)), "a") == [True]
        with pytest.raises(redis.ResponseError, match="WATCH"):
            client.execute_command("MULTI")


def test_a_script_is_forgotten_now_and_then(single: EmbeddedServer, cluster: EmbeddedServer) -> None:
    with behind(SERVICES[0], single, cluster) as service, connect(service.url) as client:
        sha = client.script_load("return 1")
        answers = []
        for _ in range(FORGETS_EVERY):
            try:
                answers.append(client.evalsha(sha, 0))
            except redis.exceptions.NoScriptError:
                answers.append(None)

        assert answers == [1] * (FORGETS_EVERY - 1) + [None]


# The product.


def test_every_step_of_the_state_machine_does_what_the_model_does(service: Service, client: Redis) -> None:
    run_machine(client, max_examples=max(2, drawn(5)))

    # CLIENT and HELLO are what a library would say unasked.
    assert not service.refusals


def test_every_way_in(service: Service, client: Redis, keys: Keys, clock: ManualClock) -> None:
    producer = Producer(service.url, keys.sdkappid)
    assert producer.set("ann", {"city": "Paris"}) == "pending"
    assert producer.set_many(updates(1000)).accepted == 1000
    assert asyncio.run(_set_async(service.url, keys)) == ("coalesced", 300)

    refused = Refused(client, keys)
    stream = StreamConsumer(client, keys, producer, refused, clock, worker="w")
    stream.turn()
    client.xadd(keys.updates, {"user": "bob", "attrs": '{"city":"Oslo"}'})
    client.xadd(keys.updates, {"user": "bob", "attrs": "no JSON"})
    stream.turn()
    stream.turn()

    # What one command or script touches must be in one slot.
    name = f"{{{keys.sdkappid}}}updates"
    lists = [name, *(f"{name}\x06\x16{step}" for step in (3, 6, 9))]
    queue = RedisQueue(client, lists, name=name, close=lambda: None)
    client.lpush(name, *(encoded(envelope(f"cat{number}", {"city": "Rome"})) for number in range(600)))
    celery = QueueConsumer(client, keys, producer, refused, clock, lambda: queue, worker="w")
    for _ in range(3):
        celery.turn()
    celery.follow()

    assert client.xlen(keys.updates) == client.llen(name) == 0
    assert queue.waiting() == 0
    assert [update.rule for update in refused.newest(5)] == ["the field attrs is not JSON"]
    assert Buffer(client, keys).snapshot().pending == 1000 + 2 + 600
    assert not service.refusals


async def _set_async(url: str, keys: Keys) -> tuple[str, int]:
    async with AsyncProducer(url, keys.sdkappid) as producer:
        accepted = await producer.set("ann", {"city": "Rome"})
        return accepted, (await producer.set_many(updates(300, "Rome"))).accepted


def test_replicas_confirm_where_there_are_any(service: Service, keys: Keys) -> None:
    producer = Producer(service.url, keys.sdkappid, replicas=1, timeout=1.5)

    if "WAIT" in service.profile.refused:
        with pytest.raises(redis.ResponseError, match="WAIT"):
            producer.set("ann", {"city": "Paris"})
    elif service.profile.is_cluster:
        with pytest.raises(NotConfirmed):
            producer.set("ann", {"city": "Paris"})
    else:
        assert producer.set("ann", {"city": "Paris"}) == "pending"
        assert asyncio.run(_set_confirmed(service.url, keys)) == "coalesced"


async def _set_confirmed(url: str, keys: Keys) -> str:
    async with AsyncProducer(url, keys.sdkappid, replicas=1) as producer:
        return await producer.set("ann", {"city": "Rome"})


def test_everything_that_people_look_after(
    service: Service, client: Redis, keys: Keys, clock: ManualClock
) -> None:
    buffer, letters, line = Buffer(client, keys), DeadLetters(client, keys), Line(client, keys)
    buffer.add([Update(f"u{number}", {"city": "Paris"}) for number in range(200)])
    limiter = RateLimiter(client, keys, quota=100, patience=2.0, clock=SystemClock())
    assert isinstance(limiter.reserve(), Permit)
    assert isinstance(limiter.reserve_isolating(), Permit)
    [first, second] = buffer.tick(size=100, linger=0, ticket_ttl=10, quota=10, horizon=1.0).tickets
    batch = buffer.claim(first, 100)
    assert batch is not None
    assert buffer.extend(first) == "held"
    given_up = {claimed.user: DeadLettered(70107, "no such account") for claimed in batch.users[:2]}
    assert buffer.settle(first, given_up, rest=Acked()) == (100, False)
    assert letters.count() == len(list(letters.find())) == 2
    assert letters.purge(dict(list(letters.choose().items())[:1])) == 1
    assert letters.redrive(letters.choose()).redriven == 1
    # A lease that has ended already: one of no length would end only with the millisecond.
    assert Buffer(client, keys, lease=-1.0).claim(second, 100) is not None
    assert buffer.reclaim() == second
    buffer.forget()
    assert buffer.repair() == (0, 0)
    buffer.begin_import("file", 1)
    buffer.end_import("file")
    assert limiter.pause(1.0, "testing")

    client.hset(keys.pending, "u50", "no JSON")
    buffer.add([Update("u50", {"city": "Rome"})])
    quarantine = Quarantine(client, keys)
    assert quarantine.drop([entry.id for entry in quarantine.find()]) == 1

    assert not line.record_dead_letters(70107, 1)
    assert line.record_failure() == 1
    assert line.renew_signature(1) is not None
    line.stop(new_batch_id(), "error", 90009, "testing")
    line.reopen(new_batch_id(), quota=100, dwell=1.5)
    line.resume()
    line.pause("testing")
    assert line.read().state == "paused"

    names = AttributeNames(client, keys, clock)
    names.set(frozenset({"city", "level"}))
    assert AttributeNames(client, keys, clock).get() == {"city", "level"}

    refused = Refused(client, keys)
    refused.keep("celery", [(InvalidUpdate("u1", "a rule"), {})])
    [kept] = refused.newest(5)
    assert refused.find(kept.id) == kept
    assert refused.purge(kept.id) == 1

    assert buffer.snapshot().balanced
    assert not service.refusals


@pytest.fixture
def sim(keys: Keys) -> Iterator[Simulation]:
    with simulation() as running:
        running.api.sdkappid = keys.sdkappid
        yield running


def imattr(service: Service, keys: Keys, sim: Simulation, *arguments: str, **environ: str) -> Result:
    environ = {
        "IMATTR_REDIS_URL": service.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_SECRET_KEY": SECRET_KEY,
        "IMATTR_API_URL": sim.url,
        "IMATTR_BROKER_PREFIX": f"{{{keys.sdkappid}}}",
    } | environ
    return CliRunner().invoke(main, arguments, env=environ)


def test_status_and_doctor_have_no_trouble(service: Service, keys: Keys, sim: Simulation) -> None:
    assert imattr(service, keys, sim, "put", "ann", "city=Paris").exit_code == 0
    status = imattr(service, keys, sim, "status", "--json")
    doctor = imattr(service, keys, sim, "doctor", "--json")

    assert json.loads(status.output)["pending"]["live"] == 1
    findings = json.loads(doctor.output)
    assert not [finding for finding in findings if finding["level"] == "error"]
    assert doctor.exit_code == 0
    named = [finding["found"] for finding in findings if finding["check"] == "redis service"]
    # The others are known by their host names.
    assert named[:1] == ([service.profile.name] if service.profile.says else [])


def test_what_a_cluster_asks_for_is_told(
    keys: Keys, sim: Simulation, single: EmbeddedServer, cluster: EmbeddedServer
) -> None:
    with behind(STRICTEST, single, cluster) as service:
        needs = {"IMATTR_BROKER_PREFIX": "", "IMATTR_REPLICAS": "1"}
        doctor = imattr(service, keys, sim, "doctor", "--json", **needs)

        errors = {f["check"]: f["fix"] for f in json.loads(doctor.output) if f["level"] == "error"}
        assert errors.keys() == {"broker slots", "redis replicas"}
        assert "IMATTR_BROKER_PREFIX={imattr}" in errors["broker slots"]
        assert doctor.exit_code == 1


def test_without_scripts_it_is_said_what_is_wrong(
    keys: Keys, sim: Simulation, single: EmbeddedServer, cluster: EmbeddedServer
) -> None:
    with behind(WITHOUT_SCRIPTS, single, cluster) as service:
        doctor = imattr(service, keys, sim, "doctor", "--json")

        assert doctor.exit_code == 1
        [wrong] = [finding for finding in json.loads(doctor.output) if finding["level"] == "error"]
        assert "EVAL" in wrong["found"] or "SCRIPT" in wrong["found"]
        with pytest.raises(redis.ResponseError, match="unknown command"):
            Producer(service.url, keys.sdkappid).set("ann", {"city": "Paris"})


def test_a_full_server_takes_what_the_broker_writes(tmp_path: Path) -> None:
    """Behind a service that reads scripts: here the text is made from the command."""
    with (
        EmbeddedServer(tmp_path, persistent=False) as server,
        connect(server.url) as direct,
        Service(STRICTEST, server.port) as service,
        connect(service.url) as client,
    ):
        sturdy = transport._sturdy(client)
        direct.config_set("maxmemory", 1)
        sturdy.lpush("tickets", "one")
        with sturdy.pipeline() as pipe:
            pipe.zadd("index", {"one": 1})
            pipe.lpush("tickets", "two")
            assert pipe.execute() == [1, 2]


class Channel(transport.SturdyChannel):
    """A channel without a connection of its own."""

    global_keyprefix = "{us}"

    def __init__(self, client: Redis) -> None:
        self._redis = client

    @contextlib.contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Redis]:
        yield self._redis


def test_the_brokers_bindings_are_swept_where_scripts_are_read(
    single: EmbeddedServer, cluster: EmbeddedServer
) -> None:
    with behind(STRICTEST, single, cluster) as service, connect(service.url) as client:
        now = client.time()[0] * 1000
        deadlines = {"gone": now - 1000, "kept": now - 1000, "fresh": now + 60_000}
        client.zadd("{us}_kombu.binding_deadlines", deadlines)
        for exchange in deadlines:
            client.sadd("{us}_kombu.binding." + exchange, "a queue")
        client.sadd("{us}_kombu.binding_permanent.kept", "a queue")
        channel = Channel(client)

        assert [channel.sweep_bindings(), channel.sweep_bindings()] == [2, 0]

        assert client.zrange("{us}_kombu.binding_deadlines", 0, -1) == [b"fresh"]
        assert not client.exists("{us}_kombu.binding.gone")
        assert client.exists("{us}_kombu.binding.kept", "{us}_kombu.binding.fresh") == 2


# All together.


@pytest.mark.parametrize(
    "profile",
    [STRICTEST, next(profile for profile in SERVICES if profile.watch_first)],
    ids=lambda profile: profile.name,
)
def test_a_worker_delivers_when_state_and_broker_are_there(
    profile: Profile, single: EmbeddedServer, cluster: EmbeddedServer, tmp_path: Path
) -> None:
    keys = new_keys()
    with behind(profile, single, cluster) as service:
        environ = {
            "IMATTR_REDIS_URL": service.url,
            "IMATTR_SECRET_KEY": SECRET_KEY,
            "IMATTR_SDKAPPID": str(keys.sdkappid),
            # Celery names several of its keys in one command.
            "IMATTR_BROKER_PREFIX": f"{{{keys.sdkappid}}}",
            "IMATTR_LINGER": "0.05",
        }
        with Sandbox(tmp_path, environ, Plan(workers=2, concurrency=4, flower=False)) as sandbox:
            Producer(service.url, keys.sdkappid).set_many(updates(1500))
            with connect(service.url) as client:
                client.xadd(keys.updates, {"user": "bob", "attrs": '{"city":"Oslo"}'})
                client.lpush(f"{{{keys.sdkappid}}}updates", encoded(envelope("ann", {"city": "Rome"})))
                buffer = Buffer(client, keys)
                wait_until(lambda: buffer.snapshot().ledger["delivered"] == 1502)
                assert buffer.snapshot().balanced
            sandbox.check()
        assert not service.refusals
        logs = "".join(log.read_text() for log in tmp_path.glob("worker-*.log"))
        assert "interrupted" not in logs
        assert "Traceback" not in logs
