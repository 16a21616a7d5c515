"""The simulator in a thread of the test's own process: real HTTP, and the Api object in reach."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import requests
import tornado.httpserver

from tests.conftest import SECRET_KEY
from worker.delivery.answers import Answer, NoReply
from worker.delivery.api import ChatApi
from worker.models import Attributes, UserId
from worker.sandbox.faults import Fault, Faults
from worker.sandbox.redis_server import free_port
from worker.sandbox.simulator import Api, make_server

APP = 1400000000


@dataclass
class Simulation:
    """A running simulator."""

    api: Api
    faults: Faults
    url: str

    def fail(self, *faults: Fault) -> None:
        # Copies: the simulator counts in them how often they are still to strike.
        self.faults.replace([dataclasses.replace(fault) for fault in faults])


@contextlib.contextmanager
def simulation() -> Iterator[Simulation]:
    """Serve until the end of the `with` block."""
    api, faults, port = Api(APP, SECRET_KEY, names=("city", "level")), Faults(), free_port()
    running, loops = threading.Event(), []

    async def main() -> None:
        server: tornado.httpserver.HTTPServer = make_server(api, faults)
        server.listen(port, "127.0.0.1")
        ended = asyncio.Event()
        loops.append((asyncio.get_running_loop(), ended))
        running.set()
        await ended.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert running.wait(10)
    try:
        yield Simulation(api, faults, f"http://127.0.0.1:{port}")
    finally:
        [(loop, ended)] = loops
        loop.call_soon_threadsafe(ended.set)
        thread.join()


def control(url: str, what: str) -> requests.Response:
    return requests.get(f"{url}/simulator/{what}", timeout=10)


def set_at_once(api: ChatApi, users: Iterable[tuple[UserId, Attributes]]) -> Answer:
    """Make one call without waiting for a slot."""
    call = api.prepare_set(users)
    if isinstance(call, NoReply):
        return call
    call.send()
    return call.answer()
