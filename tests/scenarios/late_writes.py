"""Calls end without an answer, and the service applies them up to four seconds later, old values and all."""

from tests.fleet import Fleet, Request
from tests.scenarios import Figures, figures, people
from worker.delivery.answers import Failure, NoReply, Reply


def run(fleet: Fleet) -> Figures:
    begin, users = fleet.world.monotonic(), people(500)
    unanswered = 0

    def trouble(request: Request) -> Reply | NoReply | None:
        nonlocal unanswered
        if fleet.world.rng.random() > 0.3:
            return None
        unanswered += 1
        changes = [(entry["To_Account"], entry["Attrs"]) for entry in request.body.get("UserAttrs", ())]
        late = 4 * fleet.world.rng.random()
        fleet.world.later(late, lambda: fleet.api.write(changes, request.at, 0))
        return NoReply(Failure.BROKEN)

    fleet.trouble = trouble
    for version in range(60):
        fleet.add(fleet.world.rng.sample(users, 100), {"city": f"{version:03}"})
        fleet.wait(0.5)
    fleet.trouble = lambda _: None
    end = fleet.world.monotonic()

    found = figures(
        fleet, begin, end, users=0, remark=f"{unanswered} calls without an answer, all applied late"
    )
    fleet.wait(5)

    reached: dict[str, str] = {}
    for write in fleet.api.writes:
        for user, value in ((write.user, value) for value in write.attrs.values() if value):
            assert value >= reached.get(user, ""), "an old value landed on a newer one"
            reached[user] = value
    assert unanswered > 10
    return found
