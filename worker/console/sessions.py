"""Who has logged in, kept in Redis, so that every replica of the console knows, and logging out ends a session everywhere.

Nothing is signed, so there is no key with which to forge sessions. Redis has only digests of the sessions' secrets, so
reading it is not enough to use them; and anyone who can write to it needs no console.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from worker.state.connection import Redis
from worker.state.keys import Keys
from worker.state.scripts import text

#: Seconds that a session lasts, used or not.
LASTS = 12 * 3600
#: Sessions at once; the oldest end.
MOST = 1000
#: Seconds for which the key for visitors' forms is not read again.
KEY_KEPT = 30.0


@dataclass(frozen=True, slots=True)
class Session:
    """Whose session it is, and which line of the accounts file let them in."""

    name: str
    proof: str
    until: float


class Sessions:
    """The sessions of one app's consoles. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys, wall: Callable[[], float] = time.time) -> None:
        self._redis, self._key, self._wall = redis, keys.console_sessions, wall

    def open(self, name: str, proof: str) -> str:
        """Begin a session; returns the secret for its browser to keep."""
        self._forget()
        secret = secrets.token_urlsafe(32)
        about = {"name": name, "proof": proof, "until": self._wall() + LASTS}
        self._redis.hset(self._key, _digest(secret), json.dumps(about))
        return secret

    def find(self, secret: str) -> Session | None:
        """Return the session with this secret."""
        found = _session(self._redis.hget(self._key, _digest(secret)))
        return found if found and self._wall() < found.until else None

    def close(self, secret: str) -> None:
        """End the session, for everybody who has the secret."""
        self._redis.hdel(self._key, _digest(secret))

    def _forget(self) -> None:
        """Delete sessions that have ended, and the oldest if there are too many."""
        alive = {digest: session.until if session else 0.0 for digest, session in self._everyone()}
        by_age = sorted(alive, key=lambda digest: alive[digest], reverse=True)
        gone = {digest for digest in alive if alive[digest] <= self._wall()} | set(by_age[MOST - 1 :])
        if gone:
            self._redis.hdel(self._key, *gone)

    def _everyone(self) -> Iterator[tuple[str, Session | None]]:
        for digest, packed in self._redis.hgetall(self._key).items():
            yield text(digest), _session(packed)


def _session(packed: bytes | str | None) -> Session | None:
    try:
        about = json.loads(packed or "null")
        return Session(str(about["name"]), str(about["proof"]), float(about["until"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


class FormTokens:
    """Tokens that prove that a form is ours, and was shown to this browser.

    A session's tokens derive from its secret. A visitor without one has a cookie; the tokens derive from that, the visitor's
    name, and a key that all consoles of the app share, so that nobody who plants a cookie can make a token for it.
    """

    def __init__(self, redis: Redis, keys: Keys, wall: Callable[[], float] = time.time) -> None:
        self._redis, self._key, self._wall = redis, keys.console_key, wall
        self._secret, self._read_at = b"", 0.0

    def of_session(self, secret: str) -> str:
        return _token(secret.encode(), "form")

    def of_visitor(self, cookie: str, name: str) -> str:
        return _token(self._shared(), f"{cookie}|{name}")

    def _shared(self) -> bytes:
        if not self._secret or not 0 <= self._wall() - self._read_at < KEY_KEPT:
            self._redis.set(self._key, secrets.token_hex(32), nx=True)
            found = self._redis.get(self._key)
            self._secret, self._read_at = str(text(found or b"")).encode(), self._wall()
        return self._secret


def _token(key: bytes, what: str) -> str:
    return hmac.digest(key, what.encode(errors="replace"), "sha256").hex()


def new_visitor() -> str:
    """The content of a new visitor's cookie."""
    return secrets.token_urlsafe(24)
