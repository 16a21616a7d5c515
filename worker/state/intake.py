"""What came in, by which way, counted for people: `imattr status` and the exporter show it, nothing decides by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from redis import Redis

from .buffer import Way
from .keys import Keys
from .refused import Source
from .scripts import number

#: What is counted: messages taken, and what became of their updates; whole messages that had expired, or must wait.
COUNTS = ("taken", "accepted", "coalesced", "unchanged", "stale", "refused", "expired", "scheduled")


def record_intake(redis: Redis, keys: Keys, counts: Mapping[str, int], waiting: int | None) -> None:
    """Add to the counts; `waiting` is how many messages are in the queue, if that is known."""
    with redis.pipeline(transaction=False) as pipe:
        for name, count in counts.items():
            pipe.hincrby(keys.intake, name, count)
        if waiting is not None:
            pipe.hset(keys.intake, "waiting", waiting)
        pipe.execute()


#: What follows the name of a queue in the keys of its lists, one for each priority: kombu's steps and separator.
PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")


def queue_length(broker: Redis, lists: Iterable[str]) -> int:
    """How many messages are in the lists of a queue of Celery's, at a Redis broker."""
    with broker.pipeline(transaction=False) as pipe:
        for key in lists:
            pipe.llen(key)
        return sum(pipe.execute())


class Intake(NamedTuple):
    """What came in so far, and what waits to be taken.

    `queue` counts what came by Celery's queue, and has "waiting": the messages in it when last looked at, at most half a
    second ago. Its "scheduled" are the messages that wait for their time now. `ways` has the updates accepted and `refused`
    those refused, by the way they came.
    """

    queue: Mapping[str, int]
    ways: Mapping[Way, int]
    refused: Mapping[Source, int]
    stream: int


def read_intake(redis: Redis, keys: Keys) -> Intake:
    """Count what came in."""
    found = redis.hgetall(keys.intake)

    def count(field: str) -> int:
        return number(found.get(field.encode()))

    return Intake(
        {name: count(name) for name in (*COUNTS, "waiting")} | {"scheduled": redis.zcard(keys.scheduled)},
        {way: count(f"by_{way}") for way in get_args(Way)},
        {source: count(f"refused_{source}") for source in get_args(Source)},
        redis.xlen(keys.updates),
    )
