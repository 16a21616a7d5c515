"""Pause and resume: whether anything is sent."""

from __future__ import annotations

from starlette.responses import Response

from worker.console.asked import Asked, BadRequest, Page
from worker.state.line import Line

#: Characters of a reason.
MOST = 200


def read_reason(asked: Asked) -> str:
    """Return the reason for a pause; raises `BadRequest`."""
    reason = " ".join(asked.given("reason").split())
    if not 1 <= len(reason) <= MOST:
        raise BadRequest(f"the reason must have 1 to {MOST} characters, has {len(reason)}")
    return reason


def pause(asked: Asked) -> Response:
    line = Line(asked.shared.redis, asked.shared.keys)
    paused = line.pause(read_reason(asked), by=asked.actor)
    return asked.done("/", "paused" if paused else "paused_already")


def resume(asked: Asked) -> Response:
    resumed = Line(asked.shared.redis, asked.shared.keys).resume(by=asked.actor)
    return asked.done("/", "resumed" if resumed else "open_already")


PAGES = (Page("/line/pause", pause, "operator", "POST"), Page("/line/resume", resume, "operator", "POST"))
