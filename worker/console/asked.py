"""What a page is given: who asks, for what, and the means to answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from worker.config import Settings
from worker.console.accounts import Role
from worker.console.caller import Caller, cookie_name
from worker.console.curves import Remembered
from worker.console.door import Identity
from worker.console.look import Look
from worker.console.render import render
from worker.console.sight import Sight
from worker.operate.words import age, json_text
from worker.state.connection import Redis
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.scripts import pages

#: A path of ours: it names no other host, and has no second line.
_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]*")
#: The cookies: for a session, for a visitor without one, for dark or light, and for what the previous page did, with its
#: numbers.
SESSION, VISITOR, THEME, FLASH = "session", "visitor", "theme", "flash"

#: Lines of a download that are sent together.
LINES = 500

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Shared:
    """What all pages have in common."""

    settings: Settings
    redis: Redis
    keys: Keys
    samples: Remembered
    look: Look[Sight]


class BadRequest(Exception):
    """Raised when a request breaks a rule; says which field, and which rule."""


@dataclass(slots=True)
class Asked:
    """A request from somebody who may make it."""

    request: Request
    shared: Shared
    caller: Caller
    identity: Identity | None
    #: The token that a form must send back.
    token: str
    form: Mapping[str, str]
    #: Cookies to set with the answer: name -> value, or None to delete it.
    cookies: dict[str, str | None] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return self.shared.settings.console_prefix

    def cookie(self, what: str) -> str | None:
        """The content of one of our cookies."""
        return self.caller.cookies.get(cookie_name(what, self.shared.settings.sdkappid, self.caller))

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query_params

    @property
    def actor(self) -> str:
        return self.identity.actor if self.identity else "nobody@console"

    @property
    def wants_json(self) -> bool:
        return "application/json" in self.request.headers.get("accept", "")

    def given(self, name: str) -> str:
        """The content of a field in the form or the query; empty if it is missing."""
        return (self.form or self.query).get(name, "").strip()

    def number(self, name: str, most: int = 10**15) -> int | None:
        """A whole number in a field, None if it is empty; raises `BadRequest`."""
        given = self.given(name)
        if not given:
            return None
        if not re.fullmatch(r"-?[0-9]{1,16}", given) or int(given) > most:
            raise BadRequest(f"{name} must be a whole number")
        return int(given)

    def age(self, name: str) -> int | None:
        """An age such as 90m in a field, in seconds, None if it is empty; raises `BadRequest`."""
        try:
            return age(self.given(name)) if self.given(name) else None
        except ValueError as rule:
            raise BadRequest(f"{name} {rule}") from None

    # Answers.

    def page(self, template: str, status: int = 200, **context: Any) -> Response:
        return HTMLResponse(self.html(template, **context), status)

    def html(self, template: str, **context: Any) -> str:
        """The text of a page."""
        about = {
            "me": self.identity,
            "app": self.shared.settings.sdkappid,
            "at": self.prefix,
            "token": self.token,
            "theme": self.theme,
            "here": self.request.url.path,
            "here_again": local(f"{self.request.url.path}?{self.request.url.query}".rstrip("?"), "/"),
            "flash": None,
        }
        return render(template, about | context)

    @property
    def theme(self) -> str:
        found = self.cookie(THEME)
        return found if found and found in ("light", "dark") else ""

    def back_to(self, path: str) -> Response:
        """Show another page of ours."""
        return RedirectResponse(self.prefix + path, 303)

    def note(self, event: str, **details: object) -> None:
        """Record in the history what leaves no other trace there: that somebody saw values, or exported them."""
        History(self.shared.redis, self.shared.keys).note(event, self.actor, **details)
        log.info("acted", action=event, by=self.actor)

    def done(self, path: str, what: str, *numbers: int) -> Response:
        """Show another page of ours, which says what was done; tell a program in JSON."""
        self.shared.look.forget()
        log.info("acted", action=what, by=self.actor, numbers=list(numbers))
        if self.wants_json:
            return JSONResponse({"done": what, "numbers": list(numbers)})
        self.cookies[FLASH] = ".".join([what, *map(str, numbers)])
        return self.back_to(path)

    def flash(self) -> tuple[str, list[int]] | None:
        """What the previous page did, once."""
        found = self.cookie(FLASH)
        if found is None:
            return None
        self.cookies[FLASH] = None
        what, *numbers = found.split(".")
        if not re.fullmatch(r"[a-z_]{1,40}", what) or not all(
            re.fullmatch("[0-9]{1,12}", one) for one in numbers
        ):
            return None
        return what, [int(one) for one in numbers]

    def download(self, name: str, values: Iterable[object]) -> Response:
        """JSON lines, as a file."""
        # Many lines at a time: each part costs a switch of threads.
        found = (
            "".join(f"{json_text(value)}\n" for value in page).encode(errors="replace")
            for page in pages(values, LINES)
        )
        # An immediate failure comes before the file has begun.
        lines = chain([next(found, b"")], found)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)


def local(path: str, otherwise: str) -> str:
    """Return a path to go back to, as a client sent it; `otherwise` if it could lead elsewhere."""
    return path if _LOCAL.fullmatch(path) else otherwise


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its path, who may see it (None = everybody), and the function that answers."""

    path: str
    answer: Callable[[Asked], Response]
    needs: Role | None = "viewer"
    method: str = "GET"
