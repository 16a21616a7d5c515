"""Everything that the console shows, for a browser to look at: a sandbox with a worker and a simulator, and what goes wrong in
one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import requests

from worker.errors import InvalidUpdate
from worker.models import DeadLettered, Update
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.state.buffer import Buffer, new_batch_id
from worker.state.keys import Keys
from worker.state.refused import Refused

APP = int(SDKAPPID)
CHROMIUM = shutil.which("chromium")
#: Short timeouts, so that an outage is over soon.
HASTY = {
    "IMATTR_LINGER": "0.05",
    "IMATTR_CONNECT_TIMEOUT": "1",
    "IMATTR_READ_TIMEOUT": "3.1",
    "IMATTR_LEASE": "9",
    "IMATTR_HOLD": "3.1",
}


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Stack:
    """A running sandbox, and what is done to it."""

    sandbox: Sandbox
    redis: redis.Redis
    producer: Producer
    keys: Keys

    @property
    def settings(self) -> dict[str, str]:
        """What a console needs: not the API's key."""
        return {name: self.sandbox.environ[name] for name in ("IMATTR_SDKAPPID", "IMATTR_REDIS_URL")}

    @property
    def dead(self) -> int:
        return Buffer(self.redis, self.keys).snapshot().dead

    def faults(self, *faults: dict[str, Any]) -> None:
        """Let the simulator fail, or with nothing, no longer."""
        url = f"{self.sandbox.api_url}/simulator/faults"
        requests.post(url, json=faults, timeout=30).raise_for_status()

    def give_up(self, users: Sequence[str], values: dict[str, str], code: int = 70107) -> None:
        """Make these users dead letters, as a delivery would. Only before there is a worker, which would be faster."""
        buffer, batch = Buffer(self.redis, self.keys), new_batch_id()
        buffer.add([Update(user, values) for user in users])
        self.redis.zadd(self.keys.tickets, {batch: 1})
        claimed = buffer.claim(batch, len(users))
        assert claimed
        buffer.settle(batch, {}, rest=DeadLettered(code, "the account does not exist: import it"))
        assert self.dead >= len(users)

    def have_refused(self, user: str, values: dict[str, str]) -> None:
        """Let the API refuse a user, whom a worker then gives up."""
        before = self.dead
        self.faults({"kind": "user_code", "user": user, "code": 70107, "times": None})
        self.producer.set(user, values)
        until(lambda: self.dead > before)
        self.faults()

    def refuse(self, *updates: tuple[str, str, object]) -> None:
        """Keep updates that broke a rule: user, rule, what was sent."""
        refused = [(InvalidUpdate(user, rule), sent) for user, rule, sent in updates]
        Refused(self.redis, self.keys).keep("celery", refused)

    def settled(self) -> bool:
        snapshot = Buffer(self.redis, self.keys).snapshot()
        return not snapshot.pending and not snapshot.in_flight

    @contextmanager
    def importing(self, lines: str) -> Iterator[None]:
        """An import that waits for the rest of its lines."""
        before = self.redis.zcard(self.keys.imports)
        command = [sys.executable, "-m", "worker.cli", "import", "-", "--format", "csv"]
        inherited = {name: text for name, text in os.environ.items() if not name.startswith("IMATTR_")}
        with subprocess.Popen(
            command,
            env=inherited | self.settings,
            cwd=self.sandbox.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                assert process.stdin
                process.stdin.write(lines.encode())
                process.stdin.flush()
                until(lambda: self.redis.zcard(self.keys.imports) > before)
                yield
            finally:
                process.kill()


@contextmanager
def stack(directory: Path, *, names: Sequence[str] = ()) -> Iterator[Stack]:
    """One without a worker at first: `sandbox.start_worker` starts one."""
    plan = Plan(workers=0, concurrency=4, flower=False, names=names, persistent=False)
    with (
        Sandbox(directory / "sandbox", dict(HASTY), plan) as sandbox,
        redis.Redis.from_url(sandbox.redis_url) as client,
    ):
        yield Stack(sandbox, client, Producer(sandbox.redis_url, APP, timeout=10), Keys(APP))
