"""What can go wrong, played on a real system: `make alerts`. Each scenario names the alerts that must fire, and no other may.

Prometheus' time passes twelve times as fast (`rules.FACTOR`), the product's does not: for the rules, a stop of ten seconds is
one of two minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.monitoring.promtool import Firing
from tests.monitoring.system import System

CRITICAL, WARNING = "critical", "warning"

CALM = 20.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play` makes it happen, and returns after its end. `expected` fire in it, and no others. `system` are options of `System`."""

    name: str
    play: Callable[[System], None]
    expected: frozenset[Firing] = frozenset()
    #: Live users a second, all the time.
    traffic: float = 20.0
    system: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    #: Whether Prometheus scrapes the workers.
    scraped: bool = True
    #: Seconds of ordinary traffic before anything happens.
    calm: float = CALM


def _expect(*names: str, severity: str = CRITICAL) -> frozenset[Firing]:
    return frozenset((name, severity) for name in names)


def wait(seconds: float) -> None:
    time.sleep(seconds)


def _fail(system: System, **fault: object) -> None:
    system.control("faults", [{"times": None, **fault}])


def _mend(system: System) -> None:
    system.control("faults", [])


def ordinary(system: System) -> None:
    """A good day, with what a good day has: an import, errors that pass, an unlucky user, a deployment, a short outage."""
    with system.redis() as client:
        client.xadd(system.keys.updates, {"user": "from-the-stream", "attrs": '{"level": "Gold"}'})
    system.send(10_000, prefix="import", lane="backfill")
    wait(30)
    _fail(system, kind="code", code=91000, chance=0.05)
    wait(30)
    system.control("faults", [{"kind": "user_code", "user": "unlucky", "code": 70107, "times": None}])
    system.control("quirks", {"bad_user": "list"})
    with system.redis() as client:
        client.xadd(system.keys.updates, {"user": "unlucky", "attrs": '{"level": "Gold"}'})
        client.xadd(system.keys.updates, {"user": "refused", "attrs": "no JSON"})
    wait(20)
    for number in (1, 2):
        system.restart_worker(number)
    wait(20)
    _fail(system, kind="status", code=502)
    wait(8)
    _mend(system)
    wait(60)


def stopped_by_an_error(system: System) -> None:
    """The account is no longer an administrator, for 40 s."""
    system.control("administrators", [])
    wait(40)
    system.control("administrators", ["administrator"])
    system.imattr("resume")
    wait(40)


def stopped_by_the_data(system: System) -> None:
    """A producer sends a name that the app does not have."""
    system.control("names", ["city"])
    wait(40)


def outage(system: System) -> None:
    """The API answers 502 for 110 s."""
    _fail(system, kind="status", code=502)
    wait(110)
    _mend(system)
    wait(60)


def no_worker(system: System) -> None:
    """The only worker ends."""
    system.stop_worker(1)
    wait(30)


def held_up(system: System) -> None:
    """The workers want a replica, and there is none."""
    wait(60)


def starved(system: System) -> None:
    """One thread, and an API that takes a second: a tenth of what the quota would carry."""
    system.control("quirks", {"latency": 1.0})
    wait(110)


def too_late(system: System) -> None:
    """Half of all calls are answered after six seconds, which at this speed is more than a minute."""
    _fail(system, kind="slow", delay=6.0, chance=0.5)
    wait(90)


def saturated(system: System) -> None:
    """Forty thousand users at once, for a quota that carries 49 a second."""
    system.send(40_000, prefix="mass")
    wait(130)


def quota_shared(system: System) -> None:
    """The API grants half of the quota."""
    system.control("quirks", {"quota": 5})
    wait(130)


def paused(system: System) -> None:
    """Paused by a person, and forgotten for an hour."""
    system.imattr("pause", "--reason", "maintenance")
    wait(320)


def intake_hangs(system: System) -> None:
    """The process that takes Celery's queue is suspended."""
    system.freeze_intake()
    wait(60)


def refused(system: System) -> None:
    """A producer sends what is no JSON, by the stream."""
    system.repeat(lambda client, _: client.xadd(system.keys.updates, {"user": "u", "attrs": "no JSON"}))
    wait(40)


def dead_letters(system: System) -> None:
    """One of ten users has no account."""
    system.control("accounts", [f"user{number}" for number in range(100_000)])
    system.control("quirks", {"accounts_must_exist": True, "bad_user": "list"})
    system.keep_sending(2.0, prefix="stranger")
    wait(40)


def quarantine(system: System) -> None:
    """Somebody writes into our keys."""
    with system.redis() as client:
        client.hset(system.keys.pending, "victim", "not a record")
        client.zadd(system.keys.live, {"victim": time.time() * 1000 - 1000})
    wait(25)


def keys_deleted(system: System) -> None:
    """Somebody deletes what is pending."""
    system.imattr("pause", "--reason", "test")
    system.send(100, prefix="deleted")
    with system.redis() as client:
        client.delete(system.keys.pending)
    system.imattr("resume")
    wait(30)


def audit_finds_lost(system: System) -> None:
    """The API says yes to half of all calls and does nothing; workers read users back all the time."""
    _fail(system, kind="lost", chance=0.5)
    wait(40)
    _mend(system)
    wait(10)


def ledger_drifts(system: System) -> None:
    """Somebody counts what was never delivered, again and again, so that no repair lasts."""
    system.repeat(lambda client, _: client.hincrby(system.keys.ledger, "delivered", 1), every=0.03)
    wait(30)


def redis_down(system: System) -> None:
    """Redis is killed, and comes back after 30 s."""
    system.kill_redis()
    wait(30)
    system.sandbox.restart_redis()
    wait(20)


def redis_full(system: System) -> None:
    """Nearly all of the memory that Redis may use is used, however much that is."""
    system.repeat(
        lambda client, _: client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.04))
    )
    wait(80)


def redis_unstable(system: System) -> None:
    """Redis is restarted three times."""
    for _ in range(3):
        system.sandbox.restart_redis()
        wait(15)
    wait(10)


def exporter_gone(system: System) -> None:
    """The exporter ends."""
    system.stop_exporter()
    wait(40)


def not_scraped(system: System) -> None:
    """Nobody scrapes the workers."""
    wait(80)


#: A tenth of the usual rate, so that little work is a lot.
_SLOW = {"IMATTR_QUOTA": "10", "IMATTR_BATCH_SIZE": "10"}

#: Those that last longest first, in groups that run side by side.
GROUPS: Sequence[Sequence[Scenario]] = (
    (
        Scenario("paused and forgotten", paused, _expect("ImattrPaused", severity=WARNING)),
        Scenario("an ordinary day", ordinary, system={"workers": 2}),
        Scenario("the API is out for long", outage, _expect("ImattrOutage", severity=WARNING)),
        Scenario(
            "somebody shares the quota",
            quota_shared,
            _expect("ImattrQuotaShared", severity=WARNING),
            traffic=60.0,
            settings=_SLOW,
        ),
        Scenario(
            "too few threads",
            starved,
            _expect("ImattrStarved", "ImattrTooLate") | _expect("ImattrTooLate", severity=WARNING),
            traffic=30.0,
            system={"concurrency": 1},
            settings=_SLOW,
        ),
    ),
    (
        Scenario(
            "more users than the quota carries",
            saturated,
            _expect("ImattrSaturated", severity=WARNING),
            settings={"IMATTR_QUOTA": "10", "IMATTR_BATCH_SIZE": "5"},
        ),
        Scenario(
            "half of all calls are slow",
            too_late,
            _expect("ImattrTooLate") | _expect("ImattrTooLate", severity=WARNING),
            system={"concurrency": 48},
            settings={"IMATTR_BATCH_SIZE": "10"},
        ),
        Scenario(
            "Redis is full",
            redis_full,
            _expect("ImattrRedisFull") | _expect("ImattrRedisFull", severity=WARNING),
        ),
        Scenario(
            "nobody scrapes the workers",
            not_scraped,
            _expect("ImattrWorkersNotScraped", severity=WARNING),
            scraped=False,
        ),
        Scenario("stopped by an error", stopped_by_an_error, _expect("ImattrLineStopped")),
    ),
    (
        Scenario("stopped by the data", stopped_by_the_data, _expect("ImattrLineStopped")),
        Scenario("no worker", no_worker, _expect("ImattrNoDispatcher")),
        Scenario("no replica", held_up, _expect("ImattrHeldUp"), settings={"IMATTR_REPLICAS": "1"}, calm=0.0),
        Scenario("the intake hangs", intake_hangs, _expect("ImattrIntakeStuck")),
        Scenario("a producer went wrong", refused, _expect("ImattrRefused", severity=WARNING)),
    ),
    (
        Scenario("users without an account", dead_letters, _expect("ImattrDeadLetters", severity=WARNING)),
        Scenario("somebody writes into our keys", quarantine, _expect("ImattrQuarantine", severity=WARNING)),
        Scenario("somebody deletes keys", keys_deleted, _expect("ImattrUpdatesLost")),
        Scenario(
            "the API does nothing",
            audit_finds_lost,
            _expect("ImattrAuditFoundLost", severity=WARNING),
            settings={"IMATTR_AUDIT": "60"},
        ),
        Scenario("somebody changes the ledger", ledger_drifts, _expect("ImattrLedgerDrift")),
        Scenario("the exporter is gone", exporter_gone, _expect("ImattrExporterSilent")),
    ),
    (
        Scenario("Redis is down", redis_down, _expect("ImattrRedisDown"), system={"persistent": True}),
        Scenario(
            "Redis restarts again and again",
            redis_unstable,
            _expect("ImattrRedisUnstable", severity=WARNING),
            system={"persistent": True},
        ),
    ),
)
