"""A TCP proxy between two parts of the system, told over stdin how bad the connection is.

    python -m tests.chaos.proxy LISTEN_PORT TARGET_PORT

One command a line, each answered with a line of JSON:

* `pass`: forward everything, at once;
* `cut`: reset all connections; what was on its way is lost;
* `refuse`: reset new ones, too, until `pass`;
* `delay SECONDS`: answers come later;
* `swallow`: both directions go into a black hole, until `pass` resets all connections;
* `lag SECONDS`: what goes to a replica comes later;
* `isolate`: replicas and sentinels are refused, clients are not;
* `requests`: when HTTP requests began to arrive, by the kernel's clock.

All but the last are answered with the number of connections struck. Requests are never delayed, only lost.
They are counted here and not behind: calls that the proxy bunches up are not the sender's fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
from typing import Any, Self

from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpserver import TCPServer

from worker.sandbox.simulator import TimedStream

#: Lingering for no time makes the kernel send a reset instead of an orderly end.
_RESET = struct.pack("ii", 1, 0)
#: What replicas and sentinels say first.
_PEERS = (b"PSYNC", b"REPLCONF", b"sentinel-")


class _Proxy(TCPServer):
    """The connections, and how they are treated."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self._target = target
        self._open: set[IOStream] = set()
        #: Connections of replicas, and of replicas and sentinels.
        self._replicas: set[IOStream] = set()
        self._peers: set[IOStream] = set()
        self._delay = self._lag = 0.0
        self._refuse = self._swallow = self._isolate = False
        self._requests: list[float] = []

    def command(self, line: str) -> Any:
        """Carry out one command."""
        word, _, argument = line.strip().partition(" ")
        if word == "requests":
            return self._requests
        struck = len(self._open) // 2
        if word == "pass" and not self._swallow:
            struck = 0
        elif word in ("cut", "refuse", "pass"):
            for stream in list(self._open):
                _reset(stream)
        elif word == "isolate":
            for stream in list(self._peers):
                _reset(stream)
        self._delay = float(argument) if word == "delay" else 0.0
        self._lag = float(argument) if word == "lag" else 0.0
        self._refuse, self._swallow, self._isolate = word == "refuse", word == "swallow", word == "isolate"
        return struck

    async def handle_stream(self, stream: IOStream, address: tuple[str, int]) -> None:
        """Forward one connection until either side ends it."""
        if self._refuse:
            _reset(stream)
            return
        asking, answering = TimedStream(stream.socket), IOStream(socket.socket())
        try:
            await answering.connect(("127.0.0.1", self._target))
        except StreamClosedError:
            _reset(asking)
            return
        both = {asking, answering}
        for end in both:
            end.set_nodelay(True)
        self._open |= both
        pumps = [
            asyncio.ensure_future(self._requests_of(asking, answering)),
            asyncio.ensure_future(self._answers_of(answering, asking)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in both:
            end.close()
        await asyncio.wait(pumps)
        self._open -= both
        self._peers -= both
        self._replicas -= both

    async def _requests_of(self, asking: TimedStream, answering: IOStream) -> None:
        with contextlib.suppress(StreamClosedError):
            while True:
                data = await asking.read_bytes(65_536, partial=True)
                if data.startswith(b"POST "):
                    self._requests.append(asking.arrived or time.monotonic())
                if any(word in data for word in _PEERS):
                    self._peers.add(asking)
                    if b"PSYNC" in data:
                        self._replicas.add(asking)
                    if self._isolate:
                        _reset(asking)
                if not self._swallow:
                    await answering.write(data)

    async def _answers_of(self, answering: IOStream, asking: IOStream) -> None:
        with contextlib.suppress(StreamClosedError):
            while True:
                data = await answering.read_bytes(1_000_000, partial=True)
                if seconds := self._lag if asking in self._replicas else self._delay:
                    await asyncio.sleep(seconds)
                if not self._swallow:
                    await asking.write(data)


def _reset(stream: IOStream) -> None:
    if not stream.closed():
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.close()


async def _main(listen: int, target: int) -> None:
    proxy = _Proxy(target)
    proxy.listen(listen, "127.0.0.1")
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    print("0", flush=True)
    while line := await commands.readline():
        print(json.dumps(proxy.command(line.decode())), flush=True)


class Proxy:
    """A proxy as a process of its own. A context manager."""

    def __init__(self, listen: int, target: int) -> None:
        self.port = listen
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.proxy", str(listen), str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._answer()

    def tell(self, command: str) -> int:
        """Carry out a command; returns the number of connections struck."""
        return int(self._ask(command))

    def requests(self) -> list[float]:
        """When requests began to arrive, seconds of the monotonic clock."""
        found: list[float] = self._ask("requests")
        return found

    def _ask(self, command: str) -> Any:
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the proxy has ended")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        # The end of its commands is the end of the process.
        self._process.communicate(timeout=10)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
