"""One user's data makes the service fail with an internal error, whatever batch it is in, for a quarter of an hour."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people
from worker.delivery.answers import Reply


def run(fleet: Fleet) -> Figures:
    begin, users = fleet.world.monotonic(), people(3000)
    fleet.trouble = lambda request: Reply(91000) if "user000500" in request.users else None
    fleet.add(users)
    others_done = fleet.wait_until(lambda: fleet.snapshot().ledger["delivered"] == 2999, 60)
    for number in range(900):
        if not fleet.dead():
            fleet.add(people(50, 10_000 + 50 * number))
            fleet.wait(1)
    end = fleet.world.monotonic()

    remark = f"the other 2,999 were delivered after {others_done:.1f} s"
    found = figures(fleet, begin, end, users=0, remark=remark)

    assert fleet.dead() == {"user000500"}
    assert found.attempts_used == 8
    assert others_done < 10
    return found
