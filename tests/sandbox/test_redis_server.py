"""The embedded server: it starts, it keeps its data, it stops, and it says what is wrong."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import redis

from worker.errors import SandboxError
from worker.sandbox.redis_server import EmbeddedServer, find_server


def test_data_outlives_the_server(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
        pid = server.pid

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with EmbeddedServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_a_port_that_another_server_owns_is_noticed(server: EmbeddedServer, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"did not start, see .*server\.log"):
        EmbeddedServer(tmp_path, port=server.port)


def test_a_machine_without_any_server_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(SandboxError, match="set IMATTR_REDIS_URL, or install valkey or redis"):
        find_server()


def test_a_server_on_the_path_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/opt/redis-server" if name == "redis-server" else None)

    assert find_server() == "/opt/redis-server"
