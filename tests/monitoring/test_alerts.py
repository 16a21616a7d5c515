"""Each alert fires in its scenario, and in no other: promtool plays made-up series, as the catalogue has them, on the rules."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import FAST
from tests.monitoring import rules
from tests.monitoring.promtool import Firing, Play, needs_promtool, promtool, run_tests
from tests.monitoring.record import Recording, recordings
from worker.operate.metric_catalog import FLEET, WORKER, Metric

ROOT = Path(__file__).parent.parent.parent
METRICS = {metric.name: metric for metric in (*FLEET, *WORKER)}
APP = "1400000000"

#: Seconds between two scrapes: the most that the docs allow. Long plays have fewer, to save time.
SCRAPE, SELDOM = 30, 60

#: What a series is at a minute: a gauge's value, a counter's increase a second; None = not scraped.
Course = float | Callable[[float], float | None] | None

CRITICAL, WARNING = "critical", "warning"


@dataclass(frozen=True, slots=True)
class Case:
    """What differs from a healthy system, how long it is played, and what fires at which minutes."""

    name: str
    minutes: int
    differs: Mapping[str, Course]
    firing: Mapping[float, Iterable[Firing]] = field(default_factory=dict)

    @property
    def interval(self) -> int:
        return SCRAPE if self.minutes <= 120 else SELDOM


def from_to(begin: float, end: float, value: float, otherwise: float = 0.0) -> Callable[[float], float]:
    """A value between two minutes."""
    return lambda minute: value if begin <= minute < end else otherwise


def after(begin: float, value: float, otherwise: float = 0.0) -> Callable[[float], float]:
    return from_to(begin, math.inf, value, otherwise)


def growing(begin: float, slope: float, otherwise: float = 0.0) -> Callable[[float], float]:
    """From a minute on, so much more each second."""
    return lambda minute: (minute - begin) * 60 * slope if minute > begin else otherwise


def gone(begin: float, end: float, value: float) -> Callable[[float], float | None]:
    """Not scraped between two minutes."""
    return lambda minute: None if begin <= minute < end else value


#: A healthy system with 1,000 users a second, by series; what is not here is 0.
HEALTHY: dict[str, Course] = {
    'updates_accepted_total{way="producer"}': 900.0,
    'updates_accepted_total{way="celery"}': 100.0,
    'updates_accepted_total{way="stream"}': 100.0,
    'updates_ended_total{fate="delivered"}': 1000.0,
    'users{state="live"}': 250.0,
    'users{state="in_flight"}': 60.0,
    'oldest_pending_seconds{lane="live"}': 0.3,
    "drain_seconds": 0.3,
    'line_state{state="open"}': 1.0,
    "quota_calls_per_second": 100.0,
    "limit_calls_per_second": 100.0,
    "slots_per_second": 98.0,
    "settled_calls_total": 12.0,
    'leader{role="dispatcher"}': 1.0,
    'leader{role="queue_consumer"}': 1.0,
    'leader{role="stream_consumer"}': 1.0,
    "workers": 2.0,
    "redis_up": 1.0,
    "redis_memory_used_bytes": 2e8,
    "redis_memory_max_bytes": 1e9,
    "exporter_last_success_timestamp_seconds": lambda minute: 60 * minute,
    "dispatcher_last_turn_timestamp_seconds": lambda minute: 60 * minute,
    # Each of two workers.
    'calls_total{operation="set",outcome="ok"}': 6.0,
    'delivery_delay_seconds_count{lane="live"}': 500.0,
    'delivery_delay_seconds_bucket{lane="live",le="60.0"}': 500.0,
}


def delivered(rate: Course, in_time: Course = None) -> dict[str, Course]:
    """What is delivered a second, by each of two workers, and how much of that within a minute."""
    return {
        'delivery_delay_seconds_count{lane="live"}': rate,
        'delivery_delay_seconds_bucket{lane="live",le="60.0"}': rate if in_time is None else in_time,
    }


def stopped(kind: str, begin: float, end: float = math.inf) -> dict[str, Course]:
    """A stopped line: nothing is delivered, and what comes in waits. Then everything goes out, at full rate."""
    drain = 0.0 if end == math.inf else (end - begin) / 8.8
    full = from_to(end, end + drain, 4900.0, 500.0)

    def out(minute: float) -> float:
        return 0.0 if begin <= minute < end else full(minute)

    return {
        f'line_stopped{{kind="{kind}"}}': from_to(begin, end, 1.0),
        'line_state{state="stopped"}': from_to(begin, end, 1.0),
        'line_state{state="open"}': from_to(begin, end, 0.0, 1.0),
        "line_since_timestamp_seconds": from_to(begin, end, begin * 60),
        "line_next_probe_timestamp_seconds": lambda minute: 60 * minute + 20 if begin <= minute < end else 0.0,
        "slots_per_second": from_to(begin, end, 0.0, 98.0),
        "settled_calls_total": lambda minute: 0.0 if begin <= minute < end else (98.0 if full(minute) > 500 else 12.0),
        'updates_ended_total{fate="delivered"}': lambda minute: 2 * out(minute),
        "drain_seconds": lambda minute: math.inf if begin <= minute < end else 60.0 * drain,
        **waiting(begin, end, drain),
        **delivered(out, lambda minute: 0.0 if begin <= minute < end + drain else 500.0),
    }  # fmt: skip


def waiting(begin: float, end: float = math.inf, drain: float = 0.0) -> dict[str, Course]:
    """Nobody is served from a minute on, until another; then all are within so many minutes."""

    def age(minute: float) -> float:
        if begin <= minute < end:
            return 60 * (minute - begin) + 0.3
        if end <= minute < end + drain:
            return 60 * (end - begin) * (1 - (minute - end) / drain) + 0.3
        return 0.3

    return {
        'oldest_pending_seconds{lane="live"}': age,
        'users{state="live"}': lambda minute: 1000 * age(minute),
    }


NOBODY_DELIVERS = {
    **delivered(from_to(0, 30, 500.0)),
    "settled_calls_total": from_to(0, 30, 12.0),
    'updates_ended_total{fate="delivered"}': from_to(0, 30, 1000.0),
    "drain_seconds": after(31, math.inf),
    **waiting(30),
}

CASES = [
    # Nothing fires.
    Case("a healthy day", 420, {}),
    Case(
        "nothing to do",
        400,
        {name: 0.0 for name in HEALTHY if name.partition("{")[0].endswith(("_total", "_count", "_bucket"))}
        | {'users{state="live"}': 0.0, 'oldest_pending_seconds{lane="live"}': 0.0, "drain_seconds": 0.0},
    ),
    Case(
        "an import for hours, live users unharmed",
        240,
        {
            'users{state="backfill"}': 1e8,
            'oldest_pending_seconds{lane="backfill"}': growing(0, 1.0),
            "drain_seconds": 10_000.0,
            "settled_calls_total": 98.0,
        },
    ),
    Case("a peak that takes half an hour", 120, {
        "drain_seconds": from_to(31, 60, 1500.0, 0.3),
        'oldest_pending_seconds{lane="live"}': lambda minute: (minute - 30) * 30 if 30 < minute < 60 else 0.3,
        'users{state="live"}': from_to(30, 60, 9e6, 250.0),
        "settled_calls_total": from_to(30, 60, 98.0, 12.0),
        **delivered(from_to(30, 60, 4900.0, 500.0), lambda minute: 4900.0 if 30 <= minute < 31 else from_to(30, 60, 0.0, 500.0)(minute)),
    }),
    Case("an outage of ten minutes", 120, stopped("outage", 30, 40)),
    Case("a stop of a minute", 120, stopped("error", 30, 31)),
    Case("one failover", 120, {
        "redis_failovers_total": from_to(30, 30.25, 1 / SCRAPE),
        'leader{role="dispatcher"}': from_to(30, 30.5, 0.0, 1.0),
        'line_state{state="paused"}': from_to(30, 30.5, 1.0),
        "line_next_probe_timestamp_seconds": from_to(30, 30.5, 1803.0),
    }),
    Case("a deployment", 120, {
        'leader{role="dispatcher"}': from_to(30, 31, 0.0, 1.0),
        "dispatcher_last_turn_timestamp_seconds": gone(30, 32, 1800.0),
        **delivered(gone(30, 32, 500.0)),
    }),
    Case("a refusal for frequency now and then", 240, {
        'calls_total{operation="set",outcome="rate"}': lambda minute: 0.01 if minute % 20 < 1 else 0.0,
        "limit_calls_per_second": lambda minute: 75.0 if minute % 20 < 3 else 100.0,
    }),
    Case("a low limit left over from yesterday, and hardly any call", 240, {"limit_calls_per_second": 40.0}),
    Case("a few dead letters", 120, {'updates_ended_total{fate="dead_lettered"}': 5.0}),
    Case("nine of ten users given up, ten in all", 120, {
        'updates_ended_total{fate="dead_lettered"}': from_to(30, 31, 1 / 6),
        'updates_ended_total{fate="delivered"}': 0.001,
    }),
    Case("a few refused", 120, {'updates_refused_total{way="celery"}': 5.0}),
    Case("a user a minute, and one of them late", 420, {
        **delivered(1 / 120, lambda minute: 0.0 if 30 <= minute < 32 else 1 / 120),
        "settled_calls_total": 1 / 60,
    }),
    Case("Redis at three quarters", 120, {"redis_memory_used_bytes": 7.5e8}),
    Case("Redis without a limit", 120, {"redis_memory_used_bytes": 9e9, "redis_memory_max_bytes": 0.0}),
    Case("a short pause by a person", 120, {
        'line_state{state="paused"}': from_to(30, 80, 1.0),
        'line_state{state="open"}': from_to(30, 80, 0.0, 1.0),
        "line_since_timestamp_seconds": from_to(30, 80, 1800.0),
        "slots_per_second": from_to(30, 80, 0.0, 98.0),
    }),
    Case("a long queue that is being taken", 120, {'queue_messages{queue="updates"}': 1e5, "stream_entries": 1e5}),
    Case("a record that a repair brings back within ten seconds", 120, {
        "ledger_imbalance": lambda minute: 3.0 if minute == 30 else 0.0,
    }),

    # One alert fires, and those that say the same in other words.
    Case("the line is stopped by an error", 60, stopped("error", 30, 50), {
        31: [], 33: [("ImattrLineStopped", CRITICAL)], 49: [("ImattrLineStopped", CRITICAL)], 51.5: [],
    }),
    Case("the line is stopped by the data", 60, stopped("data", 30), {
        31: [], 33: [("ImattrLineStopped", CRITICAL)], 59: [("ImattrLineStopped", CRITICAL)],
    }),
    Case("the line opens and stops again and again", 60, {
        'line_stopped{kind="error"}': lambda minute: float(minute > 30 and minute % 2 >= 0.5),
        "slots_per_second": lambda minute: 0.0 if minute > 30 and minute % 2 >= 0.5 else 98.0,
    }, {31: [], 34: [("ImattrLineStopped", CRITICAL)], 59: [("ImattrLineStopped", CRITICAL)]}),
    Case("an outage of the API", 120, stopped("outage", 30, 80), {
        44: [], 46: [("ImattrOutage", WARNING)], 79: [("ImattrOutage", WARNING)], 86: [], 120: [],
    }),
    Case("no dispatcher", 60, NOBODY_DELIVERS | {'leader{role="dispatcher"}': from_to(0, 30, 1.0), 'leader{role="queue_consumer"}': from_to(0, 30, 1.0), "workers": from_to(0, 30, 2.0)}, {
        31: [], 33: [("ImattrNoDispatcher", CRITICAL)], 60: [("ImattrNoDispatcher", CRITICAL)],
    }),
    Case("held up by Redis", 120, {
        'line_state{state="paused"}': after(30, 1.0),
        'line_state{state="open"}': from_to(0, 30, 1.0),
        "line_next_probe_timestamp_seconds": lambda minute: 60 * minute + 1 if minute >= 30 else 0.0,
        "line_since_timestamp_seconds": after(30, 1800.0),
        **NOBODY_DELIVERS,
        "slots_per_second": from_to(0, 30, 98.0),
    }, {34: [], 36: [("ImattrHeldUp", CRITICAL)], 120: [("ImattrHeldUp", CRITICAL)]}),
    Case("too few threads", 120, {
        **waiting(30),
        'users{state="live"}': growing(30, 500.0, 250.0),
        'oldest_pending_seconds{lane="live"}': growing(30, 0.5, 0.3),
        "drain_seconds": growing(30, 1.0, 0.3),
        "settled_calls_total": from_to(0, 30, 12.0, 6.0),
        **delivered(from_to(0, 30, 500.0, 250.0), from_to(0, 32, 500.0)),
    }, {
        34: [],
        # What follows from it, and why.
        60: [("ImattrStarved", CRITICAL), ("ImattrTooLate", CRITICAL), ("ImattrTooLate", WARNING)],
        120: [("ImattrStarved", CRITICAL), ("ImattrTooLate", CRITICAL), ("ImattrTooLate", WARNING)],
    }),
    Case("too few threads, then a pause", 120, {
        **waiting(30),
        "settled_calls_total": lambda minute: 12.0 if minute < 30 else from_to(30, 60, 6.0)(minute),
        **delivered(lambda minute: 500.0 if minute < 30 else from_to(30, 60, 250.0)(minute), from_to(0, 30, 500.0)),
        "slots_per_second": from_to(0, 60, 98.0),
        'line_state{state="paused"}': after(60, 1.0),
        'line_state{state="open"}': from_to(0, 60, 1.0),
        "line_since_timestamp_seconds": after(60, 3600.0),
    }, {
        59: [("ImattrStarved", CRITICAL), ("ImattrTooLate", CRITICAL), ("ImattrTooLate", WARNING)],
        # The windows of the burn rates pass; the pause has no reason to be called a lack of threads.
        62: [("ImattrTooLate", CRITICAL), ("ImattrTooLate", WARNING)],
        110: [],
    }),
    Case("one user waits and nobody comes for it", 60, {
        **dict.fromkeys(delivered(0.0), 0.0),
        "settled_calls_total": 0.0,
        'users{state="live"}': after(30, 1.0),
        'oldest_pending_seconds{lane="live"}': growing(30, 1.0),
    }, {41: [], 43: [("ImattrStarved", CRITICAL)]}),
    Case("a fifth of all users too late, by retries", 420, delivered(500.0, after(360, 400.0, 500.0)), {
        # 14.4 % of an hour, and 6 % of six hours, take their time.
        380: [],
        410: [("ImattrTooLate", CRITICAL)],
    }),
    Case("a tenth of all users too late, for hours", 420, delivered(500.0, after(150, 450.0, 500.0)), {
        300: [], 400: [("ImattrTooLate", WARNING)], 420: [("ImattrTooLate", WARNING)],
    }),
    Case("all users too late", 420, delivered(500.0, after(360, 0.0, 500.0)), {
        365: [], 372: [("ImattrTooLate", CRITICAL)],
        420: [("ImattrTooLate", CRITICAL), ("ImattrTooLate", WARNING)],
    }),
    Case("nothing moves, and nothing says why", 420, {
        **waiting(360),
        **delivered(from_to(0, 360, 500.0)),
        "settled_calls_total": from_to(0, 360, 12.0),
    }, {
        365: [],
        # The histogram stays silent: it is the users who wait.
        371.5: [("ImattrTooLate", CRITICAL)],
        374: [("ImattrStarved", CRITICAL), ("ImattrTooLate", CRITICAL)],
    }),
    Case("more users than the quota carries", 120, {
        "drain_seconds": growing(30, 4.0, 0.3),
        'oldest_pending_seconds{lane="live"}': growing(30, 0.5, 0.3),
        'users{state="live"}': growing(30, 9000.0, 250.0),
        "settled_calls_total": from_to(0, 30, 12.0, 97.0),
        **delivered(from_to(0, 30, 500.0, 4850.0), lambda minute: 500.0 if minute < 30 else from_to(30, 31, 4850.0)(minute)),
    }, {55: [], 63: [("ImattrSaturated", WARNING)], 120: [("ImattrSaturated", WARNING)]}),
    Case("somebody shares the quota", 120, {
        "limit_calls_per_second": from_to(30, 80, 50.0, 100.0),
        "slots_per_second": from_to(30, 80, 49.0, 98.0),
        'calls_total{operation="set",outcome="rate"}': from_to(30, 80, 0.02),
    }, {35: [], 45: [("ImattrQuotaShared", WARNING)], 80: [("ImattrQuotaShared", WARNING)], 115: []}),
    Case("paused and forgotten", 120, {
        'line_state{state="paused"}': after(30, 1.0),
        'line_state{state="open"}': from_to(0, 30, 1.0),
        "line_since_timestamp_seconds": after(30, 1800.0),
        **NOBODY_DELIVERS,
        "slots_per_second": from_to(0, 30, 98.0),
    }, {89: [], 92: [("ImattrPaused", WARNING)]}),
    Case("nobody consumes Celery's queue", 60, {
        'leader{role="queue_consumer"}': from_to(0, 30, 1.0),
        'updates_accepted_total{way="celery"}': from_to(0, 30, 100.0),
    }, {34: [], 37: [("ImattrIntakeStuck", CRITICAL)]}),
    Case("workers that do not consume Celery's queue", 120, {'leader{role="queue_consumer"}': 0.0}),
    Case("no room for what is in Celery's queue", 60, {
        'queue_messages{queue="updates"}': after(30, 100.0),
        'updates_accepted_total{way="celery"}': from_to(0, 30, 100.0),
    }, {38: [], 42: [("ImattrIntakeStuck", CRITICAL)]}),
    Case("nobody takes from the stream", 60, {
        "stream_entries": growing(30, 100.0),
        'updates_accepted_total{way="stream"}': from_to(0, 30, 100.0),
    }, {38: [], 42: [("ImattrIntakeStuck", CRITICAL)]}),
    Case("a producer went wrong", 90, {'updates_refused_total{way="stream"}': from_to(30, 60, 20.0)}, {
        29: [], 40: [("ImattrRefused", WARNING)], 60: [("ImattrRefused", WARNING)], 90: [],
    }),
    Case("many users are given up", 90, {'updates_ended_total{fate="dead_lettered"}': from_to(30, 60, 20.0)}, {
        29: [], 45: [("ImattrDeadLetters", WARNING)], 60: [("ImattrDeadLetters", WARNING)], 90: [],
    }),
    Case("somebody wrote into our keys", 60, {"quarantined_records": after(30, 2.0)}, {
        30: [], 32: [("ImattrQuarantine", WARNING)],
    }),
    Case("keys were deleted", 120, {'updates_lost{how="deleted"}': after(30, 500.0)}, {
        29: [], 31: [("ImattrUpdatesLost", CRITICAL)], 89: [("ImattrUpdatesLost", CRITICAL)], 92: [],
    }),
    Case("an audit finds what was lost", 150, {
        'audit_users_total{verdict="as_delivered"}': 10.0,
        'audit_users_total{verdict="lost"}': from_to(30, 60, 0.1),
    }, {29: [], 32: [("ImattrAuditFoundLost", WARNING)], 118: [("ImattrAuditFoundLost", WARNING)], 123: []}),
    Case("another program changes attributes", 120, {
        'audit_users_total{verdict="as_delivered"}': 10.0,
        'audit_users_total{verdict="changed"}': 0.5,
        'audit_users_total{verdict="gone"}': 0.5,
        'audit_users_total{verdict="skipped"}': 0.5,
    }),
    Case("the ledger does not balance", 60, {"ledger_imbalance": after(30, -3.0)}, {
        30: [], 34: [("ImattrLedgerDrift", CRITICAL)],
    }),
    Case("Redis is down", 60, {
        **{name: gone(30, 50, 1.0) for name in ('leader{role="dispatcher"}', "workers")},
        "redis_up": from_to(30, 50, 0.0, 1.0),
        "exporter_last_success_timestamp_seconds": lambda minute: 1800.0 if 30 <= minute < 50 else 60 * minute,
    }, {31: [], 33: [("ImattrRedisDown", CRITICAL)], 49: [("ImattrRedisDown", CRITICAL)], 51: []}),
    Case("Redis is filling", 60, {"redis_memory_used_bytes": after(30, 8.5e8, 2e8)}, {
        39: [], 41: [("ImattrRedisFull", WARNING)],
    }),
    Case("Redis is full, and the queue is not taken in", 60, {
        "redis_memory_used_bytes": after(30, 9.5e8, 2e8),
        'queue_messages{queue="updates"}': growing(30, 100.0),
        'updates_accepted_total{way="celery"}': from_to(0, 30, 100.0),
    }, {
        31: [], 33: [("ImattrRedisFull", CRITICAL)],
        60: [("ImattrRedisFull", CRITICAL), ("ImattrRedisFull", WARNING)],
    }),
    Case("Redis fails over again and again", 90, {
        "redis_failovers_total": lambda minute: 1 / SCRAPE if minute in (30.0, 35.0, 40.0) else 0.0,
    }, {36: [], 41: [("ImattrRedisUnstable", WARNING)], 80: []}),
    Case("the exporter reads nothing more", 60, {
        "exporter_last_success_timestamp_seconds": lambda minute: min(1800.0, 60 * minute),
    }, {33: [], 35: [("ImattrExporterSilent", CRITICAL)]}),
    Case("the exporter is gone", 180, {
        **{name: gone(30, math.inf, 1.0) for name in ("redis_up", 'leader{role="dispatcher"}', "workers")},
        "exporter_last_success_timestamp_seconds": lambda minute: 60 * minute if minute < 30 else None,
    }, {
        31: [], 38: [("ImattrExporterSilent", CRITICAL)], 89: [("ImattrExporterSilent", CRITICAL)],
        100: [("ImattrExporterSilent", CRITICAL)], 180: [("ImattrExporterSilent", CRITICAL)],
    }),
    Case("there never was an exporter", 90, dict.fromkeys(HEALTHY), {70: [("ImattrExporterSilent", CRITICAL)]}),
    Case("no worker is scraped", 60, {
        name: None for name in HEALTHY
        if name.startswith(("dispatcher_last", "calls_total", "delivery_delay"))
    }, {14: [], 17: [("ImattrWorkersNotScraped", WARNING)]}),
]  # fmt: skip


def series_of(case: Case) -> dict[str, list[float | None]]:
    """The series of a case: of two workers and two exporters, for the rules must count nothing twice."""
    courses = dict.fromkeys(_used_series(), 0.0) | HEALTHY | dict(case.differs)
    unknown = courses.keys() - _used_series()
    assert not unknown, f"no rule uses {unknown}"
    series: dict[str, list[float | None]] = {}
    for name, course in courses.items():
        metric, _, labels = name.partition("{")
        source = "worker" if _metric(f"imattr_{metric}") in WORKER else "exporter"
        for number in (1, 2):
            at = f'instance="{source}-{number}",sdkappid="{APP}"'
            rest = f",{labels}" if labels else "}"
            series[f"imattr_{metric}{{{at}{rest}"] = _samples(metric, course, case)
    return series


def _samples(metric: str, course: Course, case: Case) -> list[float | None]:
    values: list[float | None] = []
    total = 0.0
    for number in range(case.minutes * 60 // case.interval + 1):
        now = course(number * case.interval / 60) if callable(course) else course
        if metric.endswith(("_total", "_count", "_bucket")) and now is not None:
            total = now = round(total + now * case.interval, 6)
        values.append(now)
    return values


def _metric(name: str) -> Metric:
    return METRICS[name] if name in METRICS else METRICS[re.sub("_(bucket|count|sum)$", "", name)]


def _used_series() -> set[str]:
    """Every series of the metrics that the rules use, without the prefix; of histograms, those that are used."""
    found: set[str] = set()
    for name, held_to in (one for rule in _all_rules() for one in rules.selectors(rule.expr)):
        if name.startswith("sdkappid:"):
            continue
        metric = _metric(name)
        labels = [[f'{label}="{value}"' for value in values] for label, values in metric.labels]
        if "le" in held_to:
            bounds = [f"{float(bound)}" for bound in metric.bounds]
            labels.append([f'le="{bound}"' for bound in bounds if re.fullmatch(held_to["le"], bound)])
        for values in itertools.product(*labels):
            found.add(name.removeprefix("imattr_") + (f"{{{','.join(values)}}}" if values else ""))
    return found


def _all_rules() -> list[rules.Rule]:
    return [rule for group in rules.read().values() for rule in group]


@needs_promtool
@pytest.mark.parametrize("case", CASES[:: 4 if FAST else 1], ids=lambda case: case.name)
def test_each_alert_fires_in_its_scenario_and_in_no_other(case: Case, tmp_path: Path) -> None:
    firing = dict(case.firing) or dict.fromkeys(range(5, case.minutes + 1, 5), ())
    moments = {round(minute * 60): alerts for minute, alerts in firing.items()}
    play = Play(case.name, case.interval, series_of(case), moments)

    complaint = run_tests(tmp_path, rules.RULES.read_text(), [play], case.interval)

    assert not complaint, complaint


@needs_promtool
def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    assert not promtool("check", "config", str(ROOT / "docker" / "prometheus" / "prometheus.yml"))


@needs_promtool
def test_the_faster_rules_are_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(rules.faster_rules())

    assert not promtool("check", "rules", str(path))
    assert sum(map(len, rules.read().values())) == sum(
        line.strip().startswith(("- alert:", "- record:")) for line in rules.RULES.read_text().splitlines()
    )


def test_times_are_divided_and_nothing_else() -> None:
    assert rules.faster(
        'rate(a_b2m{le=~"60([.]0)?"}[2m]) > 14.4 * 0.01 and x > 120 or y[1h] offset 5m > 59'
    ) == ('rate(a_b2m{le=~"5([.]0)?"}[10000ms]) > 14.4 * 0.01 and x > 10 or y[300000ms] offset 25000ms > 59')


@pytest.mark.parametrize("rule", _all_rules(), ids=lambda rule: f"{rule.name} {rule.severity}".strip())
def test_a_rule_uses_what_the_catalogue_has(rule: rules.Rule) -> None:
    recorded = {other.name for other in _all_rules() if not other.is_alert}
    for expr in (rule.expr, rules.faster(rule.expr), " ".join(rule.annotations.values())):
        for name, held_to in rules.selectors(expr):
            if name.startswith("sdkappid:"):
                assert name in recorded
                continue
            metric = _metric(name)
            assert (metric.kind == "histogram") == (name != metric.name)
            allowed = dict(metric.labels) | {"le": tuple(f"{float(bound)}" for bound in metric.bounds)}
            for label, pattern in held_to.items():
                if label != "sdkappid":
                    assert any(re.fullmatch(pattern, value) for value in allowed[label]), (
                        name,
                        label,
                        pattern,
                    )


@pytest.mark.parametrize("rule", rules.alerts(), ids=lambda rule: f"{rule.name} {rule.severity}")
def test_an_alert_says_everything_that_is_needed_at_night(rule: rules.Rule) -> None:
    assert rule.severity in (CRITICAL, WARNING)
    assert set(rule.annotations) == {"summary", "description", "runbook_url", "dashboard"}
    assert rule.annotations["summary"].startswith("{{ $labels.sdkappid }}: ")
    assert rule.annotations["runbook_url"] == f"docs/operate/runbook.md#{rule.name.lower()}"
    assert "instance" not in rule.expr


def test_the_runbook_has_a_section_for_each_alert_and_for_nothing_else() -> None:
    headings = re.findall(
        r"^## (Imattr\w+)$", (ROOT / "docs" / "operate" / "runbook.md").read_text(), re.MULTILINE
    )

    assert headings == list(dict.fromkeys(rule.name for rule in rules.alerts()))


def test_every_alert_has_a_scenario() -> None:
    played = {alert for case in CASES for firing in case.firing.values() for alert in firing}

    assert played == {(rule.name, rule.severity) for rule in rules.alerts()}


@needs_promtool
@pytest.mark.parametrize("recording", recordings(), ids=lambda recording: recording.name)
def test_real_runs_replayed_fire_what_they_fired(recording: Recording, tmp_path: Path) -> None:
    """The series of `make alerts`, as the workers and the exporter served them, on the rules as they are now."""
    (tmp_path / "rules.json").write_text(rules.faster_rules())
    document = {"rule_files": ["rules.json"], "evaluation_interval": "1s", "tests": [recording.document]}
    (tmp_path / "tests.json").write_text(json.dumps(document))

    complaint = promtool("test", "rules", str(tmp_path / "tests.json"))

    assert not complaint, complaint
    assert recording.held


def test_every_alert_has_fired_in_a_real_run() -> None:
    fired = {alert for recording in recordings() for alert in recording.fired}

    assert fired == {(rule.name, rule.severity) for rule in rules.alerts()}


@needs_promtool
@pytest.mark.parametrize("severity", [CRITICAL, WARNING])
def test_the_texts_of_alerts_can_be_made(severity: str, tmp_path: Path) -> None:
    """What promtool says it got, when it is told to expect no text."""
    places: dict[str, tuple[Case, float]] = {}
    for case in CASES:
        for minute, firing in case.firing.items():
            for name, level in firing:
                if level == severity and name != "ImattrExporterSilent":
                    places.setdefault(name, (case, minute))
    documents = []
    for name, (case, minute) in places.items():
        document = Play(case.name, case.interval, series_of(case), {}).document()
        wanted = {"eval_time": f"{minute * 60:.0f}s", "alertname": name, "exp_alerts": []}
        documents.append(document | {"alert_rule_test": [wanted]})
    (tmp_path / "rules.yml").write_text(rules.RULES.read_text())
    path = tmp_path / "tests.json"
    path.write_text(
        json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": "30s", "tests": documents})
    )

    got = promtool("test", "rules", str(path))

    texts = re.findall(r'(?:summary|description)="((?:[^"\\]|\\.)*)"', got)
    # Of one with two severities, both are told.
    assert len(texts) >= 2 * len(places)
    for text in texts:
        assert "<" not in text, text
        assert "{" not in text, text
        assert "NaN" not in text, text
        assert "no value" not in text, text
