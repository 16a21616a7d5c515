"""Another program calls the same API all the time, with permits of the same limiter: both together keep the quota."""

from tests.fleet import Fleet, Limits
from tests.scenarios import Figures, figures, people
from worker.ratelimit import RateLimiter

#: Only calls count here: with small batches the story takes a fraction of the time.
LIMITS = Limits(batch_size=5)


def run(fleet: Fleet) -> Figures:
    others = list[float]()
    limiter = RateLimiter(
        fleet.redis, fleet.buffer._keys, quota=fleet.limits.quota, patience=2.0, clock=fleet.world
    )

    def call() -> None:
        while True:
            fleet.world.sleep(fleet.world.rng.uniform(0, 0.04))
            if limiter.acquire():
                now = fleet.world.monotonic()
                others.append(now)
                fleet.api.arrive("/v4/openim/sendmsg", now)

    begin = fleet.world.monotonic()
    for number in range(2):
        fleet.world.spawn(call, f"other program {number}")
    fleet.add(people(10_000))
    fleet.wait(20)
    end = fleet.world.monotonic()
    ours = fleet.calls(since=begin + 1, until=end) / (end - begin - 1)
    theirs = sum(begin + 1 <= at < end for at in others) / (end - begin - 1)

    remark = f"{ours:.1f} calls/s beside {theirs:.1f} of the other program's, none refused"
    found = figures(fleet, begin, end, users=0, remark=remark)

    # Most of any second, by both together, is what `check` holds against the quota at the end of every story.
    assert 95 <= ours + theirs <= 100, remark
    assert theirs > 10, remark
    assert not fleet.refusals(60007)
    return found
