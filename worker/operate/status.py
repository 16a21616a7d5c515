"""The state of an app in one dictionary: what `imattr status` shows and `--json` prints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from worker.config import Settings
from worker.ratelimit import SPACING, RateState, read_rate
from worker.state.buffer import Buffer
from worker.state.connection import Redis
from worker.state.intake import read_intake
from worker.state.keys import Keys
from worker.state.line import Line, LineState

#: Who has to act on each kind of stop.
_ADVICE = {
    "error": "It opens by itself once the cause is fixed; imattr doctor helps to find it.",
    "outage": "It opens by itself when the service has recovered.",
    "data": "Check imattr dead list and what producers send; imattr resume allows it.",
}


def read(redis: Redis, settings: Settings) -> dict[str, Any]:
    """Count everything at one instant. Times are ISO 8601 in UTC, durations and ages seconds."""
    keys = Keys(settings.sdkappid)
    snapshot = Buffer(redis, keys).snapshot()
    seconds, micros = redis.time()
    now = seconds + micros / 1e6
    rate = read_rate(redis, keys)
    line = _line(Line(redis, keys).read(), rate, now)
    # The lowest quota that any process has named rules.
    quota = min([settings.quota, *rate.quotas])
    limit = min(rate.limit or quota, quota)
    apart = max(rate.apart, SPACING / limit)
    current = round(1 / apart, 1) if line.state == "open" else 0.0
    users = snapshot.pending + snapshot.in_flight
    eta = users / (current * settings.batch_size) if current else None
    return {
        "line": {
            "state": line.state,
            "reason": line.reason,
            "code": line.code,
            "since": iso(line.since),
            "next_probe": iso(line.next_probe),
            "kind": line.kind,
            "failed_probes": line.failed_probes,
            "words": _words(line, limit, quota, now),
        },
        "pending": {
            "live": snapshot.live,
            "backfill": snapshot.backfill,
            "delayed": snapshot.delayed,
            "waiting": snapshot.waiting,
            "oldest_age_s": None if snapshot.oldest_age is None else round(snapshot.oldest_age, 3),
        },
        "in_flight": snapshot.in_flight,
        "dead": snapshot.dead,
        "quarantine": snapshot.quarantine,
        "rate": {"quota": quota, "limit": limit, "current": current},
        "intake": read_intake(redis, keys),
        "redis": {"servers": snapshot.servers, "updates_lost": snapshot.lost_with_servers},
        "ledger": {**snapshot.ledger, "balanced": snapshot.balanced},
        "eta_s": None if eta is None else round(eta, 1),
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
    since = f"{_span(now - line.since)} ago" if line.since else ""
    code = f" ({line.code})" if line.code else ""
    until = f", until in {_span(line.next_probe - now)}" if line.next_probe else ""
    if line.state == "paused":
        by = "" if line.next_probe else " Run imattr resume to send again."
        return f"paused {since}{until}: {line.reason}{code}.{by}"
    failed = f", {line.failed_probes} have failed" if line.failed_probes else ""
    probe = (
        "A probe is out"
        if line.state == "probing"
        else f"Next probe in {_span((line.next_probe or now) - now)}"
    )
    what = (
        "by an outage" if line.kind == "outage" else "by the data" if line.kind == "data" else "by an error"
    )
    advice = _ADVICE.get(line.kind or "", "")
    return f"stopped {what} {since}: {line.reason}{code}. {probe}{failed}. Nothing is lost. {advice}"


def _span(seconds: float) -> str:
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
