"""The auditor: continuously reads back random users, with a few calls a minute.

Every worker runs one in a thread of its own; the leader among them acts. It rests while the line is not open. Its findings go
into the totals, which metrics and `imattr status` show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import structlog

from worker.clock import Clock
from worker.errors import CallFailed
from worker.readback.audit import Examiner, counted
from worker.readback.crew import USERS_PER_CALL, Reads
from worker.readback.judgement import VERDICTS, WRONG
from worker.readback.reader import ReadingStopped
from worker.state.audit import AuditLog
from worker.state.connection import RedisError
from worker.state.history import History
from worker.state.leader import Leader, LeaderLoop
from worker.state.line import Line
from worker.state.shadow import Shadow

log = structlog.get_logger()

#: Seconds for which an auditor stays elected without renewing, and the longest time between two turns.
TERM, TURN = 30.0, 5.0
#: Seconds until the next attempt after an error that a person must fix.
HOPELESS = 60.0
#: Seconds between two events: another program that keeps changing attributes would fill the history.
TELL_EVERY = 3600.0


class Auditor(LeaderLoop):
    """One worker's auditor."""

    interrupted = "audit_interrupted"

    def __init__(
        self,
        leader: Leader,
        shadow: Shadow,
        make_reader: Callable[[Callable[[], bool]], Reads],
        line: Line,
        totals: AuditLog,
        history: History,
        clock: Clock,
        *,
        calls_a_minute: float,
    ) -> None:
        """`make_reader` is given a function that says whether to stop reading."""
        super().__init__(leader)
        self._shadow, self._line, self._totals, self._history = shadow, line, totals, history
        self._clock, self._every = clock, 60 / calls_a_minute
        self._examiner = Examiner(shadow, make_reader(self._must_stop), clock)
        self._next_at = clock.monotonic() + self._every
        self._untold, self._told_at = Counter[str](), -math.inf

    def follow(self) -> None:
        # The previous leader has just made a call.
        self._next_at = self._clock.monotonic() + self._every

    def lead(self) -> float:
        """Make a call, if one is due; returns the seconds until the next turn."""
        left = self._next_at - self._clock.monotonic()
        if left > 0 or not self._is_open():
            return min(TURN, max(left, 1.0))
        self._next_at = self._clock.monotonic() + self._every
        try:
            # Suspects take the places of other users, so that they cost no extra call.
            findings = self._examiner.examine(self._shadow.draw(USERS_PER_CALL - self._examiner.due))
        except ReadingStopped:
            return 0.0
        except CallFailed as failed:
            self._next_at = self._clock.monotonic() + max(self._every, HOPELESS)
            log.warning(self.interrupted, reason=failed.found)
            return TURN
        counts = counted(findings)
        if counts:
            self._totals.add(counts)
            self._tell(counts)
        return min(TURN, max(0.0, self._next_at - self._clock.monotonic()))

    def _is_open(self) -> bool:
        return self._line.read().state == "open"

    def _must_stop(self) -> bool:
        try:
            return self._stopped.is_set() or not self._is_open()
        except RedisError:
            return True

    def _tell(self, counts: Counter[str]) -> None:
        """Record in the history what was found wrong, at once or together with what follows within an hour."""
        self._untold += counts
        now = self._clock.monotonic()
        if any(self._untold[verdict] for verdict in WRONG) and now - self._told_at >= TELL_EVERY:
            found = {verdict: self._untold[verdict] for verdict in VERDICTS}
            self._history.note("audit", "worker", **found)
            log.warning("audit_found_wrong", **found)
            self._told_at = now
            self._untold.clear()
