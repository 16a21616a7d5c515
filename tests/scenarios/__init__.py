"""What goes wrong in production, and what the fleet does about it: one file, one story.

`make scenarios` plays them all in virtual time and prints what each cost; the tests play them, too. A story
has a `run`, which lets a fleet live through it, checks what must hold, and returns its figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Figures:
    """What a story cost."""

    #: Calls that arrived at the API from the trouble's begin until it was over, and all of the story.
    calls_in_trouble: int
    calls: int
    #: Most attempts that any user used up.
    attempts_used: int
    dead: int
    #: Seconds from the end of the trouble until everything was delivered, and what that could be at best.
    recovery: float
    at_best: float
    remark: str


def figures(fleet: Fleet, begin: float, end: float, *, users: int, remark: str = "") -> Figures:
    """Let the fleet finish what is left after the trouble ended at `end`, and sum up.

    `users` were left then; at best they take a call for each batch.
    """
    fleet.wait_until(fleet.drained, 1200)
    now = fleet.world.monotonic()
    return Figures(
        calls_in_trouble=fleet.calls(since=begin, until=end),
        calls=fleet.calls(),
        attempts_used=fleet.attempts_used(),
        dead=len(fleet.dead()),
        recovery=now - end,
        at_best=users / fleet.limits.batch_size / 98,
        remark=remark,
    )


def people(count: int, first: int = 0) -> list[str]:
    return [f"user{number:06}" for number in range(first, first + count)]


def left(fleet: Fleet) -> int:
    """Users not delivered yet."""
    snapshot = fleet.snapshot()
    return snapshot.pending + snapshot.in_flight
