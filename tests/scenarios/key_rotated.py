"""The key is rotated at the service first, twenty seconds later in the workers' key file. Nobody restarts anything."""

from tests.conftest import SECRET_KEY
from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, left, people

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)


def run(fleet: Fleet) -> Figures:
    fleet.add(people(4_000))
    fleet.wait(2)
    begin = fleet.world.monotonic()
    fleet.api.rotate_key(SECRET_KEY[::-1])
    fleet.wait(20)
    assert fleet.line.read().code == 70009
    fleet.key = SECRET_KEY[::-1]
    end, waiting = fleet.world.monotonic(), left(fleet)

    found = figures(fleet, begin, end, users=waiting, remark="opened by the first probe, 30 s after the stop")

    assert fleet.stopped_for() == ["the UserSig was made with the key of another app"]
    assert found.recovery < 30 + found.at_best + 10
    assert (found.attempts_used, found.dead) == (0, 0)
    assert found.calls_in_trouble < 40
    return found
