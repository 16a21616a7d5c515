"""The repair: queues again what was delivered and is not there, with its old versions.

Newer values are never replaced: repairs enter like all updates. Each user is read again right before, so only what is still
wrong is sent again, and users in motion are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from worker.clock import Clock
from worker.models import Attributes, Update, UserId
from worker.producer import Producer
from worker.readback.audit import Examiner, Finding
from worker.readback.crew import USERS_PER_CALL
from worker.readback.judgement import Verdict
from worker.readback.reader import ReadingStopped
from worker.state.buffer import MAX_UPDATES_PER_ADD
from worker.state.scripts import pages

#: Seconds between two checks for room.
LOOK_EVERY = 1.0


@dataclass(slots=True)
class Repaired:
    """How many users were queued; spared, because they were no longer wrong, or in motion; refused, for lack of room or by a
    rule."""

    queued: int = 0
    spared: int = 0
    refused: int = 0
    state: Literal["stopped", "done"] = "done"


class Repair:
    """Repairs users, a page at a time. Whatever ends it, users that were not queued are as wrong as before: an audit finds
    them."""

    def __init__(
        self,
        examiner: Examiner,
        producer: Producer,
        clock: Clock,
        *,
        verdicts: Collection[Verdict],
        stopped: Callable[[], bool] = lambda: False,
        show: Callable[[Repaired], None] = lambda _: None,
    ) -> None:
        """`verdicts` are those of the attributes to send again."""
        self._examiner, self._producer, self._clock = examiner, producer, clock
        self._verdicts, self._stopped, self._show = verdicts, stopped, show

    def run(self, users: Iterable[UserId]) -> Repaired:
        """Repair users that were found to be wrong, until stopped."""
        total = Repaired()
        for page in pages(users, USERS_PER_CALL):
            while not self._producer.has_room() and not self._stopped():
                self._clock.sleep(LOOK_EVERY)
            try:
                as_of_ms = self._producer.now_ms()
                findings = [] if self._stopped() else self._examiner.look_at(page)
            except ReadingStopped:
                findings = []
            if not findings:
                total.state = "stopped"
                break
            wrong, refused = self._queue(findings, as_of_ms)
            total.queued += len(wrong - refused)
            total.refused += len(refused)
            total.spared += len(page) - len(wrong)
            self._show(total)
        return total

    def _queue(self, findings: Iterable[Finding], as_of_ms: int) -> tuple[set[UserId], set[UserId]]:
        """Queue them again; returns the users that this was for, and those that were refused."""
        updates = [update for finding in findings for update in self._updates(finding)]
        refused: set[UserId] = set()
        for some in pages(updates, MAX_UPDATES_PER_ADD):
            added = self._producer.add(some, lane="backfill", as_of_ms=as_of_ms, again=True)
            refused |= {some[place].user for place in (*added.full, *(place for place, _ in added.refused))}
        return {update.user for update in updates}, refused

    def _updates(self, finding: Finding) -> Iterator[Update]:
        by_version: dict[int, Attributes] = {}
        for name, one in finding.differences.items():
            if one.verdict in self._verdicts:
                by_version[one.version] = {**by_version.get(one.version, {}), name: one.delivered}
        for version, attrs in by_version.items():
            # 0 would mean now.
            yield Update(finding.user, attrs, max(1, version))
