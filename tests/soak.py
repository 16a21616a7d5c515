"""A long run at full rate, after which nothing may have grown: `python -m tests.soak --minutes 30 --seed 1`.

Two workers deliver without a pause what comes by all ways in: programs, with asyncio and without, files,
Celery messages (some for later), the stream; with removals, late events, users that the API refuses, and a
service that fails now and then. People act at the console: they pause imports, put dead letters back or throw
them away. Files are planned and applied, what was delivered is audited, a record is damaged now and then. The
population moves on, so that users are forgotten as fast as new ones come. Meanwhile memory, keys, connections
and the rate are looked at; a third of the time is for warming up, and what the rest shows is judged by `grown`
and `drift`. Ends with 1 when something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import requests
from celery import Celery

from tests.bench import APP, Results, console, state_of
from tests.chaos.faults import damage
from tests.chaos.people import Away, Console
from worker.async_producer import AsyncProducer
from worker.producer import Lane, Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.state import fleet, history
from worker.state.buffer import Buffer
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys
from worker.state.quarantine import Quarantine
from worker.state.refused import Refused
from worker.state.scripts import text

#: Seconds between two samples, and two lines of progress.
EVERY, TELL_EVERY = 5.0, 30.0
#: The part of the run that is for warming up.
WARM_UP = 1 / 3

#: Users pending all the time, and users that updates come for at a time.
BACKLOG, POPULATION = 10_000, 100_000
#: Seconds between two turns of the writer.
TURN = 0.1
#: Users that the API refuses, with the code for each.
POISON = {f"poison{number:02}": (70107, 90033)[number % 2] for number in range(40)}
#: The part of all calls that fails, by the way of failing.
FAULTS = (
    {"kind": "status", "code": 502, "chance": 0.002, "times": None},
    {"kind": "reset", "applied": True, "chance": 0.001, "times": None},
    {"kind": "code", "code": 91000, "chance": 0.001, "times": None},
    {"kind": "slow", "delay": 5.0, "chance": 0.0005, "times": None},
    {"kind": "late_write", "delay": 2.0, "chance": 0.0005, "times": None},
    {"kind": "truncated", "chance": 0.0005, "times": None},
)

#: By unit, how much a figure may grow beside `GROWTH`, its part.
ALLOWED = {"MB": 2.0, "entries": 100.0, "": 3.0}
GROWTH = 0.03
#: The command that counts a key's entries, by the type that `worker/state/keys.py` tells.
LENGTH = {"hash": "hlen", "zset": "zcard", "set": "scard", "stream": "xlen", "string": "exists"}
#: Keys that this run has no use for: the line stays open, reads have no quota of their own, and the broker is no RabbitMQ.
UNUSED = {"line", "read_rate", "read_quotas", "read_server", "taken"}
#: Keys that end by themselves, at these lengths and what Redis leaves on top: they may grow until then.
CAPS = {"history": history.MOST, "samples": fleet.SAMPLES, "samples_by_minute": fleet.MINUTES}
#: What the run provokes and workers warn of.
PROVOKED = {"update_refused"}

#: Updates a turn by `AsyncProducer`; lines of a file that is imported, and of one that is planned and applied.
ASYNC, LINES, PLANNED = 20, 30_000, 500
#: Exit codes of commands that have done their work; with the second one, some lines were refused.
DONE = (0, 3)


# What is judged.


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """How fast the values rise: the median over all pairs (Theil and Sen), which single outliers do not move."""
    pairs = itertools.combinations(zip(times, values, strict=True), 2)
    return statistics.median(
        (second - first) / (later - earlier) for (earlier, first), (later, second) in pairs
    )


@dataclass(frozen=True, slots=True)
class Growth:
    """How a figure moved from the end of the warm-up to the end of the run."""

    level: float
    by: float
    allowed: float

    @property
    def flat(self) -> bool:
        return self.by <= self.allowed


def grown(times: Sequence[float], values: Sequence[float], allowed: float) -> Growth:
    """Judge the samples after the warm-up.

    It may grow by `allowed`, by `GROWTH` of itself, and by what its own ups and downs may look like: three
    standard errors of a line through so many samples, their spread being the median deviation from it.
    """
    rise = slope(times, values)
    trend = [value - rise * at for at, value in zip(times, values, strict=True)]
    spread = 1.4826 * statistics.median(abs(value - statistics.median(trend)) for value in trend)
    level, noise = statistics.median(values), 3 * spread * math.sqrt(12 / len(values))
    return Growth(level, rise * (times[-1] - times[0]), GROWTH * level + allowed + noise)


def drift(rates: Sequence[float]) -> float:
    """By what part the rate of the last third differs from that of the first."""
    third = max(1, len(rates) // 3)
    first, last = statistics.median(rates[:third]), statistics.median(rates[-third:])
    return abs(last - first) / first


def unexpected(lines: Iterable[str]) -> Counter[str]:
    """Warnings, errors and tracebacks in a worker's log that nothing here provokes, by event."""
    found: Counter[str] = Counter()
    for line in lines:
        if line.startswith("{"):
            entry = json.loads(line)
            if entry["level"] not in ("debug", "info") and entry["event"] not in PROVOKED:
                found[entry["event"]] += 1
        elif line.startswith("Traceback"):
            found["Traceback"] += 1
    return found


# What is done.


class Writer:
    """Sends updates by all ways in, and keeps the buffer filled. `run` until `stop` is set."""

    def __init__(self, url: str, seed: int, *, pass_after: float, stop: threading.Event) -> None:
        """The population is another one after `pass_after` seconds."""
        self._rng, self._url = random.Random(seed), url
        self._redis, self._keys = redis.Redis.from_url(url), Keys(APP)
        self.producer = Producer(url, APP)
        self._celery = Celery(broker=url, set_as_current=False)
        self._new_users, self._stop = POPULATION / pass_after, stop
        self._began = time.monotonic()
        #: Errors of Redis, by name.
        self.failures: Counter[str] = Counter()
        #: Who gets the seats that keep the buffer filled.
        self.lane: Lane = "live"

    def run(self) -> None:
        for turn in itertools.count():
            if self._stop.wait(TURN):
                return
            try:
                self._turn(turn)
            except redis.RedisError as error:
                # As a program does that has to go on; a machine may stand still for longer than a client waits.
                self.failures[type(error).__name__] += 1

    def _turn(self, turn: int) -> None:
        missing = BACKLOG - int(self._redis.hlen(self._keys.pending))
        if missing > 0:
            self.producer.set_many(self._updates(missing), lane=self.lane)
        self._add_to_stream(10)
        if turn % 2:
            self._celery.send_task("attributes.update_many", [list(self._updates(50))], queue="updates")
        if turn % 4 == 0:
            later = {"countdown": 2} if turn % 8 else {"expires": 60}
            self._celery.send_task("attributes.update", next(self._updates(1)), queue="updates", **later)
        if turn % 40 == 0:
            self.producer.set(self._rng.choice(list(POISON)), {"city": self._city()})

    def run_async(self) -> None:
        """Send some as asyncio applications do. In a thread of its own, until `stop` is set."""
        asyncio.run(self._run_async())

    async def _run_async(self) -> None:
        async with AsyncProducer(self._url, APP) as producer:
            while not self._stop.is_set():
                await asyncio.sleep(TURN)
                try:
                    await producer.set_many(list(self._updates(ASYNC)))
                    await producer.set(*next(self._updates(1)))
                except redis.RedisError as error:
                    self.failures[type(error).__name__] += 1

    def lines(self, count: int) -> str:
        """A file with so many updates; one in a thousand lines is none."""
        lines = [
            json.dumps({"user": user, "attrs": attrs}) if number % 1000 else "no JSON"
            for number, (user, attrs, *_) in enumerate(self._updates(count))
        ]
        return "".join(f"{line}\n" for line in lines)

    def _updates(self, count: int) -> Iterator[list[Any]]:
        passed = int((time.monotonic() - self._began) * self._new_users)
        for _ in range(count):
            attrs: dict[str, str | None] = {"city": self._city()}
            chance = self._rng.random()
            if chance < 0.3:
                attrs["level"] = self._rng.choice(("Bronze", "Silver", "Gold", "Platinum"))
            elif chance < 0.302:
                attrs["level"] = None
            update = [f"user{passed + self._rng.randrange(POPULATION):09}", attrs]
            # One in a hundred comes late.
            yield [*update, time.time() - 30] if chance > 0.99 else update

    def _city(self) -> str:
        return f"city {self._rng.randrange(1000)}"

    def _add_to_stream(self, count: int) -> None:
        with self._redis.pipeline(transaction=False) as pipe:
            for user, attrs, *_ in self._updates(count):
                # One in a hundred is refused.
                text = json.dumps(attrs) if self._rng.random() < 0.99 else "no JSON"
                pipe.xadd(self._keys.updates, {"user": user, "attrs": text})
            pipe.execute()


class Operator:
    """What a person does now and then."""

    def __init__(self, sandbox: Sandbox, client: redis.Redis, writer: Writer, people: Console) -> None:
        self._url, self._writer = sandbox.api_url, writer
        self._people, self._client, self._keys = people, client, Keys(APP)
        self._dead, self._refused = DeadLetters(client, Keys(APP)), Refused(client, Keys(APP))
        self._quarantine = Quarantine(client, Keys(APP))
        self._files = Files(sandbox, writer)
        #: What went wrong at the console, or with a command, by name.
        self.failures: Counter[str] = Counter()
        self._turns = itertools.count()
        poison = [
            {"kind": "user_code", "user": user, "code": code, "times": None} for user, code in POISON.items()
        ]
        self._control("faults", [*poison, *FAULTS])

    def turn(self) -> None:
        """Put all dead letters back, or throw them away; and let the API refuse bad users in the other way."""
        odd = next(self._turns) % 2
        self.failures += self._files.turn()
        try:
            self._at_the_console("purge" if odd else "redrive")
            self._damage()
        except (Away, redis.RedisError) as error:
            self.failures[f"{type(error).__name__} at an operator"] += 1
        for refused in self._refused.newest(1):
            self._refused.purge(refused.id)
        self._control("quirks", {"bad_user": ("batch", "list")[odd]})
        self._writer.lane = "backfill" if odd else "live"

    def _at_the_console(self, verb: str) -> None:
        """One person looks, another one acts on exactly that; and an import waits for a moment."""
        ann, ben = self._people.person("ann"), self._people.person("ben")
        ann.get("/")
        shown = ann.look_at_letters()
        if shown.get("count", "0") != "0":
            ben.decide(verb, shown)

    def look_at_imports(self) -> None:
        """Pause one that is under way, until the next look."""
        running = [text(name) for name in self._client.hkeys(self._keys.import_progress)]
        paused = [text(name) for name in self._client.hkeys(self._keys.import_pauses)]
        with contextlib.suppress(Away):
            for name in paused:
                self._people.person("ben").pause_import(name, resume=True)
            for name in running[: 1 - len(paused)]:
                self._people.person("ann").pause_import(name)

    def _damage(self) -> None:
        """Another program writes over the record of a user who waits; a person looks at some, and drops the others."""
        self._writer.producer.set("damaged", {"city": "Rome"})
        damage(self._client, self._keys.pending, "damaged", b"\xff")
        self._writer.producer.set("damaged", {"city": "Paris"})
        self._quarantine.drop([entry.id for entry in self._quarantine.find()][10:])

    def end(self) -> None:
        self._files.end()

    def _control(self, what: str, given: object) -> None:
        requests.post(f"{self._url}/simulator/{what}", data=json.dumps(given), timeout=10).raise_for_status()


class Files:
    """Files that are imported, or planned and applied, one after the other, by the commands for that."""

    def __init__(self, sandbox: Sandbox, writer: Writer) -> None:
        self._directory, self._environ, self._writer = sandbox.directory, sandbox.environ, writer
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers = itertools.count()

    def turn(self) -> Counter[str]:
        """Begin what can be begun; returns the commands that failed meanwhile."""
        failed = Counter(
            f"imattr {command} ended with {process.returncode}"
            for command, process in self._processes.items()
            if process.poll() not in (None, *DONE)
        )
        if self._is_free("import"):
            self._begin("import", self._file("import", LINES))
        if self._is_free("plan") and self._is_free("apply"):
            if "plan" in self._processes:
                del self._processes["plan"]
                self._begin("apply", self._directory / "planned.jsonl.plan", "--yes")
            else:
                self._begin("plan", self._file("planned", PLANNED), "--restart")
        return failed

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _is_free(self, command: str) -> bool:
        return command not in self._processes or self._processes[command].poll() is not None

    def _file(self, name: str, lines: int) -> Path:
        path = self._directory / f"{name}.jsonl"
        path.write_text(self._writer.lines(lines))
        return path

    def _begin(self, command: str, path: Path, *options: str) -> None:
        with (self._directory / f"{command}.log").open("wb") as output:
            self._processes[command] = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", command, str(path), "--json", *options],
                env=os.environ | self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


# What is seen.


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds since the start; figures by name and unit; whether the ledger balanced."""

    at: float
    figures: dict[tuple[str, str], float]
    balanced: bool


def key_types() -> dict[str, str]:
    """The type of each key in the catalogue, by its name there."""
    keys = {
        name: item for name, item in vars(Keys).items() if isinstance(item, property) and name != "pattern"
    }
    return {name: re.findall(r"\w+", item.__doc__ or "")[0] for name, item in keys.items()}


class Sampler:
    """Looks at everything that could grow."""

    def __init__(self, sandbox: Sandbox, client: redis.Redis, people: Console) -> None:
        self._redis = client
        self._buffer = Buffer(client, Keys(APP))
        self._pids = {name: pid for name, pid in sandbox.pids().items() if name != "simulator"}
        self._pids["console"] = people.pid
        self._began = time.monotonic()
        self._lengths = [(name, LENGTH[kind], getattr(Keys(APP), name)) for name, kind in key_types().items()]
        # Celery's own.
        self._lengths += [(f"Celery's {name}", "llen", name) for name in ("updates", "deliveries")]
        self._lengths += [
            ("Celery's unacked", "hlen", "unacked"),
            ("Celery's index", "zcard", "unacked_index"),
        ]

    def sample(self) -> Sample:
        figures: dict[tuple[str, str], float] = {}
        for name, pid in self._pids.items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            figures[f"memory of {name}", "MB"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            if name != "redis":
                figures[f"open files of {name}", ""] = len(os.listdir(f"/proc/{pid}/fd"))
                figures[f"threads of {name}", ""] = len(os.listdir(f"/proc/{pid}/task"))
        with self._redis.pipeline(transaction=False) as pipe:
            for _, command, key in self._lengths:
                getattr(pipe, command)(key)
            pipe.info("memory")
            pipe.info("clients")
            pipe.dbsize()
            *lengths, memory, clients, count = pipe.execute()
        figures["memory that Redis uses", "MB"] = memory["used_memory"] / 1e6
        figures["clients of Redis", ""] = clients["connected_clients"]
        figures["keys in Redis", ""] = count
        for (name, _, _), length in zip(self._lengths, lengths, strict=True):
            figures[name, "entries"] = length
        return Sample(time.monotonic() - self._began, figures, self._buffer.snapshot().balanced)


@dataclass(frozen=True, slots=True)
class Seen:
    """All of a run: samples; (seconds since the start, calls a second at the API); the worst rolling second."""

    samples: list[Sample]
    rates: list[tuple[float, float]]
    worst: int
    refused_for_rate: int
    unexpected: Counter[str]


def soak(seconds: float, seed: int) -> Seen:
    """Run it."""
    # Everybody is new, and forgotten again, within the warm-up.
    turnover = min(120.0, seconds / 8)
    environ = {
        "IMATTR_SHADOW_TTL": f"{turnover:.0f}",
        "IMATTR_READ_TIMEOUT": "3.1",
        "IMATTR_BACKOFF_MAX": "10",
        "IMATTR_AUDIT": "12",
    }
    options = ("--no-record", "--latency", "0.05")
    plan = Plan(workers=2, concurrency=16, flower=False, names=("city", "level"), simulator_options=options)
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory() as directory,
        Sandbox(Path(directory), environ, plan) as sandbox,
        redis.Redis.from_url(sandbox.redis_url, socket_timeout=30) as client,
        ThreadPoolExecutor(2) as pool,
        contextlib.closing(Console(Path(directory), sandbox.environ)) as people,
    ):
        people.wait()
        writer = Writer(sandbox.redis_url, seed, pass_after=turnover, stop=stop)
        operator = Operator(sandbox, client, writer, people)
        writing = [pool.submit(writer.run), pool.submit(writer.run_async)]

        def failed() -> bool:
            return any(one.done() for one in writing)

        try:
            sampler = Sampler(sandbox, client, people)
            samples, rates, state = _watch(sandbox, sampler, operator, seconds, failed)
        finally:
            stop.set()
            operator.end()
        for one in writing:
            one.result()
        logs = sorted(Path(directory).glob("worker-*.log"))
        found = sum((unexpected(log.read_text(errors="replace").splitlines()) for log in logs), Counter())
    found += Counter({f"{name} at a writer": count for name, count in writer.failures.items()})
    found += operator.failures
    found += Counter({"the console ended": people.ended, "a page failed": people.failed})
    return Seen(samples, rates, state["worst_rolling_second"], state["refused"].get("60007", 0), found)


def _watch(
    sandbox: Sandbox, sampler: Sampler, operator: Operator, seconds: float, failed: Callable[[], bool]
) -> tuple[list[Sample], list[tuple[float, float]], Any]:
    """Look every few seconds, until the end or until the writer has failed."""
    # The simulator looks at all arrivals to answer, so it is asked rarely.
    period = min(TELL_EVERY, max(EVERY, seconds / 60))
    samples: list[Sample] = []
    rates: list[tuple[float, float]] = []
    turn_at = tell_at = 0.0
    began, last, last_at, state = time.monotonic(), None, 0.0, None
    for number in itertools.count(1):
        threading.Event().wait(began + number * EVERY - time.monotonic())
        sandbox.check()
        operator.look_at_imports()
        samples.append(sampler.sample())
        now = time.monotonic() - began
        if now >= turn_at:
            turn_at = now + period - EVERY / 2
            operator.turn()
            state, now = state_of(sandbox), time.monotonic() - began
            if last is not None:
                rates.append((now, (state["calls"] - last["calls"]) / (now - last_at)))
            last, last_at = state, now
        if rates and now >= tell_at:
            tell_at = now + TELL_EVERY - EVERY / 2
            _tell(samples[-1], rates[-1][1], state)
        if now >= seconds or failed():
            return samples, rates, state_of(sandbox)
    raise AssertionError("it counts for ever")


def _tell(sample: Sample, rate: float, state: Any) -> None:
    figures = {name: value for (name, _), value in sample.figures.items()}
    console.print(
        f"{sample.at / 60:5.1f} min: {rate:.1f} calls/s, worst second {state['worst_rolling_second']}, workers "
        f"{figures['memory of worker-1']:.1f} and {figures['memory of worker-2']:.1f} MB, Redis "
        f"{figures['memory that Redis uses']:.1f} MB, {figures['pending']:,.0f} pending, "
        f"{figures['shadow']:,.0f} remembered, {figures['dead']:.0f} dead letters"
    )


def judge(seen: Seen, results: Results) -> None:
    """Hold what was seen against what must be."""
    samples, end = seen.samples, seen.samples[-1].at
    warm = [sample for sample in samples if sample.at >= WARM_UP * end]
    times = [sample.at for sample in warm]
    for name, unit in samples[0].figures:
        values = [sample.figures[name, unit] for sample in warm]
        if name in CAPS:
            # Redis cuts a stream a node at a time.
            most = 1.1 * CAPS[name] + 100
            results.add(name, f"at most {max(values):,.0f} {unit}", f"<= {most:,.0f}", max(values) <= most)
            continue
        found = grown(times, values, ALLOWED[unit])
        shown = f"{found.level:,.1f} {unit}, grown by {found.by:+,.1f}"
        results.add(name, shown, f"<= {found.allowed:,.1f}", found.flat)
    used = {name for sample in samples for (name, _), value in sample.figures.items() if value}
    idle = key_types().keys() - used - UNUSED
    results.add("keys that were not used", ", ".join(sorted(idle)) or "none", "none", not idle)
    rates = [rate for at, rate in seen.rates if at >= WARM_UP * end]
    results.add(
        "calls a second, median", f"{statistics.median(rates):.2f}", ">= 97", statistics.median(rates) >= 97
    )
    results.add("drift of the rate", f"{drift(rates):.2%}", "<= 1 %", drift(rates) <= 0.01)
    results.add("worst rolling second at the API", str(seen.worst), "<= 100", seen.worst <= 100)
    results.add("calls refused for their rate", str(seen.refused_for_rate), "0", not seen.refused_for_rate)
    unbalanced = sum(not sample.balanced for sample in samples)
    results.add("samples with an unbalanced ledger", f"{unbalanced} of {len(samples)}", "0", not unbalanced)
    strange = ", ".join(f"{event} {count} x" for event, count in seen.unexpected.items())
    results.add("in the logs, not provoked", strange or "nothing", "nothing", not strange)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A long run at full rate, after which nothing may have grown."
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    # Ended from outside, it ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console.print(f"{asked.minutes:g} minutes at full rate, seed {asked.seed}")
    results = Results()
    judge(soak(60 * asked.minutes, asked.seed), results)
    console.print(results.table)
    sys.exit(0 if results.held else 1)


if __name__ == "__main__":
    main()
