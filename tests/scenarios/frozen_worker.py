"""Threads stand still right before the socket, for longer than their lease, and then send what has long been overtaken."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people


def run(fleet: Fleet) -> Figures:
    begin, users, rng = fleet.world.monotonic(), people(500), fleet.world.rng
    frozen = 0

    def stall() -> float:
        nonlocal frozen
        if rng.random() > 0.1:
            return 0.0
        frozen += 1
        return fleet.limits.lease * (1 + rng.random())

    fleet.stall = stall
    newest: dict[str, str] = {}
    for version in range(120):
        changes = dict.fromkeys(rng.sample(users, 20), f"{version:03}")
        newest |= changes
        fleet.add(changes, {"city": f"{version:03}"})
        fleet.wait(1.0)
    fleet.stall = lambda: 0.0
    end = fleet.world.monotonic()
    # The last of them wake up, and find out.
    fleet.wait(2 * fleet.limits.lease)

    late = sum(summary.outcome == "fenced" for summary in fleet.summaries)
    found = figures(
        fleet,
        begin,
        end,
        users=0,
        remark=f"{frozen} threads frozen, {late} sent after others had their users",
    )
    has = {user: values["city"] for user, values in fleet.api.users.items()}
    assert late > 5
    assert has == newest, "an old value stayed"
    return found
