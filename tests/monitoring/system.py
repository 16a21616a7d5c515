"""One app in a sandbox, watched: workers with a health port, an exporter, somebody who sends updates, and faults at will."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from redis import Redis, RedisError

from worker.errors import ImattrError
from worker.producer import Producer
from worker.sandbox.processes import Plan, Sandbox
from worker.sandbox.redis_server import free_port
from worker.state.keys import Keys

NAMES = ("city", "level")
#: Seconds that a part may take to answer its first scrape.
PATIENCE = 60.0


class System:
    """A context manager. Its sandbox's ports are its own, so many can run side by side."""

    def __init__(
        self,
        directory: Path,
        sdkappid: int,
        *,
        settings: Mapping[str, str] | None = None,
        workers: int = 1,
        concurrency: int = 8,
        latency: float = 0.02,
        persistent: bool = False,
    ) -> None:
        self.sdkappid, self.keys, self._directory = sdkappid, Keys(sdkappid), directory
        environ = {"IMATTR_SDKAPPID": f"{sdkappid}", "IMATTR_LOG_FORMAT": "json"} | dict(settings or {})
        plan = Plan(
            workers=0,
            concurrency=concurrency,
            flower=False,
            names=NAMES,
            simulator_options=("--latency", f"{latency}"),
            persistent=persistent,
        )
        self.sandbox = Sandbox(directory, environ, plan)
        self._workers = workers
        self.health_ports: list[int] = []
        self.exporter_port = free_port()
        self._exporter: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._frozen: list[int] = []
        self._users = itertools.count()

    def __enter__(self) -> Self:
        self.sandbox.__enter__()
        try:
            ready = [self._start_worker(number) for number in range(1, self._workers + 1)]
            self.start_exporter()
            for check in ready:
                check()
            for port in (*self.health_ports, self.exporter_port):
                _wait_for(f"http://127.0.0.1:{port}/metrics")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.stop_exporter()
        self.sandbox.stop()

    # The parts.

    def _start_worker(self, number: int) -> Callable[[], None]:
        port = free_port()
        self.health_ports.append(port)
        self.sandbox.environ["IMATTR_HEALTH_PORT"] = f"{port}"
        return self.sandbox.start_worker(number)

    def stop_worker(self, number: int = 1) -> None:
        name = f"worker-{number}"
        os.kill(self.sandbox.pids()[name], signal.SIGTERM)
        self.sandbox.forget(name)

    def restart_worker(self, number: int) -> None:
        """End one in order, and start another on its port."""
        self.stop_worker(number)
        self.sandbox.environ["IMATTR_HEALTH_PORT"] = f"{self.health_ports[number - 1]}"
        self.sandbox.start_worker(number)()

    def freeze_intake(self, number: int = 1) -> None:
        """Suspend the process that takes Celery's queue."""
        worker = self.sandbox.pids()[f"worker-{number}"]
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
                if int(fields[1]) == worker and b"worker.queue_process" in command:
                    os.kill(int(entry.name), signal.SIGSTOP)
                    self._frozen.append(int(entry.name))
        assert self._frozen, "no process takes the queue"

    def start_exporter(self) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
        # What it is given, and nothing else.
        environ |= {name: self.sandbox.environ[name] for name in ("IMATTR_SDKAPPID", "IMATTR_REDIS_URL")}
        with (self._directory / "exporter.log").open("ab") as log:
            self._exporter = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", "exporter", "--host", "127.0.0.1", "--port", f"{self.exporter_port}"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def stop_exporter(self) -> None:
        if self._exporter:
            self._exporter.terminate()
            self._exporter.wait()
            self._exporter = None

    def kill_redis(self) -> None:
        os.kill(self.sandbox.pids()["redis"], signal.SIGKILL)

    # What is done to them.

    def imattr(self, *arguments: str) -> None:
        """Run a command of the product."""
        environ = {**os.environ, **self.sandbox.environ}
        subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments],
            env=environ,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def control(self, what: str, given: object) -> None:
        """Set faults or quirks of the simulator."""
        request = urllib.request.Request(
            f"{self.sandbox.api_url}/simulator/{what}", data=json.dumps(given).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=10):
            pass

    def redis(self) -> Redis:
        return Redis.from_url(self.sandbox.redis_url, socket_timeout=10)

    def send(self, users: int, *, prefix: str = "user", lane: Any = "live", value: str = "Gold") -> list[str]:
        """Send updates of so many users who have none yet; returns their ids."""
        ids = [f"{prefix}{next(self._users)}" for _ in range(users)]
        Producer(self.sandbox.redis_url, self.sdkappid, timeout=5).set_many(
            ((user, {"level": value}) for user in ids), lane=lane
        )
        return ids

    def keep_sending(self, a_second: float, *, every: float = 0.5, prefix: str = "user") -> None:
        """Send updates in the background until the end, whatever happens to Redis."""

        def run() -> None:
            owed, last = 0.0, time.monotonic()
            while not self._stop.wait(every):
                now = time.monotonic()
                owed, last = owed + a_second * (now - last), now
                users, owed = int(owed), owed - int(owed)
                # Those of Redis and of a full buffer are the scenario's.
                with contextlib.suppress(RedisError, ImattrError):
                    self.send(users, prefix=prefix)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def repeat(self, action: Callable[[Redis, int], object], every: float = 0.2) -> None:
        """Do something to Redis in the background until the end."""

        def run() -> None:
            with self.redis() as client:
                for number in itertools.count():
                    if self._stop.wait(every):
                        return
                    with contextlib.suppress(RedisError):
                        action(client, number)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def targets(self, *, workers: bool = True) -> Mapping[str, Sequence[str]]:
        """What Prometheus scrapes, by job."""
        found = self.health_ports if workers else []
        return {
            "imattr-worker": [f"127.0.0.1:{port}" for port in found],
            "imattr-exporter": [f"127.0.0.1:{self.exporter_port}"],
        }


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
