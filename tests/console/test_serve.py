"""The real server: what it takes, what it does not, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import requests
from click.testing import CliRunner

from tests.console.conftest import ANN
from worker.cli.main import main
from worker.console.accounts import Accounts
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.keys import Keys


@contextmanager
def running(
    server: EmbeddedServer, keys: Keys, **environ: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, once it answers."""
    port = free_port()
    about = {
        "IMATTR_REDIS_URL": server.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_CONSOLE_PORT": str(port),
    }
    command = [sys.executable, "-m", "worker.cli", "console"]
    with subprocess.Popen(
        command, env=os.environ | about | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
                    break
                except requests.ConnectionError:
                    assert process.poll() is None, process.communicate()[0]
            yield process, port
        finally:
            process.kill()


@pytest.mark.slow  # A process of its own.
def test_it_serves_until_it_is_told_to_stop_and_logs_no_user(
    server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    with running(server, keys) as (process, port):
        answer = requests.get(f"http://127.0.0.1:{port}/user?user=secretuser", timeout=30)
        assert answer.status_code == 200
        assert "secretuser" in answer.text
        assert "server" not in answer.headers
        # More than a line of a request may have, and what is none.
        with socket.create_connection(("127.0.0.1", port)) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " not in raw.recv(100)
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"\x16\x03\x01\x00 hello\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)

    assert process.returncode == 0, said
    assert "console_stopped" in said
    assert "secretuser" not in said


@pytest.mark.slow  # Waits until the server has had enough.
def test_a_connection_on_which_nothing_comes_is_closed(server: EmbeddedServer, keys: Keys) -> None:
    with running(server, keys) as (_, port):
        begun, slow = (
            socket.create_connection(("127.0.0.1", port)),
            socket.create_connection(("127.0.0.1", port)),
        )
        with begun, slow:
            begun.sendall(b"GET / HTTP/1.1\r\nHost: loc")
            for connection in (begun, slow):
                connection.settimeout(60)
                assert connection.recv(1) == b""


@pytest.mark.slow  # A process of its own.
@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"IMATTR_CONSOLE_HOST": "0.0.0.0"}, "nobody would have to log in"),
        ({"IMATTR_CONSOLE_ACCOUNTS_FILE": "/nonexistent"}, "IMATTR_CONSOLE_ACCOUNTS_FILE cannot be read"),
        ({"IMATTR_CONSOLE_PORT": "http"}, "IMATTR_CONSOLE_PORT must be a whole number"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    server: EmbeddedServer, keys: Keys, environ: dict[str, str], words: str
) -> None:
    about = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": str(keys.sdkappid)} | environ

    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "console"],
        env=os.environ | about,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_hash_is_made_from_a_pipe_and_lets_in(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["console", "hash", "ann", "--role", "operator"], input=f"{ANN}\n")

    assert done.exit_code == 0
    assert ANN not in done.output
    file = tmp_path / "accounts"
    file.write_text(done.stdout)
    account = Accounts(str(file)).with_password("ann", ANN)
    assert account is not None
    assert account.role == "operator"


def test_a_token_is_shown_once_and_lets_in(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["console", "token", "robot"])

    secret, line = done.stdout.split()
    file = tmp_path / "accounts"
    file.write_text(line)
    account = Accounts(str(file)).with_token(secret)
    assert account is not None
    assert (account.name, account.role) == ("robot", "viewer")


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["hash", "ann"], "short\n"),
        (["hash", "a:b"], ANN),
        (["token", "<b>"], ""),
        (["hash", "ann", "--role", "root"], ANN),
    ],
)
def test_no_line_is_made_that_the_file_would_not_take(arguments: list[str], given: str) -> None:
    done = CliRunner().invoke(main, ["console", *arguments], input=given)

    assert done.exit_code in (1, 2)
    assert "scrypt" not in done.output
    assert given.strip() not in done.output or not given.strip()
