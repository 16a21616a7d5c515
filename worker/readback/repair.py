"""The repair: queues once more what was delivered and is not there, with the versions that it had.

Nothing that is newer is ever replaced: values go through the same door as all updates, and users in motion are left alone. Each
user is read once more right before it is repaired, so only what is wrong still is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from worker.clock import Clock
from worker.errors import NotConfirmed
from worker.models import Attributes, Update, UserId
from worker.producer import Producer
from worker.readback.audit import PAGE, Examiner, Finding
from worker.readback.judgement import Verdict
from worker.readback.reader import ReadingStopped
from worker.state.buffer import MAX_UPDATES_PER_ADD
from worker.state.connection import RedisError
from worker.state.scripts import pages
from worker.state.shadow import Shadow

#: Attempts to queue what has just been corrected in the memory, and seconds between two of them.
TRIES, TRY_AGAIN_AFTER = 10, 1.0


@dataclass(slots=True)
class Repaired:
    """How many users were queued; were no longer wrong, or in motion, and spared; were refused, for want of room or by a rule."""

    queued: int = 0
    spared: int = 0
    refused: int = 0
    state: Literal["stopped", "done"] = "done"


class Repair:
    """Repairs users, a page at a time."""

    def __init__(
        self,
        shadow: Shadow,
        examiner: Examiner,
        producer: Producer,
        clock: Clock,
        *,
        verdicts: Collection[Verdict],
        stopped: Callable[[], bool] = lambda: False,
        show: Callable[[Repaired], None] = lambda _: None,
    ) -> None:
        """`verdicts` are those of the attributes that are to be sent again."""
        self._shadow, self._examiner, self._producer, self._clock = shadow, examiner, producer, clock
        self._verdicts, self._stopped, self._show = verdicts, stopped, show

    def run(self, users: Iterable[UserId]) -> Repaired:
        """Repair users who were found to be wrong, until stopped."""
        total = Repaired()
        for page in pages(users, PAGE):
            while not self._producer.has_room() and not self._stopped():
                self._clock.sleep(TRY_AGAIN_AFTER)
            try:
                findings = [] if self._stopped() else self._examiner.look_at(page)
            except ReadingStopped:
                findings = []
            if not findings:
                total.state = "stopped"
                break
            queued, refused = self._repair(findings)
            total.queued += queued
            total.refused += refused
            total.spared += len(page) - queued - refused
            self._show(total)
        return total

    def _repair(self, findings: Iterable[Finding]) -> tuple[int, int]:
        """How many users were queued, and how many were refused."""
        wrong = {finding.user: finding for finding in findings if any(self._lacking(finding))}
        # Otherwise they would count as delivered, and be dropped.
        corrected = self._shadow.correct(
            {
                user: (
                    finding.mark,
                    {name: finding.differences[name].found for name in self._lacking(finding)},
                )
                for user, finding in wrong.items()
            }
        )
        updates = [update for user in corrected for update in self._updates(wrong[user])]
        refused: set[UserId] = set()
        for page in pages(updates, MAX_UPDATES_PER_ADD):
            refused |= self._add(page)
        # As before: the next audit finds them again.
        self._undo([wrong[user] for user in corrected if user in refused])
        return len(corrected) - len(refused), len(refused)

    def _lacking(self, finding: Finding) -> Iterator[str]:
        """The names of the attributes that are to be sent again."""
        return (name for name, one in finding.differences.items() if one.verdict in self._verdicts)

    def _updates(self, finding: Finding) -> Iterator[Update]:
        by_version: dict[int, Attributes] = {}
        for name in self._lacking(finding):
            one = finding.differences[name]
            by_version[one.version] = {**by_version.get(one.version, {}), name: one.delivered}
        for version, attrs in by_version.items():
            # 0 would stand for now.
            yield Update(finding.user, attrs, max(1, version))

    def _add(self, updates: list[Update]) -> set[UserId]:
        """Queue updates; returns the users of those that were refused."""
        for left in reversed(range(TRIES)):
            try:
                added = self._producer.add(updates, lane="backfill")
                break
            except (RedisError, NotConfirmed):
                # Sending them again is safe, and giving up is not: they no longer count as delivered.
                if not left:
                    raise
                self._clock.sleep(TRY_AGAIN_AFTER)
        return {updates[place].user for place in (*added.full, *(place for place, _ in added.refused))}

    def _undo(self, findings: Iterable[Finding]) -> None:
        """Remember again what was remembered before."""
        before = {finding.user: finding for finding in findings}
        _, known = self._shadow.look([*before])
        given: Mapping[UserId, tuple[str, Mapping[str, str | None]]] = {
            user: (
                known[user].mark,
                {name: finding.differences[name].delivered for name in self._lacking(finding)},
            )
            for user, finding in before.items()
        }
        self._shadow.correct(given)
