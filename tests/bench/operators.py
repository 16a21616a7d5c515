"""What the console costs: Redis, and those who deliver."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis
import requests
from playwright.sync_api import sync_playwright

from tests.bench import APP, ATTRS, Results, cpu, state_of, users
from tests.bench.growth import redis_cpu
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox

#: Browsers that are open, how many of them are real ones, and how often a page refreshes itself.
BROWSERS, REAL, REFRESH = 50, 3, 5.0
#: Seconds that Redis is measured for at rest, and deliveries at full rate.
AT_REST, AT_WORK = 20, 30
CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stretch of time took, each a second: Redis' commands and processor, the console's processor, calls delivered."""

    commands: float
    redis: float
    console: float
    calls: float


def console(results: Results) -> None:
    """What the console costs Redis at rest, and 50 open browsers the deliveries at full rate."""
    plan = Plan(
        workers=2,
        concurrency=16,
        flower=False,
        console=True,
        names=tuple(ATTRS),
        simulator_options=("--no-record",),
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        Sandbox(Path(directory), {}, plan) as sandbox,
        redis.Redis.from_url(sandbox.redis_url) as client,
    ):
        # The fleet has left its traces, and is frozen: what is counted is the console's alone.
        Producer(sandbox.redis_url, APP).set_many(users(20_000))
        time.sleep(10)
        _signal(sandbox, "worker", signal.SIGSTOP)
        _signal(sandbox, "console", signal.SIGSTOP)
        without = _spent(sandbox, client, AT_REST)
        _signal(sandbox, "console", signal.SIGCONT)
        at_rest = {0: _spent(sandbox, client, AT_REST)}
        for count in (1, BROWSERS):
            with _browsers(sandbox.console_url, count, real=1 if count == 1 else REAL):
                at_rest[count] = _spent(sandbox, client, AT_REST)
        _signal(sandbox, "worker", signal.SIGCONT)
        for count, spent in at_rest.items():
            more = spent.redis - without.redis
            results.add(
                f"Redis' processor for the console at rest, pages open: {count}",
                f"{spent.redis:.2%} of a core against {without.redis:.2%} without it, "
                f"{spent.commands - without.commands:.0f} commands/s; the console itself {spent.console:.1%}",
                "< 1 %",
                more < 0.01,
            )

        Producer(sandbox.redis_url, APP).set_many(users(100 * 100 * (3 * AT_WORK + 80)))
        time.sleep(3)
        before = _spent(sandbox, client, AT_WORK)
        with _browsers(sandbox.console_url, BROWSERS, real=REAL):
            beside = _spent(sandbox, client, AT_WORK)
        after = _spent(sandbox, client, AT_WORK)
    alone = (before.calls + after.calls) / 2
    results.add(
        f"calls/s beside {BROWSERS} browsers, against none",
        f"{beside.calls:.1f} against {before.calls:.1f} before and {after.calls:.1f} after; Redis {beside.redis:.1%} "
        f"against {before.redis:.1%} and {after.redis:.1%} of a core, console {beside.console:.1%}",
        ">= 97 %",
        beside.calls >= 0.97 * alone,
    )


def _signal(sandbox: Sandbox, name: str, number: signal.Signals) -> None:
    for part, pid in sandbox.pids().items():
        if part.startswith(name):
            os.killpg(pid, number)


def _spent(sandbox: Sandbox, client: redis.Redis, seconds: float) -> Spent:
    def counts() -> tuple[float, ...]:
        commands = client.info("stats")["total_commands_processed"]
        calls = state_of(sandbox)["calls"]
        return time.monotonic(), commands, redis_cpu(client), cpu(sandbox.pids()["console"]), calls

    before = counts()
    time.sleep(seconds)
    took, *rest = (now - then for now, then in zip(counts(), before, strict=True))
    return Spent(*(count / took for count in rest))


@contextlib.contextmanager
def _browsers(url: str, count: int, *, real: int) -> Iterator[None]:
    """So many open overviews that keep themselves fresh; without Chromium, all of them are played."""
    real = real if CHROMIUM else 0
    over = threading.Event()
    threads = [threading.Thread(target=_watch, args=(url, over), daemon=True) for _ in range(count - real)]
    for thread in threads:
        thread.start()
    with contextlib.ExitStack() as stack:
        if real:
            browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=CHROMIUM)
            stack.callback(browser.close)
            for _ in range(real):
                browser.new_page().goto(url)
        time.sleep(2)
        yield
        over.set()
    for thread in threads:
        thread.join()


def _watch(url: str, over: threading.Event) -> None:
    with requests.Session() as session:
        session.get(url, timeout=30).raise_for_status()
        while not over.wait(REFRESH):
            session.get(f"{url}/live", timeout=30).raise_for_status()
