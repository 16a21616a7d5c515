"""Checks everything that a worker needs, and says in plain words what is wrong and how to fix it.

Each function makes one check. None changes anything, except that validation learns the app's attribute names, and that one
API call takes a slot of the shared clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from kombu.connection import Connection
from kombu.exceptions import OperationalError

from worker import logs, runtime
from worker.clock import Clock, SystemClock
from worker.config import Settings
from worker.delivery.answers import NoReply, Reply
from worker.delivery.attribute_catalog import AttributeCatalog, NoPermit
from worker.delivery.policy import Verdict, rule_for
from worker.errors import CallFailed, ConfigError
from worker.operate.redis_services import Service, identify
from worker.ratelimit import RateState, read_rate
from worker.redis_url import RedisUrl
from worker.state.buffer import Buffer
from worker.state.connection import Redis, RedisError, ResponseError, connect
from worker.state.keys import Keys
from worker.state.leader import current_leader
from worker.state.line import Kind, Line, LineState
from worker.state.quarantine import Quarantine
from worker.state.refused import Refused
from worker.state.scripts import number, text

Level = Literal["ok", "warning", "error"]

#: The oldest Redis with every command used here.
OLDEST_REDIS = (6, 2)
#: The share of maxmemory that may be in use.
FULL = 0.8
#: How long a round trip to Redis may take, in seconds.
SLOW = 0.005
#: Pings for one measurement.
PINGS = 5
#: Seconds by which this machine's clock may differ from Redis', and from the API's: warning, then error.
REDIS_SKEW, API_SKEW = (1.0, 60.0), (30.0, 600.0)
#: Seconds after which an unfinished import counts as forgotten.
OLD_IMPORT = 86_400.0
#: Where messages go if their sender names no queue.
DEFAULT_QUEUE = "celery"
#: Seconds in which a broker must answer.
ANSWERS_IN = 3.0

_MAY_LOOK = "check it yourself, or allow this URL's user the commands INFO and CONFIG GET"

#: A server that nothing identifies.
_UNKNOWN = Service("Redis")

#: What reopens a line, by the kind of its stop.
_OPENED_BY: dict[Kind, str] = {
    "error": "fix the cause: the next probe opens the line, or imattr resume at once",
    "outage": "wait: the service is probed regularly, and the first success opens the line",
    "data": "fix what sends such updates (see imattr dead list), then run imattr resume",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `fix` says what to do, and is empty if all is well."""

    check: str
    level: Level
    found: str
    fix: str = ""


def examine(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check everything, each thing after what it depends on."""
    try:
        settings = Settings.from_env(environ)
    except ConfigError as error:
        for mistake in error.mistakes:
            yield Finding(
                "settings", "error", mistake, "correct it; docs/operate/settings.md lists every setting"
            )
        return
    logs.protect(settings.secret_key.reveal())
    yield Finding("settings", "ok", f"complete, for app {settings.sdkappid}")
    with runtime.connect(settings) as redis:
        reachable = reach(redis, settings.redis)
        yield reachable
        if reachable.level == "error":
            yield from broker(settings)
            found = "not asked: the rate limit is in Redis"
            yield Finding("api", "warning", found, "fix Redis first")
            return
        service = known_service(redis, settings.redis)
        yield from server(redis, service)
        yield from broker(settings)
        yield from app(redis, settings, service)


# The servers.


def reach(redis: Redis, place: RedisUrl) -> Finding:
    """Whether the state's Redis answers."""
    try:
        redis.ping()
    except RedisError as error:
        return _unreachable("redis", place, error, "IMATTR_REDIS_URL")
    return Finding("redis", "ok", f"answers at {place}")


def _unreachable(check: str, place: RedisUrl, error: RedisError, variable: str) -> Finding:
    fix = f"start it, or check {variable}"
    if place.database and isinstance(error, ResponseError) and "SELECT" in str(error).upper():
        fix = f"use database 0 in {variable}: clusters, and some services, have no other"
    return Finding(check, "error", _words("does not answer", error), fix)


def known_service(redis: Redis, place: RedisUrl) -> Service | None:
    """Which service this is, if certain."""
    try:
        info: Mapping[str, Any] = redis.info()
    except RedisError:
        info = {}
    return identify([host for host, _ in place.hosts], info)


def service_notes(service: Service) -> Iterator[Finding]:
    """Which service this is, and what is different about it."""
    for words in (service.name, *service.notes):
        yield Finding("redis service", "ok", words)


def server(redis: Redis, service: Service | None = None) -> Iterator[Finding]:
    """Whether the state's Redis is set up as it must be."""
    if service:
        yield from service_notes(service)
    yield _looked("redis version", lambda: version(redis.info("server")))
    yield _looked("redis eviction", lambda: eviction("redis eviction", redis.info("memory"), service))
    yield _looked("redis memory", lambda: memory(redis.info("memory")))
    yield _looked("redis persistence", lambda: persistence(redis))
    yield _looked("redis latency", lambda: latency(redis, SystemClock()))
    yield _looked("redis clock", lambda: redis_clock(redis, time.time))


def _looked(check: str, look: Callable[[], Finding]) -> Finding:
    """Make a check, even if the server hides what it needs, as managed services may."""
    try:
        return look()
    except RedisError as error:
        return Finding(check, "warning", _words("could not be checked", error), _MAY_LOOK)
    except KeyError as missing:
        return Finding(check, "warning", f"could not be checked: INFO has no {missing}", _MAY_LOOK)


def version(info: Mapping[str, Any]) -> Finding:
    """Whether the server is new enough. Valkey says which Redis it is compatible with."""
    compatible = str(info["redis_version"])
    valkey = info.get("valkey_version")
    found = f"Valkey {valkey}, as Redis {compatible}" if valkey else f"Redis {compatible}"
    if tuple(int(part) for part in compatible.split(".")[:2]) >= OLDEST_REDIS:
        return Finding("redis version", "ok", found)
    return Finding("redis version", "error", f"{found} is too old", "use Redis 6.2 or newer, or Valkey")


def eviction(check: str, info: Mapping[str, Any], service: Service | None = None) -> Finding:
    """Whether a full server refuses new data instead of deleting old data."""
    policy = info["maxmemory_policy"]
    if policy == "noeviction":
        return Finding(check, "ok", "noeviction: a full server deletes nothing")
    found = f"maxmemory-policy is {policy}: a full server deletes accepted updates"
    return Finding(check, "error", found, (service or _UNKNOWN).noeviction)


def memory(info: Mapping[str, Any]) -> Finding:
    """Whether there is enough memory."""
    used, most = info["used_memory"], info["maxmemory"]
    if not most:
        return Finding("redis memory", "ok", f"{_mb(used)} used, no maxmemory is set")
    found = f"{_mb(used)} used of {_mb(most)} ({used / most:.0%})"
    if used <= FULL * most:
        return Finding("redis memory", "ok", found)
    fix = "raise maxmemory, or limit the backlog with IMATTR_MAX_PENDING: a full server refuses updates"
    return Finding("redis memory", "warning", found, fix)


def persistence(redis: Redis) -> Finding:
    """What a crash of the server costs."""
    check = "redis persistence"
    if not redis.info("persistence")["aof_enabled"]:
        found = "no append-only file: a crash of the server loses what was accepted"
        return Finding(check, "warning", found, "set appendonly yes")
    match redis.config_get("appendfsync").get("appendfsync"):
        case "always":
            return Finding(check, "ok", "append-only file, synced with every command: a crash loses nothing")
        case "everysec":
            found = "append-only file, synced every second: a crash of the machine may lose the last second"
            return Finding(check, "ok", found)
        case _:
            found = "append-only file, synced rarely: a crash of the machine may lose half a minute"
            return Finding(check, "warning", found, "set appendfsync everysec, or always")


def failover(redis: Redis, settings: Settings) -> Iterator[Finding]:
    """What a failover would lose, and what those so far have lost."""
    if settings.replicas:
        refusal = refuses_to_wait(redis, fsync=settings.replicas_fsync)
        yield refusal or _looked(
            "redis replicas", lambda: replicas(redis.info("replication"), settings.replicas)
        )
    seen = Buffer(redis, Keys(settings.sdkappid)).snapshot()
    if lost := seen.lost_with_servers:
        found = f"{lost:,} accepted updates were lost when Redis failed over or was restarted"
        yield Finding(
            "redis failover", "warning", found, "send them again; IMATTR_REPLICAS=1 or more prevents it"
        )
    if lost := seen.ledger["lost"]:
        found = f"the ledger was repaired by {lost:,} updates: keys were deleted or evicted"
        yield Finding(
            "redis keys", "warning", found, "find out what deleted them; maxmemory-policy must be noeviction"
        )


def refuses_to_wait(redis: Redis, *, fsync: bool) -> Finding | None:
    """Whether the server refuses to say how many replicas have an update."""
    command, variable = ("WAITAOF", "IMATTR_REPLICAS_FSYNC") if fsync else ("WAIT", "IMATTR_REPLICAS")
    try:
        # For no replicas, so that nothing waits.
        redis.execute_command(command, *([0, 0, 1] if fsync else [0, 1]))  # type: ignore[no-untyped-call]
    except ResponseError as error:
        found = _words(f"refuses {command}, so nothing is accepted with {variable}", error)
        return Finding("redis replicas", "error", found, f"set {variable}=0, or use a server with {command}")
    return None


def replicas(info: Mapping[str, Any], wanted: int) -> Finding:
    """Whether there are enough replicas for updates to count as accepted."""
    have = info["connected_slaves"]
    if have >= wanted:
        return Finding("redis replicas", "ok", f"{have} connected, IMATTR_REPLICAS is {wanted}")
    found = f"{have} connected, and IMATTR_REPLICAS is {wanted}: nothing is accepted"
    return Finding("redis replicas", "error", found, "start the replicas, or lower IMATTR_REPLICAS")


def latency(redis: Redis, clock: Clock) -> Finding:
    """How far away the server is, in time."""
    median = statistics.median(_seconds_of(redis.ping, clock) for _ in range(PINGS))
    found = f"{median * 1000:.1f} ms a round trip"
    if median <= SLOW:
        return Finding("redis latency", "ok", found)
    return Finding(
        "redis latency", "warning", found, "run the workers closer to Redis: each batch takes several"
    )


def _seconds_of(call: Callable[[], Any], clock: Clock) -> float:
    started = clock.monotonic()
    call()
    return clock.monotonic() - started


def redis_clock(redis: Redis, wall: Callable[[], float]) -> Finding:
    """Whether this machine and Redis agree on the time."""
    before = wall()
    seconds, micros = redis.time()
    ahead = (before + wall()) / 2 - (seconds + micros / 1e6)
    return _skew("redis clock", "Redis", ahead, REDIS_SKEW, "event times and signatures will be wrong")


def _skew(check: str, whose: str, ahead: float, bounds: tuple[float, float], so: str) -> Finding:
    """`ahead` is how many seconds this machine's clock is ahead of the other."""
    if abs(ahead) <= bounds[0]:
        return Finding(check, "ok", f"within {abs(ahead):.1f} s of this machine's clock")
    level: Level = "warning" if abs(ahead) <= bounds[1] else "error"
    side = "ahead of" if ahead > 0 else "behind"
    found = f"this machine's clock is {abs(ahead):.0f} s {side} that of {whose}: {so}"
    return Finding(check, level, found, "synchronise the clocks with NTP")


def broker(settings: Settings) -> list[Finding]:
    """Whether Celery's broker answers and, if it is a Redis other than the state's, keeps its messages."""
    return _redis_broker(settings, settings.broker) if settings.broker else _other_broker(settings)


def _redis_broker(settings: Settings, place: RedisUrl) -> list[Finding]:
    check, key = "broker", settings.celery_prefix + DEFAULT_QUEUE
    try:
        with connect(place, key=key, timeout=ANSWERS_IN, connect_timeout=ANSWERS_IN) as redis:
            stray = redis.llen(key)
            slots = list(_in_slots(redis, settings.celery_prefix))
            if place == settings.redis:
                found = [Finding(check, "ok", "answers (the same Redis)")]
            else:
                found = [Finding(check, "ok", f"answers at {place}")]
                service, name = known_service(redis, place), f"{check} eviction"
                found.append(_looked(name, lambda: eviction(name, redis.info("memory"), service)))
    except RedisError as error:
        return [_unreachable(check, place, error, "IMATTR_BROKER_URL")]
    return [*found, *slots, *_stray(int(stray))]


def _in_slots(redis: Redis, prefix: str) -> Iterator[Finding]:
    """Whether Celery's keys may be used together, as its commands with several keys need."""
    try:
        redis.sinter([f"{prefix}_kombu.binding.updates", f"{prefix}_kombu.binding.deliveries"])
    except ResponseError as error:
        if "slot" in str(error).lower():
            found = (
                "this is a cluster, and Celery's keys are in different slots: no worker can read its queues"
            )
            fix = "set IMATTR_BROKER_PREFIX={imattr}, and the same global_keyprefix in Celery's clients"
            yield Finding("broker slots", "error", found, fix)


def _other_broker(settings: Settings) -> list[Finding]:
    try:
        with Connection(settings.broker_url.reveal(), connect_timeout=ANSWERS_IN) as connection:  # type: ignore[no-untyped-call]
            connection.ensure_connection(max_retries=2, interval_start=0.2, interval_step=0.2)
            found = Finding("broker", "ok", f"answers, {connection.transport.driver_type}")
            return [found, *_stray(_waiting(connection, DEFAULT_QUEUE))]
    except OperationalError as error:
        words, fix = _words("does not answer", error), "start it, or check IMATTR_BROKER_URL"
    except Exception as error:
        # kombu quotes a URL that it cannot read, password and all.
        words = f"IMATTR_BROKER_URL cannot be read ({type(error).__name__})"
        fix = "write it like amqp://user:password@host:5672// or redis://host:6379/1"
    return [Finding("broker", "error", words, fix)]


def _waiting(connection: Any, queue: str) -> int:
    """How many messages are in a queue; 0 if there is no such queue."""
    try:
        return int(connection.channel().queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:
        return 0


def _stray(messages: int) -> Iterator[Finding]:
    if messages:
        many = "1 message waits" if messages == 1 else f"{messages:,} messages wait"
        found = f"{many} in Celery's default queue, {DEFAULT_QUEUE}, which no worker reads"
        fix = 'if they are updates, send them with queue="updates", or set task_routes in the client that sends them'
        yield Finding("broker queue", "warning", found, fix)


# The fleet and the app.


def app(redis: Redis, settings: Settings, service: Service | None = None) -> Iterator[Finding]:
    """Whether updates of this app are delivered."""
    keys = Keys(settings.sdkappid)
    try:
        yield from fleet(redis, settings)
        delivered = number(redis.hget(keys.ledger, "delivered")) > 0
        catalog = runtime.build_attribute_catalog(settings, redis)
        yield from api(catalog, _host(settings.base_url), time.time, delivered=delivered)
    except RedisError as error:
        fix = f"use a server that accepts writes, and allow the user of IMATTR_REDIS_URL all keys like {keys.pattern}"
        if service and service.scripts and isinstance(error, ResponseError):
            fix = service.scripts
        yield Finding("redis", "error", _words("refuses what a worker needs", error), fix)


def fleet(redis: Redis, settings: Settings) -> Iterator[Finding]:
    """What Redis alone tells about the workers and their work."""
    keys = Keys(settings.sdkappid)
    yield workers(redis, keys)
    yield line(Line(redis, keys).read())
    yield quotas(read_rate(redis, keys), settings.quota)
    yield from failover(redis, settings)
    yield from leftovers(Quarantine(redis, keys).count(), Refused(redis, keys).count())
    yield from unfinished_imports(redis, keys)


def workers(redis: Redis, keys: Keys) -> Finding:
    """Whether any worker is running."""
    leader = current_leader(redis, keys.dispatcher)
    if leader:
        return Finding("workers", "ok", f"running, {leader} is the dispatcher")
    fix = "start one: celery -A worker worker --pool threads --concurrency 16"
    return Finding("workers", "warning", "no worker is running: updates are accepted and wait", fix)


def line(now: LineState) -> Finding:
    """Whether the line is open, or why not."""
    if now.state == "open":
        return Finding("line", "ok", "open")
    reason = f"{now.reason} ({now.code})" if now.code else f"{now.reason}"
    if now.state == "paused":
        return Finding("line", "warning", f"paused by a person: {reason}", "imattr resume ends the pause")
    return Finding("line", "error", f"stopped: {reason}", _OPENED_BY[now.kind or "error"])


def quotas(rate: RateState, quota: int) -> Finding:
    """Whether all processes that share the rate use the same quota."""
    named = sorted({*rate.quotas, quota})
    if len(named) == 1:
        return Finding("quota", "ok", f"{quota} calls/s")
    found = f"processes name different quotas: {', '.join(map(str, named))} calls/s; the lowest applies"
    return Finding("quota", "warning", found, "give every process the same IMATTR_QUOTA")


def leftovers(quarantined: int, refused: int) -> Iterator[Finding]:
    """What is waiting for a person."""
    if quarantined:
        found = "1 record" if quarantined == 1 else f"{quarantined:,} records"
        fix = "imattr quarantine list; send what matters again, then imattr quarantine drop"
        yield Finding("quarantine", "warning", f"{found} in Redis could not be read", fix)
    if refused:
        found = "1 update was" if refused == 1 else f"{refused:,} updates were"
        fix = "imattr refused list says which rules were broken"
        yield Finding("refused", "warning", f"{found} refused after leaving the sender", fix)


def unfinished_imports(redis: Redis, keys: Keys) -> Iterator[Finding]:
    """Imports that keep everything delivered since from being forgotten."""
    found: Any = redis.zrange(keys.imports, 0, -1, withscores=True)
    for name, as_of_ms in found:
        seconds, _ = redis.time()
        if seconds - as_of_ms / 1000 > OLD_IMPORT:
            days = (seconds - as_of_ms / 1000) / 86_400
            words = (
                f"{text(name)} was begun {days:.1f} days ago and is not finished: memory grows until it is"
            )
            fix = "run the same imattr import again, or give it up with --abandon"
            yield Finding("import", "warning", words, fix)


def api(
    names: AttributeCatalog, host: str, wall: Callable[[], float], *, delivered: bool = False
) -> Iterator[Finding]:
    """Check with one call whether the API accepts this app; its clock; and the app's attribute names.

    `delivered` says whether anything ever was delivered.
    """
    try:
        answer = names.ask()
    except CallFailed as failed:
        level: Level = "warning" if isinstance(failed, NoPermit) else "error"
        yield Finding("api", level, f"{host}: {failed.found}", failed.fix)
        return
    try:
        found = names.learn(answer)
    except CallFailed as failed:
        yield Finding("api", _level(answer), f"{host}: {failed.found}", failed.fix)
        yield from api_clock(answer, wall)
        return
    yield Finding("api", "ok", f"{host} answers, and accepts the UserSig, the administrator and the app")
    yield from api_clock(answer, wall)
    yield app_names(found, delivered=delivered)


def _level(answer: Reply | NoReply) -> Level:
    """A call refused for its frequency may be sent later; any other failure stops deliveries."""
    rate = isinstance(answer, Reply) and rule_for(answer.code).verdict is Verdict.RATE
    return "warning" if rate else "error"


def api_clock(answer: Reply | NoReply, wall: Callable[[], float]) -> Iterator[Finding]:
    """Whether this machine and the API agree on the time, if the answer contains the API's."""
    try:
        theirs = parsedate_to_datetime(answer.date).timestamp() if isinstance(answer, Reply) else None
    except (ValueError, TypeError, OverflowError):
        return
    if theirs is not None:
        # The header has whole seconds.
        ahead = wall() - theirs - 0.5
        yield _skew("api clock", "the API", ahead, API_SKEW, "a UserSig from the wrong time is refused")


def app_names(names: frozenset[str], *, delivered: bool = False) -> Finding:
    """Whether the app has attributes to set."""
    if names:
        return Finding("names", "ok", f"the app has {', '.join(sorted(names))}")
    if delivered:
        return Finding("names", "ok", "the app lists no attribute names, but accepts updates")
    found = "the app has no attribute names: every update will be refused"
    return Finding("names", "warning", found, "imattr names set NAME ...")


def _host(url: str) -> str:
    """The host of a URL; the rest may be secret."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _words(what: str, error: Exception) -> str:
    return f"{what}: {logs.scrub(str(error))}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
