"""What came by Celery's queue, counted for people: `imattr status` shows it, nothing decides by it."""

from __future__ import annotations

from collections.abc import Mapping

from redis import Redis

from .keys import Keys
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


def read_intake(redis: Redis, keys: Keys) -> dict[str, int]:
    """Return the counts, and "waiting": the messages in the queue when last looked at, at most half a second ago.

    "scheduled" counts the messages that wait for their time now, not those that ever did.
    """
    found = redis.hgetall(keys.intake)
    counts = {name: number(found.get(name.encode())) for name in (*COUNTS, "waiting")}
    return counts | {"scheduled": redis.zcard(keys.scheduled)}
