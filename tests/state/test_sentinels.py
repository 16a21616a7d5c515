"""Which server a connection takes for the primary, when the sentinels that it asks say different things."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from worker.redis_url import read_redis_url
from worker.state.connection import ConnectionError, SentinelLocator

OLD, NEW = ("127.0.0.1", 7001), ("127.0.0.1", 7002)


@dataclass
class Sentinel:
    """What one sentinel says: the server that it watches, and the one that it gives to clients."""

    watches: tuple[str, int] = OLD
    names: tuple[str, int] = OLD
    epoch: int = 0
    flags: str = "master"
    asked: int = field(default=0, init=False)

    def answer(self, subcommand: str) -> list[Any]:
        self.asked += 1
        if subcommand == "GET-MASTER-ADDR-BY-NAME":
            return [self.names[0], str(self.names[1])]
        host, port = self.watches
        return ["ip", host, "port", str(port), "flags", self.flags, "config-epoch", str(self.epoch)]


class _Handler(socketserver.StreamRequestHandler):
    sentinel: Sentinel

    def handle(self) -> None:
        while head := self.rfile.readline():
            words = []
            for _ in range(int(head[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2].decode())
            reply = self.sentinel.answer(words[1].upper()) if words[0].upper() == "SENTINEL" else []
            lines = [f"${len(word)}\r\n{word}\r\n" for word in reply]
            self.wfile.write(f"*{len(reply)}\r\n{''.join(lines)}".encode())


@pytest.fixture
def sentinels() -> Iterator[tuple[SentinelLocator, list[Sentinel]]]:
    """Three sentinels on free ports, and a locator that knows them."""
    states = [Sentinel(), Sentinel(), Sentinel()]
    servers = []
    for state in states:
        handler = type("Handler", (_Handler,), {"sentinel": state})
        servers.append(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler))
        servers[-1].daemon_threads = True
        threading.Thread(
            target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
    hosts = ",".join(f"127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield SentinelLocator(read_redis_url(f"redis+sentinel://{hosts}/main")), states
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_the_latest_failover_is_believed(sentinels: tuple[SentinelLocator, list[Sentinel]]) -> None:
    locator, states = sentinels
    assert locator.locate() == OLD
    states[1].watches = states[1].names = NEW
    states[1].epoch = 1
    assert locator.locate() == NEW


def test_the_leader_of_a_failover_names_the_new_primary(
    sentinels: tuple[SentinelLocator, list[Sentinel]],
) -> None:
    # It still watches the old one, which may be well: somebody asked for the failover.
    locator, states = sentinels
    states[0].names, states[0].epoch = NEW, 1
    assert locator.locate() == NEW


def test_a_primary_that_was_replaced_may_be_down(sentinels: tuple[SentinelLocator, list[Sentinel]]) -> None:
    locator, states = sentinels
    for state in states:
        state.flags = "s_down,master,o_down"
    with pytest.raises(ConnectionError, match="the sentinels say that the primary is down"):
        locator.locate()
    states[0].names, states[0].epoch = NEW, 1
    assert locator.locate() == NEW


def test_more_than_half_are_asked(sentinels: tuple[SentinelLocator, list[Sentinel]]) -> None:
    locator, states = sentinels
    locator.locate()
    assert [bool(state.asked) for state in states] == [True, True, False]
