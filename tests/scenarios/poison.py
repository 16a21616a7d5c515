"""One, three, then ten users among a thousand are refused, and each refusal spoils the whole call."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people
from worker.delivery.answers import Reply


def run(fleet: Fleet) -> Figures:
    begin, costs = fleet.world.monotonic(), list[int]()
    bad: set[str] = set()
    fleet.trouble = lambda request: Reply(70107) if bad & set(request.users) else None
    for round_, count in enumerate((1, 3, 10)):
        users = people(1000, 1000 * round_)
        new = fleet.world.rng.sample(users, count)
        bad |= set(new)
        before = fleet.calls()
        fleet.add(users)
        fleet.wait_until(fleet.drained, 120)
        costs.append(fleet.calls() - before)
        assert costs[-1] <= 10 + 14 * count

    remark = "calls for 1, 3, 10 bad users among 1,000: " + ", ".join(map(str, costs))
    found = figures(fleet, begin, fleet.world.monotonic(), users=0, remark=remark)

    assert fleet.dead() == bad
    assert fleet.stopped_for() == []
    return found
