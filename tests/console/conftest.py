"""A console for an app of its own, and browsers in front of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from starlette.testclient import TestClient

from tests.conftest import ManualClock
from worker.config import Settings
from worker.console import accounts
from worker.console.app import build_app
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys

#: Passwords, and tokens, that are tried quickly.
CHEAP = (16, 1, 1)
ANN, BOB = "ann's own password", "bob's own password"

LOOPBACK = "http://127.0.0.1:8300"


def settings_of(server: EmbeddedServer, keys: Keys, **environ: str) -> Settings:
    about = {"REDIS_URL": server.url, "SDKAPPID": str(keys.sdkappid)} | environ
    return Settings.from_env({f"IMATTR_{name}": value for name, value in about.items()}, "producer")


Opened = Callable[..., TestClient]


@pytest.fixture
def browser(server: EmbeddedServer, client: redis.Redis, keys: Keys, clock: ManualClock) -> Opened:
    """Opens a browser at a console with these settings; `peer` is the address that it has."""

    def open_browser(url: str = LOOPBACK, peer: str = "127.0.0.1", **environ: str) -> TestClient:
        app = build_app(settings_of(server, keys, **environ), client, clock)
        return TestClient(app, base_url=url, client=(peer, 50_000), follow_redirects=False)

    return open_browser


@pytest.fixture
def accounts_file(tmp_path: Path) -> Path:
    """Ann is an operator, Bob a viewer."""
    path = tmp_path / "accounts"
    lines = [
        f"ann:operator:{accounts.hash_password(ANN, CHEAP)}",
        f"bob:viewer:{accounts.hash_password(BOB, CHEAP)}",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def token(page: str) -> str:
    """The token of the forms on a page."""
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page)
    assert found, page
    return found[1]


def log_in(at: TestClient, name: str, password: str, **more: str) -> Any:
    """Log in as a person would; returns the answer."""
    form = {"token": token(at.get("/login").text), "name": name, "password": password}
    return at.post("/login", data=form | more)


def send(at: TestClient, path: str, page: str = "/", **form: object) -> Any:
    """Send a form, with the token that a page has."""
    return at.post(
        path, data={"token": token(at.get(page).text), **{name: str(value) for name, value in form.items()}}
    )
