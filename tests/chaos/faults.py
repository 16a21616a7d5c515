"""What goes wrong, one function a kind. Each strikes, and returns how it is mended and after how long.

The name of a function is the name in the report; the first line of its docstring says what it does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import redis

from tests.chaos.people import Away
from tests.chaos.rubbish import ENTRIES, send_to
from tests.chaos.system import EVERYTHING, LEASE, USER, Promotion, Store, System
from tests.chaos.writers import NAMES
from tests.intake.messages import MALFORMED, encoded
from tests.redis_fleet import DOWN_AFTER, Node, SentinelFleet, is_primary
from worker.clock import SystemClock
from worker.ratelimit import RateLimiter
from worker.state import scripts
from worker.state.connection import Redis
from worker.state.scripts import text


class Struck(NamedTuple):
    """A fault that struck: seconds until it is mended, how, and how many things it hit."""

    seconds: float = 0.0
    mend: Callable[[], object] = lambda: None
    hits: int = 1


NOTHING = Struck(hits=0)

#: What something else may leave in place of a record.
DAMAGE = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"a":{"city":[1,2]},"t":5}',
    b'{"a":{"city":["x",1e999]},"t":5}',
)


# Processes.


def worker_killed(system: System) -> Struck:
    """kill -9 of a worker; another one comes up"""
    return Struck(hits=system.end_worker(signal.SIGKILL))


def worker_terminated(system: System) -> Struck:
    """SIGTERM to a worker: a warm shutdown; another comes up"""
    return Struck(hits=system.end_worker(signal.SIGTERM))


def fleet_scaled(system: System) -> Struck:
    """an autoscaler: SIGTERM to all workers but one, or two more workers, which get it some seconds later"""
    if system.rng.random() < 0.5:
        return Struck(hits=sum(system.end_worker(signal.SIGTERM) for _ in range(len(system.workers()) - 1)))
    more = [system.add_worker() for _ in range(2)]
    return Struck(system.rng.uniform(4.0, 8.0), lambda: system.end_workers(more), len(more))


def worker_frozen(system: System) -> Struck:
    """SIGSTOP for a moment"""
    return _freeze(system, system.rng.uniform(0.2, 3.0))


def worker_frozen_beyond_its_lease(system: System) -> Struck:
    """SIGSTOP until its leases have ended and others have its users"""
    return _freeze(system, LEASE + system.rng.uniform(1.0, 4.0))


def _freeze(system: System, seconds: float) -> Struck:
    if not (found := system.some_worker()):
        return NOTHING
    _, pid = found
    system.frozen.add(pid)
    os.kill(pid, signal.SIGSTOP)

    def thaw() -> None:
        os.kill(pid, signal.SIGCONT)
        system.frozen.discard(pid)

    return Struck(seconds, thaw)


def writer_killed(system: System) -> Struck:
    """kill -9 of a program that offers updates"""
    system.kill_writer()
    return Struck()


def import_killed(system: System) -> Struck:
    """kill -9 of an import, which is begun again"""
    running = [one for one in system.imports if one.process.poll() is None]
    for one in running:
        one.process.kill()
    return Struck(hits=len(running))


# Redis and the broker.


def redis_killed(system: System) -> Struck:
    """kill -9 of the Redis that holds the state; restarted from its file"""
    system.kill_redis()
    return Struck()


def redis_lost_its_last_second(system: System) -> Struck:
    """a power failure: what was not on its disk is gone (everysec only)"""
    if system.appendfsync == "always":
        return NOTHING
    system.lose_power()
    return Struck()


def redis_stalled(system: System) -> Struck:
    """SIGSTOP of Redis, also for longer than its clients wait"""
    pid = system.server.pid
    os.kill(pid, signal.SIGSTOP)
    return Struck(system.rng.choice((0.1, 0.5, 2.0, 7.0)), lambda: os.kill(pid, signal.SIGCONT))


def scripts_flushed(system: System) -> Struck:
    """SCRIPT FLUSH"""
    system.redis.script_flush()
    return Struck()


def broker_killed(system: System) -> Struck:
    """kill -9 of the broker, which comes back"""
    system.broker.kill()
    return Struck(system.rng.uniform(0.0, 3.0), system.broker.start)


def redis_refuses(system: System) -> Struck:
    """Redis answers everything that writes with an error: READONLY, OOM, NOREPLICAS (not beside the previous version)"""
    if system.previous:
        return NOTHING
    client, seconds = system.redis, system.rng.uniform(0.5, 4.0)
    match system.rng.choice(("READONLY", "OOM", "NOREPLICAS")):
        case "READONLY":
            # Of a server that is not there: nothing is copied, and nothing lost.
            client.slaveof("127.0.0.1", 1)
            return Struck(seconds, client.slaveof)
        case "OOM":
            client.config_set("maxmemory", "1mb")
            return Struck(seconds, lambda: client.config_set("maxmemory", "0"))
        case _:
            client.config_set("min-replicas-to-write", "1")
            return Struck(seconds, lambda: client.config_set("min-replicas-to-write", "0"))


def password_rotated(system: System) -> Struck:
    """Redis wants another password, and the file has it a moment before, or after (not beside the previous version)"""
    if system.password_file is None:
        return NOTHING
    old, new, file = system.password_file.read_text(), secrets.token_hex(16), system.password_file
    in_order, client = system.rng.random() < 0.5, system.redis

    def change(*passwords: str) -> None:
        client.acl_setuser(USER, enabled=True, passwords=list(passwords))

    if in_order:
        change(f"+{new}")
        file.write_text(new)
    else:
        change(f"+{new}", f"-{old}")
    # Connections that are open go on with the old one: as after the reset of a proxy, they must log in again.
    client.execute_command("CLIENT", "KILL", "USER", USER)  # type: ignore[no-untyped-call]

    def finish() -> None:
        file.write_text(new)
        # Also if the server was restarted meanwhile.
        client.acl_setuser(USER, enabled=True, reset=True, passwords=[f"+{new}"], **EVERYTHING)

    return Struck(system.rng.uniform(0.5, 3.0), finish)


def records_damaged(system: System) -> Struck:
    """another program writes over records of some users, or of a batch (not beside the previous version)"""
    if system.previous:
        return NOTHING
    keys, rng, hits = system.keys, system.rng, 0
    for table in (keys.pending, keys.flight, keys.shadow, keys.dead, keys.batches):
        fields = sorted(text(field) for field in system.redis.hkeys(table))
        for field in rng.sample(fields, min(2, len(fields))):
            # The user is noted first: the record may be read before we hear that it was written.
            if table == keys.pending:
                system.damaged.add(field)
            elif table != keys.batches:
                # What was delivered, or given up, is not known any more: in flight, too, once the API has taken it.
                system.forgotten.add(field)
            hits += damage(system.redis, table, field, rng.choice(DAMAGE))
    return Struck(hits=hits)


def damage(client: Redis, table: str, field: str, record: bytes) -> bool:
    """Write over one record of a table, if it is still there: one more would be a user whom nobody has accepted."""
    script = "return redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 and redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) + 1 or 0"
    return bool(client.eval(script, 1, table, field, record))


def others_with_other_settings(system: System) -> Struck:
    """another program takes permits with ten times the quota, and no patience or a hundred seconds of it"""
    hits = 0
    for patience in (0.0, 0.1, 100.0):
        other = RateLimiter(system.redis, system.keys, quota=1000, patience=patience, clock=SystemClock())
        hits += sum(other.reserve() is not None for _ in range(5))
    return Struck(hits=hits)


def clock_jumped(system: System) -> Struck:
    """Redis' clock is set forward or back, and right again (libfaketime)"""
    if not system.server_environ:
        return NOTHING
    stamp = Path(system.server_environ["FAKETIME_TIMESTAMP_FILE"])
    # A jump forward of more than a lease ends leases early, as documented: those are not for this test.
    stamp.write_text(f"{system.rng.choice((-3600, -60, -5, -1, 1, 5)):+d}\n")
    return Struck(system.rng.uniform(2.0, 5.0), lambda: stamp.write_text("+0\n"))


# A fleet of servers.


def primary_killed(system: System) -> Struck:
    """kill -9 of the primary; a replica is promoted, and the old one comes back as a replica"""
    return _promote(system, Node.kill)


def primary_suspended(system: System) -> Struck:
    """SIGSTOP of the primary for 5 s; it wakes up believing that it still is one"""
    old = system.fleet.primary(system.keys.pending)
    struck = _promote(system, Node.suspend)

    def wake() -> None:
        old.wake()
        struck.mend()

    return Struck(5.0, wake)


def replica_promoted_by_hand(system: System) -> Struck:
    """a planned failover"""
    return _promote(system, None)


def lagging_replica_promoted(system: System) -> Struck:
    """kill -9 of the primary while what it sends to its replicas is late, which is lost (not in a cluster)"""
    primary = system.fleet.primary(system.keys.pending)
    if primary.proxy is None:
        return NOTHING
    since, lag = time.monotonic(), system.rng.uniform(0.2, 2.0)
    primary.proxy.tell(f"lag {lag:.3f}")
    time.sleep(2 * lag)

    def kill(node: Node) -> None:
        assert node.proxy
        node.proxy.tell("refuse")
        node.kill()
        node.proxy.tell("pass")

    try:
        return _promote(system, kill, since)
    finally:
        primary.proxy.tell("pass")


def split_brain(system: System) -> Struck:
    """for 5 s, the primary is cut off from its replicas and sentinels, not from its clients (not in a cluster)"""
    old = system.fleet.primary(system.keys.pending)
    if old.proxy is None:
        return NOTHING
    proxy = old.proxy

    def isolate(_: Node) -> None:
        proxy.tell("isolate")

    struck = _promote(system, isolate)
    promotion, healed = system.promotions[-1], False

    def heal() -> None:
        nonlocal healed
        if not healed:
            healed = True
            # What clients gave it until now goes when it becomes a replica.
            promotion.until = time.monotonic()
            promotion.accepted = _accepted(system, old)
            proxy.tell("pass")
        struck.mend()

    return Struck(max(0.0, 5.0 - (time.monotonic() - promotion.since)), heal)


def slot_moved(system: System) -> Struck:
    """the app's slot moves to another node, key by key (cluster only)"""
    if isinstance(system.fleet, SentinelFleet):
        return NOTHING
    system.fleet.reshard(system.keys.pending)
    return Struck()


def primary_slow(system: System) -> Struck:
    """answers of the primary come late, to clients, replicas and sentinels (not in a cluster)"""
    proxy, delay = system.fleet.primary(system.keys.pending).proxy, system.rng.choice((0.005, 0.05, 0.3))
    if proxy is None:
        return NOTHING
    return Struck(system.rng.uniform(1.0, 3.0), lambda: proxy.tell("pass"), proxy.tell(f"delay {delay}"))


def primary_half_open(system: System) -> Struck:
    """packets to and from the primary vanish, for less time than makes the sentinels act (not in a cluster)"""
    proxy = system.fleet.primary(system.keys.pending).proxy
    if proxy is None:
        return NOTHING
    return Struck(DOWN_AFTER / 1000 / 2, lambda: proxy.tell("pass"), proxy.tell("swallow"))


def _promote(system: System, how: Callable[[Node], None] | None, since: float | None = None) -> Struck:
    """Do `how` to the primary, or let it hand over; returns once another one is there, and the old one knows."""
    fleet, key = system.fleet, system.keys.pending
    began, old = time.monotonic() if since is None else since, fleet.primary(key)
    before = _accepted(system, old)

    def note_and_do(node: Node) -> None:
        nonlocal before
        before = _accepted(system, node)
        assert how
        how(node)

    new = fleet.fail_over(key, note_and_do if how else None)
    promotion = Promotion(began, time.monotonic(), new, before)
    # One that hands over to another may take writes until it is told that it did.
    while not how and is_primary(old):
        with contextlib.suppress(redis.RedisError):
            promotion.accepted = _accepted(system, old)
        promotion.until = time.monotonic()
    system.promotions.append(promotion)

    def recover() -> None:
        try:
            fleet.recover(1)
        except AssertionError:
            raise redis.ConnectionError("not in step yet") from None
        if promotion.lost is None:
            known = scripts.number(system.redis.hget(system.keys.server, "accepted"))
            promotion.lost = max(0, promotion.accepted - known)

    return Struck(mend=recover)


def _accepted(system: System, node: Node) -> int:
    """How many updates that server has accepted."""
    return scripts.number(node.client().hget(system.keys.ledger, "accepted"))


# Connections.


def redis_connections_cut(system: System) -> Struck:
    """all connections to Redis are reset, with what is on its way"""
    return Struck(hits=system.redis_proxy.tell("cut"))


def redis_unreachable(system: System) -> Struck:
    """no connection to Redis can be made"""
    proxy = system.redis_proxy
    return Struck(system.rng.uniform(0.5, 4.0), lambda: proxy.tell("pass"), proxy.tell("refuse"))


def redis_slow(system: System) -> Struck:
    """answers of Redis come late"""
    proxy, delay = system.redis_proxy, system.rng.choice((0.005, 0.05, 0.3))
    return Struck(system.rng.uniform(1.0, 3.0), lambda: proxy.tell("pass"), proxy.tell(f"delay {delay}"))


def redis_answers_lost(system: System) -> Struck:
    """scripts run, and their answers are lost with the connections"""
    proxy = system.redis_proxy
    proxy.tell("delay 0.5")
    return Struck(0.3, lambda: (proxy.tell("cut"), proxy.tell("pass")))


def redis_black_hole(system: System) -> Struck:
    """packets to and from Redis vanish"""
    proxy = system.redis_proxy
    return Struck(system.rng.uniform(1.0, 7.0), lambda: proxy.tell("pass"), proxy.tell("swallow"))


def broker_connections_cut(system: System) -> Struck:
    """all connections to the broker are reset"""
    return Struck(hits=system.broker_proxy.tell("cut"))


def broker_black_hole(system: System) -> Struck:
    """packets to and from the broker vanish"""
    proxy = system.broker_proxy
    return Struck(system.rng.uniform(1.0, 4.0), lambda: proxy.tell("pass"), proxy.tell("swallow"))


def api_connections_cut(system: System) -> Struck:
    """all connections to the API are reset, with what is on its way"""
    return Struck(hits=system.api_proxy.tell("cut"))


def api_slow(system: System) -> Struck:
    """answers of the API come late, also after its clients gave up"""
    proxy, delay = system.api_proxy, system.rng.choice((0.2, 1.0, 3.5))
    return Struck(system.rng.uniform(1.0, 4.0), lambda: proxy.tell("pass"), proxy.tell(f"delay {delay}"))


def api_black_hole(system: System) -> Struck:
    """packets to and from the API vanish"""
    proxy = system.api_proxy
    return Struck(system.rng.uniform(1.0, 4.0), lambda: proxy.tell("pass"), proxy.tell("swallow"))


# The API.


def _faults(system: System, seconds: float, *faults: dict[str, Any]) -> Struck:
    """Let calls go wrong for a while. The simulator counts them itself: these are no hits of ours."""
    system.api("faults", [{"times": None, "chance": 0.3} | fault for fault in faults])
    return Struck(seconds, lambda: system.api("faults", []), hits=0)


def api_fails(system: System) -> Struck:
    """502 and resets before and after applying, replies cut short, 91000"""
    return _faults(
        system,
        system.rng.uniform(3.0, 6.0),
        {"kind": "status", "code": 502, "chance": 0.05},
        {"kind": "status", "code": 502, "chance": 0.05, "applied": True},
        {"kind": "reset", "chance": 0.05},
        {"kind": "reset", "chance": 0.05, "applied": True},
        {"kind": "truncated", "chance": 0.05},
        {"kind": "extra_fields", "chance": 0.1},
        {"kind": "code", "code": 91000, "chance": 0.05},
    )


def api_answers_oddly(system: System) -> Struck:
    """302, 429 and 204 from a gateway, codes of four hundred digits"""
    return _faults(
        system,
        system.rng.uniform(2.0, 4.0),
        {"kind": "status", "code": 302, "chance": 0.05},
        {"kind": "status", "code": 204, "chance": 0.05, "applied": True},
        {"kind": "status", "code": 429, "chance": 0.02},
        {"kind": "code", "code": 10**400, "chance": 0.05},
    )


def api_applies_late(system: System) -> Struck:
    """connections end, and the call is applied up to 3 s later"""
    return _faults(
        system, system.rng.uniform(2.0, 4.0), {"kind": "late_write", "delay": system.rng.uniform(0.1, 3.0)}
    )


def api_replies_late(system: System) -> Struck:
    """calls are applied, the reply comes after the client gave up"""
    return _faults(system, system.rng.uniform(2.0, 4.0), {"kind": "slow", "delay": 3.5, "chance": 0.1})


def api_out(system: System) -> Struck:
    """an outage: every call fails"""
    outage = system.rng.choice(
        ({"kind": "status", "code": 502}, {"kind": "code", "code": 91000}, {"kind": "reset"})
    )
    return _faults(system, system.rng.uniform(3.0, 8.0), outage | {"chance": 1.0})


def api_refuses(system: System) -> Struck:
    """a code of every class: rate, service, settings, signature, unknown"""
    code = system.rng.choice(
        (60007, 60018, 60008, 91000, 90009, 60020, 70001, 70003, 70020, 90001, 93000, 12345)
    )
    return _faults(system, system.rng.uniform(0.5, 2.0), {"kind": "code", "code": code})


def api_refuses_users(system: System) -> Struck:
    """some users are refused, and become dead letters"""
    users = [writer.user(system.rng) for writer in system.writing.values() for _ in range(2)]
    system.api("quirks", {"bad_user": system.rng.choice(("batch", "list"))})
    code = system.rng.choice((70107, 90033, 90048))
    faults = [{"kind": "user_code", "user": user, "code": code, "chance": 1.0} for user in users]
    return _faults(system, system.rng.uniform(3.0, 6.0), *faults)


def quota_lowered(system: System) -> Struck:
    """the API grants fewer calls a second than configured"""
    system.api("quirks", {"quota": system.rng.choice((20, 50, 80))})
    return Struck(system.rng.uniform(2.0, 4.0), lambda: system.api("quirks", {"quota": 100}))


def signatures_expired(system: System) -> Struck:
    """all signatures made so far have expired"""
    system.api("quirks", {"signatures_from": int(time.time())})
    return Struck()


def key_rotated(system: System) -> Struck:
    """the secret key is another one, in the key file as well"""
    system.rotate_key()
    return Struck()


def administrator_removed(system: System) -> Struck:
    """the account is no administrator for a while"""
    system.api("administrators", ["somebody"])
    return Struck(system.rng.uniform(1.0, 3.0), lambda: system.api("administrators", ["administrator"]))


def name_removed(system: System) -> Struck:
    """the app loses one of its attribute names for a while"""
    system.api("names", NAMES[:1])

    def give_back() -> None:
        system.api("names", list(NAMES))
        system.names.set(NAMES)

    return Struck(system.rng.uniform(1.0, 3.0), give_back)


# People.


def paused(system: System) -> Struck:
    """somebody pauses the line, and resumes it later"""
    system.line.pause("chaos")
    return Struck(system.rng.uniform(0.5, 3.0), system.line.resume)


def resumed(system: System) -> Struck:
    """somebody resumes a line that may be stopped for a reason"""
    system.line.resume()
    return Struck()


def redriven(system: System) -> Struck:
    """all dead letters are put back, whatever is going on"""
    return Struck(hits=system.letters.redrive(system.letters.choose()).redriven)


def _at_the_console(act: Callable[[], Struck]) -> Struck:
    try:
        return act()
    except Away:
        return NOTHING


def console_paused(system: System) -> Struck:
    """ann pauses the line at the console, ben resumes it"""
    console = system.console
    assert console

    def resume() -> None:
        try:
            console.person("ben").resume()
        except Away:
            raise redis.ConnectionError("the console does not answer") from None

    return _at_the_console(
        lambda: Struck(system.rng.uniform(0.5, 3.0), resume, console.person("ann").pause())
    )


def console_redrove(system: System) -> Struck:
    """ann looks at the dead letters, and seconds later ben puts back exactly what she saw"""
    console = system.console
    assert console

    def look() -> Struck:
        shown = console.person("ann").look_at_letters()
        if not shown.get("count"):
            return NOTHING

        def decide() -> None:
            with contextlib.suppress(Away):
                console.person("ben").decide("redrive", shown)

        return Struck(system.rng.uniform(0.5, 4.0), decide, int(shown["count"]))

    return _at_the_console(look)


def console_purged(system: System) -> Struck:
    """ann takes a copy of the dead letters, and ben throws exactly these away"""
    console = system.console
    assert console

    def purge() -> Struck:
        shown = console.person("ann").look_at_letters()
        if not shown.get("count"):
            return NOTHING
        # The copy is of the same moment: what has changed since then is not thrown away.
        for update in console.person("ann").export(shown):
            attrs: dict[str, str | None] = update["attrs"]  # type: ignore[assignment]
            system.purged |= {(str(update["user"]), name, value) for name, value in attrs.items()}
        return Struck(hits=console.person("ben").decide("purge", shown))

    return _at_the_console(purge)


def console_paused_an_import(system: System) -> Struck:
    """ann pauses the import, or the plan that is applied, and ben resumes it"""
    console = system.console
    assert console
    running = sorted(text(name) for name in system.redis.hkeys(system.keys.import_progress))
    if not running:
        return NOTHING
    name = system.rng.choice(running)

    def resume() -> None:
        try:
            console.person("ben").pause_import(name, resume=True)
        except Away:
            raise redis.ConnectionError("the console does not answer") from None

    return _at_the_console(
        lambda: Struck(system.rng.uniform(0.5, 3.0), resume, console.person("ann").pause_import(name))
    )


def console_killed(system: System) -> Struck:
    """kill -9 of the console; it comes up again, and everybody is still logged in"""
    assert system.console
    system.console.kill()
    system.console.start()
    return Struck()


def a_viewer_tried_to_act(system: System) -> Struck:
    """somebody who may only look sends the forms of those who may act"""
    console = system.console
    assert console

    def try_it() -> Struck:
        vera, done = console.person("vera"), 0
        token = vera.get("/").get("token", "")
        for path, fields in (
            ("/line/pause", {"reason": "mine"}),
            ("/dead/purge", {"until": 10**14, "count": 10**6}),
        ):
            done += vera.post(path, fields, token=token).status_code == 200
        assert not done, "a viewer has acted"
        return Struck(hits=2)

    return _at_the_console(try_it)


# What nobody should send.


def queue_got_rubbish(system: System) -> Struck:
    """messages that no client should send, in Celery's queue (not beside the previous version: they end it)"""
    if system.previous:
        return NOTHING
    messages = [found if isinstance(found, bytes) else encoded(found) for found in MALFORMED.values()]
    return Struck(hits=system.broker.put(system.rng.sample(messages, len(messages))))


def stream_got_rubbish(system: System) -> Struck:
    """entries without fields, without JSON, without sense, in the stream"""
    for entry in system.rng.sample(ENTRIES, len(ENTRIES)):
        system.redis.xadd(system.keys.updates, entry)  # type: ignore[arg-type]
    return Struck(hits=len(ENTRIES))


def pages_got_rubbish(system: System) -> Struck:
    """requests that are none, at the console and at the workers' health pages"""
    urls = [system.console.url if system.console else "", *system.sandbox.health_urls.values()]
    ports = [int(url.rpartition(":")[2]) for url in urls if url]
    return Struck(hits=send_to(system.rng.sample(ports, min(3, len(ports))), system.rng))


def plan_killed(system: System) -> Struck:
    """kill -9 of `imattr plan` or `imattr apply`, which is begun again"""
    running = [one for one in system.comparisons if one.process.poll() is None]
    for one in running:
        one.process.kill()
    return Struck(hits=len(running))


Fault = Callable[[System], Struck]

#: Where the state is on one server.
SINGLE: list[Fault] = [
    redis_killed,
    redis_lost_its_last_second,
    redis_stalled,
    clock_jumped,
    redis_refuses,
    password_rotated,
    records_damaged,
    redis_connections_cut,
    redis_unreachable,
    redis_slow,
    redis_answers_lost,
    redis_black_hole,
]
#: Where it is on a fleet of servers.
FLEET: list[Fault] = [
    primary_killed,
    primary_suspended,
    replica_promoted_by_hand,
    lagging_replica_promoted,
    split_brain,
    slot_moved,
]
#: Where it is on a fleet of servers, and none of them is promoted.
LINKS: list[Fault] = [primary_slow, primary_half_open]
#: Everywhere.
COMMON: list[Fault] = [
    worker_killed,
    worker_terminated,
    fleet_scaled,
    worker_frozen,
    worker_frozen_beyond_its_lease,
    writer_killed,
    import_killed,
    scripts_flushed,
    broker_killed,
    others_with_other_settings,
    broker_connections_cut,
    broker_black_hole,
    api_connections_cut,
    api_slow,
    api_black_hole,
    api_fails,
    api_answers_oddly,
    api_applies_late,
    api_replies_late,
    api_out,
    api_refuses,
    api_refuses_users,
    quota_lowered,
    signatures_expired,
    key_rotated,
    administrator_removed,
    name_removed,
    paused,
    resumed,
    redriven,
    console_paused,
    console_redrove,
    console_purged,
    console_paused_an_import,
    console_killed,
    a_viewer_tried_to_act,
    queue_got_rubbish,
    stream_got_rubbish,
    pages_got_rubbish,
    plan_killed,
]


def faults_of(store: Store) -> list[Fault]:
    """Everything that can go wrong where the state is kept so."""
    return COMMON + (SINGLE if store == "single" else FLEET + LINKS)


#: Only one of these at a time: they turn the same knob, or one would hide the other.
GROUPS: list[set[Fault]] = [
    {redis_killed, redis_lost_its_last_second, redis_stalled, clock_jumped, redis_refuses, password_rotated},
    {redis_connections_cut, redis_unreachable, redis_slow, redis_answers_lost, redis_black_hole},
    {api_connections_cut, api_slow, api_black_hole},
    {
        api_fails,
        api_answers_oddly,
        api_applies_late,
        api_replies_late,
        api_out,
        api_refuses,
        api_refuses_users,
    },
    {*FLEET, *LINKS},
    {broker_killed, broker_connections_cut, broker_black_hole},
    {paused, resumed, console_paused},
    {fleet_scaled},
]
