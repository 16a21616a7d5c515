"""The examples of `docs/guides/any-language.md`, run as they stand in the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.intake.test_stream import Consumers, consumer, pending, short_reads, turns
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys
from worker.state.refused import Refused

__all__ = ["consumer", "short_reads"]

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "any-language.md").read_text()

#: Stands in for Node's package `redis`, as much of it as the example uses: RESP over a socket.
NODE_REDIS = """
const net = require('net')

exports.createClient = ({ url }) => {
  const { hostname, port } = new URL(url)
  const waiting = []
  const socket = net.connect(Number(port), hostname)
  socket.on('data', (data) => {
    for (const line of String(data).split('\\r\\n').filter((line) => /^\\d+-\\d+$|^-/.test(line))) {
      const { resolve, reject } = waiting.shift()
      line.startsWith('-') ? reject(new Error(line)) : resolve(line)
    }
  })
  return {
    connect: () => new Promise((resolve) => socket.once('connect', resolve)),
    xAdd: (key, id, fields) => {
      const words = ['XADD', key, id, ...Object.entries(fields).flat()]
      socket.write(`*${words.length}\\r\\n` + words.map((w) => `$${Buffer.byteLength(w)}\\r\\n${w}\\r\\n`).join(''))
      return new Promise((resolve, reject) => waiting.push({ resolve, reject }))
    },
    close: async () => socket.end(),
  }
}
"""


def example(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def environ(server: EmbeddedServer, keys: Keys) -> dict[str, str]:
    return {"REDIS_URL": server.url, "SDKAPPID": str(keys.sdkappid)}


def test_redis_cli(consumer: Consumers, client: redis.Redis, keys: Keys) -> None:
    _, *words = shlex.split(example("sh").replace("1400000000", str(keys.sdkappid)))
    raw: Any = client
    raw.execute_command(*words)

    turns(consumer())

    assert pending(client, keys) == {"u1": {"city": "Paris", "level": "Gold"}}


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node")
def test_node(
    consumer: Consumers, client: redis.Redis, keys: Keys, environ: dict[str, str], tmp_path: Path
) -> None:
    package = tmp_path / "node_modules" / "redis"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": "redis", "main": "index.js"}))
    (package / "index.js").write_text(NODE_REDIS)
    (tmp_path / "example.mjs").write_text(example("js"))
    subprocess.run(["node", "example.mjs"], cwd=tmp_path, env=os.environ | environ, check=True, timeout=30)

    turns(consumer())

    assert pending(client, keys) == {
        "node1": {"city": "Paris", "level": "Gold"},
        "node2": {"city": "东京"},
        "node3": {"city": "Oslo"},
    }
    assert Refused(client, keys).count() == 0


def test_python(
    consumer: Consumers,
    client: redis.Redis,
    keys: Keys,
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    exec(example("python"), {})

    turns(consumer())

    assert pending(client, keys) == {"python1": {"city": "Paris"}, "python2": {"city": "Oslo"}}


def test_the_page_names_the_key_of_the_stream() -> None:
    assert f"'{Keys(1400000000).updates}'" in example("sh")
