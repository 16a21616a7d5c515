"""All signatures in use expire in mid-run. Everyone signs again once, and the line never stops."""

from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, left, people

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)


def run(fleet: Fleet) -> Figures:
    fleet.add(people(4_000))
    fleet.wait(2)
    begin = fleet.world.monotonic()
    fleet.api.quirks.signatures_from = int(fleet.world.wall())
    waiting = left(fleet)
    fleet.wait_until(lambda: fleet.snapshot().ledger["delivered"] > 4_000 - waiting + 200, 10)
    refused = fleet.api.counts.refused[70001]

    found = figures(
        fleet, begin, begin, users=waiting, remark=f"{refused} calls refused before all had signed again"
    )

    assert 0 < refused < 40
    assert fleet.api.counts.refused[70001] == refused
    assert fleet.stopped_for() == []
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
