"""Who is let in, and as whom: the only place that decides this.

In this order: the name from our proxy, a program's token or password (`Authorization`), a browser's session. Without accounts
and without a proxy, only people on this machine are let in, without logging in.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Literal

import structlog
from starlette.requests import Request

from worker.clock import Clock
from worker.config import PREFIX, Settings
from worker.console.accounts import Account, Accounts, Busy, Role
from worker.console.attempts import Attempts
from worker.console.caller import Caller, is_loopback, needs_no_login
from worker.console.sessions import Sessions
from worker.errors import ConfigError

#: How somebody was recognised.
By = Literal["session", "token", "password", "proxy", "loopback"]

#: User names that a proxy may give.
_USER = re.compile(r"[^\x00-\x1f\x7f]{1,128}")

#: Headers that proxies add.
_OF_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")

log = structlog.get_logger()


class TurnedAway(Exception):
    """Raised when somebody is not let in. `wait` is the seconds after which they may try again, if that helps."""

    def __init__(self, status: int, words: str, wait: float = 0.0) -> None:
        self.status, self.words, self.wait = status, words, wait
        super().__init__(words)


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody who was let in."""

    name: str
    role: Role
    by: By
    #: The secret of their session.
    session: str = ""

    @property
    def actor(self) -> str:
        """Who did it, for the history."""
        return "console@loopback" if self.by == "loopback" else f"{self.name}@console"

    @property
    def may_act(self) -> bool:
        return self.role == "operator"


EVERYBODY = Identity("everybody on this machine", "operator", "loopback")


def check_settings(settings: Settings) -> None:
    """Raise `ConfigError` if the console would let in strangers."""
    if not needs_no_login(settings):
        return
    login = f"set {PREFIX}CONSOLE_ACCOUNTS_FILE, or {PREFIX}CONSOLE_PROXY_HEADER"
    if not is_loopback(_bracketed(settings.console_host)):
        place = settings.console_host or "every address"
        found = f"{PREFIX}CONSOLE_HOST is {place}, and nobody would have to log in: {login}, or listen on 127.0.0.1"
        raise ConfigError([found])
    if settings.console_proxies:
        raise ConfigError([f"{PREFIX}CONSOLE_PROXIES is set, and nobody would have to log in: {login}"])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Door:
    """Lets callers in."""

    def __init__(
        self, settings: Settings, sessions: Sessions, accounts: Accounts | None, clock: Clock
    ) -> None:
        self._settings, self._sessions, self._accounts = settings, sessions, accounts
        self._attempts = Attempts(clock)
        self.is_open = needs_no_login(settings)
        self.has_login = accounts is not None

    def identify(self, request: Request, caller: Caller, secret: str | None) -> Identity | None:
        """Return who this is, None if unknown; `secret` is the session's. Raises `TurnedAway`, and what redis raises."""
        if self.is_open:
            return self._by_loopback(request)
        header = self._settings.console_proxy_header
        if header and caller.by_proxy and (named := request.headers.getlist(header)):
            return self._by_proxy(named)
        if self._accounts and "authorization" in request.headers:
            return self._by_authorization(self._accounts, request.headers["authorization"], caller)
        if self._accounts and secret:
            return self._by_session(secret)
        return None

    def log_in(self, name: str, password: str, caller: Caller) -> str | None:
        """Try a password; returns the secret of a new session, or None. Raises `TurnedAway` after too many attempts."""
        account = self._tried(self._accounts, name, password, caller) if self._accounts else None
        if account is None:
            return None
        log.info("logged_in", by=account.name, role=account.role)
        return self._sessions.open(account.name, account.proof)

    def log_out(self, identity: Identity) -> None:
        if identity.session:
            self._sessions.close(identity.session)
            log.info("logged_out", by=identity.name)

    def _tried(self, accounts: Accounts, name: str, password: str, caller: Caller) -> Account | None:
        self._take(name, caller)
        try:
            account = accounts.with_password(name, password)
        except Busy:
            self._attempts.give_back(name, caller.address)
            raise TurnedAway(429, "Too many are logging in at the moment.", 2.0) from None
        if account:
            self._attempts.give_back(name, caller.address)
        else:
            # Not the name: people type their password into the wrong field.
            log.warning("login_refused", address=caller.address)
        return account

    def _take(self, name: str | None, caller: Caller) -> None:
        if wait := self._attempts.take(name, caller.address):
            log.warning("login_limited", address=caller.address)
            raise TurnedAway(429, "Too many attempts to log in.", wait)

    def _by_authorization(self, accounts: Accounts, given: str, caller: Caller) -> Identity:
        kind, _, rest = given.partition(" ")
        account: Account | None = None
        by: By = "token"
        if kind.lower() == "bearer":
            account = accounts.with_token(rest.strip())
            if account is None:
                # Tokens cannot be guessed; this keeps the log quiet.
                self._take(None, caller)
        elif kind.lower() == "basic":
            by = "password"
            name, _, password = _basic(rest)
            account = self._tried(accounts, name, password, caller)
        if account is None:
            raise TurnedAway(401, "This token, or name and password, is not in the accounts file.")
        return Identity(account.name, account.role, by)

    def _by_loopback(self, request: Request) -> Identity:
        if not is_loopback(request.headers.get("host", "")):
            # A foreign page, whose host name leads to this machine.
            raise TurnedAway(421, "This console answers only to 127.0.0.1 and localhost.")
        if any(name in request.headers for name in _OF_PROXIES):
            # People behind the proxy are not on this machine.
            raise TurnedAway(403, "This console needs accounts to be used through a proxy.")
        return EVERYBODY

    def _by_proxy(self, named: list[str]) -> Identity:
        [name, *others] = named
        if others or not _USER.fullmatch(name.strip()):
            raise TurnedAway(400, "The proxy names no user, or several.")
        is_operator = name.strip() in self._settings.console_proxy_operators
        return Identity(name.strip(), "operator" if is_operator else "viewer", "proxy")

    def _by_session(self, secret: str) -> Identity | None:
        session = self._sessions.find(secret)
        account = session and self._accounts and self._accounts.with_proof(session.name, session.proof)
        return Identity(account.name, account.role, "session", secret) if account else None


def _basic(given: str) -> tuple[str, str, str]:
    try:
        return base64.b64decode(given.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return "", "", ""
