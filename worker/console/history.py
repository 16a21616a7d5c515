"""The history: what happened, and who did it."""

from __future__ import annotations

import re

from starlette.responses import Response

from worker.console.asked import Asked, BadRequest, Page
from worker.state.history import History

#: Events on a page.
SHOWN = 100
#: The kinds to choose from. Those of other versions are shown, too.
KINDS = (
    *("stopped", "probe", "probe_failed", "reopened", "paused", "resumed", "limit", "failover", "reclaimed"),
    *("redriven", "purged", "refused_purged", "quarantine_dropped", "values_shown", "exported"),
    *("import_began", "import_paused", "import_resumed", "import_ended", "applied", "audit"),
)


def show(asked: Asked) -> Response:
    event, before = asked.given("event"), asked.given("before")
    if event and not re.fullmatch(r"\w{1,40}", event):
        raise BadRequest("event must be one word")
    if before and not re.fullmatch(r"[0-9]{1,18}-[0-9]{1,18}", before):
        raise BadRequest("before must be the id of an event")
    history = History(asked.shared.redis, asked.shared.keys)
    found = history.newest(SHOWN + 1, event=event or None, before=before or None)
    return asked.page(
        "history.html",
        events=found[:SHOWN],
        more=found[SHOWN - 1].id if len(found) > SHOWN else None,
        kinds=KINDS,
        event=event,
        before=before,
    )


PAGES = (Page("/history", show),)
