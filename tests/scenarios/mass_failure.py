"""A bad deployment: a third of all users get a value that the API refuses. Later it is put right."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, left, people
from worker.delivery.answers import Reply, UserError


def run(fleet: Fleet) -> Figures:
    bad = set(people(30_000)[::3])
    begin = fleet.world.monotonic()
    fleet.trouble = lambda request: (
        Reply(0, errors={u: UserError(90030, "") for u in request.users if u in bad})
        if bad & set(request.users)
        else None
    )
    fleet.add(people(30_000))
    fleet.wait(600)
    buried, reason = len(fleet.dead()), fleet.line.read().reason or ""
    # The deployment is put right: good values for everybody, the buried included.
    bad.clear()
    fleet.add(people(30_000), {"city": "Rome"})
    end, waiting = fleet.world.monotonic(), left(fleet)

    found = figures(
        fleet, begin, end, users=waiting, remark=f"{buried} of 10,000 bad users became dead letters"
    )

    assert "too many dead letters" in reason
    assert buried < 1500
    assert found.dead == 0, "newer values took the old ones out of the dead letters"
    return found
