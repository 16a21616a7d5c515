"""What a whole file wants, one entry a user, on disk, so that any number of users takes the same few megabytes of memory.

A user may appear anywhere in a file, and often. Each attribute then has the value with the newest event time, and of two
equally new ones the later, just as if the file were imported. Comparing the lines one by one with the API would miss that: a
line that is overruled further down would be reported as a difference, and repaired, again and again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from worker.errors import CannotImport
from worker.intake.import_progress import Refusal
from worker.models import Update, UserId
from worker.readback.difference import Want

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode

#: Nothing needs to survive this process. The cache of 32 MB keeps the index of a million users from being read again and
#: again.
_PRAGMAS = ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", "PRAGMA cache_size = -32768")
_TABLES = (
    "CREATE TABLE users (place INTEGER PRIMARY KEY, user TEXT NOT NULL UNIQUE, wanted TEXT NOT NULL)",
    "CREATE TABLE refusals (line INTEGER NOT NULL, user TEXT NOT NULL, rule TEXT NOT NULL)",
)


class WantedUsers:
    """The users of a file in the order in which they first occur, and the lines that were refused. For one thread at a time."""

    def __init__(self) -> None:
        with _room_explained():
            # A nameless database is a temporary file of this process alone, already deleted in its directory.
            self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            for command in (*_PRAGMAS, *_TABLES, "BEGIN"):
                self._database.execute(command)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._database.close()

    def add(self, updates: Iterable[Update], refusals: Iterable[Refusal] = ()) -> None:
        """Merge updates, all with an event time, into what is wanted."""
        fresh: dict[UserId, dict[str, Want]] = {}
        with _room_explained():
            for update in updates:
                wants = fresh.get(update.user)
                if wants is None:
                    found = self._database.execute("SELECT wanted FROM users WHERE user = ?", (update.user,))
                    row = found.fetchone()
                    wants = fresh[update.user] = _read(row[0]) if row else {}
                for name, value in update.attrs.items():
                    if name not in wants or update.occurred_ms >= wants[name].version:
                        wants[name] = Want(value, update.occurred_ms)
            self._database.executemany(
                "INSERT INTO users (user, wanted) VALUES (?, ?) "
                "ON CONFLICT (user) DO UPDATE SET wanted = excluded.wanted",
                [(user, _encode(wants)) for user, wants in fresh.items()],
            )
            self._database.executemany("INSERT INTO refusals VALUES (?, ?, ?)", refusals)

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM users").fetchone()[0])

    def chunks(self, size: int, after: int = 0) -> Iterator[dict[UserId, Mapping[str, Want]]]:
        """Yield all but the first `after` users, up to `size` at a time."""
        with _room_explained():
            # Places have no gaps: nothing is ever deleted, and an upsert takes none.
            rows = self._database.execute(
                "SELECT user, wanted FROM users WHERE place > ? ORDER BY place", (after,)
            )
            while page := rows.fetchmany(size):
                yield {user: _read(wanted) for user, wanted in page}

    def refusals(self) -> Iterator[Refusal]:
        """The refused lines, in order."""
        for row in self._database.execute("SELECT line, user, rule FROM refusals ORDER BY rowid"):
            yield Refusal(*row)

    def digest(self) -> str:
        """What distinguishes this from another file's content."""
        found = hashlib.sha256()
        for table in (
            "SELECT user, wanted FROM users ORDER BY place",
            "SELECT * FROM refusals ORDER BY rowid",
        ):
            for row in self._database.execute(table):
                found.update(_encode(row).encode())
            found.update(b"\n")
        return found.hexdigest()


def _read(packed: str) -> dict[str, Want]:
    return {name: Want(*pair) for name, pair in json.loads(packed).items()}


@contextmanager
def _room_explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise CannotImport(
            f"no room for the users of the file in the directory for temporary files (TMPDIR): {error}"
        ) from None
