"""The state of the product in one dictionary: what `imattr status` shows and `--json` prints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import redis

from worker.buffer import Buffer
from worker.config import Settings
from worker.keys import Keys
from worker.line import Line, LineState
from worker.ratelimit import SPACING
from worker.scripts import text


def read(client: redis.Redis, settings: Settings) -> dict[str, Any]:
    """Count everything at one instant. Times are ISO 8601 in UTC, durations and ages seconds."""
    keys = Keys(settings.sdkappid)
    snapshot = Buffer(client, keys).snapshot()
    line = _line(client, keys)
    current = round(settings.quota / SPACING, 1) if line["state"] == "open" else 0.0
    users = snapshot.pending + snapshot.in_flight
    eta = users / (current * settings.batch_size) if current else None
    return {
        "line": line,
        "pending": {
            "live": snapshot.live,
            "backfill": snapshot.backfill,
            "delayed": snapshot.delayed,
            "waiting": snapshot.waiting,
            "oldest_age_s": None if snapshot.oldest_age is None else round(snapshot.oldest_age, 3),
        },
        "in_flight": snapshot.in_flight,
        "dead": snapshot.dead,
        "rate": {"quota": settings.quota, "current": current},
        "ledger": {**snapshot.ledger, "balanced": snapshot.balanced},
        "eta_s": None if eta is None else round(eta, 1),
    }


def _line(client: redis.Redis, keys: Keys) -> dict[str, Any]:
    """The delivery side: the line's own state, or a pause that the API's rate limit asked for."""
    line = Line(client, keys).read()
    if line.state == "open":
        line = _rate_pause(client, keys)
    return {
        "state": line.state,
        "reason": line.reason,
        "code": line.code,
        "since": iso(line.since),
        "next_probe": iso(line.next_probe),
    }


def _rate_pause(client: redis.Redis, keys: Keys) -> LineState:
    seconds, micros = client.time()
    fields = ("paused_at", "paused_until", "reason", "code")
    paused_at, paused_until, reason, code = client.hmget(keys.rate, fields)
    now = seconds + micros / 1e6
    since, until = int(paused_at or 0) / 1e6, int(paused_until or 0) / 1e6
    if not since <= now < until:
        return LineState()
    return LineState("paused", text(reason or b""), int(code) if code else None, since, until)


def iso(moment: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
