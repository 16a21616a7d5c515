"""The service grants 50 calls a second, where 100 are configured; and after a minute 100 again."""

from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, left, people

#: Only calls count here: with small batches the story takes a fraction of the time.
LIMITS = Limits(batch_size=5)


def run(fleet: Fleet) -> Figures:
    fleet.api.quirks.quota = 50
    begin = fleet.world.monotonic()
    for round_ in range(4):
        fleet.add(people(4_500), {"city": f"Paris {round_}"})
        fleet.wait(15)
    refused_by_30 = sum(request.at < begin + 30 for request in fleet.refusals(60007))
    settled = fleet.calls(since=begin + 30, until=begin + 60) / 30
    refused_later = len(fleet.refusals(60007)) - refused_by_30
    fleet.api.quirks.quota = 100
    end, waiting = fleet.world.monotonic(), left(fleet)

    remark = f"{settled:.1f} calls/s from the 30th second on, {refused_by_30} refused before, {refused_later} after"
    found = figures(fleet, begin, end, users=waiting, remark=remark)

    assert 47.5 <= settled <= 50, remark
    assert refused_later <= 10
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
