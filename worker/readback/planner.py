"""Makes a plan: reads a file, asks the API what its users have, and writes the differences to a file.

Changes nothing, neither at the API nor in Redis. The file is read as an import would read it, with the same refusals, and a
value counts as of the same time: its own event time, or that of the whole file. Without either, it is the moment at which the
plan was begun, so a plan never overwrites anything accepted from then on.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from worker.clock import Clock, SystemClock
from worker.config import Settings
from worker.errors import CannotImport, UnusablePlan
from worker.intake.import_progress import Refusal
from worker.intake.import_source import Format, Source, Unreadable
from worker.intake.importer import check_record
from worker.models import Update, UserId
from worker.producer import Producer
from worker.ratelimit import SPACING
from worker.readback.crew import USERS_PER_CALL, Crew
from worker.readback.difference import Verdict, Want, judge
from worker.readback.plan_file import Difference, Header, Mark, PlanWriter, Survey, UnknownUser
from worker.readback.reader import ReadingStopped
from worker.readback.wanted import WantedUsers
from worker.state.buffer import RULES
from worker.state.connection import ANSWER_TIMEOUT
from worker.state.shadow import Shadow

#: Records of the file that are read at a time.
PAGE = 1000
#: Seconds between two checkpoints, each of which waits for the disk.
CHECKPOINT_EVERY = 1.0
#: How many changes, and refused lines, are shown.
SAMPLES, EXAMPLES = 24, 5

State = Literal["reading the file", "comparing", "stopped", "complete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What to plan, and how. `path` None is stdin; `format` None is detected."""

    path: Path | None
    out: Path | None = None
    format: Format | None = None
    user_column: str = "user"
    #: The text that means no value in a cell of CSV, besides an empty cell.
    null: str | None = None
    as_of_ms: int | None = None
    restart: bool = False

    @property
    def plan_path(self) -> Path:
        """Where the plan goes."""
        return self.out or (
            self.path.with_name(f"{self.path.name}.plan") if self.path else Path("imattr.plan")
        )


class PlanStatus(NamedTuple):
    """How far a plan is, for people. `share` is how much of the file, or of its users, is done, 0 to 1, if known.

    `lines`, `refused` and `users` count what has been read of the file; `resumed_after` users were compared by an earlier
    run. `eta` is the seconds until the plan is complete, if known.
    """

    state: State
    lines: int
    refused: int
    users: int
    mark: Mark
    resumed_after: int
    share: float | None
    eta: float | None
    #: How the file was understood, where that is not obvious.
    notes: list[str]


class Plan(NamedTuple):
    """The result of a run."""

    state: State
    header: Header
    mark: Mark
    notes: list[str]
    #: The first changes, and the first refused lines.
    samples: list[Difference]
    refusals: list[Refusal]


class Cost(NamedTuple):
    """The least that work at the API takes."""

    calls: int
    seconds: float


def cost_of_reading(users: int, settings: Settings) -> Cost:
    """What reading that many users takes if nothing else uses the slots."""
    calls = math.ceil(users / USERS_PER_CALL)
    return Cost(calls, calls * SPACING / (settings.read_quota or settings.quota))


def cost_of_applying(mark: Mark, settings: Settings) -> tuple[Cost, Cost]:
    """What reading the users again takes at the plan's pace, and delivering them at full pace."""
    differ = mark.tally.users["differs"]
    again = cost_of_reading(differ, settings)
    # Reads may have to wait for deliveries, as they did for the plan.
    if mark.calls and mark.seconds:
        again = Cost(again.calls, max(again.seconds, again.calls * mark.seconds / mark.calls))
    removed = min(differ, mark.tally.total("remove"))
    # Removing is a call of its own.
    calls = math.ceil(differ / settings.batch_size) + math.ceil(removed / settings.batch_size)
    return again, Cost(calls, calls * SPACING / settings.quota)


class Planner:
    """One run of a plan."""

    def __init__(
        self,
        settings: Settings,
        options: PlanOptions,
        shadow: Shadow,
        crew: Crew,
        *,
        by: str = "",
        show: Callable[[PlanStatus], None] = lambda _: None,
        clock: Clock | None = None,
    ) -> None:
        """`by` is whose plan it is. The crew's `stopped` ends the run; the next one continues where it ended."""
        self._settings, self._options, self._shadow, self._crew = settings, options, shadow, crew
        self._by, self._show, self._clock = by, show, clock or SystemClock()
        self._producer = Producer.of(settings, timeout=ANSWER_TIMEOUT, way="import")
        self._lines = self._refused = 0
        self._notes, self._format = list[str](), ""
        self._samples = list[Difference]()
        #: When the file was true, in ms, if a person named that time, else 0.
        self._named_time = 0

    def run(self) -> Plan:
        """Make the plan, or continue it; the final state is `complete` or `stopped`.

        Raises `CannotImport`, `UnusablePlan`, `CallFailed`, and what `redis` raises: comparisons made until then are kept.
        """
        options = self._options
        with (
            PlanWriter(options.plan_path, restart=options.restart, samples=SAMPLES) as plan,
            WantedUsers() as wanted,
        ):
            begun = plan.begun
            header = self._header(begun)
            self._named_time = header.as_of if header.explicit else 0
            loaded = self._load(wanted, header.as_of)
            header = replace(
                header,
                format=self._format,
                digest=wanted.digest() if loaded else "",
                lines=self._lines,
                refused=self._refused,
                users=len(wanted),
            )
            refusals = list(islice(wanted.refusals(), EXAMPLES))
            mark = begun.mark if begun else Mark()
            self._samples = begun.samples if begun else []
            if loaded:
                mark = self._compare(plan, header, wanted)
        if begun:
            header = replace(header, id=begun.header.id, made=begun.header.made, made_by=begun.header.made_by)
        state: State = "complete" if mark.final else "stopped"
        return Plan(state, header, mark, self._notes, self._samples, refusals)

    def _header(self, begun: Survey | None) -> Header:
        """What is known before the file is read. A continued plan keeps its time."""
        now = self._producer.now_ms()
        as_of, explicit = self._options.as_of_ms, self._options.as_of_ms is not None
        if as_of is None and begun:
            as_of, explicit = begun.header.as_of, begun.header.explicit
        if as_of is not None and as_of > now + self._settings.max_ahead * 1000:
            raise CannotImport(f"--as-of: {RULES['ahead']}")
        # Older than anything accepted from now on. If two clocks differ a little, Redis' is the one that counts.
        as_of = min(now - 1, now if as_of is None else as_of)
        return Header(
            id=secrets.token_hex(8),
            app=self._settings.sdkappid,
            api=f"{self._settings.base_url} {self._settings.api}",
            source=str(self._options.path or "-"),
            digest="",
            format="",
            user_column=self._options.user_column,
            null=self._options.null,
            as_of=as_of,
            explicit=explicit,
            lines=0,
            refused=0,
            users=0,
            made=now // 1000,
            made_by=self._by,
        )

    def _load(self, wanted: WantedUsers, as_of: int) -> bool:
        """Read the whole file; False if stopped before its end."""
        options, names = self._options, self._producer.names()
        with Source(
            options.path,
            format=options.format,
            user_column=options.user_column,
            names=names,
            null=options.null,
            stopped=self._crew.is_over,
        ) as source:
            self._format, records = source.format, source.records()
            while page := list(islice(records, PAGE)):
                updates, refusals = list[Update](), list[Refusal]()
                for line, _, _, found in page:
                    checked = check_record(found, as_of, names)
                    if isinstance(checked, Unreadable):
                        refusals.append(Refusal(line, *checked))
                    elif checked:
                        updates.append(checked)
                wanted.add(updates, refusals)
                self._lines += len(updates) + len(refusals)
                self._refused += len(refusals)
                self._notes = source.notes
                self._show(self._status("reading the file", 0, Mark(), 0, source.share, None))
                if self._crew.is_over():
                    return False
        # An abandoned pipe ends early.
        return not self._crew.is_over()

    def _compare(self, plan: PlanWriter, header: Header, wanted: WantedUsers) -> Mark:
        """Compare all users that no earlier run has; the mark returned is final unless stopped."""
        mark = start = plan.begin(header, wanted.refusals())
        began = checkpoint_at = self._clock.monotonic()
        tally = mark.tally
        chunks = wanted.chunks(USERS_PER_CALL, mark.users)
        try:
            with closing(self._crew.each(self._judge, chunks)) as judged:
                for chunk, verdicts in judged:
                    for user, verdict in verdicts.items():
                        tally.count(verdict)
                        if verdict.fate == "differs":
                            difference = Difference(user, verdict.changes)
                            plan.write(difference)
                            if len(self._samples) < SAMPLES:
                                self._samples.append(difference)
                        elif verdict.fate == "unknown":
                            plan.write(UnknownUser(user))
                    now = self._clock.monotonic()
                    calls, seconds = start.calls + self._crew.calls, start.seconds + now - began
                    mark = Mark(mark.users + len(chunk), tally, calls, seconds)
                    if now >= checkpoint_at + CHECKPOINT_EVERY:
                        plan.checkpoint(mark)
                        checkpoint_at = now
                    self._tell(header, mark, start)
            mark = replace(mark, final=True)
        except UnusablePlan:
            # Half a chunk may be written. Anything after the last checkpoint does not count.
            raise
        except ReadingStopped:
            pass
        except BaseException:
            plan.checkpoint(mark)
            raise
        plan.checkpoint(mark)
        return mark

    def _judge(self, chunk: Mapping[UserId, Mapping[str, Want]]) -> dict[UserId, Verdict]:
        if self._crew.is_over():
            raise ReadingStopped
        seen = self._crew.observe(list(chunk))
        # Read after looking up what is remembered: values forgotten in between count.
        forgotten_at = self._shadow.forgotten_ms() if self._named_time else 0
        verdicts = {}
        for user, wants in chunk.items():
            if user in seen.moving:
                verdicts[user] = Verdict("in_motion")
                continue
            found = judge(wants, seen.found[user], seen.known[user].values)
            if found.fate == "differs" and forgotten_at > self._named_time and not seen.known[user].values:
                found = Verdict("forgotten")
            verdicts[user] = found
        return verdicts

    def _tell(self, header: Header, mark: Mark, start: Mark) -> None:
        done, left = mark.users - start.users, header.users - mark.users
        eta = (mark.seconds - start.seconds) * left / done if done else None
        self._show(
            self._status("comparing", header.users, mark, start.users, mark.users / max(1, header.users), eta)
        )

    def _status(
        self, state: State, users: int, mark: Mark, resumed_after: int, share: float | None, eta: float | None
    ) -> PlanStatus:
        return PlanStatus(
            state, self._lines, self._refused, users, mark, resumed_after, share, eta, self._notes
        )
