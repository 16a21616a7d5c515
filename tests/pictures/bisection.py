"""How one bad user among a hundred is found: `docs/how/bisect.svg`, as `worker/delivery/plan.py` decides."""

from __future__ import annotations

from typing import NamedTuple

from tests.pictures.svg import WIDTH, bar, picture, text
from worker.delivery.answers import Reply
from worker.delivery.plan import Part, advance, begin
from worker.delivery.policy import Policy
from worker.models import Batch, BatchId, ClaimedUser, UserId

USERS, BAD, CODE = 100, 37, 70402
LEFT, RIGHT, TOP, ROW = 34, 96, 62, 17


class Call(NamedTuple):
    """One call: whom it had, and whether it was refused."""

    users: list[int]
    refused: bool


def calls() -> list[Call]:
    """Answer the calls of a batch as an API does that refuses any call with the bad user."""
    users = tuple(ClaimedUser(UserId(str(number)), {"city": "Oslo"}, 0, 0) for number in range(USERS))
    policy = Policy(max_attempts=8, backoff_base=1, backoff_max=300, hold=5)
    plan, made = begin(Batch(BatchId("batch"), users, 0), policy, seed=1), list[Call]()
    while plan.todo:
        part = plan.todo[0]
        if isinstance(part, Part):
            numbers = [int(user.user) for user in part.users]
            made.append(Call(numbers, BAD in numbers))
            answer = Reply(CODE if BAD in numbers else 0, "refused")
        else:
            # The app's names are asked for once: they are not why.
            answer = Reply(0, names=frozenset({"city"}))
        plan = advance(plan, answer).plan
    return made


def draw() -> str:
    """The SVG."""
    made = calls()
    each = (WIDTH - LEFT - RIGHT) / USERS
    parts = [
        text(14, 26, f"A batch of {USERS} with one bad user, call by call", "name"),
        text(LEFT, 50, "the users of the batch, side by side", "small faint"),
    ]
    delivered = 0
    for number, call in enumerate(made):
        y = TOP + ROW * number
        first, count = call.users[0], len(call.users)
        delivered += 0 if call.refused else count
        parts += [
            text(LEFT - 8, y + 11, str(number + 1), "small faint end"),
            bar(LEFT, y, each * USERS, ROW - 4, "track"),
            bar(LEFT + each * first, y, max(each * count, 2.5), ROW - 4, "bad" if call.refused else "good"),
            text(WIDTH - RIGHT + 8, y + 11, "refused" if call.refused else f"{delivered} delivered", "small"),
        ]
    end = TOP + ROW * len(made) + 16
    parts.append(text(LEFT, end, f"{len(made)} calls: {delivered} users delivered, one dead letter", "small"))
    style = ".track { fill: var(--box); }"
    title = (
        f"Halving finds one bad user among {USERS} with {len(made)} calls, and delivers the others on the way"
    )
    return picture(end + 16, title, parts, style)
