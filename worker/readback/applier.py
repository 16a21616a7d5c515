"""Applies a plan: queues its changes, user by user, except those that no longer hold.

For each hundred users, in this order:

1. read what is remembered, ask the API again, and read what is remembered once more (`Crew.observe`);
2. skip users that are in motion, or no longer have the plan's old values;
3. correct what is remembered as delivered by what was found, or `add` would drop the repair as already delivered;
4. add the rest to the lane `backfill`, as of the time of the file.

That time is before the plan was begun. So whatever is accepted after that, at any moment in between, the newer value wins: in
`add` if it is pending, in flight or remembered, and before that at the second step. While a plan is being applied, nothing
that is delivered is forgotten, as during an import.

Applying again is harmless: users are in motion or have their new values by then.
"""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self

from worker.clock import Clock, SystemClock
from worker.config import Settings
from worker.errors import InvalidUpdate, UnusablePlan
from worker.intake.importer import LOOK_EVERY, TELL_EVERY, WAIT
from worker.models import Update, UserId, check_update
from worker.producer import Producer
from worker.readback.crew import USERS_PER_CALL, Crew, Observation
from worker.readback.difference import Change, recheck
from worker.readback.plan_file import Difference, Survey, lock, read_lines, survey
from worker.readback.reader import ReadingStopped
from worker.state.buffer import MAX_UPDATES_PER_ADD
from worker.state.connection import ANSWER_TIMEOUT, OutOfMemoryError, RedisError
from worker.state.history import History
from worker.state.import_pauses import ImportPauses, Pause
from worker.state.shadow import Shadow

#: Seconds until users for whom there was no room are read again.
FULL_WAIT = 1.0
#: How many refusals are shown.
EXAMPLES = 5

State = Literal["applying", "stopped", "complete"]
#: What it is waiting for; empty if for nothing.
Waiting = Literal["", "waiting for room", "paused"]


class Refused(NamedTuple):
    """A user whose planned values break a rule."""

    user: str
    rule: str


@dataclass(slots=True)
class Applied:
    """What became of the users, in all runs together.

    `queued` will be delivered; `done` had the new values already; `changed` have changed since the plan, or something newer
    is known; `unknown` are no longer known to the API.
    """

    queued: int = 0
    done: int = 0
    changed: int = 0
    in_motion: int = 0
    unknown: int = 0
    refused: int = 0

    @property
    def users(self) -> int:
        return self.queued + self.done + self.changed + self.in_motion + self.unknown + self.refused

    def add(self, other: Applied) -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(slots=True)
class Progress:
    """How far a plan is applied: the next line begins at `offset`, after `line` lines. `as_of` is when it was begun, in
    ms."""

    as_of: int
    offset: int = 0
    line: int = 0
    applied: Applied = field(default_factory=Applied)


class ApplyStatus(NamedTuple):
    """How far a plan is applied, for people; seconds and calls are those of this run."""

    state: State
    applied: Applied
    #: Users to be changed by the plan, and those of them that an earlier run has handled.
    users: int
    resumed_after: int
    calls: int
    seconds: float
    eta: float | None
    waiting: Waiting
    #: The first refusals of this run.
    refusals: list[Refused]


class OpenPlan:
    """A plan that nobody else writes or applies while it is open."""

    def __init__(self, path: Path, settings: Settings, *, partial: bool = False, samples: int = 0) -> None:
        """Read and check all of it; raises `UnusablePlan`, also if it is for another app or API.

        `samples` is how many of its first differences to keep, to be shown.
        """
        self.path = path
        try:
            file = open(path, "rb")  # noqa: SIM115  # closed with this
        except OSError as error:
            raise UnusablePlan(f"{path} cannot be read: {error.strerror}") from None
        self.file: io.BufferedReader = file
        try:
            lock(self.file, path)
            self.found: Survey = survey(self.file, path, samples)
            self._check(settings, partial)
            self.progress = self._read_progress()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def _check(self, settings: Settings, partial: bool) -> None:
        header, mark = self.found.header, self.found.mark
        if header.app != settings.sdkappid:
            raise UnusablePlan(
                f"{self.path} is for the app {header.app}, the settings are for {settings.sdkappid}"
            )
        if header.api != (api := f"{settings.base_url} {settings.api}"):
            raise UnusablePlan(f"{self.path} was made with the API at {header.api}, the settings name {api}")
        if not self.found.complete and not partial:
            raise UnusablePlan(
                f"{self.path} is not complete: {mark.users:,} of {header.users:,} users were compared. imattr plan "
                "continues it; --partial applies what is there"
            )

    @property
    def progress_path(self) -> Path:
        """The file that records how far the plan is applied."""
        return self.path.with_name(f"{self.path.name}.apply-progress")

    def _read_progress(self) -> Progress | None:
        try:
            kept = json.loads(self.progress_path.read_bytes())
            if kept["plan"] != self.found.header.id:
                return None
            applied = Applied(**kept["applied"])
            progress = Progress(kept["as_of"], kept["offset"], kept["line"], applied)
            numbers = [progress.as_of, progress.offset, progress.line, *asdict(applied).values()]
            if not all(type(one) is int and 0 <= one < 1 << 53 for one in numbers):
                raise ValueError
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnusablePlan(f"{self.progress_path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UnusablePlan(f"{self.progress_path} is damaged; delete it to begin again") from None
        return progress if progress.offset <= self.found.end else None

    def keep(self, progress: Progress) -> None:
        """Record how far the plan is applied. After a kill before that, a little is repeated, which changes nothing."""
        new = self.progress_path.with_name(f"{self.progress_path.name}.new")
        kept = {"plan": self.found.header.id, **asdict(progress)}
        try:
            with open(new, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                json.dump(kept, file)
            new.replace(self.progress_path)
        except OSError as error:
            raise UnusablePlan(f"{self.progress_path} cannot be written: {error.strerror}") from None

    def forget_progress(self) -> None:
        """Delete the progress: nothing is left to apply, or the plan is abandoned."""
        with suppress(OSError):
            self.progress_path.unlink()

    @property
    def name(self) -> str:
        """The name that distinguishes applying this plan, in all its runs, from imports."""
        return f"{socket.gethostname()}:{self.path.absolute()}"


class _Chunk(NamedTuple):
    """Users that are applied together; the next chunk begins at `offset`, after `line` lines."""

    changes: dict[UserId, Mapping[str, Change]]
    offset: int
    line: int


class _Outcome(NamedTuple):
    applied: Applied
    refused: list[Refused]


class Applier:
    """One run of applying a plan."""

    def __init__(
        self,
        settings: Settings,
        plan: OpenPlan,
        shadow: Shadow,
        history: History,
        pauses: ImportPauses,
        crew: Crew,
        *,
        by: str = "",
        show: Callable[[ApplyStatus], None] = lambda _: None,
        clock: Clock | None = None,
    ) -> None:
        """The crew's `stopped` ends the run; the next one continues where it ended."""
        self._plan, self._shadow, self._history, self._pauses = plan, shadow, history, pauses
        self._crew = crew
        self._by, self._show, self._clock = by, show, clock or SystemClock()
        self._producer = Producer.of(settings, timeout=ANSWER_TIMEOUT, way="import")
        self._refusals: list[Refused] = []
        self._waiting: Waiting = ""
        self._pause: Pause | None = None
        self._tell_at = self._look_at = 0.0
        self._telling = threading.Lock()
        self._status: Callable[[State], ApplyStatus]

    def run(self) -> ApplyStatus:
        """Queue what no earlier run has; the final state is `complete` or `stopped`.

        Raises `UnusablePlan`, `CallFailed`, and what `redis` raises; what was queued until then stays queued.
        """
        plan = self._plan
        progress = plan.progress or Progress(self._producer.now_ms())
        # First of all, so that nothing delivered from now on is forgotten.
        self._producer.begin_import(plan.name, progress.as_of)
        plan.keep(progress)
        resumed_after, began = progress.applied.users, self._clock.monotonic()

        def status(state: State) -> ApplyStatus:
            seconds = self._clock.monotonic() - began
            done, users = progress.applied.users - resumed_after, plan.found.differences
            eta = seconds * (users - progress.applied.users) / done if done else None
            waiting, calls = self._waiting, self._crew.calls
            return ApplyStatus(
                state, progress.applied, users, resumed_after, calls, seconds, eta, waiting, self._refusals
            )

        self._status = status
        state: State = "stopped"
        try:
            with closing(self._crew.each(self._apply, self._chunks(progress))) as outcomes:
                for chunk, outcome in outcomes:
                    progress.applied.add(outcome.applied)
                    progress.offset, progress.line = chunk.offset, chunk.line
                    self._refusals += outcome.refused[: EXAMPLES - len(self._refusals)]
                    plan.keep(progress)
                    self._tell()
            state = "complete"
        except ReadingStopped:
            pass
        finally:
            self._history.note("applied", self._by, state=state, **asdict(progress.applied))
        if state == "complete":
            self._producer.end_import(plan.name)
            plan.forget_progress()
        return status(state)

    def abandon(self) -> bool:
        """Abandon what an earlier run began; returns whether there was anything."""
        self._producer.end_import(self._plan.name)
        self._plan.forget_progress()
        return self._plan.progress is not None

    def _tell(self) -> None:
        """Report the progress: here at once, and to `imattr status` every second."""
        with self._telling:
            status = self._status("applying")
            self._show(status)
            now = self._clock.monotonic()
            if now < self._tell_at:
                return
            self._tell_at = now + TELL_EVERY
            about = {
                "at": self._producer.now_ms() / 1000,
                "state": status.waiting or "applying a plan",
                "lines": status.applied.users,
                "refused": status.applied.refused,
                "share": status.applied.users / max(1, status.users),
                "eta": status.eta,
            }
            # Only people look at it: a failing Redis raises where it matters.
            with suppress(RedisError):
                self._producer.show_import(self._plan.name, about)

    def _chunks(self, progress: Progress) -> Iterator[_Chunk]:
        """The differences that no earlier run has handled; no chunk has a user twice."""
        changes: dict[UserId, Mapping[str, Change]] = {}
        offset, line = progress.offset, progress.line
        for found, end in read_lines(self._plan.file, self._plan.path, offset, line):
            if isinstance(found, Difference):
                if found.user in changes or len(changes) == USERS_PER_CALL:
                    yield _Chunk(changes, offset, line)
                    changes = {}
                changes[found.user] = found.changes
            offset, line = end, line + 1
            if end >= self._plan.found.end:
                break
        if changes:
            yield _Chunk(changes, offset, line)

    # What a reader of the crew does.

    def _apply(self, chunk: _Chunk) -> _Outcome:
        done = _Outcome(Applied(), [])
        left: Mapping[UserId, Mapping[str, Change]] = chunk.changes
        while left:
            self._wait_until_welcome()
            seen = self._crew.observe(list(left))
            left = self._queue(left, seen, done)
            if left:
                # There was no room after all. They are read again, since it may be a while until there is.
                self._clock.sleep(FULL_WAIT)
        return done

    def _wait_until_welcome(self) -> None:
        """Wait while this is paused, as an import may be, or there is no room."""
        while True:
            if self._crew.is_over():
                raise ReadingStopped
            self._look_for_a_pause()
            if self._pause:
                self._waiting = "paused"
            elif not self._producer.has_room():
                self._waiting = "waiting for room"
            else:
                self._waiting = ""
                return
            self._tell()
            self._clock.sleep(LOOK_EVERY if self._pause else WAIT)

    def _look_for_a_pause(self) -> None:
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            # A failing Redis raises where it matters.
            with suppress(RedisError):
                self._pause = self._pauses.find(self._plan.name)

    def _queue(
        self, planned: Mapping[UserId, Mapping[str, Change]], seen: Observation, done: _Outcome
    ) -> Mapping[UserId, Mapping[str, Change]]:
        """Queue what still holds, and return the users for whom there was no room."""
        names = self._producer.names()
        ready: dict[UserId, list[Update]] = {}
        for user, changes in planned.items():
            if user in seen.moving:
                done.applied.in_motion += 1
                continue
            standing, left = recheck(changes, seen.found[user], seen.newest(user))
            if standing != "ready":
                setattr(done.applied, standing, getattr(done.applied, standing) + 1)
                continue
            try:
                ready[user] = _updates(user, left, names)
            except InvalidUpdate as error:
                done.applied.refused += 1
                done.refused.append(Refused(error.user, error.rule))
        still = set(self._shadow.correct({user: _memory(user, planned[user], seen) for user in ready}))
        done.applied.in_motion += len(ready) - len(still)
        updates = [update for user in ready if user in still for update in ready[user]]
        full = self._add(updates, seen.at_ms, done)
        return {user: planned[user] for user in full}

    def _add(self, updates: Sequence[Update], at_ms: int, done: _Outcome) -> set[UserId]:
        """Add to the buffer; returns the users for whom there was no room."""
        full, refused = set[UserId](), dict[UserId, str]()
        stale = 0
        for start in range(0, len(updates), MAX_UPDATES_PER_ADD):
            page = updates[start : start + MAX_UPDATES_PER_ADD]
            try:
                added = self._producer.add(page, lane="backfill", as_of_ms=at_ms)
            except OutOfMemoryError:
                # No room for any of them: Redis is at its maxmemory.
                full |= {update.user for update in page}
                continue
            full |= {page[place].user for place in added.full}
            refused |= {page[place].user: rule for place, rule in added.refused}
            # Something newer has been accepted since they were observed.
            stale += added.stale + added.unchanged
        users = {update.user for update in updates} - full
        done.applied.refused += len(users & refused.keys())
        done.refused.extend(Refused(user, rule) for user, rule in refused.items() if user in users)
        stale = min(stale, len(users - refused.keys()))
        done.applied.changed += stale
        done.applied.queued += len(users - refused.keys()) - stale
        return full


def _updates(user: UserId, changes: Mapping[str, Change], names: frozenset[str]) -> list[Update]:
    """Return what to queue for one user: usually one update, since most lines of a file have one time.

    Raises `InvalidUpdate`.
    """
    attrs = check_update(user, {name: change.new for name, change in changes.items()}, None, names).attrs
    versions = {name: change.version for name, change in changes.items()}
    return [
        Update(user, {name: value for name, value in attrs.items() if versions[name] == version}, version)
        for version in sorted(set(versions.values()))
    ]


def _memory(
    user: UserId, changes: Mapping[str, Change], seen: Observation
) -> tuple[str, dict[str, str | None]]:
    """Return what to remember about a user: what was found."""
    known, have = seen.known[user], seen.found[user] or {}
    return known.mark, {name: have.get(name) for name in {*known.values, *changes}}
