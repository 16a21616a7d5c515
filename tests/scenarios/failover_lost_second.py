"""A replica that is a second behind becomes the primary: what it never got is lost, and nothing else."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people


def run(fleet: Fleet) -> Figures:
    before, lost = people(3000), people(500, first=3000)
    fleet.add(before, {"city": "before"})
    fleet.wait(5)
    fleet.add(before[:1000], {"city": "replicated"})
    copy = fleet.replicate()
    fleet.add(before[:500], {"city": "too late"})
    fleet.add(lost, {"city": "too late"})
    fleet.wait(1)
    begin = fleet.world.monotonic()
    fleet.promote(copy)
    fleet.wait_until(lambda: fleet.calls(since=begin) > 0, 60)
    end = fleet.world.monotonic()

    remark = (
        f"nothing sent for {end - begin:.1f} s; a second of updates lost, and their senders send them again"
    )
    found = figures(fleet, begin, end, users=1000, remark=remark)

    has = {user: values["city"] for user, values in fleet.api.users.items()}
    assert all(has[user] in ("replicated", "too late") for user in before[:1000]), "an old value came back"
    assert all(has[user] == "before" for user in before[1000:])
    # As after any error, sending again is harmless; and what is there already goes out once more.
    fleet.add(before[:500] + lost, {"city": "too late"})
    fleet.wait_until(fleet.drained, 60)
    assert all(fleet.api.users[user]["city"] == "too late" for user in before[:500] + lost)
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
