"""The way to Redis: one connection for everybody, a third of the usual cost, and a stage that can interfere."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import hiredis
import redis
from redis._parsers import BaseParser
from redis.client import Pipeline

from tests.virtual import now_for
from worker.state import scripts

#: Commands whose replies need no further reading.
_PLAIN = {"EVALSHA", "ZREM", "HINCRBY", "HGET", "HMGET"}


class Stage(Protocol):
    """What stands between the product and the server."""

    def step(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one command, or not, and answer, or not."""

    def us(self) -> int:
        """The server's clock."""

    def expires(self, key: str, seconds: float) -> None:
        """A key was given so long to live."""


class Wire(redis.Redis):
    """A client for threads that take turns. Commands go to the stage while there is one.

    Scripts go to the server without the pool, the retries and the measuring of the library, all of which
    would take three quarters of the time. Sending a script that the server has forgotten is the library's.
    """

    def __init__(self, port: int) -> None:
        """Connect to a server of this machine."""
        super().__init__(host="127.0.0.1", port=port)
        self.stage: Stage | None = None
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader(replyError=BaseParser.parse_error)
        self._scripts: dict[str, scripts.Script] = {}
        self._names: dict[str, str] = {}
        self._flushed = False

    def close(self) -> None:
        super().close()
        self._socket.close()

    def execute_command(self, *args: Any, **options: Any) -> Any:
        command = args[0]

        stage = self.stage
        name = self._names.get(args[1], command) if command == "EVALSHA" else command

        def run() -> Any:
            if command in _PLAIN:
                return self._exchange(_dated(name, args, stage.us()) if stage else args)
            return super(Wire, self).execute_command(*args, **options)  # type: ignore[no-untyped-call]

        return stage.step(name, run) if stage else run()

    def bare(self, *args: Any) -> Any:
        """Run a command that nothing interferes with."""
        return super().execute_command(*args)  # type: ignore[no-untyped-call]

    def _exchange(self, args: Sequence[Any]) -> Any:
        self._socket.sendall(hiredis.pack_command(tuple(args)))
        reader = self._reader
        while (reply := reader.gets()) is False:
            received = self._socket.recv(65536)
            if not received:
                raise EOFError("the server is gone")
            reader.feed(received)
        if isinstance(reply, redis.RedisError):
            raise reply
        return reply

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return _Transaction(self, transaction, shard_hint)

    def load(self, name: str, text: str) -> scripts.Script:
        """A script, registered once for all schedules."""
        if text not in self._scripts:
            script: Any = self.register_script(text)
            self._scripts[text], self._names[script.sha] = script, name
            self.bare("SCRIPT LOAD", text)
        return self._scripts[text]

    def flush_scripts(self) -> None:
        """Make the server forget them."""
        self.bare("SCRIPT FLUSH")
        self._flushed = True

    def restore_scripts(self) -> None:
        """Give the server back what it was made to forget."""
        if self._flushed:
            for text in self._scripts:
                self.bare("SCRIPT LOAD", text)
        self._flushed = False


def _dated(name: str, args: Sequence[Any], us: int) -> Sequence[Any]:
    """The command of a script, with the time at which it runs."""
    if name == "campaign":
        return (*args, us // 1000)
    if args[0] != "EVALSHA" or (now := now_for(name, us)) is None:
        return args
    at = 3 + args[2]
    return (*args[:at], now, *args[at + 1 :]) if args[at] == "" else args


class _Transaction(Pipeline):
    """A transaction is one step."""

    def __init__(self, wire: Wire, transaction: bool, shard_hint: Any) -> None:
        super().__init__(wire.connection_pool, wire.response_callbacks, transaction, shard_hint)
        self._wire = wire

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        stage = self._wire.stage
        if stage is None:
            return super().execute(raise_on_error)
        commands = [args for args, _ in self.command_stack]
        name = "+".join(str(args[0]) for args in commands)
        replies: list[Any] = stage.step(name, lambda: super(_Transaction, self).execute(raise_on_error))
        for command in commands:
            if "EX" in command:
                stage.expires(str(command[1]), float(command[command.index("EX") + 1]))
        return replies
