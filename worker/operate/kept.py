"""What lists of dead letters and refused updates show: never their values."""

from __future__ import annotations

from typing import Any

from worker.operate.status import iso
from worker.state.dead_letters import Letter
from worker.state.refused import RefusedUpdate


def letter_facts(letter: Letter) -> dict[str, Any]:
    """A dead letter without its values."""
    return {
        "user": letter.user,
        "code": letter.code,
        "message": letter.message,
        "attempts": letter.attempts,
        "first_update": iso(letter.since_ms / 1000),
        "dead_since": iso(letter.at_ms / 1000),
        "attributes": sorted(letter.values),
    }


def refused_facts(kept: RefusedUpdate) -> dict[str, str | None]:
    """A refused update without its content."""
    return {
        "id": kept.id,
        "refused_at": iso(kept.at_ms / 1000),
        "source": kept.source,
        "user": kept.user,
        "rule": kept.rule,
    }
