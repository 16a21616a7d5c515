"""A console as operators have it: the program `imattr console`, in front of a real Redis."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from worker.console.accounts import Role, hash_password
from worker.sandbox.processes import answers
from worker.sandbox.redis_server import free_port

#: The accounts of the tests, with their passwords. Their hashes are cheap to make and to try.
PEOPLE: Mapping[str, tuple[Role, str]] = {
    "olga": ("operator", "opens the line again"),
    "vera": ("viewer", "only has a look at it"),
}
CHEAP = (2, 8, 1)


@dataclass(frozen=True, slots=True)
class Console:
    """A console that runs. `url` has no slash at its end."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def console(directory: Path, settings: Mapping[str, str]) -> Iterator[Console]:
    """Run one on a free port."""
    port = free_port()
    log = directory / f"console-{port}.log"
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("IMATTR_")}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "console", "--port", str(port)],
            env=inherited | {"PYTHONUNBUFFERED": "1"} | dict(settings),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 30
            while not answers(f"http://127.0.0.1:{port}/healthz"):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the console does not answer: {log.read_text()}")
                time.sleep(0.05)
            yield Console(f"http://127.0.0.1:{port}", port, process, log)
        finally:
            process.terminate()


def accounts(directory: Path) -> dict[str, str]:
    """Write the accounts' file; returns the setting that names it."""
    file = directory / "accounts"
    lines = (f"{name}:{role}:{hash_password(password, CHEAP)}\n" for name, (role, password) in PEOPLE.items())
    file.write_text("".join(lines))
    return {"IMATTR_CONSOLE_ACCOUNTS_FILE": str(file)}
