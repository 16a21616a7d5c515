"""The API says OK, and does nothing for one call in twenty: the audit finds it, and the repair sends exactly that again."""

from tests.fleet import Fleet, Request
from tests.scenarios import Figures, figures, people
from worker.clock import Clock
from worker.delivery.answers import Reply
from worker.models import Update, UserId
from worker.ratelimit import RateLimiter, reads
from worker.readback.audit import Examiner
from worker.readback.crew import USERS_PER_CALL
from worker.readback.reader import Reader
from worker.readback.repair import Repair
from worker.state.buffer import Added, Guard
from worker.state.scripts import pages
from worker.state.shadow import Shadow


class Straight:
    """What a repair needs of a producer."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def has_room(self) -> bool:
        return True

    def now_ms(self) -> int:
        return self._fleet.world.us() // 1000

    def add(self, updates: list[Update], *, lane: str, as_of_ms: int, again: bool) -> Added:
        return self._fleet.buffer.add(updates, lane=lane, guard=Guard(as_of_ms=as_of_ms, again=again))


def run(fleet: Fleet) -> Figures:
    begin, users, lost = fleet.world.monotonic(), people(4000), set[UserId]()

    def trouble(request: Request) -> Reply | None:
        if request.command != "im_set_attr" or fleet.world.rng.random() > 0.05:
            return None
        lost.update(request.users)
        return Reply(0)

    fleet.trouble = trouble
    fleet.add(users, {"city": "Paris"})
    fleet.wait_until(fleet.drained, 60)
    fleet.trouble = lambda _: None
    end = fleet.world.monotonic()
    clock: Clock = fleet.world
    limiter = RateLimiter(
        fleet.redis, fleet.buffer._keys, quota=100, patience=2.0, clock=clock, kind=reads(0.1)
    )
    reader = Reader(fleet.new_api(), limiter, clock)
    examiner = Examiner(Shadow(fleet.redis, fleet.buffer._keys), reader, clock)
    # Whoever seems wrong is looked at once more.
    findings = [one for page in pages(users, USERS_PER_CALL) for one in examiner.examine(page)]
    fleet.wait(6)
    while examiner.suspects:
        findings += examiner.examine([])
    wrong = {finding.user for finding in findings if finding.is_wrong}
    assert wrong == lost, "the audit does not say what was lost"
    newer = sorted(lost)[:10]
    fleet.add(newer, {"city": "Rome"})
    repaired = Repair(examiner, Straight(fleet), clock, verdicts=("lost",)).run(sorted(wrong))  # type: ignore[arg-type]
    calls = reader.calls

    remark = f"{len(lost)} users lost, found by {calls} reads, {repaired.queued} sent again"
    found = figures(fleet, begin, end, users=len(lost), remark=remark)

    wanted = dict.fromkeys(users, "Paris") | dict.fromkeys(newer, "Rome")
    assert {user: values["city"] for user, values in fleet.api.users.items()} == wanted
    assert len(lost) >= 100
    assert found.dead == 0
    return found
