"""The broker: a Redis of its own, or RabbitMQ where it is installed. Both can be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

import kombu
import redis

from worker.sandbox.redis_server import EmbeddedServer, free_port

#: Headers, and content types, of messages that nobody should send.
KINDS = ("application/json", "application/x-python-serialize", "", "text/plain")
HEADERS: tuple[dict[str, object], ...] = (
    {},
    {"task": 7},
    {"task": "attributes.update", "id": "1", "eta": "soon"},
)

#: Seconds RabbitMQ may take to start.
PATIENCE = 60.0


class Broker(Protocol):
    """A running broker."""

    url: str

    def kill(self) -> None:
        """End it like a crash."""

    def start(self) -> None:
        """Start it again with what it kept."""

    def put(self, messages: list[bytes]) -> int:
        """Put these into the queue of updates as they are; returns how many it took."""

    def stop(self) -> None:
        """End it for good."""


class RedisBroker:
    """A server beside the one that holds the state."""

    def __init__(self, directory: Path) -> None:
        self._server = EmbeddedServer(directory)
        self.url = self._server.url

    def kill(self) -> None:
        self._server.kill()

    def start(self) -> None:
        self._server = EmbeddedServer(self._server.directory, port=self._server.port)

    def put(self, messages: list[bytes]) -> int:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=2) as client:
                client.lpush("updates", *messages)
        except redis.RedisError:
            return 0
        return len(messages)

    def stop(self) -> None:
        self._server.stop()


def find_rabbitmq() -> str | None:
    """The program that starts RabbitMQ, not the wrapper that needs to be root."""
    beside = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(beside) if beside.exists() else shutil.which("rabbitmq-server")


class RabbitMQ:
    """A node of its own, on ports and in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        port, name = free_port(), f"imattr-{os.getpid()}"
        self.url, self._port, self._log = f"amqp://guest:guest@127.0.0.1:{port}//", port, directory / "log"
        self._environ = {
            **os.environ,
            "HOME": str(directory),
            "RABBITMQ_NODENAME": f"{name}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(directory / "none"),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        self.start()

    def start(self) -> None:
        program = find_rabbitmq()
        assert program
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [program], env=self._environ, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while not _greets(self._port):
            assert time.monotonic() < deadline, f"RabbitMQ did not start, see {self._log}"
            time.sleep(0.2)

    def kill(self) -> None:
        # The node is a child of the script that starts it.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def put(self, messages: list[bytes]) -> int:
        # What kombu puts around a message in Redis is the message itself here: all of these are rubbish as a body.
        connection: Any = kombu.Connection(self.url, connect_timeout=2)  # type: ignore[attr-defined,no-untyped-call]
        try:
            connection.connect()
            with connection, connection.channel() as channel:
                for number, message in enumerate(messages):
                    kind, headers = KINDS[number % len(KINDS)], HEADERS[number % len(HEADERS)]
                    found = channel.prepare_message(message, content_type=kind, headers=headers)
                    channel.basic_publish(found, exchange="", routing_key="updates")
        except connection.recoverable_connection_errors:
            return 0
        return len(messages)

    def stop(self) -> None:
        self.kill()
        # The name server that it started for all nodes on that port, of which it was the only one.
        subprocess.run(["epmd", "-kill"], env=self._environ, capture_output=True, check=False)


def _greets(port: int) -> bool:
    """Whether a broker answers there: a port alone is open before the node can be used."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return len(connection.recv(1)) == 1
    except OSError:
        return False
