"""What a worker and the exporter serve is what the catalogue says, and what happened."""

from __future__ import annotations

import math
from typing import Any

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from worker.config import Secret, Settings
from worker.delivery.answers import Failure, NoReply, Reply
from worker.delivery.meter import Summary
from worker.models import Acked, Batch, BatchId, ClaimedUser, DeadLettered
from worker.operate import exporter
from worker.operate import metric_catalog as catalog
from worker.operate.metric_catalog import FLEET, WORKER, Metric
from worker.operate.metrics import WorkerPage
from worker.producer import Producer
from worker.state.fleet import Fleet
from worker.state.keys import Keys
from worker.state.line import Line

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

BATCH = BatchId("batch")


def series(text: str) -> Series:
    """Every sample, by its name and labels; the label `sdkappid` is on all of them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("sdkappid")
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(found: Series, metric: Metric, suffix: str = "", **labels: str) -> float:
    return found[metric.name + suffix, frozenset(labels.items())]


@pytest.fixture
def page() -> WorkerPage:
    return WorkerPage(1, None)


def served(page: WorkerPage) -> Series:
    return series(page.render("", leads=True, last_turn=5.0)[1].decode())


def user(name: str, since_ms: int, *, backfill: bool = False) -> ClaimedUser:
    return ClaimedUser(name, {"city": "Paris"}, 0, since_ms, backfill=backfill)


def test_a_call_counts_by_what_it_asked_and_how_it_ended(page: WorkerPage) -> None:
    page.meter.call("set", Reply(0), 0.04)
    page.meter.call("set", Reply(90009), 0.04)
    page.meter.call("set", Reply(123456), 0.04)
    page.meter.call("remove", NoReply(Failure.TIMEOUT), 10.0)

    found = served(page)

    assert value(found, catalog.CALLS, operation="set", outcome="ok") == 1
    assert value(found, catalog.CALLS, operation="set", outcome="stop") == 1
    assert value(found, catalog.CALLS, operation="set", outcome="unknown") == 1
    assert value(found, catalog.CALLS, operation="remove", outcome="no_answer") == 1
    assert value(found, catalog.CALL_ERRORS, code="90009") == 1
    assert value(found, catalog.CALL_ERRORS, code="other") == 1
    assert value(found, catalog.CALL_ERRORS, code="none") == 1
    assert value(found, catalog.CALL_DURATION, "_count", operation="set") == 3


def test_a_delay_is_from_the_first_update_to_the_answer(page: WorkerPage) -> None:
    users = (user("a", 9_600), user("b", 9_600), user("c", 5_000, backfill=True), user("d", 1))
    batch = Batch(BATCH, users, claimed_ms=10_000)
    page.meter.settled(batch, {**dict.fromkeys("abc", Acked()), "d": DeadLettered(40001, "")}, 0.1)

    found = served(page)

    assert value(found, catalog.DELIVERY_DELAY, "_count", lane="live") == 2
    assert value(found, catalog.DELIVERY_DELAY, "_sum", lane="live") == pytest.approx(1.0)
    assert value(found, catalog.DELIVERY_DELAY, "_bucket", lane="live", le="0.25") == 0
    assert value(found, catalog.DELIVERY_DELAY, "_bucket", lane="live", le="0.5") == 2
    assert value(found, catalog.DELIVERY_DELAY, "_bucket", lane="live", le="+Inf") == 2
    assert value(found, catalog.DELIVERY_DELAY, "_sum", lane="backfill") == pytest.approx(5.1)
    assert sum(count for (name, _), count in found.items() if name == catalog.DEAD_LETTERED.name) == 1


def test_every_batch_counts_once_with_its_users(page: WorkerPage) -> None:
    page.meter.ended(Summary(BATCH, "delivered", users=100))
    page.meter.ended(Summary(BATCH, "fenced", users=1))
    page.meter.waited(0.02)
    page.meter.permit("late")
    page.meter.stopped("error", 90009)
    page.meter.stopped("outage", 0)
    page.meter.reclaimed()

    found = served(page)

    assert value(found, catalog.BATCHES, outcome="delivered") == 1
    assert value(found, catalog.BATCH_USERS, "_sum") == 101
    assert value(found, catalog.LEASES_LOST) == 1
    assert value(found, catalog.LEASES_RECLAIMED) == 1
    assert value(found, catalog.PERMITS, result="late") == 1
    assert value(found, catalog.PERMIT_WAIT, "_count") == 1
    assert value(found, catalog.LINE_STOPS, kind="error", code="90009") == 1
    assert value(found, catalog.LINE_STOPS, kind="outage", code="none") == 1
    assert value(found, catalog.LEADS, role="dispatcher") == 1
    assert value(found, catalog.TURN) == 5.0


def test_the_number_of_series_does_not_depend_on_who_is_delivered(page: WorkerPage) -> None:
    page.meter.ended(Summary(BATCH, "delivered", users=100))
    before = served(page)

    for number in range(1000):
        users = tuple(user(f"u{number}-{place}", number) for place in range(100))
        batch = Batch(BatchId(f"b{number}"), users, claimed_ms=10_000)
        page.meter.settled(batch, {one.user: Acked() for one in users}, 0.1)

    assert served(page).keys() == before.keys()


@pytest.fixture
def settings(keys: Keys, server: Any) -> Settings:
    return Settings(sdkappid=keys.sdkappid, redis_url=Secret(server.url), region="frankfurt")


def exported(client: redis.Redis, settings: Settings) -> Series:
    status, content_type, body = exporter.pages(client, settings)["/metrics"]("")
    assert (status, content_type.partition(";")[0]) == (200, "text/plain")
    return series(body.decode())


def test_the_exporter_tells_what_the_fleet_shares(
    client: redis.Redis, server: Any, keys: Keys, settings: Settings
) -> None:
    Producer(server.url, keys.sdkappid).set_many([("a", {"city": "Paris"}), ("a", {"city": "Rome"})])
    Line(client, keys).stop(BATCH, "error", 90009, "not an administrator")
    Fleet(client, keys).report("one", threads=16, busy=3, version="0.2")

    found = exported(client, settings)

    assert value(found, catalog.UPDATES_ACCEPTED, way="producer") == 2
    assert value(found, catalog.UPDATES_ENDED, fate="coalesced") == 1
    assert value(found, catalog.USERS, state="live") == 1
    assert value(found, catalog.OLDEST_PENDING, lane="live") > 0
    assert value(found, catalog.DRAIN) == math.inf
    assert value(found, catalog.LINE, state="stopped") == 1
    assert value(found, catalog.LINE, state="open") == 0
    assert value(found, catalog.LINE_STOPPED, kind="error") == 1
    assert value(found, catalog.LINE_SINCE) == pytest.approx(client.time()[0], abs=60)
    assert value(found, catalog.THREADS, state="busy") == 3
    assert value(found, catalog.THREADS, state="idle") == 13
    assert value(found, catalog.LEDGER_IMBALANCE) == 0
    assert value(found, catalog.REDIS_UP) == 1
    assert value(found, catalog.APP_INFO, region="frankfurt", api="chat") == 1


def test_what_the_ledger_cannot_account_for_is_told(
    client: redis.Redis, keys: Keys, settings: Settings
) -> None:
    client.hset(keys.ledger, "accepted", 5)

    assert value(exported(client, settings), catalog.LEDGER_IMBALANCE) == 5


def test_without_redis_no_old_value_looks_new(client: redis.Redis, settings: Settings) -> None:
    collector = exporter.FleetCollector(client, settings)
    assert {metric.name for metric in collector.collect()} > {"imattr_users"}

    nowhere = redis.Redis(port=1, socket_connect_timeout=0.1)
    collector._redis = nowhere
    told = {metric.name: metric.samples[0].value for metric in collector.collect()}

    assert told.keys() == {
        "imattr_app_info",
        "imattr_build_info",
        "imattr_redis_up",
        "imattr_exporter_last_success_timestamp_seconds",
    }
    assert told["imattr_redis_up"] == 0
    assert told["imattr_exporter_last_success_timestamp_seconds"] > 0


def test_what_is_served_is_what_the_catalogue_says(
    client: redis.Redis, keys: Keys, settings: Settings, page: WorkerPage
) -> None:
    page.meter.call("set", Reply(90009), 0.04)
    page.meter.stopped("outage", 0)
    page.meter.settled(Batch(BATCH, (user("a", 1),), claimed_ms=1), {"a": DeadLettered(40001, "")}, 0.1)
    for found, metrics in ((exported(client, settings), FLEET), (served(page), WORKER)):
        by_name = {metric.name: metric for metric in metrics}
        seen = set()
        for name, labels in found:
            suffix = next((s for s in ("_bucket", "_count", "_sum") if name.endswith(s)), "")
            metric = by_name.get(name) or by_name[name.removesuffix(suffix)]
            seen.add(metric.name)
            given = dict(labels)
            given.pop("le", None)
            assert given.keys() == set(metric.label_names), name
            for label, allowed in metric.labels:
                assert not allowed or given[label] in allowed, (name, label, given[label])
        assert seen == by_name.keys()


def test_the_catalogue_keeps_the_conventions() -> None:
    for metric in (*FLEET, *WORKER):
        assert metric.name.startswith("imattr_")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert metric.meaning.endswith(".")
        assert list(metric.bounds) == sorted(metric.bounds)
