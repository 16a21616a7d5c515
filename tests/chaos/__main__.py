"""Runs the system and breaks it by a seeded schedule; then mends all, waits, and judges."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import redis
from rich.console import Console
from rich.table import Table

from tests import history
from tests.chaos.brokers import find_rabbitmq
from tests.chaos.faults import GROUPS, NOTHING, Fault, Struck, faults_of
from tests.chaos.fuzz import MESSAGES, fuzz
from tests.chaos.people import Away
from tests.chaos.system import Store, System, running
from worker.state.audit import AuditLog

ROOT = Path(__file__).parents[2]
#: The last commit of the version before this one: its workers run beside those of today.
PREVIOUS = "8333278"
#: Seconds between two faults, and for everything to be delivered after the last one was mended.
EVERY, PATIENCE = (0.3, 2.0), 180.0
#: Seconds between two rounds of the person who looks after a stopped line.
OPERATOR_EVERY = 3.0
#: libfaketime, by the places where distributions put it.
FAKETIME = "**/faketime/libfaketime.so.1"

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@dataclass(slots=True)
class _Active:
    """A fault that is not mended yet."""

    fault: Fault
    until: float
    struck: Struck


@dataclass(slots=True)
class Chaos:
    """The schedule: which fault strikes when. Every kind strikes once before any strikes again."""

    system: System
    rng: random.Random
    only: list[Fault]
    #: How often each fault struck, and how many things it hit.
    times: collections.Counter[str] = field(default_factory=collections.Counter)
    hits: collections.Counter[str] = field(default_factory=collections.Counter)
    _active: list[_Active] = field(default_factory=list)
    _left: list[Fault] = field(default_factory=list)
    #: Those that found nothing to strike, and get another chance in the same round.
    _missed: set[Fault] = field(default_factory=set)

    def run(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        next_fault, next_round = time.monotonic() + 1, time.monotonic() + OPERATOR_EVERY
        while (now := time.monotonic()) < ends:
            self._mend(now)
            if now >= next_round:
                self._operate()
                next_round = now + OPERATOR_EVERY
            if now >= next_fault:
                self._strike(now)
                next_fault = now + self.rng.uniform(*EVERY)
            self.system.turn()
            time.sleep(0.05)
        deadline = time.monotonic() + PATIENCE
        while self._active and time.monotonic() < deadline:
            self._mend(float("inf"))
            time.sleep(0.5)

    def _operate(self) -> None:
        """The person whom a stopped line calls for: without one it would wait for its probes most of the time."""
        with contextlib.suppress(redis.RedisError):
            if self.system.line.read().state in ("stopped", "probing"):
                assert self.system.console
                try:
                    self.system.console.person("ben").resume()
                except Away:
                    # Whoever cannot reach the console has the command line.
                    self.system.line.resume()

    def _strike(self, now: float) -> None:
        if not self._left:
            self._left, self._missed = self.rng.sample(self.only, len(self.only)), set()
        busy = {fault for one in self._active for fault in _group_of(one.fault)}
        fault = next((fault for fault in self._left if fault not in busy), None)
        if fault is None:
            return
        self._left.remove(fault)
        # Redis itself may be what is broken at the moment.
        with contextlib.suppress(redis.RedisError):
            struck = fault(self.system)
            if struck is NOTHING and fault not in self._missed:
                self._missed.add(fault)
                self._left.append(fault)
                return
            self.times[fault.__name__] += 1
            self.hits[fault.__name__] += struck.hits
            _say(
                f"{fault.__name__:32} {struck.hits or '':>5}"
                + (f"  for {struck.seconds:.1f} s" if struck.seconds else "")
            )
            self._active.append(_Active(fault, now + struck.seconds, struck))

    def _mend(self, now: float) -> None:
        for one in [one for one in self._active if one.until <= now]:
            self._active.remove(one)
            try:
                one.struck.mend()
            except redis.RedisError:
                one.until += 1
                self._active.append(one)


def _group_of(fault: Fault) -> set[Fault]:
    return next((group for group in GROUPS if fault in group), {fault})


def _say(line: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/]  {line}")


def settle(system: System) -> bool:
    """Mend what is left, and wait until everything has been delivered."""
    for way in list(system.writing):
        system.end_writer(way)
    deadline, resumed = time.monotonic() + PATIENCE, 0.0
    quiet = 0
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            if time.monotonic() - resumed > OPERATOR_EVERY:
                resumed = time.monotonic()
                system.line.resume()
            last = system.imports[-1]
            if last.ended == float("inf") or system.ending:
                system.turn()
            compared = not system.comparisons or system.comparisons[-1].ended < float("inf")
            if not compared:
                system.compare_next()
            snapshot = system.look()
            left = snapshot.pending + snapshot.in_flight if snapshot else -1
            entries = system.redis.xlen(system.keys.updates)
            entries += system.redis.zcard(system.keys.scheduled)
            done = not left and not entries and last.ended < float("inf") and compared
            # Messages in the broker are in nobody's count: what comes from there comes soon.
            quiet = quiet + 1 if done else 0
            if quiet >= 30:
                return True
        time.sleep(0.1)
    return False


def judge(system: System) -> tuple[history.History, list[history.Violation]]:
    system.look_at_refused()
    record = system.api("record")
    seen = history.History(
        offers=list(system.offers()),
        applied=[
            history.Applied(at, request, user, name, value)
            for at, request, user, attrs in record
            for name, value in attrs.items()
        ],
        calls=[history.Call(at) for at in system.api_proxy.requests()],
        ledgers=list(system.ledgers),
        kept={
            (letter.user, name, value)
            for letter in system.letters.find()
            for name, (value, _) in letter.values.items()
        }
        | system.purged,
    )
    return seen, history.check(seen)


def _report(
    system: System, chaos: Chaos, seen: history.History, found: list[history.Violation], settled: bool
) -> bool:
    state = system.api("state")
    table = Table("fault", "times", "hits", "what it does")
    for fault in chaos.only:
        what = str(fault.__doc__).strip().splitlines()[0]
        name, hits = fault.__name__, chaos.hits[fault.__name__]
        table.add_row(name.replace("_", " "), f"{chaos.times[name]}", f"{hits:,}" if hits else "", what)
    for kind, count in sorted(state["faults"].items()):
        table.add_row(
            f"call: {kind.replace('_', ' ')}", "", f"{count:,}", "made to go wrong by the simulator"
        )
    refused: dict[str, int] = state["refused"]
    on_purpose = sum(refused.values()) - state["faults"].get("code", 0)
    table.add_row(
        "call: refused by the rules", "", f"{on_purpose:,}", "for rate, signature, rights, names, users"
    )
    total = sum(chaos.hits.values()) + sum(state["faults"].values()) + on_purpose
    table.add_row("[bold]all[/]", "", f"[bold]{total:,}[/]", "")
    console.print(table)

    codes = ", ".join(f"{_short(code)} x{count}" for code, count in sorted(refused.items()))
    ledger = system.ledgers[-1]
    came, went = (
        " + ".join(f"{ledger[name]:,} {name.replace('_', ' ')}" for name in names)
        for names in (history.LEDGER_IN, history.LEDGER_OUT)
    )
    dead = len({user for user, _, _ in seen.kept})
    worst = history.worst_second(seen.calls)
    rows = [
        ("updates", f"{len(seen.offers):,} attributes offered: {by_answer(seen)}"),
        (
            "calls",
            f"{len(seen.calls):,}, {len(seen.applied):,} attributes applied; refused: {codes or 'none'}",
        ),
        ("ledger", f"{came} = {went}; looked at {len(seen.ledgers):,} times"),
        ("dead letters", f"{dead:,} users, kept or exported and thrown away"),
        ("quarantine", f"records of {len(system.set_aside):,} users set aside"),
        ("plans", plans(system)),
        ("audit", audited(system)),
        ("worst rolling second", f"{worst} calls"),
    ]
    if system.promotions:
        lost = sum(promotion.lost or 0 for promotion in system.promotions)
        told = system.buffer.snapshot().lost_with_servers
        rows.append(
            (
                "promotions",
                f"{len(system.promotions)}; by the servers' counters {lost:,} updates lost, {told:,} told",
            )
        )
    for name, value in rows:
        console.print(f"[bold]{name:22}[/] {value}")
    console_held = not (system.console and (system.console.ended or system.console.failed))
    good = (
        settled
        and not found
        and not state["oversized"]
        and not state["repeated_users"]
        and not system.hung
        and console_held
    )
    for violation in found:
        console.out(f"✗ {violation}", style="red", highlight=False)
    if system.console and not console_held:
        console.print(
            f"[bold red]✗[/] the console ended {system.console.ended} times, "
            f"and {system.console.failed} of its pages failed"
        )
    if system.hung:
        console.print(f"[bold red]✗[/] {system.hung} workers did not end after SIGTERM")
    if not settled:
        console.print(f"[bold red]✗[/] not everything was delivered in time; left: {_left(system)}")
    if good:
        console.print(
            "[green]✓[/] nothing lost, nothing stale, no second over the quota, the ledger balanced at every look"
        )
    return good


def _short(code: str) -> str:
    return code if len(code) < 10 else f"one of {len(code)} digits"


def _left(system: System) -> str:
    """What is not finished, in words."""
    snapshot, redis = system.buffer.snapshot(), system.redis
    found = {
        "pending": snapshot.pending,
        "in flight": snapshot.in_flight,
        "entries in the stream": redis.xlen(system.keys.updates),
        "messages for later": redis.zcard(system.keys.scheduled),
        "imports": sum(one.ended == float("inf") for one in system.imports),
        "plans": sum(one.ended == float("inf") for one in system.comparisons),
    }
    line = system.line.read()
    return (
        ", ".join(f"{count} {what}" for what, count in found.items() if count) + f"; the line is {line.state}"
    )


def plans(system: System) -> str:
    done = [one for one in system.comparisons if one.ended < float("inf")]
    whole = sum(one.whole for one in done)
    return f"{len(done)} files compared and applied, {whole} of them as a whole"


def audited(system: System) -> str:
    found = AuditLog(system.redis, system.keys).read()
    return f"{found.checked:,} users read back; {found.lost} lost, {found.changed} changed, {found.gone} gone"


def by_answer(seen: history.History) -> str:
    counts = collections.Counter(str(offer.answer) for offer in seen.offers)
    return ", ".join(f"{count:,} {answer}" for answer, count in counts.most_common())


@contextlib.contextmanager
def previous_version(directory: Path) -> Iterator[Path | None]:
    """The previous version, out of the repository's history; None when there is none of it here."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", PREVIOUS, "worker", "tasks"], capture_output=True, check=False
    )
    if archive.returncode:
        yield None
        return
    directory.mkdir()
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    yield directory


def _faked_clock(directory: Path) -> dict[str, str] | None:
    """An environment in which a server's clock can be set; None where that needs to be installed."""
    found = [
        path for root in ("/usr/lib", "/usr/lib64", "/usr/local/lib") for path in Path(root).glob(FAKETIME)
    ]
    if not found:
        return None
    stamp = directory / "clock"
    stamp.write_text("+0\n")
    return {
        **os.environ,
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(stamp),
        "FAKETIME_NO_CACHE": "1",
        # Time spans stay true: it is the clock that jumps.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long faults strike [3]")
    parser.add_argument("--seed", type=int, help="repeat this schedule [a new one]")
    parser.add_argument(
        "--workers", type=int, default=3, help="worker processes, beside one of the previous version [3]"
    )
    parser.add_argument("--fsync", choices=["always", "everysec"], default="always", help="of Redis [always]")
    parser.add_argument(
        "--redis", choices=["single", "sentinel", "cluster"], help="what keeps the state [by the seed]"
    )
    parser.add_argument("--replicas", type=int, help="IMATTR_REPLICAS, for a fleet [by the seed]")
    parser.add_argument("--broker", choices=["redis", "rabbitmq"], help="[rabbitmq where it is installed]")
    parser.add_argument("--only", nargs="*", default=[], metavar="FAULT", help="these kinds only")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep logs and notes there")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    # Whoever ends us early wants everything that we started to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = random.randrange(10**6) if options.seed is None else options.seed
    rabbitmq = options.broker == "rabbitmq" or (options.broker is None and find_rabbitmq() is not None)
    store: Store = options.redis or ("single", "sentinel", "cluster")[seed // 2 % 3]
    replicas = (0 if store == "single" else seed % 2) if options.replicas is None else options.replicas
    only = [fault for fault in faults_of(store) if not options.only or fault.__name__ in options.only]
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        good = run(
            directory,
            seed,
            options.minutes * 60,
            options.workers,
            options.fsync,
            rabbitmq,
            only,
            store=store,
            replicas=replicas,
        )
        wrong = [] if options.only else fuzz(directory / "fuzz", seed)
        for words in wrong:
            console.print(f"[bold red]✗[/] {words}")
        if not options.only and not wrong:
            console.print(f"[green]✓[/] {MESSAGES:,} malformed messages ended no worker and lost no good one")
    sys.exit(0 if good and not wrong else 1)


def run(
    directory: Path,
    seed: int,
    seconds: float,
    workers: int,
    fsync: Literal["always", "everysec"],
    rabbitmq: bool,
    only: list[Fault],
    *,
    store: Store = "single",
    replicas: int = 0,
) -> bool:
    """Play one schedule and print the verdict; whether everything held."""
    alone = store == "single"
    with contextlib.ExitStack() as stack:
        # What the previous version does not survive is for the other half of the seeds.
        previous = (
            stack.enter_context(previous_version(directory / "previous")) if alone and seed % 2 == 0 else None
        )
        clock = _faked_clock(directory) if alone else None
        console.print(f"[bold]seed {seed}[/], {seconds / 60:.1f} minutes, appendfsync {fsync}")
        if not alone:
            console.print(f"Redis: {store}, IMATTR_REPLICAS={replicas}")
        console.print(
            f"broker: {'RabbitMQ' if rabbitmq else 'Redis (RabbitMQ: not installed, or not wanted)'}"
        )
        console.print(f"a worker of the previous version: {'yes' if previous else 'no'}")
        if alone:
            console.print(f"clock jumps: {'yes' if clock else 'no, libfaketime is not installed'}")
        system = stack.enter_context(
            running(
                directory,
                seed,
                workers=workers,
                appendfsync=fsync,
                rabbitmq=rabbitmq,
                previous=previous,
                server_environ=clock,
                store=store,
                replicas=replicas,
            )
        )
        chaos = Chaos(system, random.Random(seed + 1), only)
        chaos.run(seconds)
        _say("everything is mended, waiting for the rest")
        settled = settle(system)
        seen, found = judge(system)
        return _report(system, chaos, seen, found, settled)


if __name__ == "__main__":
    main()
