"""The audit: reads back random users that were delivered lately, and counts how many are as delivered.

What is remembered about a user is looked up before and after its attributes are read, and the user is judged only if it was
not in motion either time and nothing has changed in between: then what was read can be compared with what was delivered. All
others are skipped.

A user that seems wrong is checked again some seconds later, together with the next ones, since an answer may come from one of
the API's copies that lags. Only a user that is wrong twice is reported.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from worker.clock import Clock
from worker.errors import InvalidUpdate
from worker.models import UserId, check_user
from worker.readback.crew import USERS_PER_CALL, Reads
from worker.readback.judgement import WRONG, Difference, Verdict, judge
from worker.readback.reader import ReadingStopped
from worker.state.audit import AuditLog
from worker.state.shadow import UNKNOWN, Known, Shadow

#: Seconds until a user that seems wrong is checked again.
AGAIN_AFTER = 5.0
#: Draws in a row without a new user, after which none is left.
IN_VAIN = 50

Became = Literal[Verdict, "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one user. `claim` is the number of the batch that last delivered it, `mark` the mark of what is
    remembered."""

    user: UserId
    became: Became
    differences: Mapping[str, Difference] = field(default_factory=dict)
    claim: int = 0
    mark: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.became in WRONG


def counted(findings: Iterable[Finding]) -> Counter[str]:
    """How many findings there are of each kind."""
    return Counter(finding.became for finding in findings)


class Examiner:
    """Checks users, a page at a time, and those that seem wrong a second time."""

    def __init__(
        self, shadow: Shadow, reader: Reads, clock: Clock, *, again_after: float = AGAIN_AFTER
    ) -> None:
        """`again_after` in seconds."""
        self._shadow, self._reader, self._clock, self._again_after = shadow, reader, clock, again_after
        #: Users that seem wrong, and when to check them again.
        self._suspects: deque[tuple[float, Finding]] = deque()

    def look_at(self, users: Sequence[UserId]) -> list[Finding]:
        """Check up to `USERS_PER_CALL` users as they are now, with at most one call."""
        _, before = self._shadow.look([user for user in users if _is_id(user)])
        still = [user for user, known in before.items() if _can_be_judged(known)]
        found = self._reader.read(still) if still else {}
        after = self._shadow.look(still)[1] if still else {}
        return [_finding(user, before.get(user), after.get(user), found) for user in users]

    def examine(self, others: Sequence[UserId]) -> list[Finding]:
        """Check these users, and as many of the due suspects as the call has room for.

        Users that seem wrong for the first time are not among the findings.
        """
        # More may be due by now than when the others were chosen.
        due = min(self.due, USERS_PER_CALL - len(others))
        marks = {finding.user: finding.mark for _, finding in islice(self._suspects, due)}
        looked_at = self.look_at([*marks, *(user for user in others if user not in marks)])
        # Not earlier: the call may have failed.
        for _ in range(due):
            self._suspects.popleft()
        findings = []
        for finding in looked_at:
            if not finding.is_wrong or marks.get(finding.user) == finding.mark:
                findings.append(finding)
            elif finding.user in marks:
                # What is remembered has changed, so this is the first time that it is wrong.
                findings.append(Finding(finding.user, "skipped"))
            else:
                self._suspects.append((self._clock.monotonic() + self._again_after, finding))
        return findings

    @property
    def suspects(self) -> int:
        """How many are waiting to be checked again."""
        return len(self._suspects)

    @property
    def due(self) -> int:
        """How many of them may be checked now, up to `USERS_PER_CALL`."""
        now = self._clock.monotonic()
        return sum(at <= now for at, _ in islice(self._suspects, USERS_PER_CALL))

    @property
    def due_in(self) -> float:
        """Seconds until all of them, or as many as a call takes, may be checked."""
        if not self._suspects:
            return 0.0
        last, _ = self._suspects[min(USERS_PER_CALL, len(self._suspects)) - 1]
        return max(0.0, last - self._clock.monotonic())


def _is_id(user: UserId) -> bool:
    try:
        return bool(check_user(user))
    except InvalidUpdate:
        return False


def _can_be_judged(known: Known) -> bool:
    return not known.in_motion and any(value is not UNKNOWN for value, _ in known.values.values())


def _finding(
    user: UserId, before: Known | None, after: Known | None, found: Mapping[UserId, Mapping[str, str] | None]
) -> Finding:
    if before is None or after is None or user not in found:
        return Finding(user, "skipped")
    judgement = judge(after, found[user])
    if after.in_motion or after.mark != before.mark or judgement is None:
        return Finding(user, "skipped")
    return Finding(user, judgement.verdict, judgement.differences, after.claim, after.mark)


class Sample:
    """Distinct random users with something remembered; all of them if there are no more."""

    def __init__(self, shadow: Shadow, users: int) -> None:
        self._shadow, self._left = shadow, users
        #: How many users were remembered at the start.
        self.remembered = shadow.size()
        #: Whether every remembered user has been drawn.
        self.is_everybody = False
        # A user id takes about 100 bytes.
        self._seen: set[UserId] = set()

    def __iter__(self) -> Iterator[UserId]:
        # Drawing the very last ones would take longer and longer.
        return self._drawn() if 2 * self._left < self.remembered else self._everybody()

    def _new(self, users: Iterable[UserId]) -> Iterator[UserId]:
        for user in users:
            if self._left and user not in self._seen:
                self._seen.add(user)
                self._left -= 1
                yield user

    def _drawn(self) -> Iterator[UserId]:
        in_vain = 0
        while self._left and in_vain < IN_VAIN:
            left = self._left
            yield from self._new(self._shadow.draw(USERS_PER_CALL))
            in_vain = 0 if self._left < left else in_vain + 1

    def _everybody(self) -> Iterator[UserId]:
        # Redis keeps many users in hash order, which is as good as random, and few users in order of time.
        for page in self._shadow.everybody():
            yield from self._new(random.sample(page, len(page)))
            if not self._left:
                break
        self.is_everybody = self._left > 0 or len(self._seen) >= self.remembered


@dataclass(slots=True)
class Report:
    """How far an audit is, and what it has found. `shown` are some of the wrong users, `wrong_users` all, if kept."""

    wanted: int
    remembered: int
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[Finding] = field(default_factory=list)
    wrong_users: list[UserId] = field(default_factory=list)
    suspects: int = 0
    calls: int = 0
    seconds: float = 0.0
    is_everybody: bool = False
    state: Literal["running", "stopped", "done"] = "running"

    @property
    def judged(self) -> int:
        return self.counts.total() - self.counts["skipped"]

    @property
    def wrong(self) -> int:
        return sum(self.counts[verdict] for verdict in WRONG)

    @property
    def looked_at(self) -> int:
        return self.counts.total() + self.suspects

    @property
    def share(self) -> float:
        """How much of the work is done, from 0 to 1."""
        return min(1.0, self.looked_at / max(1, min(self.wanted, self.remembered)))

    @property
    def eta(self) -> float | None:
        """Seconds until the end, at the pace so far."""
        return self.seconds * (1 / self.share - 1) if self.share and self.seconds else None


class Audit:
    """One audit: draws, examines and counts users, also in the totals."""

    def __init__(
        self,
        shadow: Shadow,
        reader: Reads,
        log: AuditLog,
        clock: Clock,
        *,
        users: int,
        keep_wrong: bool = False,
        most_shown: int = 0,
        again_after: float = AGAIN_AFTER,
        stopped: Callable[[], bool] = lambda: False,
        show: Callable[[Report], None] = lambda _: None,
    ) -> None:
        """`users` is the size of the sample. `keep_wrong` keeps the ids of all wrong users, for a repair."""
        self._examiner = Examiner(shadow, reader, clock, again_after=again_after)
        self._sample = Sample(shadow, users)
        self._reader, self._log, self._clock = reader, log, clock
        self._keep_wrong, self._most_shown = keep_wrong, most_shown
        self._stopped, self._show = stopped, show
        self._began = clock.monotonic()
        self.report = Report(users, self._sample.remembered)

    def run(self) -> Report:
        """Audit until the sample is done, or until stopped: then users that only seemed wrong are not counted."""
        try:
            self.report.state = "done" if self._is_done() else "stopped"
        except ReadingStopped:
            self.report.state = "stopped"
        self.report.is_everybody = self._sample.is_everybody
        return self.report

    def _is_done(self) -> bool:
        """Whether the sample was finished before the audit was stopped."""
        users, examiner = iter(self._sample), self._examiner
        while not self._stopped():
            page = list(islice(users, USERS_PER_CALL - examiner.due))
            if page or (examiner.suspects and not examiner.due_in):
                self._take(examiner.examine(page))
            elif examiner.suspects:
                self._clock.sleep(min(examiner.due_in, 0.2))
            else:
                return True
        return False

    def _take(self, findings: list[Finding]) -> None:
        report, counts = self.report, counted(findings)
        self._log.add(counts)
        report.counts += counts
        wrong = [finding for finding in findings if finding.is_wrong]
        report.shown += wrong[: self._most_shown - len(report.shown)]
        if self._keep_wrong:
            report.wrong_users += [finding.user for finding in wrong]
        report.suspects, report.calls = self._examiner.suspects, self._reader.calls
        report.seconds = self._clock.monotonic() - self._began
        self._show(report)
