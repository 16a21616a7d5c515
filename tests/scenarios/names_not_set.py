"""An application sends a new attribute before anybody has set its name for the app."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people


def run(fleet: Fleet) -> Figures:
    fleet.add(people(2000))
    fleet.wait_until(fleet.drained, 10)
    begin = fleet.world.monotonic()
    fleet.add(people(5000), {"level": "Gold"})
    fleet.wait(60)
    reason = fleet.line.read().reason or ""
    fleet.api.names.append("level")
    end = fleet.world.monotonic()

    found = figures(
        fleet, begin, end, users=5000, remark=f"{fleet.calls('im_get_attr_name')} calls to read the names"
    )

    assert "no attribute 'level'" in reason, reason
    assert found.calls_in_trouble < 30, "halving one batch to the end would be 199"
    assert fleet.calls("im_get_attr_name", begin, end) < 20
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
