"""Everything real: Redis, Celery workers, Flower, HTTP; the simulator's record is the judge."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from celery import Celery

from tests.conftest import SECRET_KEY
from worker.producer import Producer
from worker.sandbox import demo, demo_events
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.state.buffer import Buffer, Snapshot
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.scripts import text

#: Real workers start in seconds, and what they wait for (leases, probes, back-off) passes in real time.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

#: Short timeouts, so that a killed worker's lease ends within the test.
HASTY = {"IMATTR_CONNECT_TIMEOUT": "1", "IMATTR_READ_TIMEOUT": "3.1", "IMATTR_LEASE": "9"}


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class System:
    """A running sandbox, and what a test asks of it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.producer = Producer(sandbox.redis_url, int(SDKAPPID))
        self.redis = redis.Redis.from_url(sandbox.redis_url)
        self.keys = Keys(int(SDKAPPID))
        self.buffer = Buffer(self.redis, self.keys)

    def simulator(self, what: str, given: object = None) -> Any:
        url = f"{self.sandbox.api_url}/simulator/{what}"
        return (
            requests.get(url, timeout=30).json()
            if given is None
            else requests.post(url, json=given, timeout=30)
        )

    def snapshot(self) -> Snapshot:
        return self.buffer.snapshot()

    def settled(self) -> bool:
        snapshot = self.snapshot()
        return not snapshot.pending and not snapshot.in_flight

    def settled_all(self) -> bool:
        """Also what waits in Celery's queue, or is being taken from it."""
        return not self.redis.exists("updates", "updates.taken") and self.settled()


@contextmanager
def running(directory: Path, plan: Plan, **environ: str) -> Iterator[System]:
    settings = {"IMATTR_SECRET_KEY": SECRET_KEY, "IMATTR_LINGER": "0.05"} | environ
    with Sandbox(directory, settings, plan) as sandbox:
        system = System(sandbox)
        yield system
        system.redis.close()


def updates(count: int, value: str = "Paris") -> list[tuple[str, dict[str, str]]]:
    return [(f"user{number:05}", {"city": value}) for number in range(count)]


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_whatever_the_pool_every_last_value_arrives(tmp_path: Path, pool: str) -> None:
    plan = Plan(workers=2, concurrency=4, pool=pool, flower=False)
    with running(tmp_path, plan) as system:
        system.producer.set_many(updates(2000))
        system.producer.set_many(updates(1000, "Rome"))

        wait_until(system.settled)

        applied = system.simulator("users")
        expected = dict(updates(2000)) | dict(updates(1000, "Rome"))
        assert applied == expected
        assert system.snapshot().balanced
        state = system.simulator("state")
        assert state["worst_rolling_second"] <= 100
        assert state["oversized"] == state["repeated_users"] == 0


def test_a_part_of_the_demo_holds_all_it_promises(tmp_path: Path) -> None:
    lines = [line for line, _ in zip(demo_events.events(seed=7), range(8000), strict=False)]

    report = demo.run(tmp_path / "demo", lines=lines, say=lambda _: None, show=lambda _: None, flower=False)

    assert [check for check in report.checks if not check[1]] == []


def test_the_demo_leaves_a_shared_redis_as_it_was(tmp_path: Path, server: Any, client: redis.Redis) -> None:
    client.set("somebody-elses", "key")
    before = set(client.scan_iter(count=1000))
    lines = [line for line, _ in zip(demo_events.events(seed=8), range(500), strict=False)]

    report = demo.run(
        tmp_path / "demo", server.url, lines=lines, say=lambda _: None, show=lambda _: None, flower=False
    )

    assert [check for check in report.checks if not check[1]] == []
    assert set(client.scan_iter(count=1000)) <= before
    assert client.get("somebody-elses") == b"key"


def test_a_shutdown_finishes_what_is_in_flight_and_hands_back_the_rest(tmp_path: Path) -> None:
    plan = Plan(workers=1, concurrency=8, flower=False, simulator_options=("--latency", "0.5"))
    with running(tmp_path, plan) as system:
        system.producer.set_many(updates(20_000))
        wait_until(lambda: system.snapshot().in_flight >= 400)
        worker = system.sandbox.pids()["worker-1"]

        os.kill(worker, signal.SIGTERM)
        wait_until(lambda: _ended(worker))

        snapshot = system.snapshot()
        assert snapshot.in_flight == 0
        assert snapshot.pending > 0
        assert snapshot.ledger["delivered"] == len(system.simulator("users"))
        assert snapshot.balanced
        assert system.redis.exists(system.keys.batches, system.keys.dispatcher) == 0
        system.sandbox.forget("worker-1")


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    plan = Plan(workers=2, concurrency=4, flower=False, simulator_options=("--latency", "0.5"))
    with running(tmp_path, plan, **HASTY) as system:
        system.producer.set_many(updates(6000))
        wait_until(lambda: system.snapshot().in_flight >= 400)
        worker = system.sandbox.pids()["worker-1"]

        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: _ended(worker))
        system.sandbox.forget("worker-1")
        system.producer.set_many(updates(3000, "Rome"))
        wait_until(system.settled)

        assert system.simulator("users") == dict(updates(6000)) | dict(updates(3000, "Rome"))
        assert system.snapshot().balanced


def test_a_restart_of_redis_loses_nothing_and_the_workers_live_on(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=2, concurrency=8, flower=False), **HASTY) as system:
        system.producer.set_many(updates(20_000))
        wait_until(lambda: system.snapshot().ledger["delivered"] > 3000)

        system.sandbox.restart_redis()
        system.producer.set_many(updates(5000, "Rome"))
        wait_until(system.settled, 90)

        assert system.simulator("users") == dict(updates(20_000)) | dict(updates(5000, "Rome"))
        assert system.simulator("state")["worst_rolling_second"] <= 100
        assert system.snapshot().balanced
        system.sandbox.check()


def test_a_wrong_key_stops_the_line_and_the_right_one_opens_it_again(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=2, concurrency=4, flower=False)) as system:
        line = Line(system.redis, system.keys)
        system.simulator("key", "another key")
        system.producer.set_many(updates(1500))
        wait_until(lambda: line.read().state == "stopped")
        wait_until(lambda: not system.snapshot().in_flight)

        state = line.read()
        assert (state.code, state.reason) == (70009, "the UserSig was made with the key of another app")
        assert system.snapshot().live == 1500
        calls = system.simulator("state")["calls"]
        system.producer.set_many(updates(2000, "Rome"))
        time.sleep(1)
        assert system.simulator("state")["calls"] == calls, "nothing is sent while the line is stopped"

        system.simulator("key", SECRET_KEY)
        # The probe is due in half a minute; a test need not wait for it.
        system.redis.hset(system.keys.line, "next_probe", 1)
        wait_until(system.settled)

        assert line.read().state == "open"
        assert system.simulator("users") == dict(updates(2000, "Rome"))
        assert system.snapshot().dead == 0
        assert system.snapshot().balanced


def test_what_is_set_to_null_is_removed_at_the_service(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=2, concurrency=4, flower=False)) as system:
        system.producer.set_many((user, {"city": "Paris", "level": "Gold"}) for user, _ in updates(1500))
        wait_until(system.settled)

        system.producer.set_many((user, {"city": None}) for user, _ in updates(1000))
        system.producer.set_many((user, {"city": "Rome", "level": None}) for user, _ in updates(500))
        wait_until(system.settled)

        expected = {user: {"city": "Paris", "level": "Gold"} for user, _ in updates(1500)}
        expected |= {user: {"level": "Gold"} for user, _ in updates(1000)}
        expected |= {user: {"city": "Rome"} for user, _ in updates(500)}
        assert system.simulator("users") == expected
        assert system.snapshot().balanced


def test_writes_that_the_service_applies_late_never_land_on_newer_ones(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=2, concurrency=8, flower=False)) as system:
        late = {"kind": "late_write", "delay": 3, "chance": 0.3, "times": 12}
        system.simulator("faults", [late])
        for version in range(12):
            system.producer.set_many(updates(300, f"version {version:02}"))
            time.sleep(0.5)
        wait_until(system.settled, 90)
        wait_until(lambda: system.simulator("state")["faults"].get("late_write", 0) >= 5)
        time.sleep(3.5)

        url = f"{system.sandbox.api_url}/simulator/record"
        reached: dict[str, str] = {}
        for line in requests.get(url, timeout=30).text.splitlines():
            _, _, user, attrs = json.loads(line)
            assert attrs["city"] >= reached.get(user, ""), "an old value landed on a newer one"
            reached[user] = attrs["city"]
        assert reached == {user: "version 11" for user, _ in updates(300)}
        assert system.snapshot().balanced


def test_an_outage_stops_the_line_and_its_end_opens_it(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=2, concurrency=8, flower=False)) as system:
        line = Line(system.redis, system.keys)
        system.simulator("faults", [{"kind": "status", "code": 502, "times": None}])
        system.producer.set_many(updates(5000))
        wait_until(lambda: line.read().kind == "outage")
        time.sleep(4)
        calls = system.simulator("state")["calls"]

        system.simulator("faults", [])
        wait_until(system.settled)

        assert calls < 40
        assert line.read().state == "open"
        assert system.simulator("users") == dict(updates(5000))
        assert (system.snapshot().dead, system.snapshot().balanced) == (0, True)


def test_a_rotated_key_file_opens_the_line_without_a_restart(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(SECRET_KEY)
    plan = Plan(workers=2, concurrency=4, flower=False)
    environ = {"IMATTR_SECRET_KEY": "", "IMATTR_SECRET_KEY_FILE": str(key_file)}
    with running(tmp_path, plan, **environ) as system:
        line = Line(system.redis, system.keys)
        system.producer.set_many(updates(500))
        wait_until(system.settled)
        system.simulator("key", "another key")
        system.producer.set_many(updates(1500, "Rome"))
        wait_until(lambda: line.read().state == "stopped")
        key_file.write_text("another key")
        system.redis.hset(system.keys.line, "next_probe", 1)

        wait_until(system.settled)
        system.producer.set_many(updates(3000, "Oslo"))
        wait_until(system.settled)

        assert line.read().state == "open", "no worker went on with a signature of the old key"
        assert system.simulator("users") == dict(updates(3000, "Oslo"))


def test_any_celery_client_can_send_updates_by_name(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=4, flower=False)) as system:
        stranger = Celery(broker=system.sandbox.redis_url)

        stranger.send_task("attributes.update", ["ann", {"city": "Paris"}], queue="updates")
        stranger.send_task(
            "attributes.update", ["bob", {"city": "Oslo"}, "2026-11-01T12:00:00Z"], queue="updates"
        )
        stranger.send_task("attributes.update_many", [[["cid", {"city": "Rome"}], ["", {}]]], queue="updates")
        wait_until(lambda: len(system.simulator("users")) == 3)

        assert system.simulator("users") == {
            "ann": {"city": "Paris"},
            "bob": {"city": "Oslo"},
            "cid": {"city": "Rome"},
        }


def test_messages_that_overtake_each_other_do_not_swap_values(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=1, concurrency=16, flower=False)) as system:
        line = Line(system.redis, system.keys)
        line.pause("so that the pending values tell")
        stranger = Celery(broker=system.sandbox.redis_url)
        for user, _ in updates(500):
            for value in ("old", "older than new", "new"):
                stranger.send_task("attributes.update", [user, {"city": value}], queue="updates")
        wait_until(lambda: system.snapshot().ledger["accepted"] == 1500)

        line.resume()
        wait_until(system.settled)
        assert system.simulator("users") == dict(updates(500, "new"))


def test_a_worker_killed_while_it_consumes_the_stream_loses_nothing(tmp_path: Path) -> None:
    with running(tmp_path, Plan(workers=2, concurrency=4, flower=False), **HASTY) as system:

        def add(value: str) -> None:
            with system.redis.pipeline(transaction=False) as pipe:
                for user, attrs in updates(20_000, value):
                    pipe.xadd(system.keys.updates, {"user": user, "attrs": json.dumps(attrs)})
                pipe.execute()

        line = Line(system.redis, system.keys)
        line.pause("so that the stream is all there is to do")
        add("Paris")
        wait_until(lambda: system.snapshot().ledger["accepted"])
        add("Rome")
        acting = text(system.redis.get(system.keys.consumer) or "").partition("@")[0]
        worker = system.sandbox.pids()[acting]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: _ended(worker))
        system.sandbox.forget(acting)
        assert system.redis.xlen(system.keys.updates) > 0
        add("Oslo")
        line.resume()
        wait_until(lambda: not system.redis.xlen(system.keys.updates))
        wait_until(system.settled)

        assert system.simulator("users") == dict(updates(20_000, "Oslo"))
        assert system.snapshot().balanced


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_updates_without_room_wait_in_the_broker(tmp_path: Path, pool: str) -> None:
    plan = Plan(workers=2, concurrency=4, pool=pool, flower=False)
    with running(tmp_path, plan, IMATTR_MAX_PENDING="50") as system:
        line = Line(system.redis, system.keys)
        line.pause("so that nothing makes room")
        stranger = Celery(broker=system.sandbox.redis_url)
        given = updates(300)
        for user, attrs in given[:200]:
            stranger.send_task("attributes.update", [user, attrs], queue="updates")
        stranger.send_task("attributes.update_many", [given[200:]], queue="updates")
        # Newer values of users who are not even pending yet.
        stranger.send_task("attributes.update_many", [updates(300, "Rome")[250:]], queue="updates")

        def logged(event: str) -> int:
            return sum(file.read_text().count(event) for file in tmp_path.glob("worker-*.log"))

        wait_until(lambda: logged("intake_closed") == 1)
        time.sleep(2)
        assert system.snapshot().live == 50
        assert system.redis.llen("updates") + system.redis.llen("updates.taken") > 1

        line.resume()
        wait_until(lambda: len(system.simulator("users")) == 300)
        wait_until(system.settled_all)
        assert system.simulator("users") == dict(given) | dict(updates(300, "Rome")[250:])
        assert system.redis.hlen("unacked") == 0

        system.sandbox.restart_redis()
        stranger.send_task("attributes.update", ["late", {"city": "Oslo"}], queue="updates")
        wait_until(lambda: "late" in system.simulator("users"))


#: Every way in which a call can fail, each once.
BAD_USER = "mallory"
FAILURES: list[dict[str, Any]] = [
    {"kind": "user_code", "user": BAD_USER, "code": 70107, "times": None},
    {"kind": "status", "code": 502},
    {"kind": "reset"},
    {"kind": "reset", "applied": True},
    {"kind": "truncated"},
    {"kind": "slow", "delay": 4},
    {"kind": "late_write", "delay": 0.1},
    {"kind": "extra_fields"},
    *({"kind": "code", "code": code} for code in (91000, 90033, 12345)),
]


def outcomes_in(directory: Path) -> set[str]:
    """What became of batches, as the workers' logs say."""
    logged = "".join(file.read_text(errors="replace") for file in directory.glob("worker-*.log"))
    return set(re.findall(r'"outcome": "(\w+)"', logged))


def test_no_secret_and_no_value_ever_leaks(tmp_path: Path) -> None:
    marker = "Xanadu-7731"
    plan = Plan(workers=1, concurrency=4, flower=True, login=False, names=("city",))
    environ = {**HASTY, "IMATTR_LOG_LEVEL": "debug", "FLOWER_UNAUTHENTICATED_API": "true"}
    with running(tmp_path, plan, **environ) as system:
        system.simulator("faults", FAILURES)
        stranger = Celery(broker=system.sandbox.redis_url)
        for attrs in ({"city": marker}, {"city": marker * 9}, {"": marker}, marker, [marker]):
            stranger.send_task("attributes.update", ["ann", attrs], queue="updates")
        stranger.send_task("attributes.update", kwargs={"nonsense": marker}, queue="updates")
        stranger.send_task("attributes.updat", ["ann", {"city": marker}], queue="updates")
        stranger.send_task("attributes.update_many", [[["bob", {"city": marker}], [marker]]], queue="updates")
        # In the wrong queue, and so a task of Celery's, which its events show.
        stranger.send_task("attributes.update", ["ann", {"city": marker}], queue="deliveries")
        stranger.send_task(
            "attributes.update", ["ann", {"city": marker}], queue="updates", serializer="pickle"
        )
        groups = itertools.count()

        def has_had_all_outcomes() -> bool:
            # New users each time, since those of a failed call are held for a while; and the one who is always refused, since
            # a call that failed as a whole may have been his only one in company.
            group = next(groups)
            system.producer.set_many((f"{group}-{user}", attrs) for user, attrs in updates(20, marker))
            system.producer.set(BAD_USER, {"city": marker})
            time.sleep(0.3)
            return outcomes_in(tmp_path) >= {"delivered", "retried", "partly_delivered"}

        wait_until(has_had_all_outcomes)
        wait_until(lambda: sum(system.simulator("state")["faults"].values()) >= len(FAILURES))
        system.simulator("key", "another key")
        system.producer.set_many(updates(5, marker))
        wait_until(lambda: "70009" in system.simulator("state")["refused"])
        time.sleep(1)

        shown = ""
        for page in ("api/tasks", "api/workers?refresh=true", "metrics", "tasks", "workers", "broker"):
            answer = requests.get(f"{system.sandbox.flower_url}/{page}", timeout=30)
            answer.raise_for_status()
            shown += answer.text
        queued = repr(system.redis.lrange("deliveries", 0, -1)) + repr(system.redis.hgetall("unacked"))
        state = system.simulator("state")

    logged = "".join(file.read_text(errors="replace") for file in tmp_path.glob("*.log"))
    assert sum(state["faults"].values()) >= len(FAILURES)
    assert state["refused"]["70009"] >= 1
    assert "stopped" in outcomes_in(tmp_path)
    for task in ("deliver", "intake", "update"):
        assert f'"name": "attributes.{task}"' in shown
    for found in (logged, shown, queued):
        assert SECRET_KEY not in found
        assert marker not in found
        # What any UserSig looks like: base64 of deflated data, with its three characters exchanged.
        assert not re.search(r"eJ[A-Za-z0-9*_-]{60,}", found)


def printed_by(code: str, **settings: str) -> str:
    """What Python prints where a worker would run."""
    settings = {
        "SDKAPPID": "1400000000",
        "SECRET_KEY": SECRET_KEY,
        "API_URL": "http://127.0.0.1:9",
        "REDIS_URL": "redis://127.0.0.1:9",
    } | settings
    environ = os.environ | {f"IMATTR_{name}": value for name, value in settings.items()}
    command, root = [sys.executable, "-c", code], Path(__file__).parent.parent
    return subprocess.run(
        command, cwd=root, env=environ, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_a_worker_that_is_ready_spares_the_collector_what_stays() -> None:
    # A full collection of everything that Celery has loaded takes 50 ms, in which slots are missed.
    code = (
        "import gc\nfrom celery import signals\nfrom worker.celery import app\napp.finalize()\n"
        "signals.worker_ready.send(None)\nprint(len(gc.get_objects()), gc.get_freeze_count())"
    )
    left, spared = map(int, printed_by(code).split())

    assert left < spared / 100


def test_a_broker_that_comes_back_does_not_make_the_pools_threads_read_its_connection() -> None:
    # With RabbitMQ they read each other's answers and wait for ever: `make chaos` shows it where one is installed.
    code = (
        "import json\nfrom worker.celery import app\n"
        "print(json.dumps([app.conf.worker_enable_prefetch_count_reduction, app.conf.broker_transport_options]))"
    )
    reduces, options = json.loads(printed_by(code, BROKER_URL="amqp://guest@127.0.0.1:9//"))

    assert not reduces
    # A connection of which the other end is gone is noticed.
    assert {"connect_timeout", "read_timeout", "write_timeout"} <= options.keys()


def test_up_serves_and_keeps_its_data(tmp_path: Path) -> None:
    def imattr(*arguments: str) -> str:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
        command = [sys.executable, "-m", "worker.cli", *arguments]
        environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        return subprocess.run(
            command, cwd=tmp_path, env=environ, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    @contextmanager
    def up() -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "worker.cli", "up", "--workers", "1", "--no-flower"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
        environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: (tmp_path / ".imattr" / "settings.env").exists() or process.poll() is not None)
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
            assert "simulator; nothing reaches the real service" in output
            assert "data kept in .imattr/redis" in output

    with up():
        assert (tmp_path / ".imattr" / "settings.env").stat().st_mode & 0o077 == 0
        assert imattr("put", "u1", "city=Paris") == "accepted, pending\n"
        wait_until(lambda: json.loads(imattr("status", "--json"))["ledger"]["delivered"] == 1)
    assert not (tmp_path / ".imattr" / "settings.env").exists()

    with up():
        ledger = json.loads(imattr("status", "--json"))["ledger"]
        assert (ledger["accepted"], ledger["delivered"], ledger["balanced"]) == (1, 1, True)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
