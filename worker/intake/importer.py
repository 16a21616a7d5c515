"""The way in for whole files: takes in updates of any number in flat memory, and goes on where it stopped.

A file is the state of the world at one time, so what happens while it is imported must win: every update
has an event time. Those that bring none count as of `ImportOptions.as_of_ms`, by default the moment at which the
import was begun, however often it was interrupted since.

Beside the file, until it is done, stands how far it has come. That is written after each chunk that Redis
has accepted, so nothing is left out. A process that is killed between the two, or stopped while there is no
room, offers that one chunk again, which changes nothing: its updates have the same event times as before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from worker.clock import Clock, SystemClock
from worker.config import Settings
from worker.errors import CannotImport, InvalidUpdate
from worker.intake.import_source import Format, RawUpdate, Record, Source
from worker.models import Update, check_update
from worker.producer import Lane, Producer
from worker.ratelimit import SPACING
from worker.state.buffer import MAX_UPDATES_PER_ADD, Added
from worker.state.connection import ANSWER_TIMEOUT, OutOfMemoryError

#: Seconds until what had no room is offered again; a chunk's worth is delivered meanwhile.
WAIT = 0.05
#: How many refusals a rehearsal shows.
EXAMPLES = 5

NONE = Added(0, 0, 0, 0, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What to import, and how. `path` None is stdin, `format` None is found out."""

    path: Path | None
    format: Format | None = None
    user_column: str = "user"
    lane: Lane = "backfill"
    as_of_ms: int | None = None
    refused: Path | None = None
    restart: bool = False

    @property
    def resumable(self) -> bool:
        """Whether a later run can go on in the middle: not with a pipe."""
        return self.path is not None and self.path.is_file()

    @property
    def refused_path(self) -> Path:
        """Where the refused lines go."""
        return self.refused or self._beside("refused.jsonl")

    @property
    def progress_path(self) -> Path:
        """Where it stands how far the import has come."""
        return self._beside("import-progress")

    def _beside(self, suffix: str) -> Path:
        if self.path is None or not self.resumable:
            return Path(f"imattr-import.{suffix}")
        return self.path.with_name(f"{self.path.name}.{suffix}")


@dataclass(slots=True)
class Progress:
    """How far an import has come, in all of its runs.

    The next record begins after `line`, at `offset`. `accepted` is what Redis has taken; `coalesced`,
    `unchanged` and `stale` are parts of it, as in the ledger.
    """

    as_of_ms: int
    line: int = 0
    offset: int = 0
    accepted: int = 0
    coalesced: int = 0
    unchanged: int = 0
    stale: int = 0
    refused: int = 0
    refused_bytes: int = 0

    @property
    def lines(self) -> int:
        """Updates read, good or not; a header and blank lines are none."""
        return self.accepted + self.refused


class Refusal(NamedTuple):
    """An update refused, and the line on which it stands."""

    line: int
    user: str
    rule: str


State = Literal["accepting", "waiting for room", "checking", "stopped", "complete"]


class ImportStatus(NamedTuple):
    """An import for those who watch it; `seconds` and what is made of them are of this run alone.

    `share` is how much of the file is read, 0 to 1, and `eta` the seconds until it is all accepted, if known.
    """

    state: State
    progress: Progress
    resumed_after: int
    seconds: float
    lines_per_second: float
    share: float | None
    eta: float | None


class Estimate(NamedTuple):
    """What an import would do. `users` is right within 1 % or so, `seconds` is the time at the full quota."""

    state: State
    lines: int
    users: int
    refused: int
    calls: int
    seconds: float
    #: The first refusals.
    refusals: list[Refusal]


@dataclass(slots=True)
class _Chunk:
    """Records that are accepted together; the next one begins after `line`, at `offset`."""

    line: int = 0
    offset: int = 0
    updates: list[Update] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class Importer:
    """One run of an import."""

    def __init__(
        self,
        settings: Settings,
        job: ImportOptions,
        *,
        stopped: Callable[[], bool] = lambda: False,
        show: Callable[[ImportStatus], None] = lambda _: None,
        clock: Clock | None = None,
        size: int = MAX_UPDATES_PER_ADD,
    ) -> None:
        """`stopped` is asked after each chunk of `size` records, and while there is no room."""
        url = settings.redis_url.reveal()
        self._producer = Producer(
            url, settings.sdkappid, max_pending=settings.max_pending, timeout=ANSWER_TIMEOUT
        )
        self._settings, self._job, self._size = settings, job, size
        self._stopped, self._show, self._clock = stopped, show, clock or SystemClock()

    def run(self) -> ImportStatus:
        """Import what no earlier run has; the end is `complete` or `stopped`.

        Raises `CannotImport` and what `redis` raises; what was accepted until then is kept.
        """
        try:
            with self._source() as source, _Journal(self._job, self._identity(source)) as journal:
                source.lock()
                progress = journal.begin(self._as_of())
                records = source.records(progress.line, progress.offset)
                watch = _Watch(self._clock, source, progress)
                with closing(_ahead(self._chunks(records, progress.as_of_ms))) as chunks:
                    complete = self._take(chunks, progress, journal, watch)
                if complete:
                    journal.done()
                return watch.view("complete" if complete else "stopped")
        except OSError as error:
            where = error.filename or self._job.refused_path
            raise CannotImport(f"{where} cannot be written: {error.strerror}") from None

    def _take(self, chunks: Iterator[_Chunk], progress: Progress, journal: _Journal, watch: _Watch) -> bool:
        """Have chunks accepted, one by one; False when stopped before the last."""
        for chunk in chunks:
            added = None if self._stopped() else self._offer(chunk.updates, watch)
            if added is None:
                return False
            _count(progress, chunk, added)
            journal.keep(progress, chunk.refusals)
            self._show(watch.view("accepting"))
        # A pipe that is left ends early.
        return not self._stopped()

    def rehearse(self) -> Estimate:
        """Read and check the whole file, and write nothing, anywhere."""
        users, refusals = HyperLogLog(), list[Refusal]()
        with self._source() as source:
            progress = Progress(self._as_of())
            watch = _Watch(self._clock, source, progress)
            for chunk in self._chunks(source.records(), progress.as_of_ms):
                users.add(update.user for update in chunk.updates)
                _count(progress, chunk, NONE._replace(accepted=len(chunk.updates)))
                refusals += chunk.refusals[: EXAMPLES - len(refusals)]
                self._show(watch.view("checking"))
                if self._stopped():
                    break
        count = users.count()
        calls = math.ceil(count / self._settings.batch_size)
        return Estimate(
            "stopped" if self._stopped() else "complete",
            progress.lines,
            count,
            progress.refused,
            calls,
            calls * SPACING / self._settings.quota,
            refusals,
        )

    def _source(self) -> Source:
        job = self._job
        names = self._producer.names()
        return Source(
            job.path, format=job.format, user_column=job.user_column, names=names, stopped=self._stopped
        )

    def _identity(self, source: Source) -> dict[str, object]:
        """What must be the same for a run that goes on where another one stopped."""
        url = urlsplit(self._settings.redis_url.reveal())
        return {
            "file": source.fingerprint(),
            "app": self._settings.sdkappid,
            "Redis": f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}",
            "lane": self._job.lane,
            "format": source.format,
            "user column": self._job.user_column,
            "file for refused lines": str(self._job.refused_path.absolute()),
        }

    def _as_of(self) -> int:
        now = self._producer.now_ms()
        as_of = now if self._job.as_of_ms is None else self._job.as_of_ms
        if as_of > now:
            raise CannotImport(
                "it cannot be as of a time to come: what happens until then could not replace it"
            )
        return as_of

    def _chunks(self, records: Iterator[Record], as_of_ms: int) -> Iterator[_Chunk]:
        """Records, checked."""
        while True:
            chunk, names = _Chunk(), self._producer.names()
            for first, last, end, given in islice(records, self._size):
                chunk.line, chunk.offset = last, end
                try:
                    if given is not None:
                        chunk.updates.append(_checked(given, as_of_ms, names))
                except InvalidUpdate as error:
                    chunk.refusals.append(Refusal(first, error.user, error.rule))
            if not chunk.line:
                return
            yield chunk

    def _offer(self, updates: Sequence[Update], watch: _Watch) -> Added | None:
        """Give updates until each has found room, in their order; None when stopped before."""
        total = NONE
        while True:
            added = self._add(updates)
            total = _sum(total, added)
            if not added.full:
                return total
            updates = [updates[place] for place in added.full]
            self._show(watch.view("waiting for room"))
            self._clock.sleep(WAIT)
            if self._stopped():
                return None

    def _add(self, updates: Sequence[Update]) -> Added:
        try:
            return self._producer.add(updates, lane=self._job.lane)
        except OutOfMemoryError:
            # No room for any of them: Redis has as much as its maxmemory allows.
            return NONE._replace(full=tuple(range(len(updates))))


def _sum(one: Added, other: Added) -> Added:
    return Added(
        one.accepted + other.accepted,
        one.coalesced + other.coalesced,
        one.unchanged + other.unchanged,
        one.stale + other.stale,
        (),
    )


def _ahead(chunks: Iterator[_Chunk]) -> Generator[_Chunk]:
    """The same chunks, each read while the one before it is being accepted."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, chunks, None)
        while chunk := coming.result():
            coming = reader.submit(next, chunks, None)
            yield chunk


def _checked(given: RawUpdate | InvalidUpdate, as_of_ms: int, names: frozenset[str]) -> Update:
    if isinstance(given, InvalidUpdate):
        raise given
    user, attrs, occurred_at = given
    return check_update(user, attrs, as_of_ms if occurred_at is None else occurred_at, names)


def _count(progress: Progress, chunk: _Chunk, added: Added) -> None:
    progress.line, progress.offset = chunk.line, chunk.offset
    progress.accepted += added.accepted
    progress.coalesced += added.coalesced
    progress.unchanged += added.unchanged
    progress.stale += added.stale
    progress.refused += len(chunk.refusals)


class _Watch:
    """Measures a run. Made when the file is at the place where the run begins."""

    def __init__(self, clock: Clock, source: Source, progress: Progress) -> None:
        self._clock, self._source, self._progress = clock, source, progress
        self._began, self._lines, self._line = clock.monotonic(), progress.lines, progress.line
        self._share = source.share or 0.0

    def view(self, state: State) -> ImportStatus:
        seconds = self._clock.monotonic() - self._began
        rate = (self._progress.lines - self._lines) / seconds if seconds else 0.0
        share, eta = self._source.share, None
        if share is not None and share > self._share:
            eta = seconds * (1 - share) / (share - self._share)
        return ImportStatus(state, self._progress, self._line, seconds, rate, share, eta)


class _Journal:
    """What a run writes down: for people the lines refused, for the next run how far it came.

    Both in the order in which a kill at any instant loses nothing and repeats no refusal.
    """

    def __init__(self, job: ImportOptions, identity: Mapping[str, object]) -> None:
        self._job, self._identity = job, identity
        self._refused: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._refused:
            self._refused.close()

    def begin(self, as_of_ms: int) -> Progress:
        """Where to go on, or the beginning; raises `CannotImport` when something is not as it was."""
        progress = self._read() or Progress(as_of_ms)
        self._forget_refusals_after(progress.refused_bytes)
        self._write(progress)
        return progress

    def keep(self, progress: Progress, refusals: Sequence[Refusal]) -> None:
        """Write down what Redis has accepted, and what it was not given."""
        if refusals:
            lines = [json.dumps(refusal._asdict(), ensure_ascii=False) + "\n" for refusal in refusals]
            packed = "".join(lines).encode()
            self._refused = self._refused or open(self._job.refused_path, "ab")  # noqa: SIM115
            self._refused.write(packed)
            self._refused.flush()
            progress.refused_bytes += len(packed)
        self._write(progress)

    def done(self) -> None:
        """The whole file is accepted."""
        if self._job.resumable:
            self._job.progress_path.unlink()

    def _read(self) -> Progress | None:
        path = self._job.progress_path
        if not self._job.resumable or self._job.restart or not path.exists():
            return None
        try:
            kept = json.loads(path.read_bytes())
            progress = Progress(**kept["progress"])
            before = dict(kept["import"])
        except (ValueError, TypeError, KeyError):
            raise CannotImport(f"{path} is damaged; --restart reads the file from its beginning") from None
        changed = [what for what, value in self._identity.items() if before.get(what) != value]
        if self._job.as_of_ms not in (None, progress.as_of_ms):
            changed.append("as-of time")
        if changed:
            raise CannotImport(
                f"an import of this file stopped after line {progress.line:,}, and the {', the '.join(changed)} "
                "must be the same as then. Or read it from its beginning: "
                f"--restart, with --as-of {progress.as_of_ms} if it is as old as it was"
            )
        return progress

    def _write(self, progress: Progress) -> None:
        if self._job.resumable:
            path = self._job.progress_path
            new = path.with_name(f"{path.name}.new")
            new.write_text(json.dumps({"import": self._identity, "progress": asdict(progress)}))
            new.replace(path)

    def _forget_refusals_after(self, size: int) -> None:
        path = self._job.refused_path
        if not path.is_file():
            return
        if self._job.path and path.samefile(self._job.path):
            raise CannotImport("the refused lines cannot go into the file itself")
        if size:
            os.truncate(path, min(size, path.stat().st_size))
        else:
            path.unlink()


class HyperLogLog:
    """Counts different texts in 64 kB, to half a percent: HyperLogLog, with linear counting for few."""

    _BITS = 16

    def __init__(self) -> None:
        self._longest = bytearray(1 << self._BITS)

    def add(self, texts: Iterable[str]) -> None:
        """Count these, those seen before not again."""
        rest = 64 - self._BITS
        for text in texts:
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            place, zeros = number >> rest, rest - (number & ((1 << rest) - 1)).bit_length()
            if self._longest[place] <= zeros:
                self._longest[place] = zeros + 1

    def count(self) -> int:
        """About how many there were."""
        size = len(self._longest)
        estimate = 0.7213 / (1 + 1.079 / size) * size**2 / sum(2.0**-longest for longest in self._longest)
        if estimate <= 2.5 * size and (empty := self._longest.count(0)):
            estimate = size * math.log(size / empty)
        return round(estimate)
