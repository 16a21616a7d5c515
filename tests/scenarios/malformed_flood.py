"""A program writes ten thousand malformed messages into Celery's queue, with a hundred good ones among them."""

import random
from typing import Any, cast

from tests.fleet import Fleet
from tests.intake.messages import MALFORMED, encoded, envelope, mutated
from tests.scenarios import Figures, figures
from tests.schedules.borders import AtOnce
from worker.clock import Clock
from worker.intake.brokers import RedisQueue
from worker.intake.celery_queue import QueueConsumer
from worker.producer import Producer
from worker.state.buffer import Added, Guard, Lead
from worker.state.refused import MOST, Refused

MESSAGES, GOOD_EVERY = 10_000, 100


class Straight:
    """What a consumer needs of a producer."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def names(self) -> frozenset[str]:
        return frozenset({"city"})

    def now_ms(self) -> int:
        return self._fleet.world.us() // 1000

    def add(self, updates: list[Any], *, lead: Lead) -> Added:
        return self._fleet.buffer.add(updates, guard=Guard(lead=lead, makes_room=True, way="celery"))


def run(fleet: Fleet) -> Figures:
    keys, client, dice = fleet.buffer._keys, fleet.redis, random.Random(7)
    name, lists = f"flood:{keys.sdkappid}", [f"flood:{keys.sdkappid}:{step}" for step in range(4)]
    good = {f"good{number:04}": f"value {number}" for number in range(0, MESSAGES, GOOD_EVERY)}
    begin = fleet.world.monotonic()
    for number in range(MESSAGES):
        user = f"good{number:04}"
        raw = (
            dice.choice(list(MALFORMED.values())) if dice.random() < 0.2 else mutated(dice, envelope("", {}))
        )
        if user in good:
            raw = envelope(user, {"city": good[user]})
        client.lpush(lists[0], raw if isinstance(raw, bytes) else encoded(raw))
    queue = RedisQueue(client, lists, name=name, close=lambda: None)
    producer, clock = cast(Producer, Straight(fleet)), cast(Clock, fleet.world)
    refused = Refused(client, keys)
    consumer = QueueConsumer(client, keys, producer, refused, clock, lambda: queue, worker="w0")
    consumer._adder = cast(Any, AtOnce())

    turns = 0
    while queue.waiting() or consumer._taken:
        # Any other error would end the turn, and be tried again for ever.
        fleet.wait(consumer.turn() or 0.001)
        turns += 1
    end = fleet.world.monotonic()

    remark = f"{MESSAGES:,} messages in {turns} turns, {refused.count():,} of the refused kept"
    found = figures(fleet, begin, end, users=len(good), remark=remark)
    client.unlink(*lists, f"{name}.taken", f"{name}.taken_at", f"{keys.queue_consumer}:ends")

    has = {user: values for user, values in fleet.api.users.items() if user in good}
    assert has == {user: {"city": value} for user, value in good.items()}
    assert refused.count() <= 1.1 * MOST
    assert (found.attempts_used, found.dead) == (0, 0)
    return found
