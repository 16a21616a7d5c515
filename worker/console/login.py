"""Logging in and out, and the choice between dark and light, which needs neither."""

from __future__ import annotations

from starlette.responses import Response

from worker.console.asked import SESSION, THEME, Asked, BadRequest, Page, local
from worker.console.door import Door, TurnedAway

#: Characters that may be typed into a field.
MOST = 1000


def pages(door: Door) -> tuple[Page, ...]:
    """The pages; without accounts there is nothing to log in to."""

    def show(asked: Asked) -> Response:
        if asked.identity or not door.has_login:
            return asked.back_to("/")
        return asked.page("login.html", next=local(asked.given("next"), "/"), wrong=False)

    def log_in(asked: Asked) -> Response:
        if not door.has_login:
            return asked.back_to("/")
        # A password is taken as it is, spaces and all.
        name, password = asked.given("name"), asked.form.get("password", "")
        if len(name) > MOST or len(password) > MOST:
            raise BadRequest(f"a name or a password may have at most {MOST} characters")
        then = local(asked.given("next"), "/")
        secret = door.log_in(name, password, asked.caller)
        if secret is None:
            return asked.page("login.html", 401, next=then, wrong=True)
        asked.cookies[SESSION] = secret
        return asked.back_to(then)

    def log_out(asked: Asked) -> Response:
        if asked.identity is None or asked.identity.by != "session":
            raise TurnedAway(400, "There is no session to end.")
        door.log_out(asked.identity)
        asked.cookies[SESSION] = None
        return asked.back_to("/login")

    def theme(asked: Asked) -> Response:
        wanted = asked.given("theme")
        if wanted not in ("light", "dark", "auto"):
            raise BadRequest("theme must be light, dark or auto")
        asked.cookies[THEME] = None if wanted == "auto" else wanted
        return asked.back_to(local(asked.given("back"), "/"))

    return (
        Page("/login", show, None),
        Page("/login", log_in, None, "POST"),
        Page("/logout", log_out, None, "POST"),
        Page("/theme", theme, None, "POST"),
    )
