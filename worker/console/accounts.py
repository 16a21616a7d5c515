"""The console's accounts: a file with one on each line, read again when it changes.

::

    ann:operator:scrypt$16384$8$5$<salt>$<hash>      a person, by name and password
    robot:viewer:sha256$<hash>                       a program, by a token

A name has at most one password, and any number of tokens. Passwords are slow to try (scrypt); tokens are long and random, so
a fast hash is enough for them. Reading the file does not let anyone log in.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import structlog

from worker.clock import Clock, SystemClock
from worker.config import PREFIX
from worker.errors import ConfigError

Role = Literal["viewer", "operator"]

VARIABLE = f"{PREFIX}CONSOLE_ACCOUNTS_FILE"
#: scrypt's N, r and p: 16 MB and about a quarter of a second.
COST = (2**14, 8, 5)
#: The most that a line may ask for: with a higher N r p, a typo could stall the console.
MOST_MEMORY, MOST_WORK = 128 * 1024 * 1024, 2**24
#: Characters of a password, bytes of the file, seconds between two checks of the file.
SHORTEST, LONGEST, MOST_BYTES, LOOK_EVERY = 10, 1000, 1_000_000, 1.0
#: Passwords that are tried at once, and how many may wait for that.
AT_ONCE, WAITING = 2, 8
#: Seconds for which a correct password is not tried again, for programs that send it with each request.
REMEMBERED, MOST_REMEMBERED = 60.0, 100

#: The prefix of every token, so that leaked ones can be searched for.
BEGINNING = "imattr-"

_NAME = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
_PASSWORD = re.compile(
    r"scrypt\$(\d{1,8})\$(\d{1,3})\$(\d{1,3})\$([A-Za-z0-9_-]{16,64})\$([A-Za-z0-9_-]{43})"
)
_TOKEN = re.compile(r"sha256\$[0-9a-f]{64}")

log = structlog.get_logger()


class Busy(Exception):
    """Raised when too many passwords are being tried already."""


@dataclass(frozen=True, slots=True)
class Account:
    """One line of the file."""

    name: str
    role: Role
    hash: str

    @property
    def is_program(self) -> bool:
        """Whether it logs in with a token."""
        return self.hash.startswith("sha256$")

    @property
    def proof(self) -> str:
        """Changes with the line: a session ends when its account's password or role changes."""
        return hashlib.sha256(f"{self.name}:{self.role}:{self.hash}".encode()).hexdigest()


def hash_password(password: str, cost: tuple[int, int, int] = COST) -> str:
    """Return a password's hash, as in the file; raises `ValueError` with the rule that the password breaks."""
    if not SHORTEST <= len(password) <= LONGEST:
        raise ValueError(f"must have {SHORTEST} to {LONGEST} characters, has {len(password)}")
    salt = secrets.token_bytes(16)
    n, r, p = cost
    return f"scrypt${n}${r}${p}${_packed(salt)}${_packed(_scrypt(password, salt, cost))}"


def new_token() -> tuple[str, str]:
    """Return a new token and its hash, as in the file."""
    token = BEGINNING + _packed(secrets.token_bytes(32))
    return token, _hash_token(token)


def read_name(given: str) -> str:
    """Return the name of an account; raises `ValueError` with the rule that it breaks."""
    if not _NAME.fullmatch(given):
        raise ValueError("must be 1 to 64 letters, digits or . _ @ + -")
    return given


def read_accounts(text: str) -> tuple[list[Account], list[str]]:
    """Return the accounts in a file, and what is wrong with its other lines, without their content."""
    found, mistakes = list[Account](), list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("\ufeff")
        if not line or line.startswith("#"):
            continue
        try:
            account = _account(line)
            if not account.is_program and any(
                one.name == account.name and not one.is_program for one in found
            ):
                raise ValueError("has a second password for a name")
            found.append(account)
        except ValueError as mistake:
            mistakes.append(f"{VARIABLE}: line {number} {mistake}")
    return found, mistakes


def _account(line: str) -> Account:
    parts = line.split(":")
    if len(parts) != 3:
        raise ValueError(f"must be name:role:hash, has {len(parts)} parts")
    name, role, hash = (part.strip() for part in parts)
    if not _NAME.fullmatch(name):
        raise ValueError("has a name that is not 1 to 64 letters, digits or . _ @ + -")
    if role not in get_args(Role):
        raise ValueError(f"has a role that is none of {', '.join(get_args(Role))}")
    if match := _PASSWORD.fullmatch(hash):
        n, r, p = (int(part) for part in match.groups()[:3])
        if n < 2 or n & (n - 1) or not r or not p or 128 * n * r > MOST_MEMORY or n * r * p > MOST_WORK:
            raise ValueError("has a hash whose cost cannot be used")
    elif not _TOKEN.fullmatch(hash):
        raise ValueError("has a hash that neither imattr console hash nor imattr console token made")
    return Account(name, role, hash)  # type: ignore[arg-type]


def _scrypt(password: str, salt: bytes, cost: tuple[int, int, int]) -> bytes:
    n, r, p = cost
    # The same letters may be typed as different code points.
    typed = unicodedata.normalize("NFKC", password).encode(errors="replace")
    return hashlib.scrypt(typed, salt=salt, n=n, r=r, p=p, maxmem=2 * MOST_MEMORY, dklen=32)


def _hash_token(token: str) -> str:
    return f"sha256${hashlib.sha256(token.encode(errors='replace')).hexdigest()}"


def _packed(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _unpacked(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Accounts:
    """The accounts in a file. Thread-safe.

    An account that is removed from it is locked out within a second. While it cannot be read, it has no accounts.
    """

    def __init__(self, path: str, clock: Clock | None = None) -> None:
        """Raises `ConfigError` with every mistake in the file."""
        self._path, self._clock = Path(path), clock or SystemClock()
        self._lock, self._trying = threading.Lock(), _Trying()
        self._secret = os.urandom(32)
        self._right: dict[bytes, tuple[float, Account]] = {}
        self._accounts: Sequence[Account] = ()
        self._seen: object = None
        self._look_at = 0.0
        mistakes = self._read()
        if not mistakes and not self._accounts:
            mistakes = [f"{VARIABLE} contains no account; imattr console hash makes one"]
        if mistakes:
            raise ConfigError(mistakes)

    def with_password(self, name: str, password: str) -> Account | None:
        """Whose name and password this is; takes as long for a name that nobody has. Raises `Busy`."""
        now = self._clock.monotonic()
        known = hmac.digest(self._secret, f"{len(name)}:{name}{password}".encode(errors="replace"), "sha256")
        accounts = self._current()
        kept, account = self._right.get(known, (0.0, None))
        if account in accounts and now < kept:
            return account
        hashes = [one for one in accounts if not one.is_program]
        mine = [one for one in hashes if one.name == name]
        right = None
        with self._trying.one():
            for one in mine or (hashes or [_NOBODY])[:1]:
                if _is_right(one, password) and one in mine:
                    right = one
        if right:
            with self._lock:
                if len(self._right) >= MOST_REMEMBERED:
                    self._right.clear()
                self._right[known] = now + REMEMBERED, right
        return right

    def with_token(self, token: str) -> Account | None:
        """Whose token this is."""
        given, right = _hash_token(token), None
        for one in self._current():
            if hmac.compare_digest(one.hash, given):
                right = one
        return right

    def with_proof(self, name: str, proof: str) -> Account | None:
        """The account of a session, if its line is still the same."""
        return next(
            (one for one in self._current() if one.name == name and hmac.compare_digest(one.proof, proof)),
            None,
        )

    def _current(self) -> Sequence[Account]:
        with self._lock:
            if self._clock.monotonic() >= self._look_at:
                for mistake in self._read():
                    log.warning("accounts_not_read", reason=mistake)
            return self._accounts

    def _read(self) -> list[str]:
        """Read the file, if it has changed; returns what is wrong with it, once."""
        self._look_at = self._clock.monotonic() + LOOK_EVERY
        try:
            about = self._path.stat()
            seen: object = (about.st_mtime_ns, about.st_size, about.st_ino)
            if seen == self._seen:
                return []
            if about.st_size > MOST_BYTES:
                raise ValueError(f"has {about.st_size:,} bytes, at most {MOST_BYTES:,}")
            self._accounts, mistakes = read_accounts(self._path.read_text(encoding="utf-8"))
        except OSError as error:
            seen, self._accounts = type(error), ()
            mistakes = [f"{VARIABLE} cannot be read ({type(error).__name__})"]
        except ValueError as mistake:
            self._accounts = ()
            words = "is not text" if isinstance(mistake, UnicodeDecodeError) else mistake
            mistakes = [f"{VARIABLE} {words}"]
        told, self._seen = seen == self._seen, seen
        return [] if told else mistakes


#: The account whose password is tried if nobody has that name.
_NOBODY = Account("", "viewer", f"scrypt${COST[0]}${COST[1]}${COST[2]}${'A' * 22}${'A' * 43}")


def _is_right(account: Account, password: str) -> bool:
    _, n, r, p, salt, hash = account.hash.split("$")
    tried = _scrypt(password[:LONGEST], _unpacked(salt), (int(n), int(r), int(p)))
    return hmac.compare_digest(tried, _unpacked(hash))


class _Trying:
    """Bounds how many passwords are tried at once: each takes memory and a CPU."""

    def __init__(self) -> None:
        self._waiting, self._at_once = threading.Semaphore(WAITING), threading.Semaphore(AT_ONCE)

    @contextmanager
    def one(self) -> Iterator[None]:
        if not self._waiting.acquire(blocking=False):
            raise Busy
        try:
            with self._at_once:
                yield
        finally:
            self._waiting.release()
