"""The service is out for ten minutes: timeouts, bad gateways and internal errors, one after the other."""

from collections.abc import Iterator
from itertools import cycle

from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, left, people
from worker.delivery.answers import Failure, NoReply, Reply

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)


def run(fleet: Fleet) -> Figures:
    fleet.add(people(4_000))
    fleet.wait(2)
    ways: Iterator[Reply | NoReply] = cycle(
        [NoReply(Failure.TIMEOUT), NoReply(Failure.HTTP_STATUS, http_status=502), Reply(91000), Reply(91000)]
    )
    begin, waiting = fleet.world.monotonic(), left(fleet)
    fleet.trouble = lambda _: next(ways)
    fleet.wait(600)
    assert fleet.line.read().kind == "outage"
    fleet.trouble = lambda _: None
    end = fleet.world.monotonic()

    found = figures(fleet, begin, end, users=waiting, remark="a probe every minute at most")

    assert found.calls_in_trouble < 60
    assert found.recovery < 75 + found.at_best + 10
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
