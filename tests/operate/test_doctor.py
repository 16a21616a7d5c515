"""The doctor: each look at a server that is well, and at one that is not; and names set by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import redis

from tests.conftest import SECRET_KEY, ManualClock, new_keys
from tests.simulation import Simulation, simulation
from worker import runtime
from worker.clock import SystemClock
from worker.config import Secret, Settings
from worker.delivery.answers import Failure, NoReply, Reply
from worker.delivery.attribute_catalog import AttributeCatalog
from worker.delivery.explanations import FIXES
from worker.delivery.policy import TABLE
from worker.errors import CallFailed
from worker.models import BatchId
from worker.operate import doctor
from worker.operate.doctor import Finding
from worker.operate.redis_services import Service
from worker.ratelimit import Permit, RateLimiter, read_rate
from worker.sandbox.faults import Fault
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.sandbox.simulator import Refused
from worker.state.attribute_names import AttributeNames
from worker.state.keys import Keys
from worker.state.line import Kind, Line

Environ = dict[str, str]


@pytest.fixture
def sim(keys: Keys) -> Iterator[Simulation]:
    """The API, for an app of this test's own."""
    with simulation() as running:
        running.api.sdkappid = keys.sdkappid
        yield running


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server whose settings a test may change."""
    with EmbeddedServer(tmp_path / "own", persistent=False) as running:
        yield running


@pytest.fixture
def own_client(own: EmbeddedServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own.url) as connected:
        yield connected


@pytest.fixture
def environ(server: EmbeddedServer, keys: Keys, sim: Simulation) -> Environ:
    return {
        "IMATTR_REDIS_URL": server.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_SECRET_KEY": SECRET_KEY,
        "IMATTR_API_URL": sim.url,
    }


@pytest.fixture
def app_names(environ: Environ, client: redis.Redis) -> AttributeCatalog:
    return runtime.build_attribute_catalog(Settings.from_env(environ), client)


def examine(environ: Mapping[str, str]) -> dict[str, Finding]:
    findings = list(doctor.examine(environ))
    for finding in findings:
        assert bool(finding.fix) == (finding.level != "ok"), finding
    return {finding.check: finding for finding in findings}


def away() -> str:
    return f"redis://:hunter22@127.0.0.1:{free_port()}/0"


# All together.


def test_all_is_well(environ: Environ, client: redis.Redis, keys: Keys) -> None:
    client.set(keys.dispatcher, "worker-1@host", ex=60)

    found = examine(environ)

    assert {check: finding.level for check, finding in found.items()} == {
        "settings": "ok",
        "redis": "ok",
        "redis version": "ok",
        "redis eviction": "ok",
        "redis memory": "ok",
        # The tests' server keeps nothing.
        "redis persistence": "warning",
        "redis latency": "ok",
        "redis clock": "ok",
        "broker": "ok",
        "workers": "ok",
        "line": "ok",
        "quota": "ok",
        "api": "ok",
        "api clock": "ok",
        "names": "ok",
    }
    assert "worker-1@host" in found["workers"].found


def test_every_mistake_of_the_settings_is_told_and_nothing_else_looked_at(sim: Simulation) -> None:
    environ = {"IMATTR_QOTA": "1", "IMATTR_SDKAPPID": "one", "IMATTR_API_URL": sim.url}

    findings = list(doctor.examine(environ))

    assert {(finding.check, finding.level) for finding in findings} == {("settings", "error")}
    told = " ".join(finding.found for finding in findings)
    for variable in ("QOTA", "SDKAPPID", "SECRET_KEY", "REDIS_URL"):
        assert f"IMATTR_{variable}" in told
    assert sim.api.counts.requests == 0


def test_without_redis_the_broker_is_looked_at_and_the_api_left_alone(
    environ: Environ, sim: Simulation, server: EmbeddedServer
) -> None:
    found = examine(environ | {"IMATTR_REDIS_URL": away(), "IMATTR_BROKER_URL": server.url})

    assert {check: finding.level for check, finding in found.items()} == {
        "settings": "ok",
        "redis": "error",
        "broker": "ok",
        "broker eviction": "ok",
        "api": "warning",
    }
    assert sim.api.counts.requests == 0


def test_no_secret_is_in_what_is_found(environ: Environ, sim: Simulation) -> None:
    urls = {"IMATTR_REDIS_URL": away(), "IMATTR_BROKER_URL": "amqp://me:hun/ter22@host//"}
    usersigs = Fault("code", 70003, times=None)
    sim.fail(usersigs)

    for changes in ({}, urls, {"IMATTR_BROKER_URL": f"amqp://me:hunter22@127.0.0.1:{free_port()}//"}):
        told = repr(examine(environ | changes))
        assert "hun" not in told
        assert SECRET_KEY not in told
        assert "usersig=" not in told


# The state's Redis.


@pytest.mark.parametrize(
    ("info", "level"),
    [
        ({"redis_version": "6.0.16"}, "error"),
        ({"redis_version": "5.9.9"}, "error"),
        ({"redis_version": "6.2.0"}, "ok"),
        ({"redis_version": "10.0.1"}, "ok"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "ok"),
    ],
)
def test_redis_must_be_new_enough(info: dict[str, str], level: str) -> None:
    finding = doctor.version(info)

    assert finding.level == level
    assert all(version in finding.found for version in info.values())


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_throws_data_away_is_an_error(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis, policy: str
) -> None:
    own_client.config_set("maxmemory-policy", policy)

    finding = examine(environ | {"IMATTR_REDIS_URL": own.url})["redis eviction"]

    assert finding.level == "error"
    assert policy in finding.found


@pytest.mark.parametrize(("part", "level"), [(0.5, "ok"), (0.79, "ok"), (0.9, "warning")])
def test_memory_needs_headroom(own_client: redis.Redis, part: float, level: str) -> None:
    used = own_client.info("memory")["used_memory"]
    own_client.config_set("maxmemory", round(used / part))

    info = own_client.info("memory") | {"used_memory": used}

    assert doctor.memory(info).level == level


@pytest.mark.parametrize(
    ("persistent", "appendfsync", "level", "words"),
    [
        (False, "always", "warning", "loses what was accepted"),
        (True, "no", "warning", "may lose half a minute"),
        (True, "everysec", "ok", "may lose the last second"),
        (True, "always", "ok", "loses nothing"),
    ],
)
def test_persistence_says_what_a_crash_costs(
    tmp_path: Path, persistent: bool, appendfsync: str, level: str, words: str
) -> None:
    with (
        EmbeddedServer(tmp_path, persistent=persistent) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        client.config_set("appendfsync", appendfsync)

        finding = doctor.persistence(client)

    assert (finding.level, words in finding.found) == (level, True)


class SlowClock(ManualClock):
    """Every look at it takes some time, so that every round trip does."""

    def __init__(self, *trips: float) -> None:
        super().__init__()
        self._steps = [step for trip in trips for step in (0.0, trip)]

    def monotonic(self) -> float:
        self.now += self._steps.pop(0)
        return self.now


def test_latency_is_the_median(client: redis.Redis) -> None:
    ms = 0.001

    assert doctor.latency(client, SlowClock(90 * ms, ms, ms, 2 * ms, 80 * ms)).found == "2.0 ms a round trip"
    assert doctor.latency(client, SlowClock(*[5 * ms] * 5)).level == "ok"
    assert doctor.latency(client, SlowClock(*[6 * ms] * 5)).level == "warning"


def ahead(seconds: float) -> Callable[[], float]:
    """The clock of a machine that is ahead of the others."""
    return lambda: time.time() + seconds


@pytest.mark.parametrize(
    ("seconds", "level", "words"),
    [
        (0, "ok", "within"),
        (-10, "warning", "10 s behind that of Redis"),
        (10, "warning", "10 s ahead of that of Redis"),
        (-100, "error", "100 s behind that of Redis"),
        (100, "error", "100 s ahead of that of Redis"),
    ],
)
def test_the_clocks_of_this_machine_and_redis_agree(
    client: redis.Redis, seconds: float, level: str, words: str
) -> None:
    finding = doctor.redis_clock(client, ahead(seconds))

    assert (finding.level, words in finding.found) == (level, True)


def as_user(url: str, client: redis.Redis, *rules: str) -> str:
    """The URL for a user who may do everything but what the rules say."""
    client.acl_setuser("me", enabled=True, passwords=["+hunter22"], keys=["*"], commands=["+@all", *rules])
    return url.replace("//", "//me:hunter22@")


def test_a_server_that_does_not_let_us_look_is_a_warning(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis
) -> None:
    url = as_user(own.url, own_client, "-info", "-config")

    found = examine(environ | {"IMATTR_REDIS_URL": url})

    for check in ("redis version", "redis eviction", "redis memory", "redis persistence"):
        assert found[check].level == "warning"
        assert "could not be checked" in found[check].found
    assert found["api"].level == "ok"


@pytest.mark.parametrize("fsync", [False, True])
def test_a_server_that_cannot_wait_is_an_error_if_that_is_needed(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis, fsync: bool
) -> None:
    url = as_user(own.url, own_client, "-wait", *(["-waitaof"] if _has_waitaof(own_client) else []))
    needs = {"IMATTR_REDIS_URL": url, "IMATTR_REPLICAS": "1", "IMATTR_REPLICAS_FSYNC": f"{fsync:d}"}

    finding = examine(environ | needs)["redis replicas"]

    assert (finding.level, "refuses WAIT" in finding.found) == ("error", True)
    assert ("IMATTR_REPLICAS_FSYNC=0" if fsync else "IMATTR_REPLICAS=0") in finding.fix


def _has_waitaof(client: redis.Redis) -> bool:
    return b"waitaof" in client.acl_cat("blocking") or "waitaof" in client.acl_cat("blocking")


def test_a_server_with_one_database_is_told_by_its_refusal(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis
) -> None:
    url = as_user(own.url, own_client, "-select").removesuffix("/0") + "/1"

    found = examine(environ | {"IMATTR_REDIS_URL": url, "IMATTR_BROKER_URL": url})

    assert "use database 0 in IMATTR_REDIS_URL" in found["redis"].fix
    assert "use database 0 in IMATTR_BROKER_URL" in found["broker"].fix


SERVICE = Service(
    "Some Redis", noeviction="set it in the console", scripts="allow scripts there", notes=["it is far away"]
)


def test_a_service_is_named_with_what_is_different_there(client: redis.Redis) -> None:
    found = list(doctor.server(client, SERVICE))

    assert [finding.found for finding in found if finding.check == "redis service"] == [
        "Some Redis",
        "it is far away",
    ]
    assert doctor.eviction("eviction", {"maxmemory_policy": "allkeys-lru"}, SERVICE).fix == SERVICE.noeviction


def test_a_service_that_refuses_scripts_says_how_to_allow_them(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis
) -> None:
    settings = Settings.from_env(environ | {"IMATTR_REDIS_URL": as_user(own.url, own_client, "-@scripting")})
    with runtime.connect(settings) as refusing:
        *_, finding = doctor.app(refusing, settings, SERVICE)

    assert (finding.level, finding.fix) == ("error", "allow scripts there")


def test_what_info_does_not_say_is_a_warning() -> None:
    finding = doctor._looked("redis memory", lambda: doctor.memory({}))

    assert (finding.level, "could not be checked: INFO has no" in finding.found) == ("warning", True)


def test_a_user_who_may_run_no_scripts_is_an_error(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis
) -> None:
    url = as_user(own.url, own_client, "-@scripting")

    finding = list(doctor.examine(environ | {"IMATTR_REDIS_URL": url}))[-1]

    assert (finding.check, finding.level) == ("redis", "error")
    assert "refuses what a worker needs" in finding.found


# The broker.


def look_at_broker(environ: Environ, url: str) -> dict[str, Finding]:
    settings = Settings.from_env(environ | {"IMATTR_BROKER_URL": url})
    return {finding.check: finding for finding in doctor.broker(settings)}


def test_a_broker_of_its_own_must_keep_messages_too(
    environ: Environ, own: EmbeddedServer, own_client: redis.Redis
) -> None:
    assert look_at_broker(environ, own.url)["broker eviction"].level == "ok"

    own_client.config_set("maxmemory-policy", "allkeys-lru")

    assert look_at_broker(environ, own.url)["broker eviction"].level == "error"


def test_the_eviction_of_the_states_redis_is_told_once(environ: Environ) -> None:
    assert look_at_broker(environ, "").keys() == {"broker"}


def test_a_broker_that_is_no_redis_has_no_eviction() -> None:
    settings = Settings(broker_url=Secret("memory://"))

    assert doctor.broker(settings) == [Finding("broker", "ok", "answers, memory")]


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_away_is_an_error(environ: Environ, scheme: str) -> None:
    finding = look_at_broker(environ, f"{scheme}://me:hunter22@127.0.0.1:{free_port()}/0")["broker"]

    assert (finding.level, "does not answer" in finding.found) == ("error", True)


@pytest.mark.parametrize("url", ["nothing", "carrier-pigeon://host"])
def test_a_broker_url_that_is_none_is_an_error(environ: Environ, url: str) -> None:
    finding = look_at_broker(environ, url)["broker"]

    assert (finding.level, "IMATTR_BROKER_URL" in finding.found + finding.fix) == ("error", True)


# The fleet.


def test_no_worker_is_a_warning(client: redis.Redis, keys: Keys) -> None:
    assert doctor.workers(client, keys).level == "warning"


@pytest.mark.parametrize(
    ("kind", "fix"), [("error", "fix the cause"), ("outage", "wait"), ("data", "imattr dead list")]
)
def test_a_stopped_line_says_why_and_what_opens_it(
    environ: Environ, client: redis.Redis, keys: Keys, kind: Kind, fix: str
) -> None:
    Line(client, keys).stop(BatchId("b"), kind, 60020, "the plan has expired")

    finding = examine(environ)["line"]

    assert (finding.level, finding.found) == ("error", "stopped: the plan has expired (60020)")
    assert fix in finding.fix


def test_a_paused_line_is_a_warning_and_the_api_is_asked_all_the_same(
    environ: Environ, client: redis.Redis, keys: Keys
) -> None:
    Line(client, keys).pause("new year")

    found = examine(environ)

    assert (found["line"].level, found["line"].found) == ("warning", "paused by a person: new year")
    assert found["api"].level == "ok"


# The API.


def test_one_call_is_made_and_its_names_are_known_at_the_door(
    environ: Environ, sim: Simulation, client: redis.Redis, keys: Keys
) -> None:
    assert examine(environ)["names"].found == "the app has city, level"

    assert sim.api.counts.requests == 1
    assert client.smembers(keys.names) == {b"city", b"level"}
    assert client.hget(keys.rate, "next") is not None, "the call took no slot"


@pytest.mark.parametrize(
    ("changes", "code", "fix"),
    [
        ({"IMATTR_SECRET_KEY": "of another app"}, 70009, "IMATTR_SECRET_KEY"),
        ({"IMATTR_ADMIN": "nobody"}, 90009, "administrator"),
        ({"IMATTR_SDKAPPID": "1600000000"}, 70020, "IMATTR_REGION"),
    ],
)
def test_a_wrong_setting_is_told_by_the_api(environ: Environ, changes: Environ, code: int, fix: str) -> None:
    finding = examine(environ | changes)["api"]

    assert finding.level == "error"
    assert f"{code}, {TABLE[code].meaning}" in finding.found
    assert fix in finding.fix


def test_the_switch_in_the_console_is_named(environ: Environ, sim: Simulation) -> None:
    sim.api.quirks.feature_on = False

    assert "Push to all users" in examine(environ)["api"].fix


@pytest.mark.parametrize("code", [*sorted(FIXES), 60022, 91000, 12345])
def test_every_code_has_a_meaning_and_a_fix(
    environ: Environ, app_names: AttributeCatalog, sim: Simulation, code: int
) -> None:
    sim.fail(Fault("code", code))

    [finding, clock] = doctor.api(app_names, "host", time.time)

    rate = code in (60007, 60011, 60018, 60019)
    assert finding.level == ("warning" if rate else "error")
    assert finding.fix == FIXES.get(code, "ask Tencent support, quoting the code")
    assert ("another program" in finding.fix) == rate
    assert "on purpose" not in finding.found, "its words may quote what it was sent"
    assert clock.check == "api clock"


@pytest.mark.parametrize(
    ("fault", "found", "fix"),
    [
        (Fault("status", 502), "HTTP status 502", "wait"),
        (Fault("status", 404), "HTTP status 404", "IMATTR_API_URL"),
        (Fault("truncated"), "not Tencent", "IMATTR_API_URL"),
        (Fault("reset"), "broke", "network"),
    ],
)
def test_no_readable_answer_is_explained(
    app_names: AttributeCatalog, sim: Simulation, fault: Fault, found: str, fix: str
) -> None:
    sim.fail(fault)

    [finding] = doctor.api(app_names, "host", time.time)

    assert finding.level == "error"
    assert found in finding.found
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (f"http://127.0.0.1:{free_port()}", "cannot be reached"),
        ("https://no.such.host.invalid", "cannot be reached"),
    ],
    ids=["no server", "no host"],
)
def test_an_api_that_is_not_there_is_explained(environ: Environ, url: str, found: str) -> None:
    finding = examine(environ | {"IMATTR_API_URL": url})["api"]

    assert (finding.level, found in finding.found) == ("error", True)
    assert "IMATTR_API_URL" in finding.fix


def test_a_password_in_the_api_url_is_not_shown(environ: Environ) -> None:
    url = f"http://me:hunter22@127.0.0.1:{free_port()}"

    assert "hunter22" not in repr(examine(environ | {"IMATTR_API_URL": url}))


def test_when_no_permit_comes_the_doctor_says_so_and_does_not_call(
    environ: Environ, sim: Simulation, client: redis.Redis, keys: Keys
) -> None:
    clock = ManualClock()
    limiter = RateLimiter(client, keys, quota=100, patience=2.0, clock=clock)
    limiter.pause(60, "too many calls", 60007)
    settings = Settings.from_env(environ)
    names = AttributeCatalog(runtime.build_api(settings), limiter, AttributeNames(client, keys, clock), clock)

    [finding] = doctor.api(names, "host", time.time)

    assert (finding.level, "not asked" in finding.found) == ("warning", True)
    assert sum(clock.slept) <= 3
    assert sim.api.counts.requests == 0


class LateLimiter(RateLimiter):
    """Its first slots are missed."""

    def __init__(self, client: redis.Redis, keys: Keys, missed: int) -> None:
        super().__init__(client, keys, quota=100, patience=2.0, clock=SystemClock())
        self._missed = missed

    def redeem(self, permit: Permit) -> bool:
        self._missed -= 1
        return self._missed < 0


@pytest.mark.parametrize(("missed", "calls"), [(0, 1), (4, 1), (5, 0)])
def test_a_slot_that_was_missed_is_given_up_for_another(
    environ: Environ, sim: Simulation, client: redis.Redis, keys: Keys, missed: int, calls: int
) -> None:
    clock = ManualClock()
    known = AttributeNames(client, keys, clock)
    api = runtime.build_api(Settings.from_env(environ))

    finding, *_ = doctor.api(
        AttributeCatalog(api, LateLimiter(client, keys, missed), known, clock), "host", time.time
    )

    assert finding.level == ("ok" if calls else "warning")
    assert sim.api.counts.requests == calls


@pytest.mark.parametrize(
    ("seconds", "level"), [(0, "ok"), (-60, "warning"), (60, "warning"), (-700, "error"), (700, "error")]
)
def test_the_clocks_of_this_machine_and_the_api_agree(
    app_names: AttributeCatalog, seconds: float, level: str
) -> None:
    _, clock, _ = doctor.api(app_names, "host", ahead(seconds))

    assert (clock.check, clock.level) == ("api clock", level)


@pytest.mark.parametrize("answer", [Reply(0), Reply(0, date="soon"), NoReply(Failure.TIMEOUT)])
def test_an_answer_without_a_time_says_nothing_about_the_clock(answer: Reply | NoReply) -> None:
    assert list(doctor.api_clock(answer, time.time)) == []


def test_an_app_without_names_is_a_warning_and_any_name_passes_the_door(
    environ: Environ, sim: Simulation, client: redis.Redis, keys: Keys
) -> None:
    client.sadd(keys.names, "old")
    sim.api.names = []

    finding = examine(environ)["names"]

    assert (finding.level, finding.fix) == ("warning", "imattr names set NAME ...")
    assert not client.exists(keys.names)


def test_names_that_no_app_can_have_are_an_error(environ: Environ, sim: Simulation) -> None:
    sim.api.names = [f"name{number}" for number in range(11)]

    found = examine(environ)

    assert (found["api"].level, "11 attribute names" in found["api"].found) == ("error", True)
    assert "names" not in found


# Names set by hand.


def test_only_new_names_are_added_and_the_door_knows_them_at_once(
    app_names: AttributeCatalog, sim: Simulation, client: redis.Redis, keys: Keys
) -> None:
    assert app_names.add(["vip", "city", "age", "vip"]) == ["vip", "age"]

    assert sim.api.names == ["city", "level", "vip", "age"]
    assert client.smembers(keys.names) == {b"city", b"level", b"vip", b"age"}


def test_new_names_are_numbered_behind_the_old_ones(
    app_names: AttributeCatalog, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, str]] = []
    monkeypatch.setattr(sim.api, "_add_names", lambda numbered, _: given.append(numbered))

    app_names.add(["vip", "age"])

    assert given == [{"2": "vip", "3": "age"}]


def test_names_that_are_there_cost_no_second_call(app_names: AttributeCatalog, sim: Simulation) -> None:
    assert app_names.add(["city"]) == []
    assert sim.api.counts.requests == 1


def test_an_app_has_room_for_ten_names(app_names: AttributeCatalog, sim: Simulation) -> None:
    with pytest.raises(CallFailed, match="has 2 of at most 10 names, no room for 9 more"):
        app_names.add([f"name{number}" for number in range(9)])

    assert sim.api.names == ["city", "level"]
    assert len(app_names.add([f"name{number}" for number in range(8)])) == 8


def test_a_refusal_is_told_in_the_apis_own_words_without_secrets(
    app_names: AttributeCatalog,
    sim: Simulation,
    client: redis.Redis,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "attrName:vip already exists at index:2, see ?usersig=eJyrVgrxCdYrSy1S"
    monkeypatch.setattr(sim.api, "_check_new_names", refuse(90033, words))

    with pytest.raises(
        CallFailed,
        match=r"refused with 90033, .*: attrName:vip already exists at index:2, see \?usersig=\*\*\*;",
    ):
        app_names.add(["vip"])

    assert client.smembers(keys.names) == {b"city", b"level"}


def refuse(code: int, words: str) -> Callable[[object], None]:
    def check(_: object) -> None:
        raise Refused(code, words)

    return check


def test_processes_that_name_different_quotas_are_told(client: redis.Redis, keys: Keys) -> None:
    for quota in (20, 100):
        RateLimiter(client, keys, quota=quota, patience=2.0, clock=SystemClock()).reserve()

    finding = doctor.quotas(read_rate(client, keys), 100)

    assert (finding.level, "20, 100" in finding.found) == ("warning", True)
    assert doctor.quotas(read_rate(client, new_keys()), 100).level == "ok"


def test_an_import_that_somebody_has_forgotten_is_told(client: redis.Redis, keys: Keys) -> None:
    now = int(time.time() * 1000)
    client.zadd(keys.imports, {"host:/data/users.csv": now - 3 * 86_400_000, "host:/data/new.csv": now})

    (finding,) = doctor.unfinished_imports(client, keys)

    assert (finding.level, "users.csv was begun 3.0 days ago" in finding.found) == ("warning", True)


def test_what_waits_for_a_person_is_told() -> None:
    assert not list(doctor.leftovers(0, 0))
    assert [finding.check for finding in doctor.leftovers(1, 2)] == ["quarantine", "refused"]


def test_an_app_without_names_that_has_had_deliveries_is_not_warned_about() -> None:
    assert doctor.app_names(frozenset()).level == "warning"
    assert doctor.app_names(frozenset(), delivered=True).level == "ok"
