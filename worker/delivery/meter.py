"""What a worker reports about its own work, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from worker.delivery.answers import NoReply, Reply
from worker.models import Batch, BatchId, Outcome, UserId
from worker.state.line import Kind

Operation = Literal["set", "remove", "names", "get"]
Fate = Literal["used", "late", "none", "empty"]


@dataclass(slots=True)
class Summary:
    """What became of one ticket. Has no user data, so Flower and the log may show it. Times in seconds."""

    batch: BatchId
    outcome: str = ""
    #: The number of the claim in the fleet, which `imattr why` shows.
    number: int = 0
    users: int = 0
    acked: int = 0
    #: Those of them that the API was found to have right, after a call with an unknown outcome.
    found: int = 0
    retried: int = 0
    snoozed: int = 0
    dead_lettered: int = 0
    calls: int = 0
    code: int | None = None
    failure: str | None = None
    attempt: int = 0
    waited: float = 0.0
    took: float = 0.0


class Meter:
    """Counts nothing. A subclass that counts overrides what it needs; nothing here may raise. Thread-safe."""

    def waited(self, seconds: float) -> None:
        """A permit, and the seconds from asking for it to its slot."""

    def permit(self, fate: Fate) -> None:
        """What became of a permit, or of asking for one."""

    def call(self, operation: Operation, answer: Reply | NoReply, seconds: float) -> None:
        """A call that was made, and the seconds from its slot to the end of its answer."""

    def settled(self, batch: Batch, outcomes: Mapping[UserId, Outcome], seconds: float) -> None:
        """Users of a batch that were settled, `seconds` after it was claimed."""

    def ended(self, summary: Summary) -> None:
        """A batch that ended."""

    def stopped(self, kind: Kind, code: int) -> None:
        """The line was stopped by this worker; `code` 0 = none."""

    def reclaimed(self) -> None:
        """An expired lease of another worker, whose users were taken back."""
