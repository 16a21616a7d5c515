"""The system under test: servers, simulator, proxies, workers, writers, imports; every part a process."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import redis
import requests

from tests.chaos import rubbish, writers
from tests.chaos.brokers import Broker, RabbitMQ, RedisBroker
from tests.chaos.people import Console
from tests.chaos.proxy import Proxy
from tests.history import Answer, Offer
from tests.redis_fleet import ClusterFleet, Node, SentinelFleet
from worker.clock import SystemClock
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer, Snapshot
from worker.state.connection import connect
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.quarantine import Quarantine
from worker.state.refused import Refused

ROOT = Path(__file__).parents[2]
#: What the state is in.
Store = Literal["single", "sentinel", "cluster"]
Fleet = SentinelFleet | ClusterFleet

#: Updates a second, by way.
RATES = {"set": 150.0, "set_many": 250.0, "stream": 150.0, "tasks": 100.0}
#: Lines of one import, and after how many of them comes one that is refused.
LINES, BAD_EVERY = 400, 40
#: Seconds from a plan, or its application, to the next one; and lines of a file that is planned.
PLAN_EVERY, PLANNED = 1.0, 120
#: Seconds by which the file of a plan may be older than the plan.
FILE_AGE = 3.0
#: Exit codes of a command that has done its work; the other one has refused some lines.
DONE, REFUSED_SOME = 0, 3
#: Calls a minute that the auditor makes.
AUDIT = "60"
#: Seconds a lease lasts; a call takes 4.1 s at most.
LEASE = 9
#: Seconds a worker may take to end after SIGTERM, with Redis out of reach for a part of them.
SHUTDOWN = 60.0
#: Seconds that a message may wait in the broker's queue.
QUEUED_FOR = 30.0
#: Settings of the workers: small batches, so that many are on their way at once.
SETTINGS = {
    "IMATTR_BATCH_SIZE": "10",
    "IMATTR_LINGER": "0.05",
    "IMATTR_CONNECT_TIMEOUT": "1",
    "IMATTR_READ_TIMEOUT": "3.1",
    "IMATTR_LEASE": str(LEASE),
    "IMATTR_BACKOFF_MAX": "5",
    "IMATTR_LOG_FORMAT": "json",
}

#: Whom workers and writers are for a single Redis, and what that user may do.
USER = "imattr"
EVERYTHING: dict[str, Any] = {"keys": ["*"], "channels": ["*"], "categories": ["+@all"]}


@dataclass(slots=True)
class Import:
    """A file that is imported, begun again until all of it is accepted."""

    path: Path
    began: float
    process: subprocess.Popen[bytes]
    ended: float = float("inf")


@dataclass(slots=True)
class Comparison:
    """A file that is compared with the API, and whose differences are then queued."""

    path: Path
    users: list[str]
    value: str
    began: float
    process: subprocess.Popen[bytes]
    #: The file's own time, if these users' updates have event times.
    as_of_ms: int | None = None
    applies: bool = False
    ended: float = float("inf")
    #: Whether all of it was queued.
    whole: bool = False

    @property
    def plan(self) -> Path:
        return self.path.with_suffix(".plan")

    @property
    def said(self) -> Path:
        """What the command that applies it has printed."""
        return self.path.with_suffix(".said")


@dataclass(slots=True)
class Writer:
    """A writer's process. The `number` is part of its users' names: no two have the same users."""

    way: str
    number: int
    process: subprocess.Popen[bytes]

    def user(self, rng: random.Random) -> str:
        """One of its users."""
        return f"{self.way}{self.number}-{rng.randrange(writers.USERS):03}"


@dataclass(slots=True)
class Promotion:
    """A replica became the primary. What was accepted from `since` to `until` may be lost."""

    since: float
    until: float
    node: Node
    #: How many updates the server before had accepted, and how many of them this one never got; None = not known yet.
    accepted: int
    lost: int | None = None
    #: When it was there, by the clock of this machine.
    at: float = field(default_factory=time.monotonic)


@dataclass
class System:
    """Everything that runs, and what the faults do to it."""

    directory: Path
    rng: random.Random
    sandbox: Sandbox
    #: One server behind a proxy, or a fleet.
    store: tuple[EmbeddedServer, Proxy] | Fleet
    broker: Broker
    broker_proxy: Proxy
    api_proxy: Proxy
    key_file: Path
    appendfsync: Literal["always", "everysec"]
    #: How many replicas must have an update.
    replicas: int = 0
    server_environ: dict[str, str] | None = None
    #: A directory with the previous version, if there is one, the numbers of the workers that are of it, and the writers.
    previous: Path | None = None
    old: set[int] = field(default_factory=set)
    old_ways: Collection[str] = ()
    #: Users whose record something has damaged: an update of theirs may be in the quarantine.
    damaged: set[str] = field(default_factory=set)
    #: Users whose damaged record was found, and set aside; and users of whom something else than updates was damaged.
    set_aside: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    console: Console | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    #: What a person threw away: user, attribute, value.
    purged: set[tuple[str, str, str | None]] = field(default_factory=set)
    frozen: set[int] = field(default_factory=set)
    #: Workers that were told to end: process id, and until when they may take.
    ending: dict[str, tuple[int, float]] = field(default_factory=dict)
    #: Workers in whose place none comes.
    surplus: set[str] = field(default_factory=set)
    writing: dict[str, Writer] = field(default_factory=dict)
    imports: list[Import] = field(default_factory=list)
    ledgers: list[dict[str, int]] = field(default_factory=list)
    #: What was refused on its way, by its id.
    refused: dict[str, str] = field(default_factory=dict)
    #: What the server had on its disk, and when: seconds, file, bytes.
    on_disk: list[tuple[float, Path, int]] = field(default_factory=list)
    #: From when to when what was accepted may be lost, besides by promotions.
    losses: list[tuple[float, float]] = field(default_factory=list)
    promotions: list[Promotion] = field(default_factory=list)
    #: How many workers did not end in time after SIGTERM.
    hung: int = 0
    _incarnations: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.keys = Keys(int(SDKAPPID))
        url = self.store[0].url if isinstance(self.store, tuple) else self.store.url
        self.redis = connect(url, key=self.keys.pending)
        self.buffer = Buffer(self.redis, self.keys)
        self.line = Line(self.redis, self.keys)
        self.letters = DeadLetters(self.redis, self.keys)
        self.quarantine = Quarantine(self.redis, self.keys)
        self.names = AttributeNames(self.redis, self.keys, SystemClock())

    @property
    def server(self) -> EmbeddedServer:
        """The one server."""
        assert isinstance(self.store, tuple)
        return self.store[0]

    @property
    def redis_proxy(self) -> Proxy:
        """The way of everybody else to it."""
        assert isinstance(self.store, tuple)
        return self.store[1]

    @property
    def fleet(self) -> Fleet:
        """The fleet of servers."""
        assert not isinstance(self.store, tuple)
        return self.store

    # The API.

    def api(self, what: str, given: object = None) -> Any:
        """Ask the simulator for something, or tell it."""
        url = f"{self.sandbox.api_url}/simulator/{what}"
        if given is not None:
            return requests.post(url, json=given, timeout=30)
        reply = requests.get(url, timeout=120)
        return [json.loads(line) for line in reply.text.splitlines()] if what == "record" else reply.json()

    @property
    def password_file(self) -> Path | None:
        """Where workers and writers read Redis' password; None if they need none."""
        found = self.sandbox.environ.get("IMATTR_REDIS_PASSWORD_FILE")
        return Path(found) if found else None

    def let_in(self) -> None:
        """Let everybody but ourselves in with the password in the file only. The server forgets that when it ends."""
        if self.password_file:
            password = self.password_file.read_text()
            self.redis.acl_setuser(USER, enabled=True, reset=True, passwords=[f"+{password}"], **EVERYTHING)

    def rotate_key(self) -> None:
        key = secrets.token_hex(32)
        self.key_file.write_text(key)
        self.api("key", key)

    # Workers.

    def workers(self) -> dict[str, int]:
        """Process ids of the workers that are well, by name."""
        pids = {name: pid for name, pid in self.sandbox.pids().items() if name.startswith("worker")}
        ill = self.frozen | {pid for pid, _ in self.ending.values()}
        return {name: pid for name, pid in pids.items() if pid not in ill}

    def some_worker(self) -> tuple[str, int] | None:
        return self.rng.choice(sorted(found.items())) if (found := self.workers()) else None

    def end_worker(self, how: signal.Signals) -> bool:
        """Kill or stop some worker; another one comes in its place, at the turn after it has ended."""
        if not (found := self.some_worker()):
            return False
        self._end_worker(*found, how)
        return True

    def _end_worker(self, name: str, pid: int, how: signal.Signals) -> None:
        os.kill(pid, how)
        self.ending[name] = (pid, time.monotonic() + SHUTDOWN)

    def add_worker(self) -> str:
        """Start one worker more, in whose place none comes; returns its name."""
        self._incarnations += 1
        number = 100 + self._incarnations
        self.start_worker(number)
        self.surplus.add(f"worker-{number}")
        return f"worker-{number}"

    def end_workers(self, names: Collection[str]) -> None:
        """Stop these in order, unless something else is happening to them. Others come in their places, but not of surplus ones."""
        for name, pid in self.workers().items():
            if name in names:
                self._end_worker(name, pid, signal.SIGTERM)

    def turn(self) -> None:
        """Replace the workers that have ended, and go on with the imports."""
        for name, (pid, deadline) in list(self.ending.items()):
            number = int(name.rpartition("-")[2])
            if not _ended(pid):
                if time.monotonic() < deadline:
                    continue
                os.kill(pid, signal.SIGKILL)
                # The previous version may hang, with RabbitMQ: that was mended in this one.
                self.hung += number not in self.old
            self.sandbox.forget(name)
            del self.ending[name]
            self._incarnations += 1
            log = self.directory / f"{name}.log"
            log.rename(log.with_suffix(f".{self._incarnations}.log"))
            if name not in self.surplus:
                self.start_worker(number)
        if not self.ending and not self.frozen:
            self.sandbox.check()
        if self.console:
            self.console.check()
        self.import_next()
        self.compare_next()

    def start_worker(self, number: int) -> Callable[[], None]:
        return self.sandbox.start_worker(number, code=self.previous if number in self.old else None)

    # Redis.

    def kill_redis(self) -> None:
        """Kill the server that holds the state, as a crash of the process does, and start it again."""
        self.server.kill()
        self._start_redis()

    def lose_power(self) -> None:
        """Kill it like a crash of the machine: what was written in its last second is not on the disk."""
        self.server.kill()
        killed = time.monotonic()
        sampled = [
            (at, path, size) for at, path, size in self.on_disk if at <= killed - 1.0 and path.exists()
        ]
        if sampled:
            at, path, size = sampled[-1]
            os.truncate(path, size)
            self.losses.append((at, killed))
        self._start_redis()

    def _start_redis(self) -> None:
        server = EmbeddedServer(
            self.server.directory,
            port=self.server.port,
            appendfsync=self.appendfsync,
            environ=self.server_environ,
        )
        self.store = (server, self.redis_proxy)
        self.let_in()

    # Writers and imports.

    def start_writer(self, way: str) -> None:
        """Start the writer of a way, in place of the one that there was."""
        self._incarnations += 1
        notes = self.directory / "notes" / f"{way}-{self._incarnations}.jsonl"
        notes.parent.mkdir(exist_ok=True)
        arguments = [way, str(self._incarnations), str(RATES[way]), str(notes)]
        code = self.previous if way in self.old_ways else None
        process = self._run("tests.chaos.writers", arguments, f"writer-{way}.log", code=code)
        self.writing[way] = Writer(way, self._incarnations, process)

    def kill_writer(self) -> None:
        way = self.rng.choice(sorted(self.writing))
        self.end_writer(way)
        self.start_writer(way)

    def end_writer(self, way: str) -> None:
        self.writing[way].process.kill()
        self.writing[way].process.wait()

    def import_next(self) -> None:
        """Begin the next import, or go on with one that was interrupted."""
        last = self.imports[-1] if self.imports else None
        if last and last.ended == float("inf"):
            if last.process.poll() is None:
                return
            if last.process.returncode in (DONE, REFUSED_SOME):
                last.ended = time.monotonic()
            else:
                last.process = self._import(last.path)
            return
        path = self.directory / f"import-{len(self.imports)}.jsonl"
        lines = [{"user": f"i{len(self.imports)}-{n:04}", "attrs": {"city": f"i{n}"}} for n in range(LINES)]
        texts = [json.dumps(line) for line in lines]
        for place in range(0, LINES, BAD_EVERY):
            texts.insert(place, rubbish.LINES[place // BAD_EVERY % len(rubbish.LINES)])
        path.write_text("".join(f"{text}\n" for text in texts))
        self.imports.append(Import(path, time.monotonic(), self._import(path)))

    def compare_next(self) -> None:
        """Go on with `imattr plan` and `imattr apply` of a file; or begin with the next one, some time after the last."""
        last = self.comparisons[-1] if self.comparisons else None
        if last is None or last.ended < time.monotonic() - PLAN_EVERY:
            self._compare()
        elif last.ended == float("inf") and (code := last.process.poll()) is not None:
            done = code in (DONE, REFUSED_SOME)
            if done and last.applies:
                last.ended, last.whole = time.monotonic(), self._was_whole(last)
            else:
                last.applies |= done
                last.process = self._plan_or_apply(last)

    def _compare(self) -> None:
        """Plan a file: now about users of the last import, now about some whom live updates come for at this moment."""
        number = len(self.comparisons)
        imported = [one for one in self.imports if one.ended < float("inf")]
        if number % 2 == 0 and not imported:
            return
        path, as_of_ms = self.directory / f"compare-{number}.jsonl", None
        if number % 2 == 0:
            # Most of an older one has been delivered.
            place = self.rng.randrange(max(1, len(imported) - 3))
            users = [f"i{place}-{n:04}" for n in range(0, LINES, LINES // PLANNED)][:PLANNED]
        else:
            writer = self.writing["set_many"]
            users = [f"{writer.way}{writer.number}-{n:03}" for n in range(PLANNED)]
            as_of_ms = int((time.time() - self.rng.uniform(0, FILE_AGE)) * 1000)
        value = f"p{number}"
        path.write_text("".join(json.dumps({"user": u, "attrs": {"city": value}}) + "\n" for u in users))
        begun = Comparison(path, users, value, time.monotonic(), None, as_of_ms)  # type: ignore[arg-type]
        begun.process = self._plan_or_apply(begun)
        self.comparisons.append(begun)

    def _plan_or_apply(self, one: Comparison) -> subprocess.Popen[bytes]:
        if one.applies:
            one.said.unlink(missing_ok=True)
            return self._run("worker.cli", ["apply", str(one.plan), "--yes", "--json"], one.said.name)
        as_of = [] if one.as_of_ms is None else ["--as-of", str(one.as_of_ms)]
        return self._run(
            "worker.cli", ["plan", str(one.path), "--out", str(one.plan), "--json", *as_of], "plan.log"
        )

    @staticmethod
    def _was_whole(one: Comparison) -> bool:
        """Whether every user of the file was queued, by what the command said."""
        with suppress(ValueError, KeyError, IndexError):
            said = one.said.read_text()
            facts = json.loads(said[said.index("{") :])
            return bool(facts["queued"] == len(one.users))
        return False

    def _import(self, path: Path) -> subprocess.Popen[bytes]:
        return self._run("worker.cli", ["import", str(path), "--json"], "import.log")

    def _run(
        self, module: str, arguments: list[str], log: str, *, code: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a module; `code` is a directory with another version of the product."""
        # What is in the working directory comes first, so that tests are today's in any case.
        here = {"PYTHONPATH": str(ROOT)} if code else {}
        with (self.directory / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=code,
                env=os.environ | self.sandbox.environ | here,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def offers(self) -> Iterator[Offer]:
        """Everything that was offered, as its writers saw it."""
        refused = self._refused()
        yield from map(self._with_damage, self._offers(refused))

    def _offers(self, refused: set[tuple[str, str, str | None]]) -> Iterator[Offer]:
        for notes in sorted((self.directory / "notes").glob("*.jsonl")):
            for offer in writers.read(notes):
                known = self._with_losses(offer)
                # Nobody could tell the sender of a message. It may have been taken all the same, the second time.
                told_late = (offer.user, offer.name, offer.value) in refused
                is_good = known.answer is not Answer.REFUSED
                yield replace(known, answer=Answer.DOUBT) if told_late and is_good else known
        for done in self.imports:
            answer = Answer.DOUBT if done.ended == float("inf") else Answer.ACCEPTED
            number = self.imports.index(done)
            for n in range(LINES):
                offer = Offer(f"i{number}-{n:04}", "city", f"i{n}", done.began, done.ended, answer)
                yield self._with_losses(offer)
        for one in self.comparisons:
            answer = Answer.ACCEPTED if one.whole and one.as_of_ms is None else Answer.DOUBT
            for user in one.users:
                offer = Offer(user, "city", one.value, one.began, one.ended, answer, one.as_of_ms)
                yield self._with_losses(offer)

    def _with_damage(self, offer: Offer) -> Offer:
        """What was in a damaged record is in the quarantine: neither lost nor delivered. All else is judged as ever."""
        gone = offer.user in self.forgotten or (offer.user in self.damaged and offer.user in self.set_aside)
        return (
            replace(offer, answer=Answer.SET_ASIDE) if gone and offer.answer is not Answer.REFUSED else offer
        )

    def _with_losses(self, offer: Offer) -> Offer:
        """What Redis confirmed and may have lost. A message is accepted when it is consumed, which is later."""
        in_transit = offer.user.startswith(("tasks", "stream"))
        late = QUEUED_FOR if offer.user.startswith("tasks") else 0.0
        losses = [*self.losses, *((promotion.since, promotion.until) for promotion in self.promotions)]
        lost = any(since <= offer.ended + late and offer.began <= until for since, until in losses)
        # What replicas have is kept. Who puts something into a stream or a queue has no such promise.
        safe = self.replicas and not in_transit and offer.answer is Answer.ACCEPTED
        if not lost or safe or offer.answer is Answer.REFUSED:
            return offer
        return replace(offer, answer=Answer.LOSABLE)

    def _refused(self) -> set[tuple[str, str, str | None]]:
        """What was refused on its way and is kept: messages of Celery and entries of the stream."""
        found: set[tuple[str, str, str | None]] = set()
        for text in self.refused.values():
            # Among them is what nobody could read.
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                payload = json.loads(text)
                user, attrs = (
                    payload[:2]
                    if isinstance(payload, list)
                    else (payload["user"], json.loads(payload["attrs"]))
                )
                found |= {(user, name, value) for name, value in attrs.items()}
        return found

    # Looking on.

    def look(self) -> Snapshot | None:
        """Note the ledger; None when Redis does not answer."""
        try:
            snapshot = self.buffer.snapshot()
        except redis.RedisError:
            return None
        self.ledgers.append({**snapshot.ledger, "pending": snapshot.pending, "in_flight": snapshot.in_flight})
        return snapshot

    def watch(self) -> None:
        """Look on until `end`: at the ledger, and at what Redis has written."""
        turn = 0
        while not self._ended.wait(0.1):
            if isinstance(self.store, tuple):
                files = sorted((self.server.directory / "appendonlydir").glob("*.incr.aof"))
                with suppress(OSError):
                    self.on_disk.append((time.monotonic(), files[-1], files[-1].stat().st_size))
                del self.on_disk[:-100]
            turn += 1
            if turn % 3 == 0:
                self.look()
            if turn % 10 == 0:
                self.look_at_refused()

    def look_at_refused(self) -> None:
        """Note what was refused on its way: Redis keeps the newest only."""
        with suppress(redis.RedisError):
            kept = Refused(self.redis, self.keys).newest(3000)
            self.refused |= {one.id: one.payload for one in kept}
            self.set_aside |= {entry.user for entry in self.quarantine.find()}

    def end(self) -> None:
        """No more writers, no more looks; whoever is frozen can be asked to stop."""
        self._ended.set()
        for pid in self.frozen:
            os.kill(pid, signal.SIGCONT)
        for way in self.writing:
            self.end_writer(way)
        for one in self.comparisons[-1:]:
            one.process.kill()


def _ended(pid: int) -> bool:
    """Whether the process has ended; nobody has asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _proxy_before(url: str, stack: ExitStack) -> tuple[Proxy, str]:
    """A proxy before a server, and the URL that goes through it."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    proxy = stack.enter_context(Proxy(free_port(), port))
    return proxy, url.replace(f":{port}", f":{proxy.port}")


@contextmanager
def running(
    directory: Path,
    seed: int,
    *,
    workers: int,
    appendfsync: Literal["always", "everysec"] = "always",
    rabbitmq: bool = False,
    store: Store = "single",
    replicas: int = 0,
    previous: Path | None = None,
    old: Collection[int] = (0,),
    old_ways: Collection[str] = (),
    server_environ: dict[str, str] | None = None,
    settings: Mapping[str, str] = SETTINGS,
) -> Iterator[System]:
    """A system at work until the end of the block.

    If there is a `previous` version, the workers numbered `old` are of it, and the writers of `old_ways`.
    """
    with ExitStack() as stack:
        place: EmbeddedServer | Fleet
        match store:
            case "single":
                place = EmbeddedServer(directory / "redis", appendfsync=appendfsync, environ=server_environ)
            case "sentinel":
                place = stack.enter_context(SentinelFleet(directory / "redis", proxied=True))
            case "cluster":
                place = stack.enter_context(ClusterFleet(directory / "redis"))
        broker: Broker = RabbitMQ(directory / "rabbitmq") if rabbitmq else RedisBroker(directory / "broker")
        stack.callback(broker.stop)
        key_file = directory / "key"
        key_file.write_text(secrets.token_hex(32))
        environ = {
            **settings,
            "IMATTR_SDKAPPID": SDKAPPID,
            "IMATTR_SECRET_KEY_FILE": str(key_file),
            "IMATTR_REDIS_URL": place.url,
        }
        # The previous version does not know it.
        if replicas:
            environ["IMATTR_REPLICAS"] = str(replicas)
        # The simulator is started by the sandbox, workers are not: they see the proxies.
        options = ("--latency", "0.03")
        plan = Plan(workers=0, concurrency=8, flower=False, names=writers.NAMES, simulator_options=options)
        sandbox = stack.enter_context(Sandbox(directory, environ, plan))
        found: tuple[EmbeddedServer, Proxy] | Fleet
        if isinstance(place, EmbeddedServer):
            proxy, url = _proxy_before(place.url, stack)
            # The previous version reads no password file.
            if not previous:
                url = url.replace("//", f"//{USER}@")
                password_file = directory / "password"
                password_file.write_text(secrets.token_hex(16))
                sandbox.environ["IMATTR_REDIS_PASSWORD_FILE"] = str(password_file)
            sandbox.environ["IMATTR_REDIS_URL"] = url
            found = (place, proxy)
        else:
            found = place
        broker_proxy, sandbox.environ["IMATTR_BROKER_URL"] = _proxy_before(broker.url, stack)
        api_proxy, sandbox.environ["IMATTR_API_URL"] = _proxy_before(sandbox.api_url, stack)
        system = System(
            directory,
            random.Random(seed),
            sandbox,
            found,
            broker,
            broker_proxy,
            api_proxy,
            key_file,
            appendfsync,
            replicas,
            server_environ,
            previous,
            set(old if previous else ()),
            old_ways,
        )
        if store == "single":
            stack.callback(lambda: system.server.stop())
            system.let_in()
        system.names.set(writers.NAMES)
        # The previous version knows neither of these settings, nor that page.
        if not previous:
            sandbox.environ["IMATTR_AUDIT"] = AUDIT
            sandbox.plan = replace(plan, metrics=True)
        ready = [system.start_worker(number) for number in range(0 if previous else 1, workers + 1)]
        system.console = Console(directory, sandbox.environ)
        stack.callback(system.console.kill)
        for wait in ready:
            wait()
        system.console.wait()
        stack.callback(system.end)
        watcher = threading.Thread(target=system.watch, daemon=True)
        watcher.start()
        for way in RATES:
            system.start_writer(way)
        yield system
