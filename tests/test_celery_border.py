"""The border to Celery, with real workers: nothing in a queue ends one, nor does any answer of the broker's server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from celery import Celery
from celery.utils.saferepr import saferepr
from kombu.compression import get_decoder
from kombu.connection import Connection

from tests.chaos.brokers import RabbitMQ, find_rabbitmq
from tests.intake.messages import MALFORMED, encoded, envelope
from tests.test_end_to_end import HASTY, System, running, updates, wait_until
from worker import transport
from worker.celery import PrivateTask, worst_outcome
from worker.delivery.loop import MOST_BATCHES
from worker.delivery.meter import Summary
from worker.errors import SandboxError
from worker.intake.brokers import RabbitQueue, Taken
from worker.intake.celery_message import MOST_BYTES
from worker.operate import doctor
from worker.sandbox.processes import SDKAPPID, Plan
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.buffer import new_batch_id
from worker.state.intake import read_intake
from worker.state.keys import Keys
from worker.state.refused import Refused
from worker.state.scripts import text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PLAN = Plan(workers=2, concurrency=4, flower=False)


def workers(system: System) -> dict[str, int]:
    system.sandbox.check()
    return {name: pid for name, pid in system.sandbox.pids().items() if name.startswith("worker")}


def leader(system: System) -> str:
    """The worker whose process takes messages now."""
    return text(system.redis.get(system.keys.queue_consumer) or "").partition("@")[0]


@pytest.mark.parametrize("queue", ["updates", "deliveries"])
def test_nothing_in_a_queue_ends_a_worker_or_stops_what_is_behind_it(tmp_path: Path, queue: str) -> None:
    with running(tmp_path, PLAN) as system:
        before = workers(system)
        for message in MALFORMED.values():
            system.redis.lpush(queue, message if isinstance(message, bytes) else encoded(message))
            system.redis.publish(
                "/0.celery.pidbox", message if isinstance(message, bytes) else encoded(message)
            )
        stranger = Celery(broker=system.sandbox.redis_url, set_as_current=False)
        for user, attrs in updates(50):
            stranger.send_task("attributes.update", [user, attrs], queue="updates")

        wait_until(lambda: len(system.simulator("users")) >= 50)
        wait_until(lambda: not system.redis.llen(queue) and not system.redis.hlen("unacked"))

        assert dict(updates(50)).items() <= system.simulator("users").items()
        assert workers(system) == before
        assert Refused(system.redis, system.keys).count() == len(MALFORMED)
        logs = "".join(log.read_text() for log in tmp_path.glob("worker-*.log"))
        assert "Unrecoverable error" not in logs
        assert "queue_process_ended" not in logs


def test_flower_gets_every_batch_that_a_ticket_was_good_for() -> None:
    batch = dict.fromkeys(Summary.__slots__, 3600.123) | {
        "batch": new_batch_id(),
        "outcome": "partly_delivered",
    }
    # As Celery does with a result, before it sends it to Flower.
    shown = saferepr([batch] * MOST_BATCHES, PrivateTask.resultrepr_maxsize)

    assert shown.count("partly_delivered") == MOST_BATCHES


def test_celery_itself_unpacks_no_bomb() -> None:
    assert transport
    unpack = get_decoder("application/x-gzip")  # type: ignore[no-untyped-call]

    assert unpack(zlib.compress(b"good")) == b"good"
    assert len(unpack(zlib.compress(b" " * 10 * MOST_BYTES))) == MOST_BYTES + 1


def _readonly(client: redis.Redis) -> Iterator[None]:
    client.replicaof("127.0.0.1", "1")
    yield
    client.replicaof("NO", "ONE")


def _master_down(client: redis.Redis) -> Iterator[None]:
    client.config_set("replica-serve-stale-data", "no")
    client.replicaof("127.0.0.1", "1")
    yield
    client.replicaof("NO", "ONE")


def _out_of_memory(client: redis.Redis) -> Iterator[None]:
    client.config_set("maxmemory", "1mb")
    yield
    client.config_set("maxmemory", "0")


def _no_replicas(client: redis.Redis) -> Iterator[None]:
    client.config_set("min-replicas-to-write", 1)
    yield
    client.config_set("min-replicas-to-write", 0)


def _no_auth(client: redis.Redis) -> Iterator[None]:
    client.config_set("requirepass", "x")
    client.client_kill_filter(_type="normal", skipme=True)
    yield
    client.config_set("requirepass", "")


def _busy(client: redis.Redis) -> Iterator[None]:
    client.config_set("busy-reply-threshold", 200)
    with contextlib.suppress(redis.RedisError):
        client.eval("local t = redis.call('TIME')[1] while redis.call('TIME')[1] - t < 3 do end", 0)
    yield


FAULTS: dict[str, Callable[[redis.Redis], Iterator[None]]] = {
    "READONLY": _readonly,
    "MASTERDOWN": _master_down,
    "OOM": _out_of_memory,
    "NOREPLICAS": _no_replicas,
    "NOAUTH": _no_auth,
    "BUSY": _busy,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_reply_of_redis_is_waited_out_in_the_middle_and_at_the_start(
    tmp_path: Path, fault: str
) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=4, flower=False), **HASTY) as system:
        stranger = Celery(broker=system.sandbox.redis_url, set_as_current=False)
        system.producer.set_many(updates(3000))
        before = workers(system)
        striking = FAULTS[fault](system.redis)
        next(striking)
        # A second worker starts into it.
        starting = system.sandbox.start_worker(2)
        time.sleep(2)
        assert workers(system).items() >= before.items()

        next(striking, None)
        starting()
        stranger.send_task("attributes.update", ["late", {"city": "Oslo"}], queue="updates")
        wait_until(lambda: system.settled() and "late" in system.simulator("users"))

        assert workers(system).items() >= before.items()
        assert len(system.simulator("users")) == 3001
        assert system.snapshot().balanced


@pytest.mark.parametrize("query", ["", "?protocol=3"])
def test_a_server_that_refuses_hello_will_do_for_state_and_broker(tmp_path: Path, query: str) -> None:
    options = ("--rename-command", "HELLO", "")
    with EmbeddedServer(tmp_path / "old", persistent=False, options=options) as server:
        with redis.Redis.from_url(server.url, protocol=2) as client, pytest.raises(redis.ResponseError):
            client.execute_command("HELLO", "3")
        with running(tmp_path, PLAN, IMATTR_REDIS_URL=server.url + query) as system:
            system.redis = redis.Redis.from_url(server.url, protocol=2)
            stranger = Celery(broker=server.url, set_as_current=False)
            stranger.conf.broker_transport_options = {}
            for user, attrs in updates(20):
                system.redis.lpush("updates", encoded(envelope(user, attrs)))
            system.redis.xadd(system.keys.updates, {"user": "eve", "attrs": '{"city":"Oslo"}'})
            system.producer.set("ann", {"city": "Rome"})

            wait_until(lambda: len(system.simulator("users")) == 22)


def test_a_worker_killed_while_it_takes_messages_loses_none(tmp_path: Path) -> None:
    with running(tmp_path, PLAN, **HASTY) as system:
        for user, attrs in updates(20_000):
            system.redis.lpush("updates", encoded(envelope(user, attrs)))
        wait_until(lambda: system.snapshot().ledger["accepted"] > 1000)
        name = leader(system)
        os.killpg(workers(system)[name], signal.SIGKILL)
        system.sandbox.forget(name)
        for user, attrs in updates(500, "Rome"):
            system.redis.lpush("updates", encoded(envelope(user, attrs)))

        wait_until(system.settled_all, 90)

        assert system.simulator("users") == dict(updates(20_000)) | dict(updates(500, "Rome"))
        assert system.snapshot().balanced


def test_the_intake_ends_with_its_worker_however_that_ends(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=2, flower=False)) as system:
        [worker] = workers(system).values()
        [intake] = _children(worker)

        os.kill(intake, signal.SIGKILL)
        found: list[int] = []

        def is_replaced() -> bool:
            # Whatever was seen counts: the next look may come while the list is being written.
            found[:] = [child for child in _children(worker) if child != intake]
            return bool(found)

        wait_until(is_replaced)
        [successor] = found
        system.redis.lpush("updates", encoded(envelope("ann")))
        wait_until(lambda: "ann" in system.simulator("users"))
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{successor}").exists(), 20)
        system.sandbox.forget("worker-1")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        if thread.name != str(pid)
        for child in (thread / "children").read_text().split()
    ]


def test_flower_shows_what_is_taken_in_and_the_queues(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=2, flower=True)) as system:
        for user, attrs in updates(500):
            system.redis.lpush("updates", encoded(envelope(user, attrs)))
        system.redis.lpush("updates", b"Xanadu")
        wait_until(lambda: len(system.simulator("users")) == 500)
        wait_until(lambda: read_intake(system.redis, system.keys).queue["taken"] == 501)

        metrics = system.sandbox.flower_url + "/metrics"
        wait_until(lambda: 'task="attributes.intake"' in requests.get(metrics, timeout=20).text)
        # Until it has asked the workers what they take, Flower shows whatever is configured.
        # The page of a worker waits for its answer.
        name = f"worker-1@{socket.gethostname()}"
        url, login = system.sandbox.flower_url, system.sandbox.flower_login
        wait_until(lambda: requests.get(f"{url}/worker/{name}", auth=login, timeout=60).ok)
        broker = requests.get(f"{url}/broker", auth=login, timeout=20).text
        assert "updates" in broker
        assert "deliveries" in broker
        assert "has no attribute" not in broker
        # What a worker says of itself has no secret in it, and can be said.
        stats = system.sandbox.directory / "worker-1.log"
        assert "Control command error" not in stats.read_text()


def celery(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command of Celery's with nothing else in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker", *arguments],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_worker_reports_everything_that_is_missing_at_once() -> None:
    done = celery("worker", "--pool", "threads")

    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            "imattr cannot start:",
            "  IMATTR_SDKAPPID is not set",
            "  IMATTR_REDIS_URL is not set",
            "  IMATTR_SECRET_KEY is not set",
            "  IMATTR_REGION or IMATTR_API_URL is not set",
        ],
    )


def test_flower_needs_no_key_and_asks_for_less(tmp_path: Path, server: EmbeddedServer, keys: Keys) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environ = {
        "PATH": os.environ["PATH"],
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_REDIS_URL": server.url,
        "IMATTR_BROKER_URL": server.url,
        "FLOWER_BASIC_AUTH": "ops:hunter22",
    }
    command = [sys.executable, "-m", "celery", "-A", "worker", "flower", f"--port={port}", "--read_only=True"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, env=environ, stdout=log, stderr=log) as flower,
    ):
        try:
            wait_until(lambda: flower.poll() is not None or _answers(f"{url}/healthcheck"))
            assert flower.poll() is None, (tmp_path / "log").read_text()
            login = ("ops", "hunter22")

            assert requests.get(f"{url}/workers", timeout=20).status_code == 401
            assert requests.get(f"{url}/workers", auth=login, timeout=20).status_code == 200
            shut_down = requests.post(f"{url}/api/worker/shutdown/x", auth=login, timeout=20)
            assert shut_down.status_code == 403
        finally:
            flower.terminate()

    done = celery("flower", IMATTR_SDKAPPID="1")

    assert (done.returncode, done.stderr) == (2, "imattr cannot start:\n  IMATTR_REDIS_URL is not set\n")


def _answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=5).ok
    return False


def test_doctor_finds_messages_that_were_sent_without_a_queue(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=2, flower=False)) as system:
        Celery(broker=system.sandbox.redis_url, set_as_current=False).send_task(
            "attributes.update", ["ann", {"city": "Paris"}]
        )

        findings = list(doctor.examine(system.sandbox.environ))

        [found] = [finding for finding in findings if finding.check == "broker queue"]
        assert found.level == "warning"
        assert "1 message waits in Celery's default queue" in found.found
        assert "task_routes" in found.fix


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_every_pool_ends_in_order_at_sigterm(tmp_path: Path, pool: str) -> None:
    plan = Plan(workers=1, concurrency=2, pool=pool, flower=False, simulator_options=("--latency", "0.6"))
    with running(tmp_path, plan) as system:
        faults = [
            {"kind": "user_code", "user": f"user{n:05}", "code": 90048, "times": None} for n in (3, 40, 77)
        ]
        system.simulator("faults", faults)
        system.producer.set_many(updates(100))
        wait_until(lambda: system.snapshot().in_flight)
        time.sleep(1.5)
        [worker] = workers(system).values()
        calls = system.simulator("state")["calls"]

        os.kill(worker, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{worker}").exists() or _is_zombie(worker))
        system.sandbox.forget("worker-1")

        assert system.simulator("state")["calls"] - calls <= 4
        assert system.snapshot().in_flight == 0
        assert system.snapshot().balanced


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("pool", ["solo", "gevent", "eventlet"])
def test_a_pool_that_is_not_supported_is_refused_at_the_start(tmp_path: Path, pool: str) -> None:
    environ = {
        **os.environ,
        "IMATTR_SDKAPPID": "1400000000",
        "IMATTR_SECRET_KEY": "x" * 64,
        "IMATTR_API_URL": "http://127.0.0.1:9",
        "IMATTR_REDIS_URL": "redis://127.0.0.1:9/0",
    }
    command = [sys.executable, "-m", "celery", "-A", "worker", "worker", "--pool", pool]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    said = done.stdout + done.stderr
    assert done.returncode == 2 or f"No module named '{pool}'" in said
    assert done.returncode != 2 or "not supported, use threads or prefork" in said


rabbitmq = pytest.mark.skipif(find_rabbitmq() is None, reason="RabbitMQ is not installed")


@rabbitmq
def test_rabbitmqs_messages_are_taken_in_bulk_and_bad_ones_kept(tmp_path: Path) -> None:
    broker = RabbitMQ(tmp_path / "rabbit")
    try:
        with running(tmp_path / "box", PLAN, IMATTR_BROKER_URL=broker.url) as system:
            before = workers(system)
            stranger = Celery(broker=broker.url, set_as_current=False)
            for user, attrs in updates(300):
                stranger.send_task("attributes.update", [user, attrs], queue="updates")
            stranger.send_task("attributes.updat", ["x", {}], queue="updates", compression="gzip")
            with stranger.connection_for_write() as connection:
                channel = connection.channel()
                for raw in (b"hello", b"", b"\xff", b"[" * 10_000):
                    message = channel.prepare_message(
                        raw, content_type="application/json", headers={"task": {}}
                    )
                    channel.basic_publish(message, exchange="", routing_key="updates")
                    channel.basic_publish(message, exchange="", routing_key="deliveries")
            stranger.send_task("attributes.update", ["last", {"city": "Oslo"}], queue="updates")

            wait_until(lambda: len(system.simulator("users")) == 301)
            wait_until(lambda: Refused(system.redis, system.keys).count() == 9)

            assert workers(system) == before
            assert not system.redis.zcard(system.keys.taken)
    finally:
        broker.stop()


@rabbitmq
def test_what_rabbitmq_delivers_again_has_the_time_of_the_first_taking(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    broker = RabbitMQ(tmp_path / "rabbit")

    def connect() -> RabbitQueue:
        return RabbitQueue(
            Connection(broker.url),  # type: ignore[no-untyped-call]
            "updates",
            client,
            keys,
        )

    def take(queue: RabbitQueue, now_ms: int, count: int) -> Taken:
        messages: list[Any] = []
        while len(messages) < count:
            queue.wait(0.1)
            if taken := queue.take(lambda: now_ms):
                messages += taken.messages
        return Taken(taken.id if taken else None, messages)

    try:
        killed = connect()
        stranger = Celery(broker=broker.url, set_as_current=False)
        for number in range(3):
            stranger.send_task("attributes.update", [f"user{number}", {"city": "x"}], queue="updates")
        assert [at for _, at in take(killed, 1_000, 3).messages] == [1_000] * 3
        killed.close()
        stranger.send_task("attributes.update", ["new", {"city": "x"}], queue="updates")
        successor = connect()

        again = take(successor, 2_000, 4)
        successor.finish(again)

        assert [at for _, at in again.messages] == [1_000, 1_000, 1_000, 2_000]
        assert successor.waiting() == 0
        assert take_nothing(successor)
        successor.close()
        last = connect()
        assert take_nothing(last)
        last.close()
    finally:
        broker.stop()


def take_nothing(queue: RabbitQueue) -> bool:
    queue.wait(0.2)
    return queue.take(lambda: 3_000) is None


def test_a_worker_of_deliveries_only_leaves_the_updates_alone(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=0, flower=False)) as system:
        system.sandbox._spawn(
            "worker-1",
            ["-m", "celery", "-A", "worker", "worker", "-P", "threads", "-c", "2", "-Q", "deliveries"],
        )
        system.redis.lpush("updates", encoded(envelope("ann")))
        system.producer.set("bob", {"city": "Paris"})
        wait_until(lambda: "bob" in system.simulator("users"))

        assert system.redis.llen("updates") == 1
        assert json.loads(system.redis.lindex("updates", 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_serves_what_all_processes_of_its_pool_have_done(tmp_path: Path, pool: str) -> None:
    port = free_port()
    plan = Plan(workers=1, concurrency=3, pool=pool, flower=False)

    def served(path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{port}/{path}", timeout=10)

    environ = {"IMATTR_HEALTH_PORT": str(port), "TMPDIR": str(tmp_path)}
    with running(tmp_path / "sandbox", plan, **environ) as system:
        system.producer.set_many(updates(3000))
        wait_until(system.settled)
        wait_until(lambda: served("readyz").ok)
        assert served("livez").ok

        def counted() -> dict[str, float]:
            lines = (line for line in served("metrics").text.splitlines() if not line.startswith("#"))
            return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

        label = f'sdkappid="{SDKAPPID}"'
        wait_until(lambda: counted()[f'imattr_delivery_delay_seconds_count{{lane="live",{label}}}'] == 3000)
        found = counted()
        calls = system.simulator("state")["calls"]
        assert found[f'imattr_calls_total{{operation="set",outcome="ok",{label}}}'] == calls
        assert found[f"imattr_batch_users_sum{{{label}}}"] == 3000
        assert found[f'imattr_leads{{role="dispatcher",{label}}}'] == 1
        # What the fleet shares is the exporter's.
        assert not any(name.startswith("imattr_users") for name in found)
        assert bool(list(tmp_path.glob("imattr-metrics-*"))) == (pool == "prefork")
    assert not list(tmp_path.glob("imattr-metrics-*")), "a worker leaves nothing behind"


def test_a_worker_is_not_ready_while_redis_is_away_and_lives_on(tmp_path: Path) -> None:
    port = free_port()

    def status(path: str) -> int:
        return requests.get(f"http://127.0.0.1:{port}/{path}", timeout=10).status_code

    with running(
        tmp_path, Plan(workers=1, concurrency=2, flower=False), IMATTR_HEALTH_PORT=str(port)
    ) as system:
        wait_until(lambda: status("readyz") == 200)

        os.kill(system.sandbox.pids()["redis"], signal.SIGSTOP)
        try:
            wait_until(lambda: status("readyz") == 503)
            assert status("livez") == 200
        finally:
            os.kill(system.sandbox.pids()["redis"], signal.SIGCONT)
        wait_until(lambda: status("readyz") == 200)


def test_a_health_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        plan = Plan(workers=1, concurrency=2, flower=False)

        words = rf"status 2[\s\S]*IMATTR_HEALTH_PORT: port {port}: Address"
        with pytest.raises(SandboxError, match=words), running(tmp_path, plan, IMATTR_HEALTH_PORT=port):
            pass


def test_flower_does_not_call_a_stopped_batch_a_success(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=2, flower=True)) as system:
        page = system.sandbox.flower_url + "/metrics"

        def seen(event: str) -> int:
            """How many such events of deliveries Flower has seen."""
            lines = requests.get(page, timeout=20).text.splitlines()
            found = [line for line in lines if f'"attributes.deliver",type="task-{event}"' in line]
            counts = [line for line in found if line.startswith("flower_events_total{")]
            return sum(int(float(line.rpartition(" ")[2])) for line in counts)

        def seen_after_more(event: str, users: Iterator[str]) -> int:
            # Events are not kept for Flower: what happens while it does not listen, it never sees.
            system.producer.set(next(users), {"city": "Paris"})
            time.sleep(0.5)
            return seen(event)

        bad = [f"bad{number}" for number in range(100)]
        faults = [{"kind": "user_code", "user": user, "code": 70107, "times": None} for user in bad]
        system.simulator("faults", faults)
        strangers = iter(bad)
        wait_until(lambda: seen_after_more("dead_lettered", strangers))
        system.simulator("faults", [{"kind": "code", "code": 90009, "times": None}])
        others = (f"user{number}" for number in range(1000))
        wait_until(lambda: seen_after_more("stopped", others))

        assert not seen("succeeded")


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        (["delivered"], None),
        (["empty"], None),
        (["no_permit"], None),
        (["delivered", "retried"], "retried"),
        (["stopped", "delivered", "dead_lettered"], "dead_lettered"),
    ],
)
def test_a_ticket_is_shown_by_the_worst_of_its_batches(outcomes: list[str], worst: str | None) -> None:
    batches = [{"batch": new_batch_id(), "outcome": outcome, "users": 5} for outcome in outcomes]

    assert worst_outcome(saferepr(batches, PrivateTask.resultrepr_maxsize)) == worst
    assert worst_outcome(None) is None
