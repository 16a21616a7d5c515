"""Imports under way: their progress, the last refused lines, pause and resume."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from worker.console.asked import Asked, BadRequest, Page
from worker.console.line import read_reason
from worker.state.import_pauses import ImportPauses
from worker.state.scripts import text


def show(asked: Asked) -> Response:
    state = asked.shared.look.now().state
    refusals = _refusals(asked)
    found = [(one, refusals.get(one["name"], [])) for one in state["imports"]]
    return asked.page("imports.html", flash=asked.flash(), imports=found)


def _refusals(asked: Asked) -> dict[str, list[Any]]:
    """The last refused lines of each import: line, user, rule."""
    found = {}
    for name, packed in asked.shared.redis.hgetall(asked.shared.keys.import_progress).items():
        try:
            lines = json.loads(packed).get("refusals", [])
            found[text(name)] = [(str(line), str(user), str(rule)) for line, user, rule in lines]
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _name(asked: Asked) -> str:
    # As it is stored: spaces at either end belong to it.
    name = asked.form.get("name", "")
    if not name:
        raise BadRequest("name must say which import")
    return name


def pause(asked: Asked) -> Response:
    pauses = ImportPauses(asked.shared.redis, asked.shared.keys)
    paused = pauses.pause(_name(asked), read_reason(asked), by=asked.actor)
    return asked.done("/imports", "import_paused" if paused else "import_gone")


def resume(asked: Asked) -> Response:
    resumed = ImportPauses(asked.shared.redis, asked.shared.keys).resume(_name(asked), by=asked.actor)
    return asked.done("/imports", "import_resumed" if resumed else "import_gone")


PAGES = (
    Page("/imports", show),
    Page("/imports/pause", pause, "operator", "POST"),
    Page("/imports/resume", resume, "operator", "POST"),
)
