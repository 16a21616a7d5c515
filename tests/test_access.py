"""Ways to be let in: the least user of a server, TLS, sockets, passwords of any kind, and passwords that change."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import requests
from celery import Celery
from click.testing import CliRunner
from starlette.testclient import TestClient

from tests.conftest import SECRET_KEY
from tests.intake.messages import encoded, envelope
from tests.redis_fleet import Node
from tests.test_end_to_end import updates, wait_until
from worker import celery as product
from worker.async_producer import AsyncProducer
from worker.cli.main import main
from worker.config import Settings
from worker.console.accounts import hash_password
from worker.console.app import build_app
from worker.errors import SandboxError
from worker.operate import access
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.buffer import Buffer
from worker.state.connection import connect
from worker.state.dead_letters import DeadLetters
from worker.state.keys import Keys

#: Real servers, workers and connections.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEYS = Keys(int(SDKAPPID))
ROOT = Path(__file__).parent.parent


def administrator(port: int, database: int = 0) -> Any:
    return redis.Redis(port=port, db=database, username="admin", password="admin", protocol=2)


@contextmanager
def guarded(directory: Path, *options: str, port: int | None = None) -> Iterator[tuple[EmbeddedServer, Any]]:
    """A server that lets nobody in without a name, and its administrator's client."""
    with EmbeddedServer(directory / "server", persistent=False, port=port, options=options) as server:
        first: Any = redis.Redis(port=server.port)
        first.execute_command("ACL SETUSER admin on >admin ~* &* +@all")
        first.close()
        with administrator(server.port) as admin:
            admin.execute_command("ACL SETUSER default off")
            yield server, admin


def admit(admin: Any, given: access.Access, password: str) -> None:
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
        self._client = administrator(port)
        self._connection = self._client.connection_pool.get_connection()
        self._connection.send_command("MONITOR")
        self._connection.read_response()
        threading.Thread(target=self._read, daemon=True).start()

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


def refuses(admin: Any, user: str, words: list[str]) -> bool:
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


def console(environ: dict[str, str], tmp_path: Path) -> None:
    """Look at every page, and do what operators do there, as Ann, who logs in."""
    accounts = tmp_path / "accounts"
    accounts.write_text(f"ann:operator:{hash_password('a long password', (16, 1, 1))}")
    settings = Settings.from_env(environ | {"IMATTR_CONSOLE_ACCOUNTS_FILE": str(accounts)}, "producer")
    with connect(settings.redis, key=KEYS.pending) as state:
        page = TestClient(build_app(settings, state), base_url="http://localhost", follow_redirects=True)

        def send(path: str, shown: str = "/", **form: str) -> None:
            token = re.search('name="token" value="([0-9a-f]+)"', page.get(shown).text)
            assert token
            answer = page.post(path, data={"token": token[1], **form})
            assert answer.status_code == 200, (path, answer.text)

        send("/login", "/login", name="ann", password="a long password")
        for path in ("/", "/dead", "/refused", "/user?user=ann", "/imports", "/history", "/settings"):
            assert page.get(path).status_code == 200, path
        # Workers say how they are set up, and nothing that is secret.
        assert "set, and hidden" in page.get("/settings").text
        assert SECRET_KEY not in page.get("/settings").text
        Buffer(state, KEYS).begin_import("by hand", 1)
        send("/imports/pause", name="by hand", reason="a test")
        send("/imports/resume", name="by hand")
        Buffer(state, KEYS).end_import("by hand")
        until = str(DeadLetters(state, KEYS).now_ms())
        for path in ("/dead/redrive", "/dead/purge", "/refused/purge"):
            send(path, until=until, count="1000000")
        send("/dead/export")
        send("/logout")


def everything(sandbox: Sandbox, state: Any, broker: Any, tmp_path: Path) -> None:
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
    cli(environ, "plan", str(tmp_path / "users.csv"))
    cli(environ, "apply", str(tmp_path / "users.csv.plan"), "--yes")
    cli(environ, "put", "ann", "city=Oslo")
    cli(environ, "permit")
    cli(environ, "names", "set", "city", "level")
    assert "city" in cli(environ, "names", "list")
    cli(environ, "pause", "--reason", "a test")
    producer.set_many(updates(300, "Rome"))
    assert "paused" in cli(environ, "why", "user00007", "city")
    assert json.loads(cli(environ, "user", "show", "user00007", "--json"))["pending"]["lane"] == "live"
    assert "a test" in cli(environ, "history")
    cli(environ, "resume")
    wait_until(settled)
    assert json.loads(cli(environ, "audit", "--users", "20", "--json"))["checked"] > 0
    cli(environ, "audit", "--repair", "--yes")

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
            url = f"{sandbox.flower_url}/{page}"
            assert requests.get(url, auth=sandbox.flower_login, timeout=30).ok, page

    console(environ, tmp_path)

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


def denied(admin: Any) -> list[Any]:
    """What the server has refused, but for CONFIG GET, which shows passwords: the doctor does without it; and for the library's
    name, which clients of others tell.
    """
    log: list[Any] = [(entry["object"], entry["username"]) for entry in admin.acl_log()]
    return [entry for entry in log if entry not in (("config|get", "app"), ("client|setinfo", "app"))]


def spare_rules(admin: Any, given: access.Access, tap: Tap) -> list[str]:
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
            administrator(server.port, 1) as in_database,
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


def test_on_a_cluster_the_user_has_what_finding_the_slot_takes(tmp_path: Path) -> None:
    # The cluster's bus listens 10,000 above.
    while (port := free_port()) > 55_000:
        pass
    with guarded(tmp_path, "--cluster-enabled", "yes", port=port) as (server, admin):
        admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        wait_until(lambda: "cluster_state:ok" in str(admin.execute_command("CLUSTER", "INFO")))
        url = f"redis+cluster://app:secret@127.0.0.1:{server.port}"
        environ = HASTY | {"IMATTR_REDIS_URL": url}
        [given] = access.accesses(Settings.from_env(environ, "producer"))
        admit(admin, given, "secret")
        with Sandbox(tmp_path / "sandbox", environ, Plan(workers=1, concurrency=4, flower=False)) as sandbox:
            deliver(sandbox, Producer(url, int(SDKAPPID)), "Rome")
            cli(sandbox.environ, "doctor")

        assert denied(admin) == []


# Passwords.

#: Everything that means something in a URL, a shell, a configuration file or an ACL, and what is not ASCII.
PASSWORD = "p@ss:/?#[]%20 ü\"'\\&=+{}|;,$字"
QUOTED = quote(PASSWORD, "")


def use(redis_url: str = "", **environ: str) -> None:
    """Put an update in and take a round trip to the broker, as every process of ours does; raises what they raise."""
    environ = {"REDIS_URL": redis_url} | environ
    environ = HASTY | {f"IMATTR_{name}": value for name, value in environ.items()}
    environ |= {"IMATTR_API_URL": "http://127.0.0.1:9"}
    settings = Settings.from_env(environ)
    Producer.of(settings).set("ann", {"city": "Paris"})
    asyncio.run(_use_async(environ))
    app = Celery(set_as_current=False)
    app.conf.update(product._configuration(settings))
    with app.connection_for_write() as connection:
        channel: Any = connection.channel()
        channel.client.ping()


async def _use_async(environ: dict[str, str]) -> None:
    async with AsyncProducer.from_env(environ) as sender:
        await sender.set("ann", {"city": "Paris"})


def test_a_password_may_have_any_characters(tmp_path: Path) -> None:
    with guarded(tmp_path) as (server, admin):
        admin.execute_command("ACL", "SETUSER", "ä@b", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        user, place = quote("ä@b", ""), f"127.0.0.1:{server.port}/0"
        (tmp_path / "password").write_text(f"{PASSWORD}\n")
        in_file = str(tmp_path / "password")

        use(f"redis://{user}:{QUOTED}@{place}")
        use(f"redis://{user}:{QUOTED}@{place}", BROKER_URL=f"redis://{user}:{QUOTED}@{place}")
        use(f"redis://{user}@{place}", REDIS_PASSWORD_FILE=in_file)
        use(
            f"redis://{user}:{QUOTED}@{place}",
            BROKER_URL=f"redis://{user}@{place}",
            BROKER_PASSWORD_FILE=in_file,
        )
        Producer(f"redis://{user}@{place}", 14, password_file=tmp_path / "password").set(
            "ann", {"city": "Rome"}
        )
        assert RateLimiter.connect(f"redis://{user}@{place}", 14, password_file=in_file).acquire()

        with pytest.raises(redis.AuthenticationError):
            use(f"redis://{user}:{QUOTED}x@{place}")
        with pytest.raises(redis.AuthenticationError):
            use(f"redis://{user}:{QUOTED}@{place}", BROKER_URL=f"redis://{user}:{QUOTED}x@{place}")


def test_the_password_of_sentinels_may_have_any_characters_and_is_another(tmp_path: Path) -> None:
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    with guarded(tmp_path) as (server, admin):
        admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all")
        port = free_port()
        (tmp_path / "sentinel.conf").write_text(
            f"port {port}\nbind 127.0.0.1\nsentinel monitor mine 127.0.0.1 {server.port} 1\n"
            "sentinel auth-user mine admin\nsentinel auth-pass mine admin\n"
            # As `imattr doctor --acl` says.
            f"user asks reset on #{digest} resetchannels -@all +sentinel|get-master-addr-by-name +sentinel|master\n"
        )
        sentinel = Node(tmp_path, port, str(tmp_path / "sentinel.conf"), "--sentinel")
        try:
            url = (
                f"redis+sentinel://app:secret@127.0.0.1:{port}/mine?sentinel_username=asks&sentinel_password="
            )
            use(f"{url}{QUOTED}")
            with pytest.raises(redis.ConnectionError):
                use(f"{url}{QUOTED}x")
            assert {entry["reason"] for entry in sentinel.client().acl_log()} == {"auth"}
        finally:
            sentinel.kill()


# Sockets.


def test_a_unix_socket_serves_for_everything(tmp_path: Path) -> None:
    path = Path(tempfile.mkdtemp()) / "re dis%20.sock"
    with guarded(tmp_path, "--unixsocket", str(path)) as (_server, admin):
        admin.execute_command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        url = f"unix://app:{QUOTED}@{quote(str(path))}?db=1"
        use(url)
        with pytest.raises(redis.AuthenticationError):
            use(url.replace("app:", "app:x"))

        environ = HASTY | {"IMATTR_REDIS_URL": url}
        with Sandbox(tmp_path / "sandbox", environ, Plan(workers=1, concurrency=4, flower=False)) as sandbox:
            deliver(sandbox, Producer(url, int(SDKAPPID)), "Rome")
    shutil.rmtree(path.parent)


def deliver(sandbox: Sandbox, producer: Producer, city: str) -> None:
    """Send updates by a producer and by Celery's queue, as its own app does, and wait until the API has them."""
    producer.set("ann", {"city": city})
    settings = Settings.from_env(sandbox.environ)
    app = Celery(set_as_current=False)
    app.conf.update(product._configuration(settings))
    app.send_task("attributes.update", ["bob", {"city": city}], queue="updates")
    app.close()
    url = f"{sandbox.api_url}/simulator/users"
    expected = {"ann": {"city": city}, "bob": {"city": city}}
    wait_until(lambda: expected.items() <= requests.get(url, timeout=30).json().items())


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority, with a certificate for the server and one for its clients; and another authority."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    place = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}")
    for name, also in (
        ("server", "IP:127.0.0.1"),
        ("elsewhere", "DNS:elsewhere.example"),
        ("client", "DNS:client"),
    ):
        (place / "extensions").write_text(f"subjectAltName={also}\n")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed_by = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed_by, "-out", f"{name}.crt")
    return place


@contextmanager
def encrypted(directory: Path, certificates: Path, name: str = "server") -> Iterator[int]:
    """A server that speaks TLS, only to those who have a certificate, too; its port."""
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "yes"]
    options += ["--tls-cert-file", str(certificates / f"{name}.crt")]
    options += ["--tls-key-file", str(certificates / f"{name}.key")]
    options += ["--tls-ca-cert-file", str(certificates / "ca.crt")]
    try:
        server = EmbeddedServer(directory / name, persistent=False, options=options)
    except SandboxError:
        pytest.skip("the server here has been built without TLS")
    with server:
        yield port


def test_tls_lets_in_whoever_has_a_certificate_and_is_verified_by_default(
    tmp_path: Path, certificates: Path
) -> None:
    def url(port: int, ca: str = "ca", client: str = "client") -> str:
        options = {"ssl_ca_certs": ca, "ssl_certfile": client, "ssl_keyfile": client}
        given = [f"{name}={certificates / value}" for name, value in options.items() if value]
        ends = {"ssl_ca_certs": ".crt", "ssl_certfile": ".crt", "ssl_keyfile": ".key"}
        return f"rediss://127.0.0.1:{port}/0?" + "&".join(
            text + ends[text.partition("=")[0]] for text in given
        )

    with encrypted(tmp_path, certificates) as port, encrypted(tmp_path, certificates, "elsewhere") as other:
        good = url(port)
        refused = {
            "another authority": url(port, ca="other"),
            "the authorities of this machine": url(port, ca=""),
            "no certificate of its own": url(port, client=""),
            "another host": url(other),
        }
        use(good)
        use(f"{url(other)}&ssl_check_hostname=false")
        use(f"{url(port, ca='')}&ssl_cert_reqs=none")
        for bad in refused.values():
            for environ in ({"REDIS_URL": bad}, {"BROKER_URL": bad}):
                with pytest.raises(redis.ConnectionError):
                    use(**{"REDIS_URL": good} | environ)

        environ = HASTY | {"IMATTR_REDIS_URL": good}
        with Sandbox(tmp_path / "sandbox", environ, Plan(workers=1, concurrency=4)) as sandbox:
            deliver(sandbox, Producer(good, int(SDKAPPID)), "Rome")
            page = f"{sandbox.flower_url}/broker"
            assert requests.get(page, auth=sandbox.flower_login, timeout=30).ok


# Passwords that change.

#: What a worker does beside its tasks, as its log calls it.
LOOPS = ("dispatcher", "stream", "queue")


def test_a_fleet_goes_on_with_a_new_password(tmp_path: Path) -> None:
    with guarded(tmp_path) as (server, admin):
        url = f"redis://app@127.0.0.1:{server.port}/0"
        files = {name: tmp_path / name for name in ("state", "broker")}
        environ = HASTY | {
            "IMATTR_REDIS_URL": url,
            "IMATTR_REDIS_PASSWORD_FILE": str(files["state"]),
            "IMATTR_BROKER_URL": url.replace("/0", "/1"),
            "IMATTR_BROKER_PASSWORD_FILE": str(files["broker"]),
        }
        [given] = access.accesses(Settings.from_env(environ | given_files(files, "old"), "producer"))
        admit(admin, given, "old")
        with Sandbox(tmp_path / "sandbox", environ, Plan(workers=1, concurrency=4, flower=False)) as sandbox:
            producer = Producer(url, int(SDKAPPID), password_file=files["state"])
            deliver(sandbox, producer, "Rome")

            # Both passwords are good until everybody has the new one: nobody notices anything.
            admin.execute_command("ACL", "SETUSER", "app", ">new")
            given_files(files, "new")
            admin.execute_command("ACL", "SETUSER", "app", "<old")
            disconnect(admin)
            deliver(sandbox, producer, "Oslo")
            assert "AuthenticationError" not in logged(sandbox)

            # In the wrong order: nobody gets in for a while.
            admin.execute_command("ACL", "SETUSER", "app", "resetpass", ">newest")
            disconnect(admin)
            with pytest.raises(redis.AuthenticationError):
                producer.set("ann", {"city": "Bern"})
            refused = [f'"event": "{name}_interrupted", "reason": "AuthenticationError"' for name in LOOPS]
            wait_until(lambda: all(line in logged(sandbox) for line in refused))
            wait_until(lambda: "consumer: Cannot connect" in logged(sandbox))
            sandbox.check()
            given_files(files, "newest")
            deliver(sandbox, producer, "Cork")
            sandbox.check()

        told = logged(sandbox)
        assert [told.count(line) for line in refused] == [1, 1, 1]
        assert not re.search(r"\bnewest\b", told)


def given_files(files: dict[str, Path], password: str) -> dict[str, str]:
    """Replace the files as secrets are mounted: all at once, never half."""
    for file in files.values():
        file.with_suffix(".next").write_text(password)
        file.with_suffix(".next").replace(file)
    return {}


def disconnect(admin: Any) -> None:
    admin.execute_command("CLIENT", "KILL", "USER", "app")


def logged(sandbox: Sandbox) -> str:
    return (sandbox.directory / "worker-1.log").read_text()
