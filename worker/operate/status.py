"""The state of an app in one dictionary: what `imattr status` shows and `--json` prints, and the exporter serves.

What is permitted is not what is done: `rate` is what the shared clock gives out, `measured` what was done.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from worker.config import Settings
from worker.ratelimit import SPACING, RateState, read_rate
from worker.state.audit import COUNTED, AuditLog, AuditTotals
from worker.state.buffer import Buffer
from worker.state.connection import Redis, RedisError, connect
from worker.state.fleet import EVERY, Fleet, Pace, Sample, pace
from worker.state.history import Event, History
from worker.state.import_pauses import ImportPauses
from worker.state.intake import PRIORITIES, queue_length, read_intake
from worker.state.keys import Keys
from worker.state.leader import current_leader
from worker.state.line import Line, LineState
from worker.state.refused import Refused
from worker.state.scripts import text

#: Who has to act on each kind of stop.
_ADVICE = {
    "error": "It opens by itself once the cause is fixed; imattr doctor helps to find it.",
    "outage": "It opens by itself when the service has recovered.",
    "data": "Check imattr dead list and what producers send; imattr resume allows it.",
}

#: Seconds over which the pace is measured.
WINDOWS = {"10s": 10.0, "1min": 60.0, "15min": 900.0}
#: Points of the curves over the longest window.
POINTS = 50
#: How many of the last stops are shown, and among how many events they are searched for.
STOPS, EVENTS = 3, 100
#: Celery's queue of updates, and the seconds in which its broker must say how long it is.
QUEUE, BROKER_PATIENCE = "updates", 1.0
#: Seconds that a batch takes besides its call, and that a call takes if none was made lately.
BESIDE_A_CALL, USUAL_CALL = 0.02, 0.1


def read(redis: Redis, settings: Settings) -> dict[str, Any]:
    """Read everything. Times are ISO 8601 in UTC; durations and ages are in seconds.

    The lanes and the ledger are of one instant, the rest is of the moments after it.
    """
    keys = Keys(settings.sdkappid)
    snapshot = Buffer(redis, keys).snapshot()
    seconds, micros = redis.time()
    now = seconds + micros / 1e6
    rate = read_rate(redis, keys)
    line = _line(Line(redis, keys).read(), rate, now)
    # The lowest quota that any process has named applies.
    quota = min([settings.quota, *rate.quotas])
    limit = min(rate.limit or quota, quota)
    current = round(1 / max(rate.apart, SPACING / limit), 1) if line.state == "open" else 0.0
    return {
        "at": iso(now),
        "line": {
            "state": line.state,
            "reason": line.reason,
            "code": line.code,
            "since": iso(line.since),
            "next_probe": iso(line.next_probe),
            "kind": line.kind,
            "failed_probes": line.failed_probes,
            "by": line.by,
            "words": _words(line, limit, quota, now),
        },
        "pending": {
            "live": snapshot.live,
            "backfill": snapshot.backfill,
            "delayed": snapshot.delayed,
            "waiting": snapshot.waiting,
            "oldest_age_s": None if snapshot.oldest_age is None else round(snapshot.oldest_age, 3),
            "oldest_s": {
                lane: None if age is None else round(age, 3) for lane, age in snapshot.oldest.items()
            },
        },
        "in_flight": snapshot.in_flight,
        "dead": snapshot.dead,
        "quarantine": snapshot.quarantine,
        "refused": Refused(redis, keys).count(),
        "rate": {"quota": quota, "limit": limit, "current": current},
        **_pace(Fleet(redis, keys), snapshot.pending + snapshot.in_flight, current, now),
        "leaders": {role: current_leader(redis, key) for role, key in _roles(keys).items()},
        "tickets": redis.zcard(keys.tickets),
        **_ways_in(redis, settings, snapshot.ledger["accepted"]),
        "imports": _imports(redis, keys, now),
        "stops": [_stop(event) for event in _last_stops(History(redis, keys).newest(EVENTS))],
        "audit": _audit(AuditLog(redis, keys).read()),
        "redis": {"servers": snapshot.servers, "updates_lost": snapshot.lost_with_servers},
        "calls": snapshot.calls,
        "ledger": {**snapshot.ledger, "imbalance": snapshot.imbalance, "balanced": snapshot.balanced},
    }


def _pace(fleet: Fleet, users: int, rate: float, now: float) -> dict[str, Any]:
    """The fleet's pace, and when it will have delivered that many users, if anything may be sent at all."""
    samples = _up_to_now(fleet.samples(round(max(WINDOWS.values()) / EVERY) + 2), now)
    lately = pace(samples, WINDOWS["1min"])
    # While nothing may be sent, the last minute's pace says nothing about the next.
    eta = users / lately.users if lately and lately.users and rate else None
    return {
        "measured": {name: _measured(pace(samples, seconds)) for name, seconds in WINDOWS.items()},
        "series": _series(samples),
        "threads_wanted": _threads_wanted(rate, lately) if users else 0,
        "workers": [dataclasses.asdict(worker) for worker in fleet.workers()],
        "eta_s": 0.0 if not users else None if eta is None else round(eta, 1),
    }


def _ways_in(redis: Redis, settings: Settings, accepted: int) -> dict[str, Any]:
    """What came in by which way, and what is waiting to be taken."""
    intake = read_intake(redis, Keys(settings.sdkappid))
    waiting = _queued(redis, settings)
    # Producers of the previous version do not say how their updates came.
    ways: dict[str, int] = dict(intake.ways) | {"other": max(0, accepted - sum(intake.ways.values()))}
    return {
        # Otherwise its consumer's last count, which is old if there is no consumer.
        "intake": {**intake.queue, "waiting": intake.queue["waiting"] if waiting is None else waiting},
        "ways": {"accepted": ways, "refused": intake.refused},
        "stream": intake.stream,
    }


def _queued(redis: Redis, settings: Settings) -> int | None:
    """How many messages are in Celery's queue of updates; None if the broker is not Redis, or does not say."""
    place, lists = settings.broker, [settings.celery_prefix + QUEUE + priority for priority in PRIORITIES]
    if place is None:
        return None
    try:
        if place == settings.redis:
            return queue_length(redis, lists)
        with connect(place, key=lists[0], timeout=BROKER_PATIENCE, connect_timeout=BROKER_PATIENCE) as broker:
            return queue_length(broker, lists)
    except RedisError:
        return None


def _roles(keys: Keys) -> dict[str, str]:
    return {
        "dispatcher": keys.dispatcher,
        "stream_consumer": keys.consumer,
        "queue_consumer": keys.queue_consumer,
    }


def _up_to_now(samples: list[Sample], now: float) -> list[Sample]:
    """The samples, unless they are old: while no worker runs, none are taken and nothing is delivered."""
    return samples if samples and now - samples[-1].at < 3 * EVERY else []


def _measured(found: Pace | None) -> dict[str, float | None]:
    if found is None:
        return {"calls_per_s": None, "users_per_s": None, "call_s": None}
    call = None if found.call is None else round(found.call, 3)
    return {"calls_per_s": round(found.calls, 1), "users_per_s": round(found.users, 1), "call_s": call}


def _series(samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Calls a second and users left, in `POINTS` equal parts of the longest window, the newest last; None where unknown."""
    calls: list[float | None] = [None] * POINTS
    left: list[float | None] = [None] * POINTS
    width = max(WINDOWS.values()) / POINTS
    for before, sample in pairwise(samples):
        place = POINTS - 1 - int((samples[-1].at - sample.at) / width)
        found = pace([before, sample], math.inf)
        if place >= 0 and found:
            calls[place] = max(round(found.calls, 1), calls[place] or 0.0)
            left[place] = max(float(sample.pending + sample.in_flight), left[place] or 0.0)
    return {"calls_per_s": calls, "users_left": left}


def _threads_wanted(rate: float, lately: Pace | None) -> int:
    """Threads for the whole rate by Little's law, doubled because half of them wait for their slots."""
    call = USUAL_CALL if lately is None or lately.call is None else lately.call
    return math.ceil(2 * rate * (call + BESIDE_A_CALL))


def _imports(redis: Redis, keys: Keys, now: float) -> list[dict[str, Any]]:
    """The unfinished imports, with the progress that they last reported."""
    found: Any = redis.zrange(keys.imports, 0, -1, withscores=True)
    seen = redis.hgetall(keys.import_progress)
    pauses = ImportPauses(redis, keys).everyone() if found else {}
    imports = []
    for name, as_of_ms in found:
        try:
            about = json.loads(seen.get(name, b"{}"))
            at, share, eta = about.get("at"), about.get("share"), about.get("eta")
            numbers = {"seen_s": now - at if at else None, "share": share, "eta_s": eta}
            rounded = {key: None if value is None else round(value, 3) for key, value in numbers.items()}
            told = {name: about.get(name) for name in ("state", "lines", "refused")} | rounded
        except (ValueError, TypeError, AttributeError):
            told = {}
        pause = pauses.get(text(name))
        paused = pause and {"by": pause.by, "reason": pause.reason, "since": iso(pause.at)}
        imports.append({"name": text(name), "as_of": iso(as_of_ms / 1000), **told, "paused": paused})
    return imports


def _audit(totals: AuditTotals) -> dict[str, Any]:
    """What all audits have found so far."""
    return {
        "checked": totals.checked,
        **{name: getattr(totals, name) for name in COUNTED},
        "since": iso(totals.since),
        "at": iso(totals.at),
    }


def _last_stops(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.event == "stopped"][:STOPS]


def _stop(event: Event) -> dict[str, Any]:
    code = event.details.get("code", "0")
    return {
        "at": iso(event.at_ms / 1000),
        "kind": event.details.get("kind"),
        "code": int(code) if code.lstrip("-").isdecimal() and code != "0" else None,
        "reason": event.details.get("reason"),
    }


def _line(state: LineState, rate: RateState, now: float) -> LineState:
    """The line's own state, or a pause that the API's rate limit asked for."""
    if state.state != "open" or not rate.paused_at <= now < rate.paused_until:
        return state
    return LineState("paused", rate.reason, rate.code, rate.paused_at, rate.paused_until)


def _words(line: LineState, limit: int, quota: int, now: float) -> str:
    """The line's state in a sentence."""
    if line.state == "open":
        return (
            "open"
            if limit == quota
            else f"open, at {limit} of {quota} calls/s, climbing to what the API grants"
        )
    since = f"{span(now - line.since)} ago" if line.since else ""
    code = f" ({line.code})" if line.code else ""
    until = f", until in {span(line.next_probe - now)}" if line.next_probe else ""
    if line.state == "paused":
        to_do = "" if line.next_probe else " Run imattr resume to send again."
        by = f" by {line.by}" if line.by else ""
        return f"paused{by} {since}{until}: {line.reason}{code}.{to_do}"
    failed = f", {line.failed_probes} have failed" if line.failed_probes else ""
    probe = (
        "A probe is out"
        if line.state == "probing"
        else f"Next probe in {span((line.next_probe or now) - now)}"
    )
    what = (
        "by an outage" if line.kind == "outage" else "by the data" if line.kind == "data" else "by an error"
    )
    advice = _ADVICE.get(line.kind or "", "")
    return f"stopped {what} {since}: {line.reason}{code}. {probe}{failed}. Nothing is lost. {advice}"


def span(seconds: float) -> str:
    """A duration in a suitable unit."""
    seconds = max(0.0, seconds)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def iso(moment: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
