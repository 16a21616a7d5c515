"""One writer: offers updates by one of the ways in, for as long as it lives, and notes what it was told.

    python -m tests.chaos.writers WAY SEED RATE NOTES

The settings come from the environment, as for any program that uses the product. NOTES gets two lines of
JSON for each offer: one before the call and one after it. A writer that is killed in between leaves the
first alone, and that offer in doubt. Each attribute has one writer, its updates either all have event times
or none, and each value says which update it is of: so the order of the updates is known without the product.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.history import Answer, Offer
from worker.errors import InvalidUpdate
from worker.producer import Producer

# A writer of the previous version has only what both versions have.
if TYPE_CHECKING:
    from worker.state.connection import Redis
    from worker.state.keys import Keys

#: Users of each writer: few, so that updates meet those before them in every state.
USERS = 150
#: How far behind the newest event an event may be, ms.
LATE_MS = 5000

NAMES = ("city", "level")
#: The part of all updates that break a rule, and what breaks it: more bytes than the API takes.
BAD, TOO_LONG = 0.01, "é" * 26


class Update(NamedTuple):
    """One update: a user, attributes, the event time in ms or None."""

    user: str
    attrs: dict[str, str | None]
    event_ms: int | None


#: Offers some updates, and says for each whether it was accepted. `bad` ones break a rule.
Way = Callable[[Sequence[Update]], list[Answer]]


def updates(writer: str, rng: random.Random, *, timed: bool) -> Iterator[Update]:
    """Changes of attributes, without end: some to the value they had, some removals, events out of order."""
    last: dict[tuple[str, str], str | None] = {}
    number = 0
    while True:
        number += 1
        user = f"{writer}-{rng.randrange(USERS):03}"
        attrs: dict[str, str | None] = {}
        for name in rng.sample(NAMES, rng.choice((1, 1, 2))):
            value = f"{writer}.{number}"
            chance = rng.random()
            attrs[name] = last.get((user, name), value) if chance < 0.1 else None if chance < 0.15 else value
            if chance > 1 - BAD:
                attrs[name] = f"{TOO_LONG}{number}"
            else:
                last[user, name] = attrs[name]
        # No two events of one attribute at the same millisecond: then their order would be that of arrival.
        late = rng.randrange(0, LATE_MS) if rng.random() < 0.3 else 0
        now = int(time.time() * 1000)
        yield Update(user, attrs, now - late if timed else None)


def _one_by_one(producer: Producer) -> Way:
    def offer(given: Sequence[Update]) -> list[Answer]:
        for update in given:
            try:
                producer.set(update.user, update.attrs)
            except InvalidUpdate:
                assert is_bad(update)
        return _answers(given)

    return offer


def _many(producer: Producer) -> Way:
    def offer(given: Sequence[Update]) -> list[Answer]:
        result = producer.set_many((update.user, update.attrs, update.event_ms) for update in given)
        refused = {refusal.index for refusal in result.refused}
        return [
            Answer.REFUSED if place in refused or is_bad(update) else Answer.ACCEPTED
            for place, update in enumerate(given)
        ]

    return offer


def _stream(client: Redis, keys: Keys) -> Way:
    def offer(given: Sequence[Update]) -> list[Answer]:
        for update in given:
            client.xadd(keys.updates, {"user": update.user, "attrs": json.dumps(update.attrs)})
        return _answers(given)

    return offer


def is_bad(update: Update) -> bool:
    """Whether it breaks a rule."""
    return any(value and value.startswith(TOO_LONG) for value in update.attrs.values())


def _answers(given: Sequence[Update], accepted: Answer = Answer.ACCEPTED) -> list[Answer]:
    return [Answer.REFUSED if is_bad(update) else accepted for update in given]


def _tasks(broker_url: str) -> Way:
    """As any Celery client sends them: some to be taken later, some with an expiry, some of a higher priority.

    A Redis broker that is killed may lose what it took, and what has expired is dropped.
    """
    from celery import Celery

    app = Celery(broker=broker_url, set_as_current=False)
    durable = broker_url.startswith(("amqp", "pyamqp"))
    app.conf.broker_transport_options = {"confirm_publish": True} if durable else {"socket_timeout": 5}
    accepted = Answer.ACCEPTED if durable else Answer.DOUBT

    def offer(given: Sequence[Update]) -> list[Answer]:
        updates = [[update.user, update.attrs, update.event_ms] for update in given]
        # Not by chance: the seed has decided already what is in the updates.
        kind = zlib.crc32(given[0].user.encode()) % 10
        how: dict[str, Any] = (
            [{}, {"countdown": 2}, {"expires": 30}, {"priority": 9}][kind] if kind < 4 else {}
        )
        app.send_task("attributes.update_many", [updates], queue="updates", retry=False, **how)
        return _answers(given, Answer.DOUBT if "expires" in how else accepted)

    return offer


#: How many updates a call has, and whether they have event times, by way.
WAYS = {"set": (1, False), "set_many": (40, True), "stream": (1, False), "tasks": (20, True)}


def make(way: str) -> Way:
    """The way of that name, by the settings in the environment."""
    redis_url, app = os.environ["IMATTR_REDIS_URL"], int(os.environ["IMATTR_SDKAPPID"])
    password_file = os.environ.get("IMATTR_REDIS_PASSWORD_FILE", "")
    if way == "tasks":
        return _tasks(os.environ["IMATTR_BROKER_URL"])
    if way == "stream":
        from worker.redis_url import with_password_file
        from worker.state.connection import connect
        from worker.state.keys import Keys

        keys = Keys(app)
        place = with_password_file(redis_url, password_file) if password_file else redis_url
        return _stream(connect(place, key=keys.updates), keys)
    options: dict[str, Any] = {}
    if password_file:
        options["password_file"] = password_file
    if replicas := int(os.environ.get("IMATTR_REPLICAS", "0")):
        options["replicas"] = replicas
    producer = Producer(redis_url, app, **options)
    return _one_by_one(producer) if way == "set" else _many(producer)


def write(way: str, seed: int, rate: float, notes: Path) -> None:
    """Offer `rate` updates a second until this process ends."""
    offer, (size, timed), rng = make(way), WAYS[way], random.Random(seed)
    stream = updates(f"{way}{seed}", rng, timed=timed)
    due = time.monotonic()
    with notes.open("a", encoding="utf-8", buffering=1) as file:
        for number in range(sys.maxsize):
            given = [next(stream) for _ in range(size)]
            file.write(json.dumps({"number": number, "began": time.monotonic(), "given": given}) + "\n")
            failed = False
            try:
                answers = offer(given)
            # Whatever it is, the writer cannot know whether the updates were taken, and goes on.
            except Exception as error:
                answers, failed = [Answer.DOUBT for _ in given], True
                print(type(error).__name__, file=sys.stderr, flush=True)
            told = {"number": number, "ended": time.monotonic(), "answers": answers}
            file.write(json.dumps(told) + "\n")
            # No more than so much is caught up after a pause.
            due = max(due + size / rate, time.monotonic() - 1)
            time.sleep(max(0.2 if failed else 0.0, due - time.monotonic()))


def read(notes: Path) -> Iterator[Offer]:
    """The offers that the notes tell of, an attribute each."""
    begun: dict[int, Any] = {}
    for line in notes.read_text(encoding="utf-8").splitlines():
        try:
            note = json.loads(line)
        except ValueError:
            # Cut short by a kill: what it says began after that, or was never told.
            continue
        if "given" in note:
            begun[note["number"]] = note
        else:
            offer = begun.pop(note["number"])
            yield from _offers(offer, note["ended"], note["answers"])
    for offer in begun.values():
        yield from _offers(offer, float("inf"), [Answer.DOUBT] * len(offer["given"]))


def _offers(offer: Any, ended: float, answers: Sequence[str]) -> Iterator[Offer]:
    for (user, attrs, event_ms), answer in zip(offer["given"], answers, strict=True):
        for name, value in attrs.items():
            yield Offer(user, name, value, offer["began"], ended, Answer(answer), event_ms)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
