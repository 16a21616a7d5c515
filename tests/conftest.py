"""What the tests share: one private server for all of them, and an app id of its own for each."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, settings

from tests.schedules.wire import Wire
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys

# Real servers answer at their own pace: no deadline for one example, no fixed seed hidden in a cache.
settings.register_profile(
    "imattr", deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
#: `make fast` draws a quarter of the cases of everything that is drawn, and plants a quarter of the bugs that must be found;
#: `make test` takes them all.
FAST = bool(os.environ.get("FAST_TESTS"))


def drawn(cases: int) -> int:
    """How many of so many cases to draw."""
    return cases // 4 if FAST else cases


def planted(bugs: Iterable[str]) -> list[str]:
    """Which of the bugs to plant."""
    return list(bugs)[:: 4 if FAST else 1]


settings.register_profile("fast", settings.get_profile("imattr"), max_examples=drawn(100))
settings.load_profile("fast")

#: A key, so that nobody needs to invent one; worth nothing.
SECRET_KEY = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

_apps = itertools.count(1_500_000_000)


def new_keys() -> Keys:
    """The keys of an app that nobody else uses, instead of flushing anything."""
    return Keys(next(_apps))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no process is left with one when the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(Path(tmp_path_factory.mktemp("redis")), persistent=False) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as connected:
        yield connected


@pytest.fixture(scope="module")
def wire(server: EmbeddedServer) -> Iterator[Wire]:
    """The client for tests that run many thousands of scripts: a third of the usual cost."""
    with contextlib.closing(Wire(server.port)) as connected:
        yield connected


@pytest.fixture
def keys() -> Keys:
    return new_keys()


class ManualClock:
    """Time that passes only when someone sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.slept.append(seconds)
            self.now += seconds


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
