"""A worker's own metrics, for `/metrics` of its health page.

Computed once a batch, with one update for each bucket rather than for each user, since a worker at full rate settles 10,000
users a second.

Processes of a prefork pool share theirs through files, which is `prometheus_client`'s way.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from worker.delivery.answers import NoReply, Reply
from worker.delivery.meter import Fate, Meter, Operation, Summary
from worker.delivery.policy import rule_for
from worker.models import Acked, Batch, DeadLettered, Outcome, UserId
from worker.operate import metric_catalog as catalog
from worker.operate.metric_catalog import CODES, NO_ANSWER, OTHER, Metric
from worker.state.line import Kind
from worker.version import VERSION

# Creation times double the number of series, and Prometheus does not use them.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Metrics with up to this many series have them all from the start, so that their first increase is seen.
MOST_PREPARED = 50


class _Histogram(Histogram):
    """A histogram that observes many values at once."""

    def observe_all(self, values: Iterable[float]) -> None:
        found = list(values)
        places = Tally(bisect_left(self._upper_bounds, value) for value in found)
        self._sum.inc(sum(found))
        for place, count in places.items():
            self._buckets[place].inc(count)


class WorkerMetrics(Meter):
    """Counts what one worker does. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = _counter(catalog.CALLS, registry)
        self._errors = _counter(catalog.CALL_ERRORS, registry)
        self._durations = _histogram(catalog.CALL_DURATION, registry)
        self._batches = _counter(catalog.BATCHES, registry)
        self._batch_users = _histogram(catalog.BATCH_USERS, registry)
        self._delays = _histogram(catalog.DELIVERY_DELAY, registry)
        self._waits = _histogram(catalog.PERMIT_WAIT, registry)
        self._permits = _counter(catalog.PERMITS, registry)
        self._dead_lettered = _counter(catalog.DEAD_LETTERED, registry)
        self._stops = _counter(catalog.LINE_STOPS, registry)
        self._lost = _counter(catalog.LEASES_LOST, registry)
        self._reclaimed = _counter(catalog.LEASES_RECLAIMED, registry)

    def waited(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def permit(self, fate: Fate) -> None:
        self._permits.labels(fate).inc()

    def call(self, operation: Operation, answer: Reply | NoReply, seconds: float) -> None:
        self._durations.labels(operation).observe(seconds)
        if isinstance(answer, NoReply):
            self._calls.labels(operation, "no_answer").inc()
            self._errors.labels(NO_ANSWER).inc()
            return
        if not answer.code:
            self._calls.labels(operation, "partial" if answer.errors else "ok").inc()
            return
        self._calls.labels(operation, rule_for(answer.code).verdict.value).inc()
        self._errors.labels(_code(answer.code)).inc()

    def settled(self, batch: Batch, outcomes: Mapping[UserId, Outcome], seconds: float) -> None:
        delays: dict[bool, list[float]] = {}
        for user in batch.users:
            end = outcomes.get(user.user)
            if isinstance(end, Acked):
                waited = max(0.0, (batch.claimed_ms - user.since_ms) / 1000 + seconds)
                delays.setdefault(user.backfill, []).append(waited)
            elif isinstance(end, DeadLettered):
                self._dead_lettered.labels(_code(end.code)).inc()
        for backfill, found in delays.items():
            self._delays.labels("backfill" if backfill else "live").observe_all(found)

    def ended(self, summary: Summary) -> None:
        self._batches.labels(summary.outcome).inc()
        self._batch_users.observe(summary.users)
        if summary.outcome == "fenced":
            self._lost.inc()

    def stopped(self, kind: Kind, code: int) -> None:
        self._stops.labels(kind, _code(code) if code else NO_ANSWER).inc()

    def reclaimed(self) -> None:
        self._reclaimed.inc()


def _code(code: int) -> str:
    found = str(code)
    return found if found in CODES else OTHER


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    made = Counter(metric.name, metric.meaning, metric.label_names, registry=registry)
    for labels in _label_values(metric):
        made.labels(*labels)
    return made


def _histogram(metric: Metric, registry: CollectorRegistry) -> _Histogram:
    made = _Histogram(
        metric.name, metric.meaning, metric.label_names, buckets=metric.bounds, registry=registry
    )
    for labels in _label_values(metric):
        made.labels(*labels)
    return made


def _label_values(metric: Metric) -> list[tuple[str, ...]]:
    """All combinations of label values; none of a metric without labels, or with too many."""
    found: list[tuple[str, ...]] = [()]
    for _, allowed in metric.labels:
        found = [(*before, value) for before in found for value in allowed]
    return found if metric.labels and len(found) <= MOST_PREPARED else []


class Gauges(Collector):
    """Gauges with the values that they have now: by metric, then by the values of its labels."""

    def __init__(self, values: Mapping[Metric, Mapping[tuple[str, ...], float]]) -> None:
        self._values = values

    def collect(self) -> Iterator[Family]:
        for metric, samples in self._values.items():
            found = GaugeMetricFamily(metric.name, metric.meaning, labels=metric.label_names)
            for labels, value in samples.items():
                found.add_metric(labels, value)
            yield found


class Labelled(Collector):
    """Another collector's samples, each with one more label."""

    def __init__(self, inner: Collector, name: str, value: str) -> None:
        self._inner, self._label = inner, {name: value}

    def collect(self) -> Iterator[Family]:
        for family in self._inner.collect():
            family.samples = [
                sample._replace(labels={**self._label, **sample.labels}) for sample in family.samples
            ]
            yield family


def page(collectors: Iterable[Collector], sdkappid: int, accept: str) -> tuple[str, bytes]:
    """The content type and the body of `/metrics`, in the format that the scraper accepts."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(Labelled(collector, "sdkappid", str(sdkappid)))
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


class WorkerPage:
    """`/metrics` of one worker, all processes of its pool included."""

    def __init__(self, sdkappid: int, directory: str | None) -> None:
        """`directory` is where the processes of a prefork pool share their metrics; None for a pool of threads."""
        self._sdkappid = sdkappid
        if directory:
            # The library reads the environment when it is first imported, and Celery's command has imported it already, for
            # Flower.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
            values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        self.meter = WorkerMetrics(own)
        self._collectors: list[Collector] = [own]
        if directory:
            shared = CollectorRegistry()
            MultiProcessCollector(shared, directory)  # type: ignore[no-untyped-call]
            self._collectors = [shared]

    def render(self, accept: str, *, leads: bool, last_turn: float) -> tuple[str, bytes]:
        """The content type and the body of the page; `last_turn` in seconds since 1970."""
        now: Mapping[Metric, Mapping[tuple[str, ...], float]] = {
            catalog.LEADS: {("dispatcher",): float(leads)},
            catalog.TURN: {(): last_turn},
            catalog.BUILD_INFO: {(VERSION,): 1.0},
        }
        return page([*self._collectors, Gauges(now)], self._sdkappid, accept)
