"""The health page tells a worker that takes turns from one that has stalled, and one that takes work from one that does not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from worker.operate import health
from worker.sandbox.redis_server import free_port


class Page:
    """A page whose worker is as the test says."""

    def __init__(self) -> None:
        self.stalled_for = self.unanswered_for = 0.0
        self.is_registered = True
        self.port = free_port()

    def get(self, path: str) -> tuple[int, Any]:
        reply = requests.get(f"http://127.0.0.1:{self.port}/{path}", timeout=5)
        return reply.status_code, reply.json() if reply.headers[
            "Content-Type"
        ] == "application/json" else None


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page()
    live = health.live(lambda: page.stalled_for)
    ready = health.ready(lambda: page.unanswered_for, lambda: page.is_registered)
    server = health.serve(page.port, {**dict.fromkeys(health.LIVE_PATHS, live), "/readyz": ready})
    yield page
    server.shutdown()
    server.server_close()


def test_a_worker_that_takes_turns_is_alive(page: Page) -> None:
    page.stalled_for = health.STALLED_AFTER - 1

    status, body = page.get("livez")

    assert (status, body["healthy"]) == (200, True)


def test_a_worker_that_has_stalled_is_not(page: Page) -> None:
    page.stalled_for = health.STALLED_AFTER

    assert page.get("livez") == (503, {"healthy": False, "last_turn_s": 120.0})


def test_a_worker_whose_redis_is_down_is_alive_and_not_ready(page: Page) -> None:
    page.unanswered_for = health.UNREADY_AFTER

    assert page.get("livez")[0] == 200
    assert page.get("readyz") == (503, {"ready": False, "redis": False, "broker": True})


def test_a_worker_that_the_broker_does_not_know_is_not_ready(page: Page) -> None:
    assert page.get("readyz") == (200, {"ready": True, "redis": True, "broker": True})

    page.is_registered = False

    assert page.get("readyz") == (503, {"ready": False, "redis": True, "broker": False})


@pytest.mark.parametrize(
    ("path", "status"), [("", 200), ("healthz", 200), ("livez?x=1", 200), ("metrics.old", 404), ("a/b", 404)]
)
def test_the_page_has_its_paths(page: Page, path: str, status: int) -> None:
    assert page.get(path)[0] == status


def test_the_page_is_there_by_ipv6_as_well(page: Page) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    assert requests.get(f"http://[::1]:{page.port}/livez", timeout=5).ok
    assert page.get("livez")[0] == 200


def test_a_port_that_is_taken_is_an_error_that_says_so(page: Page) -> None:
    with pytest.raises(OSError, match="in use"):
        health.serve(page.port, {})
