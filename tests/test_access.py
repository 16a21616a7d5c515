"""Ways to be let in: the least user of a server, TLS, sockets, passwords of any kind, and passwords that change."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from click.testing import CliRunner

from tests.conftest import SECRET_KEY
from tests.intake.messages import encoded, envelope
from tests.test_end_to_end import updates, wait_until
from worker.async_producer import AsyncProducer
from worker.cli.main import main
from worker.config import Settings
from worker.operate import access
from worker.producer import Producer
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.keys import Keys

#: Real servers, workers and connections.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEYS = Keys(int(SDKAPPID))
ROOT = Path(__file__).parent.parent


@contextmanager
def guarded(directory: Path, *options: str) -> Iterator[tuple[EmbeddedServer, redis.Redis]]:
    """A server that lets nobody in without a name, and its administrator's client."""
    with EmbeddedServer(directory / "server", persistent=False, options=options) as server:
        first = redis.Redis(port=server.port)
        first.execute_command("ACL SETUSER admin on >admin ~* &* +@all")
        first.close()
        with redis.Redis(port=server.port, username="admin", password="admin", protocol=2) as admin:
            admin.execute_command("ACL SETUSER default off")
            yield server, admin


def admit(admin: redis.Redis, given: access.Access, password: str) -> None:
    """Make the user as `imattr doctor --acl` says."""
    command = given.line.replace(">PASSWORD", f">{password}").split(" ")
    assert admin.execute_command(*command) == b"OK"


def cli(environ: dict[str, str], *arguments: str, status: int = 0) -> str:
    """What `imattr` prints."""
    done = CliRunner().invoke(main, arguments, env=environ)
    assert done.exit_code == status, (arguments, done.output)
    return done.stdout


class Tap:
    """Notes every command that a server runs, those of scripts included: each kind once."""

    def __init__(self, port: int) -> None:
        self.seen: dict[tuple[str, ...], list[str]] = {}
        self._client = redis.Redis(port=port, username="admin", password="admin", protocol=2)
        self._connection: Any = self._client.connection_pool.get_connection()
        self._connection.send_command("MONITOR")
        self._connection.read_response()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(redis.ConnectionError, OSError, ValueError, AttributeError):
            while True:
                try:
                    self._note(self._connection.read_response(timeout=None))
                except redis.TimeoutError:
                    continue

    def _note(self, line: bytes) -> None:
        quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', line.decode())
        words = [word.encode().decode("unicode_escape") for word in quoted]
        kind = tuple(re.sub(r"[\da-f-]{3,}", "", word)[:40] for word in words[:8])
        if len(self.seen) < 20_000:
            self.seen.setdefault(kind, words)

    def commands(self, of: str) -> list[list[str]]:
        """The commands with this name, or the first of a container's."""
        name, _, sub = of.partition("|")
        return [
            words
            for words in self.seen.values()
            if words[0].lower() == name and (not sub or words[1].lower() == sub)
        ]


def refuses(admin: redis.Redis, user: str, words: list[str]) -> bool:
    answer = admin.execute_command("ACL", "DRYRUN", user, *(word.encode("latin-1") for word in words))
    return bool(answer != b"OK")


STRANGER = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1], broker_transport_options={"global_keyprefix": sys.argv[2]})
for number in range(50):
    app.send_task("attributes.update", [f"celery{number}", {"city": "Rome"}], queue="updates")
app.send_task("attributes.update", ["later", {"city": "Rome"}], queue="updates", countdown=2)
app.send_task("attributes.update", ["gone", {"city": "Rome"}], queue="updates", expires=-1)
app.send_task("attributes.update", ["", {"city": "Rome"}], queue="updates", priority=9)
app.send_task("attributes.deliver", queue="deliveries", priority=3)
print(app.control.inspect(timeout=5).ping())
with app.connection_for_read() as connection:
    app.events.Receiver(connection, handlers={}).capture(limit=1, timeout=20, wakeup=False)
"""


def everything(sandbox: Sandbox, state: redis.Redis, broker: redis.Redis, tmp_path: Path) -> None:
    """Use every way in, and every command, as the sandbox' user. `state` and `broker` are an administrator's clients."""
    environ = sandbox.environ
    state_url = environ["IMATTR_REDIS_URL"]
    broker_url = environ.get("IMATTR_BROKER_URL", state_url)
    prefix = environ.get("IMATTR_BROKER_PREFIX", "")

    def simulator(what: str, given: object = None) -> Any:
        url = f"{sandbox.api_url}/simulator/{what}"
        if given is None:
            return requests.get(url, timeout=30).json()
        return requests.post(url, json=given, timeout=30)

    def status() -> Any:
        return json.loads(cli(environ, "status", "--json"))

    def settled() -> bool:
        now = status()
        pending = now["pending"]
        return not any((pending["live"], pending["backfill"], pending["delayed"], now["in_flight"]))

    producer = Producer(state_url, int(SDKAPPID), max_pending=100_000)
    assert producer.set("ann", {"city": "Paris"}) == "pending"
    producer.set_many(updates(500))

    async def send() -> None:
        async with AsyncProducer(state_url, int(SDKAPPID)) as sender:
            await sender.set("async", {"city": "Paris"})

    asyncio.run(send())

    stream = redis.Redis.from_url(state_url, protocol=2)
    for user in ("streamed", ""):
        stream.xadd(KEYS.updates, {"user": user, "attrs": '{"city": "Oslo"}'})
    broker.lpush(f"{prefix}updates", encoded(envelope("broken") | {"body": "?"}))
    # What a worker that was killed took long ago, and never acknowledged.
    left = json.dumps([envelope(task="attributes.deliver", args=[]), "deliveries", "deliveries"])
    broker.hset(f"{prefix}unacked", "left", left)
    broker.zadd(f"{prefix}unacked_index", {"left": 1})

    arguments = [sys.executable, "-c", STRANGER, broker_url, prefix]
    told = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "pong" in told.stdout, told.stderr[-1500:]
    users = {"ann", "async", "streamed", "celery49", "later"}
    wait_until(lambda: users <= simulator("users").keys())

    (tmp_path / "users.csv").write_text("user,city\n" + "".join(f"imported{n},Rome\n" for n in range(300)))
    cli(environ, "import", str(tmp_path / "users.csv"))
    cli(environ, "put", "ann", "city=Oslo")
    cli(environ, "permit")
    cli(environ, "names", "set", "city", "level")
    assert "city" in cli(environ, "names", "list")
    cli(environ, "pause", "--reason", "a test")
    producer.set_many(updates(300, "Rome"))
    cli(environ, "resume")
    wait_until(settled)

    # A user that the API refuses: bisected, dead, and back.
    simulator("faults", [{"kind": "user_code", "user": "bad", "code": 70107, "times": None}])
    producer.set_many([("bad", {"city": "Rome"}), *updates(50, "Bern")])
    producer.set("bad2", {"city": "Rome"})
    wait_until(lambda: status()["dead"] >= 1)
    assert "bad" in cli(environ, "dead", "list")
    cli(environ, "dead", "show", "bad")
    assert "Rome" in cli(environ, "dead", "export")
    cli(environ, "dead", "redrive", "--yes")
    wait_until(lambda: status()["dead"] >= 1)
    cli(environ, "dead", "redrive", "--code", "70107", "--dry-run")
    cli(environ, "dead", "purge", "--yes")
    simulator("faults", [])

    id = json.loads(cli(environ, "refused", "list", "--json").splitlines()[0])["id"]
    cli(environ, "refused", "show", id)
    cli(environ, "refused", "purge", "--yes")

    # Records that somebody has damaged, and one without a batch.
    cli(environ, "pause", "--reason", "a test")
    producer.set("damaged", {"city": "Rome"})
    state.hset(KEYS.pending, "damaged", "{")
    state.hset(KEYS.flight, "ghost", json.dumps({"t": 1, "a": {"city": ["Rome", 1]}}))
    state.hset(KEYS.batches, "another", '["nobody"]')
    cli(environ, "resume")
    wait_until(lambda: "damaged" in cli(environ, "quarantine", "list"))
    cli(environ, "quarantine", "show")
    cli(environ, "quarantine", "drop", "--yes")

    # The service is down for a while, then has another key for a moment.
    simulator("faults", [{"kind": "status", "code": 502, "times": None}])
    producer.set_many(updates(200, "Kiev"))
    wait_until(lambda: status()["line"]["state"] == "stopped")
    simulator("faults", [])
    cli(environ, "resume")
    wait_until(settled)
    simulator("key", "another key")
    producer.set_many(updates(200, "Lima"))
    wait_until(lambda: status()["line"]["state"] == "stopped")
    simulator("key", SECRET_KEY)
    cli(environ, "resume")
    wait_until(settled)
    simulator("faults", [{"kind": "code", "code": 60007, "times": 3}])
    producer.set_many(updates(400, "Riga"))
    wait_until(settled)

    if sandbox.flower_url:
        pages = ("api/workers?refresh=true", "api/tasks", "broker", "api/queues/length", "workers")
        for page in pages:
            assert requests.get(f"{sandbox.flower_url}/{page}", timeout=30).ok, page

    found = {check["check"]: check for check in json.loads(cli(environ, "doctor", "--json"))}
    assert {name for name, check in found.items() if check["level"] == "error"} == set()

    # A server without room takes tickets all the same.
    cli(environ, "pause", "--reason", "a test")
    producer.set_many(updates(200, "Cork"))
    for server in {state, broker}:
        server.config_set("maxmemory", server.info("memory")["used_memory"] // 2)
    cli(environ, "resume")
    wait_until(settled)
    for server in {state, broker}:
        server.config_set("maxmemory", 0)
    wait_until(lambda: not broker.exists(f"{prefix}unacked"))


#: Settings with which a scenario takes seconds.
HASTY = {
    "IMATTR_SDKAPPID": SDKAPPID,
    "IMATTR_SECRET_KEY": SECRET_KEY,
    "IMATTR_LINGER": "0.05",
    "IMATTR_SHADOW_MAX_USERS": "100",
    "IMATTR_CONNECT_TIMEOUT": "1",
    "IMATTR_READ_TIMEOUT": "3.1",
    "IMATTR_HOLD": "3.2",
    "IMATTR_LEASE": "9",
}


def denied(admin: redis.Redis) -> list[tuple[str, str]]:
    """What the server has refused, but for what shows passwords: the doctor does without CONFIG GET."""
    log = [(entry["object"], entry["username"]) for entry in admin.acl_log()]
    return [entry for entry in log if entry != ("config|get", "app")]


def spare_rules(admin: redis.Redis, given: access.Access, tap: Tap) -> list[str]:
    """Rules without which everything that was seen would be allowed all the same."""
    rules = given.rules.split(" ")
    keys, spare = [rule for rule in rules if rule[0] in "~&+"], []
    for rule in keys:
        admin.execute_command(
            "ACL SETUSER", "less", "reset", "resetchannels", *(r for r in keys if r != rule)
        )
        tried = tap.commands(rule[1:]) if rule[0] == "+" else tap.seen.values()
        if not any(
            refuses(admin, "less", words) and not refuses(admin, given.user, words) for words in tried
        ):
            spare.append(rule)
    return spare


#: Sent only when what a worker left behind cannot be read.
RARE = ["+unwatch"]


def test_the_user_that_the_doctor_names_can_do_everything_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    with guarded(tmp_path) as (server, admin):
        environ = HASTY | {"IMATTR_REDIS_URL": f"redis://app:secret@127.0.0.1:{server.port}/1"}
        [given] = access.accesses(Settings.from_env(environ, "producer"))
        admit(admin, given, "secret")
        tap = Tap(server.port)
        with (
            redis.Redis(port=server.port, username="admin", password="admin", db=1) as in_database,
            Sandbox(tmp_path / "sandbox", environ, Plan(workers=2, concurrency=4)) as sandbox,
        ):
            everything(sandbox, in_database, in_database, tmp_path)

        assert denied(admin) == []
        assert spare_rules(admin, given, tap) == RARE


def test_each_server_has_a_user_who_can_do_only_what_is_done_there(tmp_path: Path) -> None:
    with guarded(tmp_path / "state") as (server, state), guarded(tmp_path / "broker") as (other, broker):
        environ = HASTY | {
            "IMATTR_REDIS_URL": f"redis://app:secret@127.0.0.1:{server.port}",
            "IMATTR_BROKER_URL": f"redis://app:secret@127.0.0.1:{other.port}",
            "IMATTR_BROKER_PREFIX": "ours:",
        }
        for admin, given in zip(
            (state, broker), access.accesses(Settings.from_env(environ, "producer")), strict=True
        ):
            admit(admin, given, "secret")
        plan = Plan(workers=1, concurrency=4, flower=False)
        with Sandbox(tmp_path / "sandbox", environ, plan) as sandbox:
            everything(sandbox, state, broker, tmp_path)

        assert denied(state) == []
        assert denied(broker) == []
