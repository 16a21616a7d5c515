"""The settings in force among the workers, and where they disagree."""

from __future__ import annotations

from starlette.responses import Response

from worker.console.asked import Asked, Page
from worker.operate.settings_in_force import in_force
from worker.ratelimit import read_rate
from worker.state.fleet import Fleet


def show(asked: Asked) -> Response:
    redis, keys = asked.shared.redis, asked.shared.keys
    workers = Fleet(redis, keys).workers()
    found = sorted(in_force(workers), key=lambda one: not one.disagree)
    return asked.page(
        "settings.html",
        workers=workers,
        settings=found,
        quotas=sorted(set(read_rate(redis, keys).quotas)),
        rate=asked.shared.look.now().state["rate"],
    )


PAGES = (Page("/settings", show),)
