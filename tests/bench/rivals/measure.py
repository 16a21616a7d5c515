"""What is done to every contestant: the job, a worker killed, eight clients, another quota, and a failover of Redis."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import redis
import requests

from tests.bench import ATTRS, cpu, server, state_of, users
from tests.bench.rivals import results
from tests.bench.rivals.api import QUOTA
from tests.bench.rivals.contestants import (
    CONTESTANTS,
    DIFFERENT,
    DIFFERENT_BATCHES,
    DIFFERENT_SINGLE,
    NODE_PROJECT,
    ROOT,
    Contestant,
    absent,
)
from tests.bench.rivals.results import OTHER_QUOTA, OURS, PARTS, Figures, Report
from tests.redis_fleet import SentinelFleet
from worker.delivery.api import PATHS
from worker.delivery.usersig import sign
from worker.errors import InvalidUpdate
from worker.models import Attributes, UserId, check_update
from worker.sandbox import demo, demo_events
from worker.sandbox.processes import Plan, Sandbox
from worker.state.connection import connect

Event = tuple[UserId, Attributes, int]

#: Seconds until the API replies.
LATENCY = 0.05
#: Seconds for the first call; and without a call until nothing more is expected, longer than any contestant
#: takes to give what a dead worker had to another one: Celery looks every 100 s for what is older than 60 s.
START, STALL = 60.0, 180.0
#: Seconds that enqueuing may take, and that a run may take after what happens in the middle of it.
ENQUEUE, PATIENCE = 300.0, 200.0

#: Client processes that send messages one by one, and how many each of them sends; seconds until it is enough.
CLIENTS, EACH_CLIENT, CLIENTS_CAP = 8, 2000, 20.0
#: Seconds from the first call on with another quota.
QUOTA_CAP = 10.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: events of the job, seconds it may take, and the part of all other runs."""

    events: int = 50_000
    cap: float = 30.0
    rest: float = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """The events, (user, attributes, ms), in the order of arrival, and what must be there in the end."""

    events: Sequence[Event]
    expected: demo.Expected

    @classmethod
    def make(cls, count: int) -> Job:
        """The first valid events of the demo."""
        valid = list(islice(_valid(demo_events.events()), count))
        return cls([event for _, event in valid], demo.expect((line for line, _ in valid), frozenset()))


def _valid(lines: Iterator[str]) -> Iterator[tuple[str, Event]]:
    names = frozenset(demo_events.NAMES)
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, InvalidUpdate):
            given = json.loads(line)
            update = check_update(given["user"], given["attrs"], given["occurred_at"], names)
            yield line, (update.user, update.attrs, update.occurred_ms)


@dataclass(slots=True)
class Stage:
    """A server and a simulator, and the worker processes of one contestant, by name."""

    contestant: Contestant
    sandbox: Sandbox
    client: redis.Redis
    fleet: SentinelFleet | None = None
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def _environ(self) -> dict[str, str]:
        own = self.sandbox.environ
        app = int(own["IMATTR_SDKAPPID"])
        sig = sign(own["IMATTR_SECRET_KEY"], "administrator", app, int(time.time()))
        query = f"sdkappid={app}&identifier=administrator&contenttype=json&usersig={sig}"
        url = f"{self.sandbox.api_url}/{PATHS['chat']}set_attr?{query}"
        return {**os.environ, **own, "CALL_URL": url, "PYTHONUNBUFFERED": "1"}

    def enqueue(self, events: Sequence[Event]) -> float:
        """Enqueue everything with one process; returns the seconds it took."""
        if not self.contestant.takes_times:
            # What comes late would win by coming late: in the order of the events they lose nothing.
            events = sorted(events, key=lambda event: event[2])
        file = self.sandbox.directory / "events.jsonl"
        file.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        command = self.contestant.enqueue_command(file)
        done = subprocess.run(
            command, cwd=ROOT, env=self._environ(), capture_output=True, text=True, timeout=ENQUEUE
        )
        if done.returncode:
            raise RuntimeError(f"enqueuing ended with {done.returncode}: {done.stderr}")
        return float(done.stdout)

    @contextlib.contextmanager
    def clients(self, count: int) -> Iterator[list[subprocess.Popen[str]]]:
        """Celery clients that send `count` messages each, about different users, once `begin` is called."""
        module = self.contestant.client or self.contestant.enqueuer
        found: list[subprocess.Popen[str]] = []
        try:
            for number in range(CLIENTS):
                file = self.sandbox.directory / f"events-{number}.jsonl"
                lines = (json.dumps((*user, 0)) + "\n" for user in users(count, number * count))
                file.write_text("".join(lines), encoding="utf-8")
                command = [sys.executable, "-m", "tests.bench.rivals.enqueue", module, str(file), "wait"]
                found.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=self._environ(),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
            for client in found:
                assert client.stdout
                client.stdout.readline()
            yield found
        finally:
            for client in found:
                client.kill()
                client.communicate()

    def start(self, *names: str) -> None:
        for name in names:
            with (self.sandbox.directory / f"{name}.log").open("wb") as log:
                self.workers[name] = subprocess.Popen(
                    self.contestant.worker_command(name),
                    cwd=ROOT,
                    env=self._environ(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def kill(self, name: str) -> None:
        worker = self.workers.pop(name)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    def left(self) -> int:
        return self.contestant.left(self.client)

    def is_done(self) -> bool:
        """Whether nothing is left. Not while Redis does not answer."""
        with contextlib.suppress(redis.RedisError):
            return not self.left()
        return False

    def state(self) -> Any:
        return state_of(self.sandbox)

    def ask(self, what: str) -> Any:
        reply = requests.get(f"{self.sandbox.api_url}/simulator/{what}", timeout=60)
        return [json.loads(line) for line in reply.text.splitlines()] if what == "record" else reply.json()

    def worker_cpu(self) -> float:
        return sum(cpu(pid) for worker in self.workers.values() for pid in group(worker.pid))

    def redis_cpu(self) -> float:
        return cpu(self.sandbox.pids()["redis"])

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true within that time; raises `RuntimeError` when a worker ends by itself."""
        deadline = time.monotonic() + seconds
        while not until():
            for name, worker in self.workers.items():
                if worker.poll() is not None:
                    log = (self.sandbox.directory / f"{name}.log").read_text(errors="replace")
                    raise RuntimeError(f"{name} of {self.contestant.name} ended:\n{log[-2000:]}")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def settle(self, quiet: float) -> None:
        """Wait until nothing is left and no call has come for `quiet` seconds, or no call for `STALL` seconds."""
        last, since = -1, time.monotonic()
        deadline = since + PATIENCE
        while time.monotonic() < deadline:
            idle = time.monotonic() - since
            if idle >= STALL or (idle >= quiet and self.is_done()):
                return
            time.sleep(0.1)
            calls = self.state()["calls"]
            if calls != last:
                last, since = calls, time.monotonic()


def group(leader: int) -> Iterator[int]:
    """The processes of a worker: those of its group."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[2]) == leader:
                yield int(file.parent.name)


def begin(clients: Sequence[subprocess.Popen[str]]) -> None:
    for client in clients:
        assert client.stdin
        client.stdin.write("go\n")
        client.stdin.flush()


@contextlib.contextmanager
def stage(contestant: Contestant, *, quota: int = QUOTA, sentinels: bool = False) -> Iterator[Stage]:
    """The API with that quota, and one Redis; or a primary with two replicas, and three sentinels."""
    options = ("--latency", str(LATENCY), "--quota", str(quota))
    names = tuple({*demo_events.NAMES, *ATTRS})
    plan = Plan(workers=0, flower=False, names=names, simulator_options=options)
    settings = {"IMATTR_QUOTA": str(quota)}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = None
        if sentinels:
            fleet = stack.enter_context(SentinelFleet(directory / "fleet"))
            settings["IMATTR_REDIS_URL"] = fleet.url.removesuffix("/0")
        sandbox = stack.enter_context(Sandbox(directory, settings, plan))
        client = stack.enter_context(connect(sandbox.redis_url, timeout=2, connect_timeout=2))
        running = Stage(contestant, sandbox, client, fleet)
        try:
            yield running
        finally:
            for name in list(running.workers):
                running.kill(name)


def do_job(contestant: Contestant, job: Job, scale: Scale) -> results.Job:
    """Enqueue the events, then deliver them, for `cap` seconds at most."""
    with stage(contestant) as it:
        enqueue_seconds = it.enqueue(job.events)
        total, enqueue_cpu = it.left(), it.redis_cpu()
        it.start("worker-1", "worker-2")
        if not it.wait(lambda: it.state()["calls"] > 0, START):
            raise RuntimeError(f"{contestant.name} makes no call")
        worker_cpu = it.worker_cpu()
        finished = it.wait(it.is_done, scale.cap)
        worker_cpu, redis_cpu = it.worker_cpu() - worker_cpu, it.redis_cpu()
        if finished:
            it.settle(0.5)
        state, done = it.state(), 1 - it.left() / total
        record = it.ask("record")
        wrong = _wrong(it.ask("users"), job.expected) if finished else None
    return results.Job(
        events=len(job.events),
        done=done,
        enqueue_seconds=enqueue_seconds,
        seconds=state["seconds"],
        calls=state["calls"],
        refused=state["refused"].get("60007", 0),
        worst=state["worst_rolling_second"],
        worker_cpu=worker_cpu,
        # Enqueuing was complete at the cap, too: `whole` must not count it again.
        redis_cpu=redis_cpu - enqueue_cpu + enqueue_cpu * done,
        older=demo.stale_writes(record, job.expected),
        wrong=wrong,
    )


def _wrong(applied: dict[str, dict[str, str]], expected: demo.Expected) -> int:
    """Attributes that are not what the newest event says."""
    return sum(
        applied.get(user, {}).get(name) != value
        for user, attrs in expected.latest.items()
        for name, value in attrs.items()
    )


def kill_one(contestant: Contestant, scale: Scale) -> results.Kill:
    """Different users, so that every update counts. One worker is killed half-way, another one started."""
    count = int(contestant.size * scale.rest)
    with stage(contestant) as it:
        it.enqueue(different(count))
        it.start("worker-1", "worker-2")
        if not it.wait(lambda: it.state()["users"] >= count / 2, START + count / 2 / QUOTA * 4):
            raise RuntimeError(f"{contestant.name} does not deliver")
        killed = time.monotonic()
        it.kill("worker-1")
        it.start("worker-3")
        it.settle(3)
        record = it.ask("record")
        arrived: dict[str, dict[str, str]] = it.ask("users")
    writes = Counter(user for _, _, user, _ in record)
    return results.Kill(
        users_per_second=rate([at for at, *_ in record if at < killed]),
        lost=sum(arrived.get(user) != attrs for user, attrs in users(count)),
        twice=sum(times > 1 for times in writes.values()),
    )


def different(count: int) -> list[Event]:
    now = int(time.time() * 1000)
    return [(user, attrs, now) for user, attrs in users(count)]


def from_clients(contestant: Contestant, scale: Scale) -> results.Clients | None:
    """Different users, one message each, from clients that all begin at once: before the workers start, and beside them."""
    if not contestant.app:
        return None
    count = int(EACH_CLIENT * scale.rest)
    with stage(contestant) as it:
        with it.clients(count) as clients:
            start = time.monotonic()
            begin(clients)
            for client in clients:
                client.wait(ENQUEUE)
            sent = CLIENTS * count / (time.monotonic() - start)
        it.start("worker-1", "worker-2")
        _deliver(it, CLIENTS * count, CLIENTS_CAP)
        drained = rate([at for at, *_ in it.ask("record")])
    with stage(contestant) as it:
        it.start("worker-1", "worker-2")
        logs = [it.sandbox.directory / f"{name}.log" for name in it.workers]
        it.wait(lambda: all(b" ready." in log.read_bytes() for log in logs), START)
        with it.clients(count) as clients:
            start = time.monotonic()
            begin(clients)
            it.wait(lambda: it.state()["users"] >= CLIENTS * count, CLIENTS_CAP)
            meanwhile = it.state()["users"] / (time.monotonic() - start)
    return results.Clients(sent=sent, drained=drained, meanwhile=meanwhile)


def _deliver(it: Stage, users: int, cap: float) -> None:
    """Wait until that many have arrived, `cap` seconds from the first at most."""
    if not it.wait(lambda: it.state()["users"] > 0, START):
        raise RuntimeError(f"{it.contestant.name} does not deliver")
    it.wait(lambda: it.state()["users"] >= users, cap)


def other_quota(contestant: Contestant, scale: Scale) -> results.Quota:
    """Different users, with twice the quota."""
    count = int(2 * contestant.size * scale.rest)
    with stage(contestant, quota=OTHER_QUOTA) as it:
        it.enqueue(different(count))
        it.start("worker-1", "worker-2")
        _deliver(it, count, QUOTA_CAP)
        state, record = it.state(), it.ask("record")
    return results.Quota(
        users_per_second=rate([at for at, *_ in record]),
        calls=state["calls"],
        refused=state["refused"].get("60007", 0),
        worst=state["worst_rolling_second"],
    )


def fail_over(contestant: Contestant, scale: Scale) -> results.Failover:
    """The job on Redis behind sentinels, whose primary is killed half-way and stays away."""
    job = Job.make(min(int(contestant.size * scale.rest), scale.events))
    with stage(contestant, sentinels=True) as it:
        assert it.fleet
        it.enqueue(job.events)
        total = it.left()
        it.start("worker-1", "worker-2")
        if not it.wait(lambda: it.left() <= total / 2, START + total / QUOTA * 4):
            raise RuntimeError(f"{contestant.name} does not deliver")
        killed = time.monotonic()
        it.fleet.fail_over(how=lambda primary: primary.kill())
        promoted = time.monotonic()
        it.settle(3)
        left, state, record = it.left(), it.state(), it.ask("record")
        arrived: dict[str, dict[str, str]] = it.ask("users")
    after = [at for at, *_ in record if at > promoted]
    return results.Failover(
        events=len(job.events),
        promoted=promoted - killed,
        pause=min(after) - killed if after else None,
        left=left,
        lost=sum(user not in arrived for user in job.expected.latest),
        older=demo.stale_writes(record, job.expected),
        wrong=_wrong(arrived, job.expected),
        worst=state["worst_rolling_second"],
    )


def rate(times: Sequence[float]) -> float:
    """Users a second, from the times at which they arrived (seconds), over the full seconds from the first to the last.

    Full ones, so that limiters that let calls pass in bursts are not measured from one burst to the next.
    """
    first, last = min(times), max(times)
    full = max(1, int(last - first))
    return sum(at < first + full for at in times) / full


def bare(events: Sequence[Event]) -> dict[str, float]:
    """What Redis alone gives: events a second that one client writes, and the barest script, one by one."""
    with server() as running, redis.Redis.from_url(running.url) as client:
        start = time.perf_counter()
        for first in range(0, len(events), 1000):
            pipeline = client.pipeline(transaction=False)
            for user, attrs, _ in events[first : first + 1000]:
                pipeline.hset("bare", user, json.dumps(attrs))
            pipeline.execute()
        piped = len(events) / (time.perf_counter() - start)
        script = client.register_script("return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])")
        few = events[:5000]
        start = time.perf_counter()
        for user, attrs, _ in few:
            script(["bare"], [user, json.dumps(attrs)])
        single = len(few) / (time.perf_counter() - start)
    return {"hset_pipelined": round(piped), "evalsha": round(single)}


def machine() -> dict[str, str]:
    """What the figures were measured on, and the versions of everything."""
    found = {"cores": str(os.cpu_count()), "system": platform.system(), "Python": platform.python_version()}
    with server(persistent=False) as running, redis.Redis.from_url(running.url) as client:
        info = client.info("server")
    found |= {info.get("server_name", "redis"): info.get("valkey_version", info["redis_version"])}
    found |= {name: version(name) for name in ("celery", "celery-batches", "limits", "throttled-py")}
    manifest = NODE_PROJECT / "node_modules" / "bullmq" / "package.json"
    if manifest.exists():
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
        found |= {"node": node.stdout.strip().removeprefix("v")}
        found |= {"bullmq": json.loads(manifest.read_text(encoding="utf-8"))["version"]}
    return found


#: How each part is measured.
MEASURES: dict[str, Callable[[Contestant, Scale], Any]] = {
    "kill": kill_one,
    "clients": from_clients,
    "quota": other_quota,
    "failover": fail_over,
}


def measure(
    scale: Scale,
    say: Callable[[str], None],
    only: Sequence[str] = (),
    parts: Sequence[str] = (),
    *,
    file: Path,
) -> Report:
    """Measure everybody who can take part, or only those named, and imattr.

    What fails is noted, and the rest goes on. The report is written to `file` after each contestant.
    """
    job, missing = Job.make(scale.events), absent()
    measures = {"job": lambda contestant, scale: do_job(contestant, job, scale), **MEASURES}
    setup = {
        "events": scale.events,
        "users": len(job.expected.latest),
        "cap": scale.cap,
        "quota": QUOTA,
        "latency": LATENCY,
        "different": int(DIFFERENT * scale.rest),
        "different_batches": int(DIFFERENT_BATCHES * scale.rest),
        "different_single": int(DIFFERENT_SINGLE * scale.rest),
        "messages": int(CLIENTS * EACH_CLIENT * scale.rest),
    }
    report = Report(machine(), setup, bare(job.events), {}, dict(missing))
    began = time.monotonic()
    for contestant in CONTESTANTS:
        if only and contestant.name not in {OURS, *only}:
            continue
        if why := missing.get(contestant.name):
            say(f"{contestant.title}: left out, {why}")
            continue
        found: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for part in PARTS:
            if parts and part not in parts:
                continue
            try:
                found[part] = measures[part](contestant, scale)
            # Whatever it is: the others are still worth measuring.
            except Exception as error:
                failed[part] = " ".join(f"{type(error).__name__}: {error}".split())[-300:]
            said = _short(found[part]) if part in found else f"failed, {failed[part]}"
            say(f"{(time.monotonic() - began) / 60:4.1f} min  {contestant.title}, {part}: {said}")
        report.figures[contestant.name] = Figures(failed=failed, **found)
        report.write(file)
    return report


def _short(measured: Any) -> str:
    if measured is None:
        return "–"
    return ", ".join(
        f"{name.replace('_', ' ')} {round(value, 2) if value is not None else '–'}"
        for name, value in dataclasses.asdict(measured).items()
    )
