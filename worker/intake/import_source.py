"""Reads updates from files of any size: JSON lines, or CSV with a header; either may be compressed with gzip.

JSON lines, one update each, as `imattr dead export` prints them; null removes the attribute::

    {"user": "u1", "attrs": {"city": "Paris"}, "occurred_at": "2026-11-01T12:00:00Z"}

CSV, UTF-8, separated by commas, semicolons, tabs or vertical bars: a column `user`, optionally a column `occurred_at`, and
every other column is an attribute. An empty cell changes nothing::

    user,city,level
    u1,Paris,

A line that cannot be read is a record with the reason, and reading continues after it. One line is in memory at a time.
"""

from __future__ import annotations

import codecs
import csv
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import select
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from worker.errors import CannotImport, InvalidUpdate
from worker.intake.import_dialect import (
    SEPARATORS,
    broken_user,
    broken_value,
    check_beginning,
    no_user_column,
    separator_of,
)
from worker.models import check_names, check_user

Format = Literal["jsonl", "csv"]

#: Bytes of the longest line that is read; longer ones are skipped. A good line has a few hundred.
MAX_LINE = 1_000_000
#: Bytes after which a row of CSV must end; otherwise its opening quote was a mistake.
MAX_ROW = 65_536

#: Bytes at the beginning of a file that distinguish it from another of the same size and time.
HEAD = 65_536

_BLOCK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}

_TOO_LONG = f"the line is longer than {MAX_LINE:,} bytes"
_NO_UTF8 = "the line is not UTF-8"
_NO_JSON = "the line is not JSON"
_NO_OBJECT = 'the line is not {"user": ..., "attrs": {...}}, with "occurred_at" if known and nothing else'
_TWICE = "a name appears twice in one object"
_NO_CSV = "the line is not CSV: a quote is out of place or never closed, or a cell is too long"


class RawUpdate(NamedTuple):
    """An update as the file has it, not validated yet. `occurred_at` is None if the file does not say."""

    user: object
    attrs: object
    occurred_at: object = None


class Unreadable(NamedTuple):
    """Why a line is not an update. `user` is its user id, shortened, or ``?``."""

    user: str
    rule: str


class Line(NamedTuple):
    """A line and its number, from 1; `text` is None if it is too long. `end` is the offset after it."""

    number: int
    text: bytes | None
    end: int


class Record(NamedTuple):
    """What begins on one line of the file: an update, the reason why it is not one, or None for a blank line.

    `last` is the number of its last line, `end` the offset after it.
    """

    line: int
    last: int
    end: int
    found: RawUpdate | Unreadable | None


def event_time(text: str) -> str | float:
    """Return a time as people write it: as a number if it is one, else unchanged."""
    return float(text) if text.replace(".", "", 1).isdecimal() else text


class Source:
    """An open file, or stdin, and the records in it.

    Offsets count uncompressed bytes. A pipe ends early when `stopped` says so.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        format: Format | None = None,
        user_column: str = "user",
        names: frozenset[str] = frozenset(),
        null: str | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises `CannotImport` if the format is not clear, or the header of a CSV file is wrong.

        `null` is the text that means no value, besides an empty cell.
        """
        self._separator, self._null = ",", null
        #: Headers in the middle of a CSV file, which were skipped.
        self.repeated_headers = 0
        with _damage_explained():
            self._file = open(path or 0, "rb", buffering=0, closefd=path is not None)  # noqa: SIM115
        try:
            about = os.fstat(self._file.fileno())
            self.size = about.st_size if stat.S_ISREG(about.st_mode) else None
            raw = self._file if self.size is not None else _Pipe(self._file.fileno(), stopped)
            with _damage_explained():
                self._stream = _unpacked(io.BufferedReader(raw, _BLOCK))
                check_beginning(self._stream.peek(HEAD)[:HEAD])
                start = len(codecs.BOM_UTF8) if self._stream.peek(3).startswith(codecs.BOM_UTF8) else 0
                self._stream.read(start)
                self.format = format or _format(path, self._stream)
                self._start = (0, start)
                if self.format == "csv":
                    self._columns = self._header(user_column, names)
        except BaseException:
            self._file.close()
            raise

    def _header(self, user_column: str, names: frozenset[str]) -> _Columns:
        lines = _lines(self._stream, *self._start)
        read = list(islice(lines, 1))
        first = (read[0].text or b"").decode(errors="replace").strip() if read else ""
        if declared := re.fullmatch(r'"?sep=([,;\t|])"?', first, re.IGNORECASE):
            # Excel writes and expects such a line.
            self._separator, read = declared[1], []
        else:
            self._separator = separator_of(first, user_column)
        header = next(_rows(chain(read, lines), self._separator), None)
        if header is None:
            raise CannotImport("the file is empty, so it has no header")
        if isinstance(header.cells, Unreadable):
            raise CannotImport(f"the header cannot be read: {header.cells.rule}")
        self._start = (header.last, header.end)
        return _Columns.of(header.cells, user_column, names, self._null)

    @property
    def notes(self) -> list[str]:
        """How the file was understood, where that is not obvious."""
        notes = [] if self._separator == "," else [f"separated by {SEPARATORS[self._separator]}"]
        if self.repeated_headers:
            many = (
                "1 more header" if self.repeated_headers == 1 else f"{self.repeated_headers:,} more headers"
            )
            notes.append(f"{many} left out")
        return notes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def lock(self) -> None:
        """Lock the file; raises `CannotImport` if another import is reading it."""
        if self.size is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotImport("another import of this file is running") from None
        except OSError:
            # Some network file systems have no locks.
            return

    def fingerprint(self) -> dict[str, object]:
        """What distinguishes this file from a changed one; nothing does with a pipe."""
        if self.size is None:
            return {}
        about = os.fstat(self._file.fileno())
        head = hashlib.sha256(os.pread(self._file.fileno(), HEAD, 0)).hexdigest()
        return {"size": about.st_size, "mtime_ns": about.st_mtime_ns, "head": head}

    @property
    def share(self) -> float | None:
        """The share of the file that has been read, 0 to 1; None for a pipe."""
        return None if self.size is None else self._file.tell() / max(1, self.size)

    def records(self, line: int = 0, offset: int = 0) -> Iterator[Record]:
        """The records after that line, which ended at that offset.

        Raises `CannotImport` where the file is damaged.
        """
        if offset > self._start[1]:
            with _damage_explained():
                # In a compressed file this reads everything before it.
                self._stream.seek(offset)
        else:
            line, offset = self._start
        return self._records(_lines(self._stream, line, offset))

    def _records(self, lines: Iterator[Line]) -> Iterator[Record]:
        with _damage_explained():
            yield from self._csv_records(lines) if self.format == "csv" else _json_records(lines)

    def _csv_records(self, lines: Iterator[Line]) -> Iterator[Record]:
        for line, last, end, cells in _rows(lines, self._separator):
            found = cells if isinstance(cells, Unreadable) else self._columns.found(line, cells)
            if found == HEADER:
                self.repeated_headers += 1
                found = None
            yield Record(line, last, end, found)


@contextmanager
def _damage_explained() -> Iterator[None]:
    """Turn what reading a file may raise into `CannotImport`."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise CannotImport("the gzip file is damaged or cut off") from None
    except OSError as error:
        raise CannotImport(f"the file cannot be read: {error.strerror}") from None


class _Pipe(io.RawIOBase):
    """A pipe that can be abandoned while it is silent: it then reads as ended."""

    def __init__(self, fd: int, stopped: Callable[[], bool]) -> None:
        self._fd, self._stopped = fd, stopped

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not select.select([self._fd], [], [], 0.1)[0]:
            if self._stopped():
                return 0
        return os.readv(self._fd, [buffer])


def _unpacked(stream: io.BufferedReader) -> io.BufferedReader:
    if not stream.peek(2).startswith(_GZIP_MAGIC):
        return stream
    packed: Any = gzip.GzipFile(fileobj=stream)
    return io.BufferedReader(packed, _BLOCK)


def _format(path: Path | None, stream: io.BufferedReader) -> Format:
    """By the name of the file, else by its first character."""
    suffixes = [suffix.lower() for suffix in path.suffixes] if path else []
    for suffix in reversed(suffixes[-2:]):
        if suffix in _SUFFIXES:
            return _SUFFIXES[suffix]
    return "jsonl" if stream.peek(1).lstrip().startswith(b"{") else "csv"


def _lines(stream: io.BufferedReader, number: int, end: int) -> Iterator[Line]:
    """Every line after number `number`, which ended at the offset `end`."""
    while text := stream.readline(MAX_LINE + 1):
        number, end = number + 1, end + len(text)
        if len(text) <= MAX_LINE:
            yield Line(number, text, end)
            continue
        while not text.endswith(b"\n") and (text := stream.readline(MAX_LINE)):
            end += len(text)
        yield Line(number, None, end)


def _json_records(lines: Iterator[Line]) -> Iterator[Record]:
    for number, text, end in lines:
        yield Record(number, number, end, _from_json(text))


def _decoded(text: bytes | None) -> str | Unreadable:
    if text is None:
        return Unreadable("?", _TOO_LONG)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return Unreadable("?", _NO_UTF8)


def _from_json(text: bytes | None) -> RawUpdate | Unreadable | None:
    decoded = _decoded(text)
    if isinstance(decoded, Unreadable):
        return decoded
    try:
        # Concatenated files have byte order marks in the middle.
        found = json.loads(decoded.removeprefix("\ufeff"), object_pairs_hook=_without_repeated_names)
    except _RepeatedName:
        return Unreadable("?", _TWICE)
    except (ValueError, RecursionError):
        # Python's own words may quote the line.
        return None if decoded.isspace() else Unreadable("?", _NO_JSON)
    if not isinstance(found, dict):
        return Unreadable("?", _NO_OBJECT)
    keys = found.keys()
    if keys != {"user", "attrs"} and keys != {"user", "attrs", "occurred_at"}:
        return _refused(found.get("user"), _NO_OBJECT)
    return RawUpdate(found["user"], found["attrs"], found.get("occurred_at"))


class _RepeatedName(Exception):
    """Raised for an object with a name that appears twice: nobody knows which of the values is meant."""


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedName
    return found


class _Row(NamedTuple):
    line: int
    last: int
    end: int
    cells: list[str] | Unreadable


class _Feed:
    """Hands lines to a `csv.reader` as text; can hand out those of the current row again."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: deque[Line] = deque()
        self._taken: list[Line] = []
        self._size = 0
        #: Why the line that was taken last is not text.
        self.problem: Unreadable | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        if self._size > MAX_ROW:
            raise StopIteration
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        self._size += len(line.text or b"")
        text = _decoded(line.text)
        if isinstance(text, Unreadable):
            # Only the end of its input can interrupt a reader.
            self.problem = text
            raise StopIteration
        return text

    def row(self, cells: list[str]) -> _Row:
        """Return the row that the lines taken make up."""
        row = _Row(self._taken[0].number, self._taken[-1].number, self._taken[-1].end, cells)
        self._taken.clear()
        self._size = 0
        return row

    def spoilt(self) -> _Row:
        """Give up the first of the lines taken, which is not a row; the others are read again."""
        problem, self.problem = self.problem or Unreadable("?", _NO_CSV), None
        first, *others = self._taken
        self._again.extendleft(reversed(others))
        self._taken.clear()
        self._size = 0
        return _Row(first.number, first.number, first.end, problem)


def _rows(lines: Iterator[Line], separator: str) -> Iterator[_Row]:
    feed = _Feed(lines)
    reader = csv.reader(feed, delimiter=separator, strict=True)
    while True:
        try:
            yield feed.row(next(reader))
        except StopIteration:
            if not feed.problem:
                return
            yield feed.spoilt()
        except csv.Error:
            yield feed.spoilt()


#: In place of an update: a repeated header.
HEADER = Unreadable("", "header")


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which column of a row holds what."""

    count: int
    user: int
    occurred_at: int | None
    attributes: list[tuple[int, str]]
    header: list[str]
    null: str | None = None

    @classmethod
    def of(cls, header: list[str], user_column: str, names: frozenset[str], null: str | None = None) -> Self:
        """Read the header; raises `CannotImport`. `names` are the app's attributes, empty if not known."""
        header = [name.strip() for name in header]
        while header and not header[-1]:
            # Spreadsheets save columns that were once used.
            header.pop()
        if user_column not in header:
            raise CannotImport(no_user_column(header, user_column))
        if len(set(header)) < len(header):
            raise CannotImport("two columns of the header have the same name")
        places = {name: place for place, name in enumerate(header)}
        user, occurred_at = places.pop(user_column), places.pop("occurred_at", None)
        try:
            check_names(places)
        except ValueError as error:
            raise CannotImport(f"the header does not name valid attributes: {error}") from None
        if names and (unknown := places.keys() - names):
            known = ", ".join(sorted(names))
            raise CannotImport(f"column {min(unknown)!r} is not one of the app's attributes ({known})")
        attributes = [(place, name) for name, place in places.items()]
        return cls(len(header), user, occurred_at, attributes, header, null)

    def found(self, line: int, cells: list[str]) -> RawUpdate | Unreadable | None:
        """Return the update in a row; `HEADER` for a repeated header, as in concatenated files.

        Raises `CannotImport` for a header with other columns: what follows it would be taken for something else.
        """
        if not any(cells):
            return None
        names = [cell.removeprefix("\ufeff").strip() for cell in cells]
        if names[: self.count] == self.header and not any(names[self.count :]):
            return HEADER
        user_column = self.header[self.user]
        at_its_place = names[self.user : self.user + 1] == [user_column]
        if at_its_place or (user_column in names and set(names) <= {*self.header, ""}):
            raise CannotImport(
                f"line {line} looks like another header, with other columns: import the files one by one "
                f"(if a user is called {user_column!r}, rename the column and use --user-column)"
            )
        if len(cells) < self.count or any(cells[self.count :]):
            # Nobody knows which of them is the user.
            return Unreadable("?", f"{len(cells)} cells, the header has {self.count}")
        user, moment = cells[self.user], None if self.occurred_at is None else cells[self.occurred_at]
        attrs = {name: cells[place] for place, name in self.attributes if cells[place] not in ("", self.null)}
        broken = broken_user(user)
        for name, value in attrs.items():
            broken = broken or broken_value(name, value, self.null)
        if broken:
            return _refused(user, broken)
        return RawUpdate(user, attrs, event_time(moment) if moment else None)


def _refused(user: object, rule: str) -> Unreadable:
    """A line refused for a rule; or for a rule that its user id breaks."""
    try:
        return Unreadable(check_user(user), rule)
    except InvalidUpdate as error:
        return Unreadable(error.user, error.rule)
