"""Every metric: the only catalogue of names, types, labels and meanings. `docs/operate/metrics.md` is made from it.

Names follow the conventions of Prometheus: the prefix, base units, `_total` for counters. The samples of one metric can be
summed over any of its labels. No label contains a user, a value, a batch, a worker or an attribute's name, so the number of
series depends on none of them. Each sample also has the label `sdkappid`.

There are two sources. What the whole fleet shares is in Redis, survives every deployment, and comes from one exporter. What a
worker sees itself comes from its health port, and starts over when the worker does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from worker.delivery.policy import TABLE

Kind = Literal["counter", "gauge", "histogram"]

PREFIX = "imattr_"

#: The label of a code that is not in the table of error codes, and of a call that got no answer.
OTHER, NO_ANSWER = "other", "none"
CODES = (*sorted(str(code) for code in TABLE), OTHER, NO_ANSWER)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `labels` has every label with its possible values; `bounds` the upper bounds of a histogram's buckets."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.labels)


WAYS = ("producer", "import", "celery", "stream", "other")
LANES = ("live", "backfill")
KINDS = ("error", "outage", "data")


def _counter(name: str, meaning: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", meaning, tuple(labels.items()))


def _gauge(name: str, meaning: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(f"{PREFIX}{name}", "gauge", meaning, tuple(labels.items()))


def _histogram(name: str, meaning: str, bounds: tuple[float, ...], **labels: tuple[str, ...]) -> Metric:
    return Metric(f"{PREFIX}{name}", "histogram", meaning, tuple(labels.items()), bounds)


# The fleet's, from `imattr exporter`.

UPDATES_ACCEPTED = _counter("updates_accepted", "Updates accepted, by the way they arrived.", way=WAYS)
UPDATES_REDRIVEN = _counter("updates_redriven", "Dead letters put back by a person.")
UPDATES_ENDED = _counter(
    "updates_ended",
    "Updates that are no longer pending, by what became of them.",
    fate=("coalesced", "unchanged", "stale", "delivered", "dead_lettered", "quarantined"),
)
UPDATES_REFUSED = _counter(
    "updates_refused",
    "Updates that were refused after leaving their sender, and are kept.",
    way=("celery", "stream"),
)
UPDATES_EXPIRED = _counter(
    "updates_expired", "Celery messages that had expired before they were taken, and were dropped."
)
UPDATES_LOST = _gauge(
    "updates_lost",
    "Accepted updates lost from Redis, by cause: its keys were deleted or evicted, or a server failed over.",
    how=("deleted", "failover"),
)
LEDGER_IMBALANCE = _gauge(
    "ledger_imbalance", "Updates that the ledger cannot account for. 0 unless something is badly wrong."
)
USERS = _gauge(
    "users",
    "Users with something undelivered. `waiting` users are in flight, with newer values pending.",
    state=("live", "backfill", "delayed", "waiting", "in_flight"),
)
OLDEST_PENDING = _gauge(
    "oldest_pending_seconds", "Age of the oldest pending user's first update; 0 if there is none.", lane=LANES
)
DRAIN = _gauge(
    "drain_seconds",
    "Seconds until everything pending is delivered, at the rate measured over the last minute; +Inf while nothing is delivered.",
)
DEAD_LETTERS = _gauge("dead_letters", "Users given up, and kept for a person.")
REFUSED = _gauge("refused_updates", "Refused updates that are kept for a person.")
QUARANTINED = _gauge("quarantined_records", "Records that could not be read, and are kept for a person.")
STREAM = _gauge("stream_entries", "Updates in the stream, not taken yet.")
QUEUE = _gauge(
    "queue_messages", "Messages in Celery's queues, not taken yet.", queue=("updates", "deliveries")
)
SCHEDULED = _gauge("scheduled_messages", "Celery messages that wait for their time.")
IMPORTS = _gauge("unfinished_imports", "Imports that have begun and not ended.")
LINE = _gauge(
    "line_state",
    "1 for the state that the line is in, else 0.",
    state=("open", "stopped", "probing", "paused"),
)
LINE_STOPPED = _gauge("line_stopped", "1 for why the line is stopped, else 0.", kind=KINDS)
LINE_SINCE = _gauge(
    "line_since_timestamp_seconds", "When the line was stopped or paused; 0 while it is open."
)
NEXT_PROBE = _gauge("line_next_probe_timestamp_seconds", "When the next probe is due; 0 if none is.")
QUOTA = _gauge(
    "quota_calls_per_second", "Calls a second that the API allows, as configured; the lowest of the fleet's."
)
LIMIT = _gauge(
    "limit_calls_per_second", "Calls a second being tried now; below the quota while the API grants less."
)
SLOTS = _gauge(
    "slots_per_second", "Slots that the shared clock gives out a second; 0 while the line is not open."
)
CALLS_SETTLED = _counter("settled_calls", "Calls made for batches that were settled.")
THREADS_WANTED = _gauge(
    "threads_wanted",
    "Threads that the fleet needs to use the whole rate now: twice the rate times the time a batch takes; 0 while idle.",
)
THREADS = _gauge("threads", "Threads or processes of live workers' pools.", state=("busy", "idle"))
WORKERS = _gauge("workers", "Workers that were alive in the last 15 seconds.")
LEADER = _gauge(
    "leader",
    "1 if some worker leads in this role, else 0.",
    role=("dispatcher", "stream_consumer", "queue_consumer"),
)
AUDIT_USERS = _counter(
    "audit_users",
    "Users read back, by the verdict on what the API has: `skipped` were in motion, or nothing certain is remembered about them.",
    verdict=("as_delivered", "lost", "changed", "gone", "skipped"),
)
AUDIT_AT = _gauge("audit_last_timestamp_seconds", "When users were last read back; 0 = never.")
REDIS_UP = _gauge("redis_up", "1 if the exporter could reach Redis, else 0.")
REDIS_USED = _gauge("redis_memory_used_bytes", "Memory that Redis uses.")
REDIS_MAX = _gauge("redis_memory_max_bytes", "Memory that Redis may use, 0 = no limit.")
REDIS_REPLICAS = _gauge("redis_connected_replicas", "Replicas connected to the primary.")
REDIS_FAILOVERS = _counter("redis_failovers", "Times that Redis failed over, was restarted, or was emptied.")
LAST_SUCCESS = _gauge(
    "exporter_last_success_timestamp_seconds", "When the exporter last read everything; 0 = never."
)
APP_INFO = _gauge("app_info", "1. The app, as the exporter is configured.", region=(), api=("chat", "push"))

BUILD_INFO = _gauge("build_info", "1. The version that runs.", version=())

#: What the exporter serves, in the order of the docs.
FLEET = (
    UPDATES_ACCEPTED,
    UPDATES_REDRIVEN,
    UPDATES_ENDED,
    UPDATES_REFUSED,
    UPDATES_EXPIRED,
    UPDATES_LOST,
    LEDGER_IMBALANCE,
    USERS,
    OLDEST_PENDING,
    DRAIN,
    DEAD_LETTERS,
    REFUSED,
    QUARANTINED,
    STREAM,
    QUEUE,
    SCHEDULED,
    IMPORTS,
    LINE,
    LINE_STOPPED,
    LINE_SINCE,
    NEXT_PROBE,
    QUOTA,
    LIMIT,
    SLOTS,
    CALLS_SETTLED,
    THREADS_WANTED,
    THREADS,
    WORKERS,
    LEADER,
    AUDIT_USERS,
    AUDIT_AT,
    REDIS_UP,
    REDIS_USED,
    REDIS_MAX,
    REDIS_REPLICAS,
    REDIS_FAILOVERS,
    LAST_SUCCESS,
    APP_INFO,
    BUILD_INFO,
)

# A worker's own, from its health port.

CALLS = _counter(
    "calls",
    "API calls, by operation and outcome: the verdict on the code, or no answer.",
    operation=("set", "remove", "names", "get"),
    outcome=(
        "ok",
        "partial",
        "transient",
        "rate",
        "credential",
        "stop",
        "shape",
        "user",
        "unknown",
        "no_answer",
    ),
)
CALL_ERRORS = _counter(
    "call_errors",
    "API calls that failed, by error code; `none` = no answer, `other` = undocumented.",
    code=CODES,
)
CALL_DURATION = _histogram(
    "call_duration_seconds",
    "Seconds from a call's slot to the end of its answer.",
    (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10),
    operation=("set", "remove", "names", "get"),
)
BATCHES = _counter(
    "batches",
    "Batches that ended, by outcome.",
    outcome=(
        "delivered",
        "partly_delivered",
        "retried",
        "snoozed",
        "dead_lettered",
        "handed_back",
        "rate_limited",
        "signature_renewed",
        "stopped",
        "fenced",
        "failed",
    ),
)
BATCH_USERS = _histogram("batch_users", "Users in a batch.", (1, 10, 25, 50, 75, 90, 99, 100))
DELIVERY_DELAY = _histogram(
    "delivery_delay_seconds",
    "Seconds from a user's first undelivered update to its delivery: the basis of the service level.",
    (0.1, 0.25, 0.5, 1, 2, 5, 15, 60, 300, 1800, 7200),
    lane=LANES,
)
PERMIT_WAIT = _histogram(
    "permit_wait_seconds", "Seconds from asking for a permit to its slot.", (0.01, 0.05, 0.1, 0.2, 0.5, 1, 2)
)
PERMITS = _counter(
    "permits",
    "Permits, by what became of them: `late` = the slot was missed, `none` = no slot was free within patience, "
    "`empty` = nothing was left to send.",
    result=("used", "late", "none", "empty"),
)
DEAD_LETTERED = _counter("dead_lettered", "Users given up, by error code.", code=CODES)
LINE_STOPS = _counter(
    "line_stops", "Times that this worker stopped the line, by reason.", kind=KINDS, code=CODES
)
LEASES_LOST = _counter("leases_lost", "Batches whose lease ran out before this worker had settled them.")
LEASES_RECLAIMED = _counter(
    "leases_reclaimed", "Expired leases of other workers whose users this worker took back."
)
LEADS = _gauge("leads", "1 if this worker leads in this role, else 0.", role=("dispatcher",))
TURN = _gauge(
    "dispatcher_last_turn_timestamp_seconds",
    "When this worker's dispatcher last took a turn, leading or not.",
)

#: What each worker serves, in the order of the docs.
WORKER = (
    CALLS,
    CALL_ERRORS,
    CALL_DURATION,
    BATCHES,
    BATCH_USERS,
    DELIVERY_DELAY,
    PERMIT_WAIT,
    PERMITS,
    DEAD_LETTERED,
    LINE_STOPS,
    LEASES_LOST,
    LEASES_RECLAIMED,
    LEADS,
    TURN,
    BUILD_INFO,
)
