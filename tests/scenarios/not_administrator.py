"""The account loses its administrator's rights for ten minutes, while updates keep coming."""

from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, left, people

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)


def run(fleet: Fleet) -> Figures:
    fleet.add(people(2_000))
    fleet.wait(1)
    begin = fleet.world.monotonic()
    fleet.api.administrators.clear()
    for minute in range(10):
        fleet.add(people(300, 100 * minute), {"city": f"Paris {minute}"})
        fleet.wait(60)
    assert fleet.line.read().reason == "the calling account is not an administrator"
    fleet.api.administrators.add("administrator")
    end, waiting = fleet.world.monotonic(), left(fleet)

    found = figures(fleet, begin, end, users=waiting, remark="updates were accepted and coalesced all along")

    assert found.calls_in_trouble < 40
    assert found.recovery < 300 + found.at_best + 10, "probes are five minutes apart at most"
    assert (found.attempts_used, found.dead) == (0, 0)
    assert fleet.api.users["user000950"] == {"city": "Paris 9"}
    return found
