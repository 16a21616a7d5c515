"""The health page tells a worker that takes turns from one that has stalled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests

from worker.operate import health
from worker.sandbox.redis_server import free_port


@pytest.fixture
def page() -> Iterator[tuple[str, list[float]]]:
    age = [0.0]
    port = free_port()
    server = health.serve(port, lambda: age[0])
    yield f"http://127.0.0.1:{port}/", age
    server.shutdown()
    server.server_close()


def test_a_worker_that_takes_turns_is_healthy(page: tuple[str, list[float]]) -> None:
    url, age = page
    age[0] = health.STALLED_AFTER - 1

    reply = requests.get(url, timeout=5)

    assert (reply.status_code, reply.json()["healthy"]) == (200, True)


def test_a_worker_that_has_stalled_is_not(page: tuple[str, list[float]]) -> None:
    url, age = page
    age[0] = health.STALLED_AFTER

    reply = requests.get(url, timeout=5)

    assert (reply.status_code, reply.json()) == (503, {"healthy": False, "last_turn_s": 120.0})


@pytest.mark.parametrize(
    ("path", "status"), [("healthz", 200), ("?x=1", 200), ("metrics.old", 404), ("a/b", 404)]
)
def test_the_page_has_its_paths(page: tuple[str, list[float]], path: str, status: int) -> None:
    assert requests.get(page[0] + path, timeout=5).status_code == status
