"""The plan file: the differences between a file and the API, one line of JSON a user.

::

    {"imattr_plan": 1, "id": ..., "app": ..., "api": ..., "source": ..., "digest": ..., "as_of": ms, ...}   what this is
    {"line": 7, "user": "u9", "rule": "..."}                                      a line of the source that was refused
    {"user": "u1", "changes": {"city": [null, "Paris", ms], "level": ["3", "4", ms]}}      old value, new value, as of
    {"user": "u3", "unknown": true}                                               the API does not know this user
    {"checkpoint": 4200, "tally": {...}, "calls": 42, "seconds": 1.3}             this many users are done
    {"summary": 9999, "tally": {...}, "calls": 100, "seconds": 2.1}               always the last line, if it is complete

An interrupted plan continues after its last checkpoint; anything after that is written again. Checkpoints are on disk before
anything follows them.

The file contains users and values, so only its owner may read it. When applied, it is untrusted input: every field is
checked, and only JSON is read.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from worker.errors import UnusablePlan
from worker.intake.import_progress import Refusal
from worker.models import EARLIEST_MS, LATEST_MS, UserId
from worker.readback.difference import FATES, KINDS, MOST_NAMES, Change, Tally

VERSION = 1
_BEGINNING = b'{"imattr_plan": '

#: Bytes of the longest line. One user with 10 attributes takes some 2,000.
MAX_LINE = 1_000_000
#: Bytes that are written at a time.
_BLOCK = 1 << 20

_encode = json.JSONEncoder(ensure_ascii=True).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a plan is for. Two runs with equal `identity` write the same plan.

    `digest` is that of the source's content, `users` and `refused` count what is in it, `as_of` is when it was true, in ms;
    `explicit` says whether a person named that time. `made` is seconds since 1970.
    """

    id: str
    app: int
    api: str
    source: str
    digest: str
    format: str
    user_column: str
    null: str | None
    as_of: int
    explicit: bool
    lines: int
    refused: int
    users: int
    made: int
    made_by: str

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to continue this plan, by names for people."""
        return {
            "app": self.app,
            "API": self.api,
            "as-of time": self.as_of,
            "content of the file": self.digest,
            "format": self.format,
            "user column": self.user_column,
            "text for no value": self.null,
        }


class Difference(NamedTuple):
    """A user with values to be changed."""

    user: UserId
    changes: Mapping[str, Change]


class UnknownUser(NamedTuple):
    """A user that the API does not know."""

    user: UserId


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a plan is: `users` done, in `calls` that took `seconds`. The last mark, if `final`, is the summary."""

    users: int = 0
    tally: Tally = field(default_factory=Tally)
    calls: int = 0
    seconds: float = 0.0
    final: bool = False


class Line(NamedTuple):
    """The content of one line of a plan, and the offset after it."""

    found: Header | Refusal | Difference | UnknownUser | Mark
    end: int


# Writing.


def packed(found: Header | Refusal | Difference | UnknownUser | Mark) -> bytes:
    """Return its line."""
    match found:
        case Header():
            fields: dict[str, Any] = {"imattr_plan": VERSION, **asdict(found)}
        case Refusal(line, user, rule):
            fields = {"line": line, "user": user, "rule": rule}
        case Difference(user, changes):
            fields = {"user": user, "changes": {name: list(change) for name, change in changes.items()}}
        case UnknownUser(user):
            fields = {"user": user, "unknown": True}
        case Mark(users, tally, calls, seconds, final):
            kind = "summary" if final else "checkpoint"
            fields = {kind: users, "tally": asdict(tally), "calls": calls, "seconds": round(seconds, 3)}
    return f"{_encode(fields)}\n".encode()


class PlanWriter:
    """A plan that is being made. It is locked while open."""

    def __init__(self, path: Path, *, restart: bool = False, samples: int = 0) -> None:
        """Open a plan that may exist already; raises `UnusablePlan` for a file that is not one.

        `samples` is how many of its first differences to keep.
        """
        self._path, self._waiting = path, bytearray()
        with _explained(path):
            # Not buffered: a failed write must not be tried again when the file is closed.
            self._file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            lock(self._file, path)
            with _explained(path):
                os.fchmod(self._file.fileno(), 0o600)
            #: The plan to continue; None if this is a new one.
            self.begun: Survey | None = None
            with _explained(path), open(path, "rb") as before:
                if _holds_a_plan(before, path) and not restart:
                    found = survey(before, path, samples)
                    self.begun = found if found.end and not found.complete else None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._file, _explained(self._path):
            if not os.fstat(self._file.fileno()).st_size:
                # Nothing came of it.
                self._path.unlink(missing_ok=True)

    def begin(self, header: Header, refusals: Iterable[Refusal]) -> Mark:
        """Write the header, or find where to continue; returns how far the plan is.

        Raises `UnusablePlan` if a different plan was begun there.
        """
        if self.begun:
            changed = [
                name for name, value in self.begun.header.identity.items() if header.identity[name] != value
            ]
            if "as-of time" in changed:
                # Lines without a time of their own use that one.
                changed = ["as-of time"]
            if changed:
                raise UnusablePlan(
                    f"{self._path} was begun and not finished; to continue it, the {', the '.join(changed)} must be "
                    "the same as then. To replace it, use --restart"
                )
        end = self.begun.end if self.begun else 0
        with _explained(self._path):
            self._file.truncate(end)
            self._file.seek(end)
        if self.begun:
            return self.begun.mark
        self._put(packed(header))
        for refusal in refusals:
            self._put(packed(refusal))
        self.checkpoint(Mark())
        return Mark()

    def write(self, found: Difference | UnknownUser) -> None:
        """Write one user's line."""
        self._put(packed(found))

    def checkpoint(self, mark: Mark) -> None:
        """Make sure that everything so far is on disk. With a `final` mark, the plan is complete."""
        self._put(packed(mark))
        self._flush()
        with _explained(self._path):
            os.fsync(self._file.fileno())

    def _put(self, line: bytes) -> None:
        self._waiting += line
        if len(self._waiting) > _BLOCK:
            self._flush()

    def _flush(self) -> None:
        with _explained(self._path):
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]


def lock(file: IO[bytes] | io.FileIO, path: Path) -> None:
    """Lock a plan; raises `UnusablePlan` if it is locked, or is not a regular file."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise UnusablePlan(f"{path} is not a regular file")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UnusablePlan(f"{path} is being written, or applied, by another imattr") from None
    except OSError:
        # Some network file systems have no locks.
        return


def _holds_a_plan(file: IO[bytes], path: Path) -> bool:
    """Whether a plan was begun in a file; raises `UnusablePlan` for any other file."""
    file.seek(0)
    head = file.read(MAX_LINE)
    if head.startswith(_BEGINNING) and b"\n" in head:
        return True
    if head.startswith(_BEGINNING) or _BEGINNING.startswith(head):
        # Empty, or with a torn first line.
        return False
    raise UnusablePlan(f"{path} exists and is not a plan of imattr; it is left as it is")


# Reading.


@dataclass(frozen=True, slots=True)
class Survey:
    """What a plan has up to its last mark, which ends at `end`, 0 if there is none. `differences` are users to be changed."""

    header: Header
    mark: Mark
    end: int
    differences: int
    #: The first ones.
    samples: list[Difference]

    @property
    def complete(self) -> bool:
        return self.mark.final


def survey(file: IO[bytes], path: Path, samples: int = 0) -> Survey:
    """Read and check a whole plan, one line at a time.

    Raises `UnusablePlan` for a file that is not one of our plans, or is damaged. Anything after the last mark of an
    incomplete plan may be torn, and does not count.
    """
    lines = read_lines(file, path)
    first = next(lines, None)
    if first is None or not isinstance(first.found, Header):
        raise _foreign(path)
    header, mark, end = first.found, Mark(), 0
    refused = unknown = differences = 0
    # As of the last mark.
    counted = (0, 0, 0)
    shown, early = list[Difference](), list[Difference]()
    for line in lines:
        match line.found:
            case Difference():
                differences += 1
                if len(early) < samples:
                    early.append(line.found)
            case UnknownUser():
                unknown += 1
            case Refusal():
                refused += 1
            case Mark():
                mark, end, counted = line.found, line.end, (refused, unknown, differences)
                shown = list(early)
            case Header():
                raise UnusablePlan(f"{path} is damaged: it has two headers")
        if mark.final:
            break
    if mark.final and file.read(1):
        raise UnusablePlan(f"{path} is damaged: something follows its summary")
    users = mark.tally.users
    if counted != (header.refused if end else 0, users["unknown"], users["differs"]):
        raise UnusablePlan(f"{path} is damaged: its lines do not match its own count")
    if (
        mark.users != mark.tally.judged
        or mark.users > header.users
        or (mark.final and mark.users != header.users)
    ):
        raise UnusablePlan(f"{path} is damaged: its users do not match its own count")
    return Survey(header, mark, end, counted[2], shown)


def read_lines(file: IO[bytes], path: Path, start: int = 0, number: int = 0) -> Iterator[Line]:
    """Yield every line from an offset on, which is after `number` lines; skip a torn last line."""
    end = start
    with _explained(path):
        file.seek(start)
        while text := file.readline(MAX_LINE):
            number, end = number + 1, end + len(text)
            if not text.endswith(b"\n"):
                if len(text) < MAX_LINE and number > 1:
                    return
                raise (
                    UnusablePlan(f"{path} is damaged: line {number:,} is too long")
                    if number > 1
                    else _foreign(path)
                )
            try:
                found = _read(json.loads(text, object_pairs_hook=_without_repeated_names))
            except _OtherVersion as other:
                raise UnusablePlan(f"{path} {other}") from None
            except (ValueError, TypeError, KeyError, RecursionError):
                if number == 1:
                    raise _foreign(path) from None
                raise UnusablePlan(f"{path} is damaged: line {number:,} cannot be read") from None
            yield Line(found, end)


class _OtherVersion(Exception):
    """Raised for a plan of another version, with what to say after its name."""


def _foreign(path: Path) -> UnusablePlan:
    return UnusablePlan(f"{path} is not a plan of imattr")


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _read(fields: Any) -> Header | Refusal | Difference | UnknownUser | Mark:
    """Read a line; raises `ValueError`, `TypeError` or `KeyError` for anything that our plans never have."""
    match fields:
        case {"imattr_plan": version, **others}:
            if type(version) is int and version != VERSION:
                raise _OtherVersion(
                    f"is of version {version}; this imattr reads version {VERSION}: make it again"
                )
            return _header({str(name): value for name, value in others.items()})
        case {"line": line, "user": user, "rule": rule, **others} if not others:
            return Refusal(_whole(line), _text(user), _text(rule))
        case {"user": user, "changes": changes, **others} if not others:
            return Difference(_text(user), _changes(changes))
        case {"user": user, "unknown": True, **others} if not others:
            return UnknownUser(_text(user))
        case {"checkpoint": users, "tally": tally, "calls": calls, "seconds": seconds, **others} if (
            not others
        ):
            return Mark(_whole(users), _tally(tally), _whole(calls), _seconds(seconds))
        case {"summary": users, "tally": tally, "calls": calls, "seconds": seconds, **others} if not others:
            return Mark(_whole(users), _tally(tally), _whole(calls), _seconds(seconds), final=True)
    raise ValueError


#: How each field of a header is checked, by its type in `Header`.
_FIELDS = {name: str(kind) for name, kind in Header.__annotations__.items()}


def _header(fields: dict[str, Any]) -> Header:
    if fields.keys() != _FIELDS.keys():
        raise ValueError
    for name, kind in _FIELDS.items():
        value = fields[name]
        if kind == "int":
            _whole(value)
        elif kind == "bool":
            if type(value) is not bool:
                raise TypeError
        elif not (kind == "str | None" and value is None):
            _text(value)
    _moment(fields["as_of"])
    return Header(**fields)


def _changes(given: Any) -> dict[str, Change]:
    if not isinstance(given, dict) or not given:
        raise ValueError
    found = {}
    for name, (old, new, version) in given.items():
        change = Change(_value(old), _value(new), _moment(version))
        if change.old == change.new:
            raise ValueError
        found[name] = change
    return found


def _tally(given: Any) -> Tally:
    if given.keys() != {"users", "values"}:
        raise ValueError
    if len(given["values"]) > MOST_NAMES + 1:
        raise ValueError
    return Tally(
        _counts(given["users"], FATES),
        {name: _counts(counts, KINDS) for name, counts in given["values"].items()},
    )


def _counts(given: Any, kinds: tuple[Any, ...]) -> dict[Any, int]:
    if given.keys() != set(kinds):
        raise ValueError
    return {kind: _whole(given[kind]) for kind in kinds}


def _text(given: Any) -> str:
    if type(given) is not str:
        raise TypeError
    return given


def _value(given: Any) -> str | None:
    return None if given is None else _text(given)


def _whole(given: Any) -> int:
    if type(given) is not int or not 0 <= given < 1 << 53:
        raise ValueError
    return given


def _moment(given: Any) -> int:
    if not EARLIEST_MS <= _whole(given) <= LATEST_MS:
        raise ValueError
    return int(given)


def _seconds(given: Any) -> float:
    if type(given) not in (int, float) or not 0 <= given < 1e12:
        raise ValueError
    return float(given)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the file system raises into `UnusablePlan`."""
    try:
        yield
    except OSError as error:
        raise UnusablePlan(f"{path} cannot be read or written: {error.strerror}") from None
