"""An outage, from its first failure to the last user delivered: `docs/how/outage.svg`, of a run in virtual time."""

from __future__ import annotations

from tests.fleet import Limits
from tests.pictures import timeline
from tests.pictures.fleet import watched
from tests.pictures.timeline import Look, Span, Story
from tests.scenarios import people
from tests.schedules.wire import Wire
from worker.delivery.answers import Failure, NoReply

#: Small batches make the same calls in a fraction of the time.
LIMITS = Limits(batch_size=10)
#: Seconds until the outage and its end; users waiting at the begin, and how many more come every half a second until then.
FAILS, RECOVERS, USERS, MORE = 8.0, 128.0, 8_500, 30


def run(wire: Wire | None = None) -> Story:
    """Let every call be answered with 502 for two minutes, while updates go on coming in."""
    looks: list[Look] = []
    with watched(workers=2, threads=8, limits=LIMITS, wire=wire) as running:
        running.add(people(USERS))
        began, added = running.world.monotonic(), USERS
        bad = NoReply(Failure.HTTP_STATUS, http_status=502)
        running.trouble = lambda request: bad if FAILS <= request.at - began < RECOVERS else None
        while running.world.monotonic() < began + FAILS or not running.drained():
            timeline.watch(running, timeline.EVERY, looks, began)
            if running.world.monotonic() < began + RECOVERS:
                running.add(people(MORE, added))
                added += MORE
        timeline.watch(running, 2.0, looks, began)
        assert not running.dead()
        assert running.attempts_used() == 0
        arrivals = [request.at - began for request in running.requests]
    return Story(arrivals, looks)


def draw(story: Story) -> str:
    """The SVG."""
    in_trouble = [at for at in story.arrivals if FAILS <= at < RECOVERS]
    after = next(at for at in story.arrivals if at >= RECOVERS)
    return timeline.draw(
        story,
        name="An outage of two minutes",
        band="the line",
        marks=[at for at in in_trouble if at > FAILS + 1],
        spans=[Span(FAILS, RECOVERS, "every call is answered with 502", "trouble")],
        notes=[
            (FAILS, f"it begins; {len(in_trouble)} calls are made until it ends"),
            (after, "a probe passes: the line opens, the rate climbs"),
            (story.looks[-1].at - 2.0, "everything is delivered: no attempt used, no dead letter"),
        ],
        title="During an outage the line stops and probes ever more rarely; afterwards everything that waited is delivered",
    )
