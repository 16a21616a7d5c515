"""Counts what came in, and by which way, for people: `imattr status` and the exporter show it; nothing is decided by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from redis import Redis

from .buffer import Way
from .keys import Keys
from .refused import Source
from .scripts import number

#: What is counted: messages taken, and what became of their updates; whole messages that had expired, or have to wait.
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
    """How many messages are in the lists of a Celery queue, at a Redis broker."""
    with broker.pipeline(transaction=False) as pipe:
        for key in lists:
            pipe.llen(key)
        return sum(pipe.execute())


class Intake(NamedTuple):
    """What came in so far, and what waits to be taken.

    `queue` counts what came by Celery's queue; its "waiting" are the messages in the queue when last checked, at most half a
    second ago, and its "scheduled" those that wait for their time now. `ways` counts the updates accepted, and `refused`
    those refused, by the way they came.
    """

    queue: Mapping[str, int]
    ways: Mapping[Way, int]
    refused: Mapping[Source, int]
    stream: int


def read_intake(redis: Redis, keys: Keys) -> Intake:
    """Read the counts."""
    found = redis.hgetall(keys.intake)

    def count(field: str) -> int:
        return number(found.get(field.encode()))

    return Intake(
        {name: count(name) for name in (*COUNTS, "waiting")} | {"scheduled": redis.zcard(keys.scheduled)},
        {way: count(f"by_{way}") for way in get_args(Way)},
        {source: count(f"refused_{source}") for source in get_args(Source)},
        redis.xlen(keys.updates),
    )
