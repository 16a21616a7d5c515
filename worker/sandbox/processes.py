"""Everything on one machine: Redis, the API simulator, workers and Flower, each in its own process.

Uses what is configured, and starts stand-ins for the rest on free ports of the loopback interface. All logs, and the data
of the embedded server, are in one directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from worker.errors import SandboxError
from worker.sandbox.redis_server import EmbeddedServer, free_port

#: The app that the simulator serves unless another is configured.
SDKAPPID = "1400000000"
#: Seconds a process may take to start, and a worker to finish its batches.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start. `names` are the attribute names that the simulated app has."""

    workers: int = 2
    concurrency: int = 16
    pool: str = "threads"
    flower: bool = True
    names: Sequence[str] = ()
    simulator_options: Sequence[str] = ()
    persistent: bool = True


@dataclass(slots=True)
class _Process:
    name: str
    popen: subprocess.Popen[bytes]
    log: Path


@dataclass(slots=True)
class Sandbox:
    """A running sandbox; a context manager. `environ` has the settings that its processes use."""

    directory: Path
    environ: dict[str, str]
    plan: Plan = field(default_factory=Plan)
    redis_url: str = ""
    api_url: str = ""
    flower_url: str = ""
    #: The stand-ins, in words.
    stand_ins: list[str] = field(default_factory=list)
    #: Whether somebody has asked twice to stop: parts that have not ended yet are then killed.
    impatient: Callable[[], bool] = lambda: False
    _lock: DirectoryLock | None = None
    _server: EmbeddedServer | None = None
    _processes: list[_Process] = field(default_factory=list)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _start(self) -> None:
        self._lock = DirectoryLock(self.directory)
        self._start_redis()
        self._start_simulator()
        ready = [self.start_worker(number) for number in range(1, self.plan.workers + 1)]
        if self.plan.flower:
            ready.append(self._start_flower())
        for check in ready:
            check()

    def _start_redis(self) -> None:
        if not self.environ.get("IMATTR_REDIS_URL"):
            lock = (self._lock.file,) if self._lock else ()
            self._server = EmbeddedServer(
                self.directory / "redis", persistent=self.plan.persistent, keeps_open=lock
            )
            self.environ["IMATTR_REDIS_URL"] = self._server.url
            kept = f", data kept in {self.directory / 'redis'}" if self.plan.persistent else ""
            self.stand_ins.append(f"Redis: an embedded server{kept}")
        self.redis_url = self.environ["IMATTR_REDIS_URL"]

    def _start_simulator(self) -> None:
        env = self.environ
        if env.get("IMATTR_API_URL") or env.get("IMATTR_REGION"):
            self.api_url = env.get("IMATTR_API_URL", "")
            return
        env.setdefault("IMATTR_SDKAPPID", SDKAPPID)
        if not env.get("IMATTR_SECRET_KEY_FILE"):
            env["IMATTR_SECRET_KEY"] = env.get("IMATTR_SECRET_KEY") or secrets.token_hex(32)
        port = free_port()
        self.api_url = env["IMATTR_API_URL"] = f"http://127.0.0.1:{port}"
        options = [part for name in self.plan.names for part in ("--name", name)]
        options += [*self.plan.simulator_options, "--port", str(port)]
        self._spawn("simulator", ["-m", "worker.cli", "simulate", *options])
        self._wait("simulator", lambda: _answers(f"{self.api_url}/simulator/state"))
        self.stand_ins.append("Tencent Cloud Chat: a simulator; nothing reaches the real service")

    def restart_redis(self) -> None:
        """Restart the embedded server on its port, with the data in its file."""
        if self._server is None:
            raise SandboxError("the Redis in use is not ours, so it cannot be restarted")
        self._server.stop()
        self._server = EmbeddedServer(self._server.directory, port=self._server.port)

    def start_worker(self, number: int, *, include: str = "", code: Path | None = None) -> Callable[[], None]:
        """Start one worker process; the result waits until it is ready.

        `include` names a module of tasks, `code` a directory with another version of the product.
        """
        name = f"worker-{number}"
        pool = ["--pool", self.plan.pool, "--concurrency", str(self.plan.concurrency)]
        options = [*pool, "--without-gossip", "--without-mingle", "--hostname", f"{name}@%h"]
        options += ["--include", include] if include else []
        process = self._spawn(name, ["-m", "celery", "--app", "worker", "worker", *options], cwd=code)
        return lambda: self._wait(name, lambda: b" ready." in process.log.read_bytes())

    def _start_flower(self) -> Callable[[], None]:
        port = free_port()
        self.flower_url = f"http://127.0.0.1:{port}"
        options = ["--address=127.0.0.1", f"--port={port}", "--max_tasks=5000", "--logging=warning"]
        self._spawn("flower", ["-m", "celery", "--app", "worker", "flower", *options])
        return lambda: self._wait("flower", lambda: _answers(f"{self.flower_url}/healthcheck"))

    def _spawn(self, name: str, arguments: Sequence[str], *, cwd: Path | None = None) -> _Process:
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, *arguments],
                env=_environment(self.environ),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal reaches only us; we stop the others in order.
                start_new_session=True,
            )
        process = _Process(name, popen, log)
        self._processes.append(process)
        return process

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise SandboxError(
                    f"{name} did not start in {PATIENCE:.0f} s, see {self.directory / name}.log"
                )
            time.sleep(0.05)

    def check(self) -> None:
        """Raise `SandboxError`, with its last words, when a part has ended."""
        ended = [(process.name, process.popen.poll(), process.log) for process in self._processes]
        if self._server:
            ended.append(("Redis", self._server.status(), self._server.log))
        for name, status, log in ended:
            if status is not None:
                raise SandboxError(f"{name} {_how_it_ended(status)}, see {log}{_last_words(log)}")

    def forget(self, name: str) -> None:
        """Stop watching this process, which was ended on purpose."""
        for process in self._processes:
            if process.name == name:
                process.popen.wait()
        self._processes = [process for process in self._processes if process.name != name]

    def pids(self) -> dict[str, int]:
        """Process id by name; the embedded server is `redis`."""
        found = {process.name: process.popen.pid for process in self._processes}
        return found | ({"redis": self._server.pid} if self._server else {})

    def stop(self) -> None:
        """End everything in order: workers finish their batches, Redis goes last."""
        order = {"worker": 0, "flower": 1, "simulator": 2}
        # Without Redis, workers cannot finish anything.
        patience = 5.0 if self._server and self._server.status() is not None else PATIENCE
        for stage in sorted(set(order.values())):
            stopping = [p for p in self._processes if order[p.name.partition("-")[0]] == stage]
            for process in stopping:
                with contextlib.suppress(ProcessLookupError):
                    process.popen.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + patience
            for process in stopping:
                while process.popen.poll() is None and time.monotonic() < deadline and not self.impatient():
                    time.sleep(0.05)
                if process.popen.poll() is None:
                    process.popen.kill()
                process.popen.wait()
        self._processes.clear()
        if self._server:
            self._server.stop()
            self._server = None
        if self._lock:
            self._lock.release()
            self._lock = None


def _how_it_ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _last_words(log: Path) -> str:
    """The end of a log, if it says anything."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()[-3:]
    except OSError:
        lines = []
    return ":" + "".join(f"\n  {line}" for line in lines) if lines else ""


class DirectoryLock:
    """A directory that belongs to one sandbox; made if it is not there, and marked as ours.

    The embedded server keeps the lock's file open, too: as long as it runs, nobody else starts one on its data, even if
    the process that started it was killed.
    """

    #: What says that a directory is a sandbox's; it holds the process ids of those who have it.
    MARKER = "imattr-sandbox"

    def __init__(self, directory: Path) -> None:
        """Raises `SandboxError` if the directory is in use, or cannot be used."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.file = os.open(directory / self.MARKER, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SandboxError(f"{directory} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self.file, 100).decode(errors="replace").strip()
            os.close(self.file)
            raise SandboxError(f"already running in {directory}, pid {owner}") from None
        os.truncate(self.file, 0)
        os.pwrite(self.file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self.file)


def empty(directory: Path) -> None:
    """Delete what a sandbox has left in a directory; raises `SandboxError` for a directory that is not one."""
    try:
        if not directory.exists() or not any(directory.iterdir()):
            return
        if directory.is_symlink() or not (directory / DirectoryLock.MARKER).is_file():
            raise SandboxError(
                f"{directory} has files that no sandbox has made: name a new directory, or empty it yourself"
            )
        DirectoryLock(directory).release()
        shutil.rmtree(directory)
    except OSError as error:
        raise SandboxError(f"{directory} cannot be emptied: {error.strerror}") from None


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
    return inherited | {"PYTHONUNBUFFERED": "1"} | dict(settings)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
