"""Dead letters are put back while newer values for the same users are on their way."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people
from worker.delivery.answers import Reply, UserError
from worker.state.dead_letters import Filter


def run(fleet: Fleet) -> Figures:
    begin, users = fleet.world.monotonic(), people(1000)
    lost = set(users[::20])
    fleet.trouble = lambda request: (
        Reply(0, errors={u: UserError(70107, "") for u in lost & set(request.users)})
        if request.users and lost
        else None
    )
    fleet.add(users, {"city": "old"})
    fleet.wait_until(fleet.drained, 30)
    assert fleet.dead() == lost
    lost.clear()
    chosen = sorted(fleet.dead())
    for number, user in enumerate(chosen):
        # Before, at the same time as, and after the letter is put back; some already delivered.
        if number % 4 == 0:
            fleet.add([user], {"city": "new"})
        fleet.letters.redrive(fleet.letters.choose(Filter(user)))
        if number % 4 == 1:
            fleet.add([user], {"city": "new"})
        fleet.wait(fleet.world.rng.random() / 10)
        if number % 4 == 2:
            fleet.add([user], {"city": "new"})
    end = fleet.world.monotonic()

    found = figures(fleet, begin, end, users=0, remark=f"{len(chosen)} put back, three quarters raced")

    newest = [{"city": "old" if number % 4 == 3 else "new"} for number in range(len(chosen))]
    assert [fleet.api.users[user] for user in chosen] == newest
    assert found.dead == 0
    return found
