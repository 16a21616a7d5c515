"""The console as an ASGI application: every request passes through here.

Checked in this order: its size, where it comes from, who sent it, whether they may, whether a form is one of ours; then the
page answers. Every failure has a page of its own. Pages are plain functions, which run in threads because they ask Redis.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlencode

import structlog
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from worker.clock import Clock, SystemClock
from worker.config import Settings
from worker.console import (
    dead_letters,
    history,
    imports,
    line,
    login,
    overview,
    refused_updates,
    settings_page,
    user,
)
from worker.console.accounts import Accounts
from worker.console.asked import SESSION, THEME, VISITOR, Asked, BadRequest, Page, Shared, local
from worker.console.caller import cookie_name, is_from_our_page, read_caller
from worker.console.curves import Remembered
from worker.console.door import Door, Identity, TurnedAway, check_settings
from worker.console.headers import SafeHeaders
from worker.console.look import Look
from worker.console.render import MARK, STATIC, static
from worker.console.sessions import LASTS, FormTokens, Sessions, new_visitor
from worker.console.sight import see
from worker.state.connection import Redis, RedisError
from worker.state.fleet import Fleet
from worker.state.keys import Keys

#: Bytes of a form, its fields, and seconds in which it must arrive.
MOST_BYTES, MOST_FIELDS, ARRIVES_IN = 65_536, 50, 10.0

log = structlog.get_logger()


def build_app(settings: Settings, redis: Redis, clock: Clock | None = None) -> ASGIApp:
    """The console; raises `ConfigError`."""
    check_settings(settings)
    clock = clock or SystemClock()
    keys = Keys(settings.sdkappid)
    path = settings.console_accounts_file
    accounts = Accounts(path, clock) if path else None
    samples = Remembered(Fleet(redis, keys))
    look = Look(lambda: see(redis, settings, samples), clock)
    sessions = Sessions(redis, keys)
    door = Door(settings, sessions, accounts, clock)
    reception = _Reception(Shared(settings, redis, keys, samples, look), door, FormTokens(redis, keys))
    pages = [
        *overview.PAGES,
        *line.PAGES,
        *dead_letters.PAGES,
        *refused_updates.PAGES,
        *user.PAGES,
        *imports.PAGES,
        *history.PAGES,
        *settings_page.PAGES,
        *login.pages(door),
    ]
    routes = [Route(path, endpoint) for path, endpoint in reception.endpoints(pages).items()]
    routes = [Route("/healthz", _healthy), *(_static(name) for name in STATIC), *routes]
    app = Starlette(routes=routes, exception_handlers={404: reception.not_found, 405: reception.not_found})
    # A path with one slash too many is not found, rather than redirected to a host that the caller names.
    app.router.redirect_slashes = False
    return SafeHeaders(_Prefix(app, settings.console_prefix))


async def _healthy(_: Request) -> Response:
    """Alive. Redis may be away: restarting the console would not help."""
    return JSONResponse({"healthy": True})


def _static(name: str) -> Route:
    body, kind = static(name), STATIC[name]

    async def answer(request: Request) -> Response:
        kept = "public, max-age=31536000, immutable" if request.url.query == MARK else "no-cache"
        return Response(body, media_type=kind, headers={"Cache-Control": kept})

    return Route(f"/static/{name}", answer)


class _Prefix:
    """Removes the prefix from the path, unless the proxy has done so already."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, prefix = scope.get("path", ""), self._prefix
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            path = path.removeprefix(prefix) or "/"
            scope = {**scope, "path": path, "raw_path": path.encode(errors="replace")}
        await self._app(scope, receive, send)


class _Reception:
    """Takes a request to its page."""

    def __init__(self, shared: Shared, door: Door, tokens: FormTokens) -> None:
        self._shared, self._door, self._tokens = shared, door, tokens

    def endpoints(self, pages: Iterable[Page]) -> dict[str, ASGIApp]:
        """The endpoint of each path."""
        by_path: dict[str, dict[str, Page]] = {}
        for page in pages:
            by_path.setdefault(page.path, {})[page.method] = page
        return {path: _Endpoint(methods, self) for path, methods in by_path.items()}

    async def receive(self, request: Request, page: Page) -> Response:
        caller = read_caller(request, self._shared.settings.console_proxies)
        asked = Asked(request, self._shared, caller, None, "", {})
        try:
            asked.form = await _read_form(request) if page.method == "POST" else {}
            response = await run_in_threadpool(self._answer, asked, page)
        except TurnedAway as away:
            response = self._turned_away(asked, away)
        except BadRequest as mistake:
            response = self._problem(asked, 400, str(mistake))
        except ClientDisconnect:
            return Response(status_code=400)
        except RedisError as error:
            log.warning("redis_away", reason=type(error).__name__)
            response = self._problem(
                asked, 503, "Redis does not answer. This page shows nothing until it does.", 5.0
            )
        except Exception as error:
            # Its text may have a value in it.
            log.error("page_failed", page=page.path, error=type(error).__name__, where=_where(error))
            response = self._problem(asked, 500, "Something went wrong here; the console's log says where.")
        return self._with_cookies(asked, response)

    def _answer(self, asked: Asked, page: Page) -> Response:
        identity = self._door.identify(asked.request, asked.caller, asked.cookie(SESSION))
        asked.identity = identity
        if identity is None and page.needs:
            return self._ask_to_log_in(asked)
        asked.token = self._token(asked, identity)
        if page.method == "POST":
            self._check_form(asked, identity)
        if page.needs == "operator" and identity and not identity.may_act:
            raise TurnedAway(403, "Only operators may do this; your account is a viewer's.")
        return page.answer(asked)

    def _ask_to_log_in(self, asked: Asked) -> Response:
        if not self._door.has_login:
            raise TurnedAway(403, "The proxy in front of this console has not said who you are.")
        if asked.wants_json or asked.request.method == "POST":
            raise TurnedAway(401, "Log in first.")
        path = asked.request.url.path
        if path == "/live":
            raise TurnedAway(401, "Log in first.")
        wanted = local(f"{path}?{asked.request.url.query}".rstrip("?"), "/")
        return asked.back_to("/login" + ("" if wanted == "/" else f"?{urlencode({'next': wanted})}"))

    def _token(self, asked: Asked, identity: Identity | None) -> str:
        """The token for this browser's forms. A visitor without a cookie for it gets one."""
        if identity and identity.by in ("token", "password"):
            return ""
        if identity and identity.session:
            return self._tokens.of_session(identity.session)
        visitor = asked.cookie(VISITOR) or ""
        if not 16 <= len(visitor) <= 64:
            visitor = asked.cookies[VISITOR] = new_visitor()
        return self._tokens.of_visitor(visitor, identity.name if identity else "")

    def _check_form(self, asked: Asked, identity: Identity | None) -> None:
        """Refuse a form that another site sent, or made this browser send."""
        if not is_from_our_page(asked.request, asked.caller):
            raise TurnedAway(403, "This form was sent by another site.")
        # No browser sends a token by itself, or a password that it was not asked for.
        if identity and identity.by in ("token", "password"):
            return
        given = asked.form.get("token", "")
        if not hmac.compare_digest(given.encode(errors="replace"), asked.token.encode()):
            raise TurnedAway(
                403, "This form is too old, or was not made for you. Go back, reload the page, and try again."
            )

    def _turned_away(self, asked: Asked, away: TurnedAway) -> Response:
        response = self._problem(asked, away.status, away.words, away.wait)
        if away.status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="imattr"'
        return response

    def _problem(self, asked: Asked, status: int, words: str, wait: float = 0.0) -> Response:
        if asked.wants_json:
            response: Response = JSONResponse({"error": words}, status)
        elif asked.request.url.path == "/live":
            response = asked.page("problem_live.html", status, words=words)
        else:
            response = asked.page("problem.html", status, words=words, status_code=status)
        if wait:
            response.headers["Retry-After"] = f"{max(1, round(wait))}"
        return response

    async def not_found(self, request: Request, error: Exception) -> Response:
        """Answer that there is no such page, or not for this method."""
        caller = read_caller(request, self._shared.settings.console_proxies)
        asked = Asked(request, self._shared, caller, None, "", {})
        status = getattr(error, "status_code", 404)
        return self._problem(
            asked,
            status,
            "There is no such page." if status == 404 else "This page does not support that method.",
        )

    def _with_cookies(self, asked: Asked, response: Response) -> Response:
        secure = asked.caller.secure
        for what, value in asked.cookies.items():
            name = cookie_name(what, self._shared.settings.sdkappid, asked.caller)
            lasts = 365 * 86_400 if what == THEME else LASTS
            if value is None:
                response.delete_cookie(name, path="/", secure=secure, httponly=True, samesite="lax")
            else:
                response.set_cookie(
                    name, value, max_age=lasts, path="/", secure=secure, httponly=True, samesite="lax"
                )
        return response


class _Endpoint:
    """All methods of one path."""

    def __init__(self, pages: dict[str, Page], reception: _Reception) -> None:
        self._pages, self._reception = pages, reception

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        method = "GET" if request.method == "HEAD" else request.method
        page = self._pages.get(method)
        if page is None:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(self._pages))})
        response = await self._reception.receive(request, page)
        await response(scope, receive, send)


async def _read_form(request: Request) -> dict[str, str]:
    """Return a form's fields; raises `TurnedAway` if it is too big, too slow, or not a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/x-www-form-urlencoded", ""):
        raise TurnedAway(415, "Forms must be sent as application/x-www-form-urlencoded.")
    if "transfer-encoding" in request.headers and "content-length" in request.headers:
        # A proxy in front may read the form differently than we would.
        raise TurnedAway(400, "A form must have exactly one length.")
    body = bytearray()
    try:
        async with asyncio.timeout(ARRIVES_IN):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise TurnedAway(413, f"A form may have {MOST_BYTES:,} bytes at most.")
    except TimeoutError:
        raise TurnedAway(408, "The form did not arrive in time.") from None
    try:
        pairs = parse_qsl(
            body.decode(),
            keep_blank_values=True,
            max_num_fields=MOST_FIELDS,
            encoding="utf-8",
            errors="replace",
        )
    except ValueError:
        raise TurnedAway(400, f"This is not a form, or it has more than {MOST_FIELDS} fields.") from None
    return dict(pairs)


def _where(error: BaseException) -> str:
    """The place in the code where an error was raised, without its text."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace else "?"
