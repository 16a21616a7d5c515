"""Imports whole files: any number of updates in constant memory, resuming where an earlier run stopped.

A file describes the world at one time, so what happens during the import must win: every update has an event time. Those
without one of their own get `ImportOptions.as_of_ms`, by default the moment at which the import first began, however often it
is interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from worker.clock import Clock, SystemClock
from worker.config import Settings
from worker.errors import CannotImport, InvalidUpdate
from worker.intake.hyperloglog import HyperLogLog
from worker.intake.import_progress import ImportJournal, ImportOptions, Progress, Refusal
from worker.intake.import_source import RawUpdate, Record, Source, Unreadable
from worker.models import Update, check_update
from worker.producer import Producer
from worker.ratelimit import SPACING
from worker.state.buffer import MAX_UPDATES_PER_ADD, NOTHING_ADDED, RULES, Added
from worker.state.connection import ANSWER_TIMEOUT, OutOfMemoryError, RedisError, connect
from worker.state.import_pauses import ImportPauses, Pause
from worker.state.keys import Keys

#: Seconds until updates without room are sent again; a chunk's worth is delivered meanwhile.
WAIT = 0.05
#: Seconds between two reports of an import's progress to `imattr status`.
TELL_EVERY = 1.0
#: Seconds between two checks whether a person has paused the import.
LOOK_EVERY = 1.0
#: How many refusals a dry run shows, and how many of the last ones `imattr status` and the console can show.
EXAMPLES, LAST_REFUSALS = 5, 10

State = Literal["accepting", "waiting for room", "paused", "checking", "stopped", "complete"]


class ImportStatus(NamedTuple):
    """The state of an import, for people. `seconds` and `lines_per_second` are those of this run.

    `share` is how much of the file has been read, 0 to 1; `eta` the seconds until all is accepted, if known.
    """

    state: State
    progress: Progress
    resumed_after: int
    seconds: float
    lines_per_second: float
    share: float | None
    eta: float | None
    #: How the file was understood, where that is not obvious.
    notes: list[str]
    #: Who paused it.
    pause: Pause | None = None


class Estimate(NamedTuple):
    """What an import would do. `users` is right within about 1 %; `seconds` is the time at the full quota."""

    state: State
    lines: int
    users: int
    refused: int
    calls: int
    seconds: float
    #: The first refusals.
    refusals: list[Refusal]
    #: The first updates as understood, with their lines.
    samples: list[tuple[int, Update]]
    #: How the file was understood, where that is not obvious.
    notes: list[str]


@dataclass(slots=True)
class _Chunk:
    """Records that are accepted together; the next chunk begins after `line`, at `offset`."""

    line: int = 0
    offset: int = 0
    updates: list[Update] = field(default_factory=list)
    #: The line of each update.
    lines: list[int] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class Importer:
    """One run of an import."""

    def __init__(
        self,
        settings: Settings,
        options: ImportOptions,
        *,
        stopped: Callable[[], bool] = lambda: False,
        show: Callable[[ImportStatus], None] = lambda _: None,
        clock: Clock | None = None,
        size: int = MAX_UPDATES_PER_ADD,
    ) -> None:
        """`stopped` is called after each chunk of `size` records, and while there is no room."""
        self._producer = Producer.of(settings, timeout=ANSWER_TIMEOUT, way="import")
        self._settings, self._options, self._size = settings, options, size
        self._stopped, self._show, self._clock = stopped, show, clock or SystemClock()
        redis, keys = connect(settings.redis, key=Keys(settings.sdkappid).pending), Keys(settings.sdkappid)
        self._pauses = ImportPauses(redis, keys)
        self._pause: Pause | None = None
        self._refusals: deque[Refusal] = deque(maxlen=LAST_REFUSALS)
        self._tell_at = self._look_at = 0.0

    def run(self) -> ImportStatus:
        """Import what no earlier run has; the final state is `complete` or `stopped`.

        Raises `CannotImport`, and what `redis` raises; what was accepted until then stays accepted.
        """
        try:
            with self._source() as source, ImportJournal(self._options, self._identity(source)) as journal:
                source.lock()
                name = self._options.name
                # First of all, so that nothing delivered from now on is forgotten.
                self._producer.begin_import(name, self._producer.now_ms())
                progress = journal.begin(self._as_of())
                self._producer.begin_import(name, progress.as_of_ms)
                records = source.records(progress.line, progress.offset)
                watch = _Watch(self._clock, source, progress)
                with closing(_ahead(self._chunks(records, progress.as_of_ms))) as chunks:
                    complete = self._take(chunks, progress, journal, watch)
                if complete:
                    journal.done()
                if complete or not self._options.resumable:
                    self._producer.end_import(name)
                return watch.status("complete" if complete else "stopped")
        except OSError as error:
            where = error.filename or self._options.refused_path
            raise CannotImport(f"{where} cannot be written: {error.strerror}") from None

    def _take(
        self, chunks: Iterator[_Chunk], progress: Progress, journal: ImportJournal, watch: _Watch
    ) -> bool:
        """Have chunks accepted one by one; returns False if stopped before the last."""
        for chunk in chunks:
            self._wait_while_paused(watch)
            added = None if self._stopped() else self._offer(chunk, progress.as_of_ms, watch)
            if added is None:
                return False
            _count(progress, chunk, added)
            journal.keep(progress, chunk.refusals)
            self._refusals.extend(chunk.refusals)
            self._tell(watch.status("accepting"))
        # An abandoned pipe ends early.
        return not self._stopped()

    def _wait_while_paused(self, watch: _Watch) -> None:
        """Wait until the import is no longer paused, or is stopped. A failing Redis raises where it matters."""
        if self._clock.monotonic() < self._look_at:
            return
        while True:
            with suppress(RedisError):
                self._pause = self._pauses.find(self._options.name)
            if not self._pause or self._stopped():
                break
            self._tell(watch.status("paused")._replace(pause=self._pause))
            self._clock.sleep(LOOK_EVERY)
        self._look_at = self._clock.monotonic() + LOOK_EVERY

    def _tell(self, status: ImportStatus) -> None:
        """Report the progress: here at once, and to `imattr status` every second."""
        self._show(status)
        now = self._clock.monotonic()
        if now < self._tell_at:
            return
        self._tell_at = now + TELL_EVERY
        about = {
            "at": self._producer.now_ms() / 1000,
            "state": status.state,
            "lines": status.progress.lines,
            "refused": status.progress.refused,
            "share": status.share,
            "eta": status.eta,
            "refusals": list(self._refusals),
        }
        # Only people look at it: a failing Redis raises where it matters.
        with suppress(RedisError):
            self._producer.show_import(self._options.name, about)

    def abandon(self) -> bool:
        """Abandon an import that an earlier run began; returns whether there was one."""
        self._producer.end_import(self._options.name)
        path = self._options.progress_path
        if not path.is_file():
            return False
        path.unlink()
        return True

    def rehearse(self) -> Estimate:
        """Read and check the whole file without writing anything, anywhere."""
        users, refusals, samples = HyperLogLog(), list[Refusal](), list[tuple[int, Update]]()
        with self._source() as source:
            progress = Progress(self._as_of())
            watch = _Watch(self._clock, source, progress)
            for chunk in self._chunks(source.records(), progress.as_of_ms):
                users.add(update.user for update in chunk.updates)
                _count(progress, chunk, NOTHING_ADDED._replace(accepted=len(chunk.updates)))
                refusals += chunk.refusals[: EXAMPLES - len(refusals)]
                samples += list(zip(chunk.lines, chunk.updates, strict=True))[: EXAMPLES - len(samples)]
                self._show(watch.status("checking"))
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
            samples,
            source.notes,
        )

    def _source(self) -> Source:
        options = self._options
        names = self._producer.names()
        return Source(
            options.path,
            format=options.format,
            user_column=options.user_column,
            names=names,
            null=options.null,
            stopped=self._stopped,
        )

    def _identity(self, source: Source) -> dict[str, object]:
        """What must be the same for a run to resume another one."""
        return {
            "file": source.fingerprint(),
            "app": self._settings.sdkappid,
            "Redis": str(self._settings.redis),
            "lane": self._options.lane,
            "format": source.format,
            "text for no value": self._options.null,
            "user column": self._options.user_column,
            "file for refused lines": str(self._options.refused_path.absolute()),
        }

    def _as_of(self) -> int:
        now = self._producer.now_ms()
        as_of = now if self._options.as_of_ms is None else self._options.as_of_ms
        if as_of > now + self._settings.max_ahead * 1000:
            raise CannotImport(f"--as-of: {RULES['ahead']}")
        # If two clocks differ a little, Redis' is the one that counts.
        return min(as_of, now)

    def _chunks(self, records: Iterator[Record], as_of_ms: int) -> Iterator[_Chunk]:
        """Chunks of validated records."""
        while True:
            chunk, names = _Chunk(), self._producer.names()
            for first, last, end, found in islice(records, self._size):
                chunk.line, chunk.offset = last, end
                checked = check_record(found, as_of_ms, names)
                if isinstance(checked, Unreadable):
                    chunk.refusals.append(Refusal(first, *checked))
                elif checked:
                    chunk.updates.append(checked)
                    chunk.lines.append(first)
            if not chunk.line:
                return
            yield chunk

    def _offer(self, chunk: _Chunk, as_of_ms: int, watch: _Watch) -> Added | None:
        """Send a chunk's updates, in order, until each has found room; None if stopped before."""
        total, left = NOTHING_ADDED, list(range(len(chunk.updates)))
        while True:
            added = self._add([chunk.updates[place] for place in left], as_of_ms)
            total = _sum(total, added)
            for place, rule in added.refused:
                chunk.refusals.append(
                    Refusal(chunk.lines[left[place]], chunk.updates[left[place]].user, rule)
                )
            if not added.full:
                chunk.refusals.sort()
                return total
            left = [left[place] for place in added.full]
            self._tell(watch.status("waiting for room"))
            self._clock.sleep(WAIT)
            if self._stopped():
                return None

    def _add(self, updates: Sequence[Update], as_of_ms: int) -> Added:
        try:
            return self._producer.add(updates, lane=self._options.lane, as_of_ms=as_of_ms)
        except OutOfMemoryError:
            # No room for any of them: Redis is at its maxmemory.
            return NOTHING_ADDED._replace(full=tuple(range(len(updates))))


def _sum(one: Added, other: Added) -> Added:
    return Added(
        one.accepted + other.accepted,
        one.coalesced + other.coalesced,
        one.unchanged + other.unchanged,
        one.stale + other.stale,
    )


def _ahead(chunks: Iterator[_Chunk]) -> Generator[_Chunk]:
    """The same chunks, each read while the one before is being accepted."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, chunks, None)
        while chunk := coming.result():
            coming = reader.submit(next, chunks, None)
            yield chunk


def check_record(
    found: RawUpdate | Unreadable | None, as_of_ms: int, names: frozenset[str]
) -> Update | Unreadable | None:
    """Return the update in a record, as of `as_of_ms` if it has no time of its own; or why it is none. None for a blank
    line."""
    if not isinstance(found, RawUpdate):
        return found
    moment = as_of_ms if found.occurred_at is None else found.occurred_at
    try:
        return check_update(found.user, found.attrs, moment, names)
    except InvalidUpdate as error:
        return Unreadable(error.user, error.rule)


def _count(progress: Progress, chunk: _Chunk, added: Added) -> None:
    progress.line, progress.offset = chunk.line, chunk.offset
    progress.accepted += added.accepted
    progress.coalesced += added.coalesced
    progress.unchanged += added.unchanged
    progress.stale += added.stale
    progress.refused += len(chunk.refusals)


class _Watch:
    """Measures a run. Created when the file is at the place where the run begins."""

    def __init__(self, clock: Clock, source: Source, progress: Progress) -> None:
        self._clock, self._source, self._progress = clock, source, progress
        self._began, self._lines, self._line = clock.monotonic(), progress.lines, progress.line
        self._share = source.share or 0.0

    def status(self, state: State) -> ImportStatus:
        seconds = self._clock.monotonic() - self._began
        rate = (self._progress.lines - self._lines) / seconds if seconds else 0.0
        share, eta = self._source.share, None
        if share is not None and share > self._share:
            eta = seconds * (1 - share) / (share - self._share)
        return ImportStatus(state, self._progress, self._line, seconds, rate, share, eta, self._source.notes)
