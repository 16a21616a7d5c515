"""Who takes part: imattr, and what a user would pick instead. How each is started, and what it has left to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.bench import APP
from tests.bench.rivals.api import BATCH
from worker.state.buffer import Buffer
from worker.state.keys import Keys

NODE_PROJECT = Path(__file__).parent / "bullmq"
ROOT = Path(__file__).parents[3]

#: Users, all different, of the runs that are to last some seconds: of those who fill the API's calls, of celery-batches, and
#: of those with one user a call.
DIFFERENT, DIFFERENT_BATCHES, DIFFERENT_SINGLE = 60_000, 15_000, 1_000

#: Threads, or jobs at a time, of each of the two worker processes.
CONCURRENCY = 16


def _left_of_ours(client: redis.Redis) -> int:
    snapshot = Buffer(client, Keys(APP)).snapshot()
    return snapshot.pending + snapshot.in_flight


def _left_of_celery(client: redis.Redis) -> int:
    waiting: int = client.llen("celery")
    taken: int = client.hlen("unacked")
    return waiting + taken


def _left_of_bullmq(client: redis.Redis) -> int:
    lists = [client.llen(f"bull:attributes:{name}") for name in ("wait", "active", "paused")]
    later = [client.zcard(f"bull:attributes:{name}") for name in ("delayed", "prioritized")]
    return int(sum(lists + later))


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the job. `left` counts what is accepted and not done, in its own units."""

    name: str
    #: Heading of its column.
    title: str
    #: How it is set up, for the page.
    setting: str
    left: Callable[[redis.Redis], int]
    #: Where its function `enqueue` is; empty: a project of node.
    enqueuer: str = ""
    #: Celery's app.
    app: str = ""
    #: The same function for events that come one by one from Celery clients; empty: the same as `enqueuer`.
    client: str = ""
    #: Different users, or events, of the runs beside the job.
    size: int = DIFFERENT
    #: Whether events come with their times, in the order of arrival. The others get them in the order of events.
    takes_times: bool = False
    #: Events in one job of node.
    job_size: int = 1
    #: Celery's pool, and what it does at a time.
    pool: tuple[str, int] = ("threads", CONCURRENCY)

    def enqueue_command(self, events: Path) -> list[str]:
        if self.enqueuer:
            return [sys.executable, "-m", "tests.bench.rivals.enqueue", self.enqueuer, str(events)]
        return ["node", str(NODE_PROJECT / "enqueue.js"), str(events), str(self.job_size)]

    def worker_command(self, name: str) -> list[str]:
        if not self.app:
            return ["node", str(NODE_PROJECT / "worker.js")]
        kind, concurrency = self.pool
        pool = ["--pool", kind, "--concurrency", str(concurrency), "--hostname", f"{name}@%h"]
        flags = ["--without-gossip", "--without-mingle"]
        return [sys.executable, "-m", "celery", "--app", self.app, "worker", *pool, *flags]


def _on_celery(
    name: str, title: str, setting: str, size: int, pool: tuple[str, int] = ("threads", CONCURRENCY)
) -> Contestant:
    module = f"tests.bench.rivals.{name}"
    return Contestant(name, title, setting, _left_of_celery, module, module, size=size, pool=pool)


_BATCHES = (
    "Messages are collected into calls of up to 100 users (`flush_every=100`, `flush_interval=0.5`), a user "
)
_BATCHES += "that comes twice is merged within a batch; acknowledged late, with a prefetch of 100 per thread; a failed "
_BATCHES += "call is repeated in place, with back-off. "

CONTESTANTS = (
    Contestant(
        "imattr",
        "imattr",
        "As in the README: `Producer.set_many`, two workers with 16 threads, all settings at their defaults.",
        _left_of_ours,
        "tests.bench.rivals.ours",
        "worker",
        "tests.bench.rivals.ours_celery",
        takes_times=True,
    ),
    _on_celery(
        "each",
        "Celery, a task per event",
        'One call for one user each; `rate_limit="50/s"` for each of the two workers, as Celery limits a worker, '
        "not a fleet; the default pool, with 4 processes a worker, as the limit keeps time worse with threads; `acks_late`, `reject_on_worker_lost`, automatic retries with back-off and jitter, without limit.",
        DIFFERENT_SINGLE,
        # Its rate limit keeps time only with a pool that works beside the event loop.
        ("prefork", 4),
    ),
    _on_celery(
        "batches_limits",
        "celery-batches + limits",
        _BATCHES
        + "Before each call it waits for `limits`: moving window, 100 a second, in Redis; it sleeps until the "
        "oldest call leaves the window, and tries again.",
        DIFFERENT_BATCHES,
    ),
    _on_celery(
        "batches_throttled",
        "celery-batches + throttled-py",
        _BATCHES
        + "Before each call it waits for `throttled-py`: GCRA, 100 a second, burst 1, in Redis; it sleeps for "
        "`retry_after`, and tries again (the library's own blocking wait sleeps for 0.2 s at least).",
        DIFFERENT_BATCHES,
    ),
    Contestant(
        "bullmq",
        "BullMQ, a job per event",
        "One call for one user each; `limiter: {max: 9, duration: 100}`, since its windows are fixed: with `{max: 100, "
        "duration: 1000}` a rolling second may hold two windows' worth, and the API refuses some; `addBulk` with 1,000 jobs, "
        "16 jobs at a time; on 60007 it pauses the queue for a second and throws `RateLimitError`, as documented; "
        "`maxRetriesPerRequest: null`, and `sentinels` of ioredis.",
        _left_of_bullmq,
        size=DIFFERENT_SINGLE,
    ),
    Contestant(
        "bullmq_100",
        "BullMQ, 100 events per job",
        "The same, but the producer itself puts 100 events into a job and merges them by user, so it must have them "
        "all at hand.",
        _left_of_bullmq,
        job_size=BATCH,
    ),
)


def prepare_node() -> str:
    """Install what the node project needs; returns why it cannot take part, or nothing."""
    if missing := [program for program in ("node", "npm") if not shutil.which(program)]:
        return f"{' and '.join(missing)} not found"
    lock, installed = NODE_PROJECT / "package-lock.json", NODE_PROJECT / "node_modules" / ".package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return ""
    options = ["--ignore-scripts", "--omit-lockfile-registry-resolved", "--no-audit", "--no-fund"]
    done = subprocess.run(["npm", "ci", *options], cwd=NODE_PROJECT, capture_output=True, text=True)
    return "npm ci failed: " + done.stderr.strip()[-200:] if done.returncode else ""


def absent() -> Mapping[str, str]:
    """Who cannot take part here, and why."""
    why = prepare_node()
    return {it.name: why for it in CONTESTANTS if why and not it.enqueuer}
