"""A failover to a replica that was behind: `docs/how/failover.svg`, of a run in virtual time."""

from __future__ import annotations

import redis

from tests.fleet import Fleet, Limits
from tests.pictures import timeline
from tests.pictures.fleet import watched
from tests.pictures.timeline import Look, Span, Story
from tests.scenarios import people
from tests.schedules.wire import Wire
from worker.ratelimit import read_rate

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)
#: Seconds until the failover, by which the replica is behind, and of what is shown; users at the begin.
FAILS, BEHIND, SHOWN, USERS = 6.0, 0.3, 36.0, 18_000


def _promote(running: Fleet, copy: dict[bytes, bytes]) -> None:
    """Put the data back to what a replica knew, as the data of another server."""
    client, keys = running.redis, running.buffer._keys
    client.unlink(*client.keys(keys.pattern))
    for key, packed in copy.items():
        client.restore(key, 0, packed)
    client.hset(keys.server, "id", "the one before")


def _copy(client: redis.Redis, pattern: str) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in sorted(client.keys(pattern))}  # type: ignore[misc]


def run(wire: Wire | None = None) -> Story:
    """Let a replica be promoted that has not heard of the last claims."""
    looks: list[Look] = []
    with watched(workers=2, threads=8, limits=LIMITS, wire=wire) as running:
        running.add(people(USERS))
        world, keys = running.world, running.buffer._keys
        began = world.monotonic()

        def watch(seconds: float) -> None:
            until = world.monotonic() + seconds
            while world.monotonic() < until:
                rate = read_rate(running.redis, keys)
                paused = rate.paused_until > world.us() / 1e6
                timeline.watch(
                    running,
                    min(timeline.EVERY, until - world.monotonic()),
                    looks,
                    began,
                    "paused" if paused else "granted",
                )

        watch(FAILS - BEHIND)
        copy = _copy(running.redis, keys.pattern)
        watch(BEHIND)
        _promote(running, copy)
        watch(SHOWN - FAILS)
        arrivals = [request.at - began for request in running.requests]
        running.wait_until(running.drained, 600)
    return Story(arrivals, looks)


def draw(story: Story) -> str:
    """The SVG."""
    before = max(at for at in story.arrivals if at < FAILS + 2)
    resumed = min(at for at in story.arrivals if at > before)
    return timeline.draw(
        story,
        name="A failover to a replica that was 0.3 s behind",
        band="slots of the shared clock",
        spans=[Span(FAILS, resumed, "nothing is sent", "quiet")],
        notes=[
            (FAILS, "a replica is promoted: permits and tickets are void"),
            (before, "the last call of the old server arrives"),
            (resumed, "15 s after a claim from the gap was settled: full speed"),
        ],
        title="After a failover nothing is sent until every call that was under way has landed; then the rate is as before",
    )
