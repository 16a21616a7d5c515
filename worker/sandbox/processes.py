"""Everything on one machine: Redis, the API simulator, workers, console, exporter and Flower, each in its own process.

Uses what is configured, and starts stand-ins for the rest on free ports of the loopback interface. All logs, and the data
of the embedded server, are in one directory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
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

from worker.config import Settings
from worker.errors import ConfigError, SandboxError
from worker.sandbox.directory import DirectoryLock
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.sandbox.supervisor import PATIENCE, Part, Supervisor, end_of, how_it_ended, where_to_look
from worker.state.connection import AuthenticationError, ConnectionError, RedisError, TimeoutError, connect
from worker.state.keys import Keys

#: The app that the simulator serves unless another is configured.
SDKAPPID = "1400000000"
#: Seconds in which workers must finish their batches, and every other part must end.
WORKERS_PATIENCE, PARTS_PATIENCE = 60.0, 10.0
#: The same without Redis: workers cannot finish anything then.
PATIENCE_WITHOUT_REDIS = 5.0
#: Settings that hold the secret key, or name its file.
KEYS = ("IMATTR_SECRET_KEY", "IMATTR_SECRET_KEY_FILE")
#: The user name of Flower's login.
FLOWER_USER = "imattr"
#: Where Flower reads its logins: everybody on the machine can see a command line.
FLOWER_LOGINS = ("FLOWER_BASIC_AUTH", "FLOWER_AUTH")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start. `names` are the attribute names that the simulated app has."""

    workers: int = 2
    concurrency: int = 16
    pool: str = "threads"
    flower: bool = True
    #: Whether Flower asks for a login.
    login: bool = True
    #: Whether to run an exporter, and give each worker a health port.
    metrics: bool = False
    #: Whether to run the console, the website for operators.
    console: bool = False
    names: Sequence[str] = ()
    simulator_options: Sequence[str] = ()
    persistent: bool = True


class Process:
    """A part that is one of our programs, with its log in a file; `is_ready` calls `ready`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        log: Path,
        environ: Mapping[str, str],
        ready: Callable[[Process], bool],
        cwd: Path | None = None,
    ) -> None:
        self.name, self.log = name, log
        self._arguments, self._environ, self._cwd, self._ready = arguments, environ, cwd, ready
        log.write_bytes(b"")
        self.start()

    def start(self) -> None:
        # Keep what it logged before it ended.
        with self.log.open("ab") as output:
            self._begin, self._is_cleared = output.tell(), False
            self.popen = subprocess.Popen(
                [sys.executable, *self._arguments],
                env=self._environ,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal reaches only this process, which stops the others in order.
                start_new_session=True,
            )

    def status(self) -> int | None:
        return self.popen.poll()

    def is_ready(self) -> bool:
        return self._ready(self)

    def said(self) -> str:
        """What it has logged since its last start."""
        return end_of(self.log, self._begin)

    def ask_to_end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it and everything that it has started: they are in its session."""
        # Once only: later, the id may belong to another process.
        if not self._is_cleared:
            self._is_cleared = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


@dataclass(slots=True)
class Sandbox:
    """A running sandbox; a context manager. `environ` has the settings that its processes use."""

    directory: Path
    environ: dict[str, str]
    plan: Plan = field(default_factory=Plan)
    redis_url: str = ""
    api_url: str = ""
    flower_url: str = ""
    #: User and password, if Flower asks for a login that we made.
    flower_login: tuple[str, str] | None = None
    exporter_url: str = ""
    console_url: str = ""
    #: The URL of each worker's health page, by name.
    health_urls: dict[str, str] = field(default_factory=dict)
    #: The stand-ins, in words.
    stand_ins: list[str] = field(default_factory=list)
    #: Called with what happens to the parts. If given, those that end are started again; else `check` raises.
    tell: Callable[[str], None] | None = None
    #: Whether we were asked to stop, which ends a start.
    stopping: Callable[[], bool] = lambda: False
    #: Whether we were asked twice: parts that have not ended yet are then killed.
    impatient: Callable[[], bool] = lambda: False
    _lock: DirectoryLock | None = None
    _server: EmbeddedServer | None = None
    _processes: list[Process] = field(default_factory=list)
    _supervisor: Supervisor | None = None

    @property
    def simulates(self) -> bool:
        """Whether the API is our simulator."""
        return any(process.name == "simulator" for process in self._processes)

    @property
    def login(self) -> str:
        """Flower's login, in words."""
        if self.flower_login:
            return "user {}, password {}".format(*self.flower_login)
        return "the login that your environment names" if self.plan.login else "no login"

    def __enter__(self) -> Self:
        if self.tell:
            self._supervisor = Supervisor(self.tell)
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
        if self.plan.metrics:
            ready.append(self._start_exporter())
        if self.plan.console:
            ready.append(self._start_console())
        if self.plan.flower:
            ready.append(self._start_flower())
        for wait in ready:
            wait()

    def _start_redis(self) -> None:
        if not self.environ.get("IMATTR_REDIS_URL"):
            lock = (self._lock.file,) if self._lock else ()
            self._server = EmbeddedServer(
                self.directory / "redis", persistent=self.plan.persistent, keeps_open=lock, wait=False
            )
            self._watch(self._server)
            self._wait(self._server)
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
        self._spawn(
            "simulator",
            ["-m", "worker.cli", "simulate", *options],
            lambda _: answers(f"{self.api_url}/simulator/state"),
        )()
        self.stand_ins.append("Tencent Cloud Chat: a simulator; nothing reaches the real service")

    def restart_redis(self) -> None:
        """Restart the embedded server on its port, with the data in its file."""
        if self._server is None:
            raise SandboxError("the Redis in use is not ours, so it cannot be restarted")
        self._server.stop()
        self._server.start()
        self._server.wait_until_ready()

    def start_worker(self, number: int, *, include: str = "", code: Path | None = None) -> Callable[[], None]:
        """Start one worker process; the result waits until it is ready.

        `include` names a module of tasks, `code` a directory with another version of the product.
        """
        name = f"worker-{number}"
        pool = ["--pool", self.plan.pool, "--concurrency", str(self.plan.concurrency)]
        options = [*pool, "--without-gossip", "--without-mingle", "--hostname", f"{name}@%h"]
        options += ["--include", include] if include else []
        own: dict[str, str] = {}
        if self.plan.metrics:
            own["IMATTR_HEALTH_PORT"] = str(port := free_port())
            self.health_urls[name] = f"http://127.0.0.1:{port}"

        def ready(process: Process) -> bool:
            if self.plan.metrics:
                return answers(f"{self.health_urls[name]}/readyz")
            return " ready." in process.said()

        return self._spawn(
            name, ["-m", "celery", "--app", "worker", "worker", *options], ready, own=own, cwd=code
        )

    def _start_exporter(self) -> Callable[[], None]:
        port = free_port()
        self.exporter_url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port)]
        return self._spawn(
            "exporter",
            ["-m", "worker.cli", "exporter", *options],
            lambda _: answers(f"{self.exporter_url}/healthz"),
            calls_api=False,
        )

    def _start_console(self) -> Callable[[], None]:
        port = free_port()
        self.console_url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port)]
        return self._spawn(
            "console",
            ["-m", "worker.cli", "console", *options],
            lambda _: answers(f"{self.console_url}/healthz"),
            calls_api=False,
        )

    def _start_flower(self) -> Callable[[], None]:
        port = free_port()
        self.flower_url = f"http://127.0.0.1:{port}"
        options = ["--address=127.0.0.1", f"--port={port}", "--max_tasks=5000", "--logging=warning"]
        own: dict[str, str] = {}
        if self.plan.login and not any(os.environ.get(name) for name in FLOWER_LOGINS):
            self.flower_login = (FLOWER_USER, secrets.token_urlsafe(12))
            own["FLOWER_BASIC_AUTH"] = ":".join(self.flower_login)
        return self._spawn(
            "flower",
            ["-m", "celery", "--app", "worker", "flower", *options, "--read_only=True"],
            lambda _: answers(f"{self.flower_url}/healthcheck"),
            own=own,
            calls_api=False,
        )

    def _spawn(
        self,
        name: str,
        arguments: Sequence[str],
        ready: Callable[[Process], bool] = lambda _: True,
        *,
        own: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        calls_api: bool = True,
    ) -> Callable[[], None]:
        """Start one of our programs; the result waits until it is ready.

        Its `own` settings take precedence. A program that does not call the API does not get the key.
        """
        settings = {name: text for name, text in self.environ.items() if calls_api or name not in KEYS}
        environ = _environment(settings, own or {})
        log = self.directory / f"{name}.log"
        process = Process(name, arguments, log=log, environ=environ, ready=ready, cwd=cwd)
        self._processes.append(process)
        self._watch(process)
        return lambda: self._wait(process)

    def _watch(self, part: Part) -> None:
        if self._supervisor:
            self._supervisor.watch(part)
        self._note_pids()

    def _note_pids(self) -> None:
        if self._lock:
            self._lock.note(self.pids().values())

    def _wait(self, part: Part) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self._supervisor.is_ready(part) if self._supervisor else part.is_ready()):
            if self.stopping():
                raise KeyboardInterrupt
            self.check()
            if not self._supervisor and time.monotonic() > deadline:
                raise SandboxError(f"{part.name} did not start in {PATIENCE:.0f} s, see {part.log}")
            time.sleep(0.05)

    def check(self) -> None:
        """Check every part once. Raises `SandboxError`, with its last words, if one has ended for good."""
        if self._supervisor:
            if self._supervisor.turn():
                self._note_pids()
            return
        for part in self._parts():
            status = part.status()
            if status is not None:
                raise SandboxError(f"{part.name} {how_it_ended(status)}{where_to_look(part)}")

    def _say(self, text: str) -> None:
        if self.tell:
            self.tell(text)

    def _parts(self) -> list[Part]:
        return [*self._processes, *([self._server] if self._server else [])]

    def forget(self, name: str) -> None:
        """Stop watching a process that was ended on purpose."""
        for process in self._processes:
            if process.name == name:
                process.popen.wait()
        self._processes = [process for process in self._processes if process.name != name]

    def pids(self) -> dict[str, int]:
        """Process id by name; the embedded server is `redis`."""
        found = {process.name: process.popen.pid for process in self._processes}
        return found | ({"redis": self._server.pid} if self._server else {})

    def stop(self) -> None:
        """Stop everything in order, in bounded time: workers finish their batches, Redis goes last."""
        if self._processes:
            self._say(f"stopping: workers finish their batches, in {WORKERS_PATIENCE:.0f} s at most ...")
        workers = [process for process in self._processes if process.name.startswith("worker-")]
        simulator = [process for process in self._processes if process.name == "simulator"]
        others = [process for process in self._processes if process not in (*workers, *simulator)]
        self._end(workers, WORKERS_PATIENCE)
        self._end(others, PARTS_PATIENCE)
        self._end(simulator, PARTS_PATIENCE)
        self._processes.clear()
        if self._server:
            self._server.stop(PARTS_PATIENCE)
            self._server = None
        if self._lock:
            self._lock.release()
            self._lock = None

    def _end(self, processes: Sequence[Process], patience: float) -> None:
        """Ask these to end, and kill those that do not in time."""
        running = [process for process in processes if process.status() is None]
        for process in running:
            process.ask_to_end()
        now = time.monotonic()
        deadline, look_at_redis = now + patience, now
        while any(process.status() is None for process in running) and now < deadline:
            if self.impatient():
                break
            if now >= look_at_redis:
                look_at_redis = now + 1
                if deadline - now > PATIENCE_WITHOUT_REDIS and not self._redis_answers():
                    deadline = time.monotonic() + PATIENCE_WITHOUT_REDIS
                    self._say(
                        f"Redis does not answer: anything still running in {PATIENCE_WITHOUT_REDIS:.0f} s is killed"
                    )
            time.sleep(0.05)
            now = time.monotonic()
        for process in processes:
            process.kill()

    def _redis_answers(self) -> bool:
        """Whether there is a Redis with which workers can finish. One that refuses us counts."""
        try:
            settings = Settings.from_env(self.environ, "producer")
        except ConfigError:
            return True
        key = Keys(settings.sdkappid).pending
        try:
            with connect(settings.redis, key=key, timeout=1, connect_timeout=1) as redis:
                redis.ping()
        except AuthenticationError:
            return True
        except (ConnectionError, TimeoutError):
            return False
        except RedisError:
            return True
        return True


def _environment(settings: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMATTR_")}
    return inherited | {"PYTHONUNBUFFERED": "1"} | dict(settings) | dict(own)


#: This machine is asked directly, not through a proxy that the environment may name.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(url: str) -> bool:
    try:
        with _direct.open(url, timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
