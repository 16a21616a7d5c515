"""The plan expires for twenty minutes: every call is answered 60020, with HTTP 200."""

from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, left, people
from worker.delivery.answers import Reply

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)


def run(fleet: Fleet) -> Figures:
    fleet.add(people(2_000))
    fleet.wait(1)
    begin, waiting = fleet.world.monotonic(), left(fleet)
    fleet.trouble = lambda _: Reply(60020, "arrears")
    fleet.wait(1200)
    assert fleet.line.read().code == 60020
    fleet.trouble = lambda _: None
    end = fleet.world.monotonic()

    found = figures(fleet, begin, end, users=waiting, remark="a probe every five minutes at most")

    assert found.calls_in_trouble < 40
    assert found.recovery < 300 + found.at_best + 10
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
