"""The overview: what needs a person, the line, what is done and what is left."""

from __future__ import annotations

from typing import Any

from starlette.responses import HTMLResponse, JSONResponse, Response

from worker.console.asked import Asked, Page
from worker.console.charts import Chart
from worker.console.curves import WINDOWS, Window
from worker.console.sight import Sight
from worker.readback import certainty
from worker.state.keys import LEDGER

#: The page with more about a problem, by the check that found it.
_PAGES = {
    "dead letters": "/dead",
    "refused": "/refused",
    "import": "/imports",
    "settings": "/settings",
    "quota": "/settings",
    "version": "/settings",
    "line": "/history?event=stopped",
    "redis failover": "/history?event=failover",
}


def show(asked: Asked) -> Response:
    """The whole page. `live` answers with its main part, too."""
    return asked.page("overview.html", flash=asked.flash(), **_about(asked))


def live(asked: Asked) -> Response:
    """The parts that change by themselves, for the script that refreshes them."""
    return HTMLResponse(asked.html("live.html", **_about(asked)))


def as_json(asked: Asked) -> Response:
    """What `imattr status --json` prints."""
    return JSONResponse(asked.shared.look.now().state)


def _about(asked: Asked) -> dict[str, Any]:
    sight = asked.shared.look.now()
    window = WINDOWS.get(asked.given("window"), WINDOWS["15min"])
    return {
        "state": sight.state,
        "problems": [(one, _PAGES.get(one.check)) for one in sight.problems],
        "charts": _charts(asked, sight, window),
        "windows": WINDOWS.values(),
        "window": window,
        "audit": sight.audit,
        "certainty": certainty.in_words(sight.audit.wrong, sight.audit.checked) if sight.audit else "",
        "ledger": [(name, sight.state["ledger"][name]) for name in LEDGER],
    }


def _charts(asked: Asked, sight: Sight, window: Window) -> list[Chart]:
    found = asked.shared.samples.curves(window, sight.now)
    given = {"end": found.end, "part": float(window.part)}
    return [
        Chart(
            "calls",
            "Calls a second",
            found.calls,
            unit="calls/s",
            limit=sight.state["rate"]["quota"],
            **given,
        ),
        Chart("users", "Users a second", found.users, unit="users/s", **given),
        Chart("left", "Backlog", found.left, unit="users", **given),
        Chart("oldest", "Age of the oldest", found.oldest, unit="", **given),
    ]


PAGES = (Page("/", show), Page("/live", live), Page("/status.json", as_json))
