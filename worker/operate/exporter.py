"""The exporter: the fleet's shared state, for Prometheus, read from Redis at each scrape.

One for an app, however many workers there are: if each worker reported the backlog, the sum would be many times too high.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from worker.config import Settings
from worker.operate import health, status
from worker.operate import metric_catalog as catalog
from worker.operate.metric_catalog import Metric
from worker.operate.metrics import page
from worker.state.connection import Redis, RedisError, ResponseError
from worker.version import VERSION

Values = dict[Metric, dict[tuple[str, ...], float]]


class FleetCollector(Collector):
    """Reads everything when asked. While Redis is away, it reports only that, so no old value looks like a new one."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis, self._settings, self._last_success = redis, settings, 0.0

    def collect(self) -> Iterator[Family]:
        about = (self._settings.region, self._settings.api)
        values: Values = {
            catalog.APP_INFO: {about: 1.0},
            catalog.BUILD_INFO: {(VERSION,): 1.0},
            catalog.REDIS_UP: {(): 0.0},
        }
        try:
            values |= measure(status.read(self._redis, self._settings)) | _redis(self._redis)
            self._last_success = time.time()
            values[catalog.REDIS_UP] = {(): 1.0}
        except RedisError:
            pass
        values[catalog.LAST_SUCCESS] = {(): self._last_success}
        for metric, samples in values.items():
            made: CounterMetricFamily | GaugeMetricFamily
            if metric.kind == "counter":
                made = CounterMetricFamily(metric.name, metric.meaning, labels=metric.label_names)
            else:
                made = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.label_names)
            for labels, value in samples.items():
                made.add_metric(labels, value)
            yield made


def measure(state: Mapping[str, Any]) -> Values:
    """The fleet's metrics, from what `status.read` returns."""
    ledger, pending, line, ways = state["ledger"], state["pending"], state["line"], state["ways"]
    users = {name: pending[name] for name in ("live", "backfill", "delayed", "waiting")}
    users["in_flight"] = state["in_flight"]
    threads = sum(worker["threads"] for worker in state["workers"])
    busy = min(threads, sum(worker["busy"] for worker in state["workers"]))
    eta = state["eta_s"]
    return {
        catalog.UPDATES_ACCEPTED: {(way,): count for way, count in ways["accepted"].items()},
        catalog.UPDATES_REDRIVEN: {(): ledger["redriven"]},
        catalog.UPDATES_ENDED: {
            (fate,): ledger[fate] for _, fates in catalog.UPDATES_ENDED.labels for fate in fates
        },
        catalog.UPDATES_REFUSED: {(way,): count for way, count in ways["refused"].items()},
        catalog.UPDATES_EXPIRED: {(): state["intake"]["expired"]},
        catalog.UPDATES_LOST: {("deleted",): ledger["lost"], ("failover",): state["redis"]["updates_lost"]},
        catalog.LEDGER_IMBALANCE: {(): ledger["imbalance"]},
        catalog.USERS: {(name,): count for name, count in users.items()},
        catalog.OLDEST_PENDING: {(lane,): pending["oldest_s"][lane] or 0.0 for lane in catalog.LANES},
        catalog.DRAIN: {(): math.inf if eta is None else eta},
        catalog.DEAD_LETTERS: {(): state["dead"]},
        catalog.REFUSED: {(): state["refused"]},
        catalog.QUARANTINED: {(): state["quarantine"]},
        catalog.STREAM: {(): state["stream"]},
        catalog.QUEUE: {("updates",): state["intake"]["waiting"], ("deliveries",): state["tickets"]},
        catalog.SCHEDULED: {(): state["intake"]["scheduled"]},
        catalog.IMPORTS: {(): len(state["imports"])},
        catalog.LINE: _one_of(catalog.LINE, line["state"]),
        catalog.LINE_STOPPED: _one_of(catalog.LINE_STOPPED, line["kind"]),
        catalog.LINE_SINCE: {(): _seconds(line["since"])},
        catalog.NEXT_PROBE: {(): _seconds(line["next_probe"])},
        catalog.QUOTA: {(): state["rate"]["quota"]},
        catalog.LIMIT: {(): state["rate"]["limit"]},
        catalog.SLOTS: {(): state["rate"]["current"]},
        catalog.CALLS_SETTLED: {(): state["calls"]},
        catalog.THREADS_WANTED: {(): state["threads_wanted"]},
        catalog.THREADS: {("busy",): busy, ("idle",): threads - busy},
        catalog.WORKERS: {(): len(state["workers"])},
        catalog.LEADER: {(role,): float(leader is not None) for role, leader in state["leaders"].items()},
        catalog.AUDIT_USERS: {
            (verdict,): state["audit"][verdict]
            for _, verdicts in catalog.AUDIT_USERS.labels
            for verdict in verdicts
        },
        catalog.AUDIT_AT: {(): _seconds(state["audit"]["at"])},
        catalog.REDIS_FAILOVERS: {(): state["redis"]["servers"] - 1},
    }


def _seconds(moment: str | None) -> float:
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0


def _one_of(metric: Metric, value: str | None) -> dict[tuple[str, ...], float]:
    """Return 1 for this value of the metric's label, 0 for all others."""
    ((_, values),) = metric.labels
    return {(one,): float(one == value) for one in values}


def _redis(redis: Redis) -> Values:
    """What Redis says about itself; nothing where a service hides it."""
    try:
        memory, replication = redis.info("memory"), redis.info("replication")
    except ResponseError:
        return {}
    return {
        catalog.REDIS_USED: {(): memory.get("used_memory", 0)},
        catalog.REDIS_MAX: {(): memory.get("maxmemory", 0)},
        catalog.REDIS_REPLICAS: {(): replication.get("connected_slaves", 0)},
    }


def pages(redis: Redis, settings: Settings) -> health.Pages:
    """What the exporter serves."""
    collector = FleetCollector(redis, settings)

    def metrics(accept: str) -> health.Answer:
        return health.Answer(200, *page([collector], settings.sdkappid, accept))

    def alive(_accept: str) -> health.Answer:
        return health.Answer(200, "application/json", b'{"healthy": true}')

    return {"/metrics": metrics, **dict.fromkeys(health.LIVE_PATHS, alive)}
