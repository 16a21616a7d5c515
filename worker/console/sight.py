"""What the overview shows: the state, what needs a person, the samples, and what the last audit found."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.config import Settings
from worker.console.curves import Remembered
from worker.operate import status
from worker.operate.doctor import Finding
from worker.operate.problems import problems
from worker.state.audit import AuditLog, AuditTotals
from worker.state.connection import Redis
from worker.state.keys import Keys


@dataclass(frozen=True, slots=True)
class Sight:
    """The fleet as it was at `now`, in seconds since 1970 on Redis' clock. `state` is what `status.read` returns."""

    now: float
    state: dict[str, Any]
    problems: list[Finding]
    audit: AuditTotals | None


def see(redis: Redis, settings: Settings, samples: Remembered) -> Sight:
    """Read everything once."""
    state = status.read(redis, settings)
    now = datetime.fromisoformat(state["at"]).timestamp()
    samples.look(now)
    return Sight(now, state, problems(redis, settings, state), _audit(redis, settings))


def _audit(redis: Redis, settings: Settings) -> AuditTotals | None:
    """What audits have found so far, if there were any."""
    totals = AuditLog(redis, Keys(settings.sdkappid)).read()
    return totals if totals.checked else None
