"""Puts a hundred thousand messages that nobody should send before real workers, with good ones among them."""

from __future__ import annotations

import random
import time
from pathlib import Path

import redis
import requests
from celery import Celery

from tests.intake.messages import MALFORMED, encoded, envelope, mutated, sealed
from worker.sandbox.processes import SDKAPPID, Plan, Sandbox
from worker.state.buffer import Buffer
from worker.state.intake import read_intake
from worker.state.keys import Keys

#: How many messages there are, and after how many of them a good one comes.
MESSAGES, GOOD_EVERY = 100_000, 500
#: The attribute names of the app.
NAMES = ("city", "level")
#: Seconds that all of it may take.
PATIENCE = 240.0


def fuzz(directory: Path, seed: int, messages: int = MESSAGES) -> list[str]:
    """Return what went wrong, in words; nothing if all is well."""
    dice, keys = random.Random(seed), Keys(int(SDKAPPID))
    plan = Plan(workers=2, concurrency=4, flower=False, names=NAMES)
    with Sandbox(directory, {}, plan) as sandbox:
        client = redis.Redis.from_url(sandbox.redis_url)
        stranger = Celery(broker=sandbox.redis_url, set_as_current=False)
        # Known from the start, so that what has others is refused at the door and does not stop the line.
        client.sadd(keys.names, *NAMES)
        before, good, sent = sandbox.pids(), {}, 0
        for number in range(0, messages, GOOD_EVERY):
            with client.pipeline(transaction=False) as pipe:
                for _ in range(GOOD_EVERY):
                    # A few go where tickets are, which Celery itself reads.
                    queue = "updates" if dice.random() < 0.98 else "deliveries"
                    pipe.lpush(queue, _message(dice))
                    sent += queue == "updates"
                pipe.execute()
            user = f"good{number:07}"
            good[user] = {"city": f"value {number}"}
            stranger.send_task("attributes.update", [user, good[user]], queue="updates")
            sent += 1
        deadline = time.monotonic() + PATIENCE
        buffer = Buffer(client, keys)
        # What was taken last is counted half a second later.
        while _queued(client) or buffer.snapshot().live or read_intake(client, keys).queue["taken"] < sent:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        users = requests.get(f"{sandbox.api_url}/simulator/users", timeout=60).json()
        ended = [name for name, pid in before.items() if not Path(f"/proc/{pid}").exists()]
        left = _queued(client)
        taken, balanced = read_intake(client, keys).queue["taken"], buffer.snapshot().balanced
        client.close()
    logs = "".join(log.read_text(errors="replace") for log in directory.glob("worker-*.log"))
    missing = sum(users.get(user) != attrs for user, attrs in good.items())
    wrong = {
        f"these ended: {', '.join(ended)}": bool(ended),
        f"{left} messages are left": left > 0,
        f"{missing} good messages of {len(good)} did not arrive": missing > 0,
        f"{taken:,} messages were taken of {sent:,} sent": taken != sent,
        "the ledger does not balance": not balanced,
        "a worker's consumer ended": "Unrecoverable error" in logs or "queue_process_ended" in logs,
        "a message could not even be refused": "message_unreadable" in logs,
    }
    return [words for words, is_so in wrong.items() if is_so]


def _message(dice: random.Random) -> bytes:
    if dice.random() < 0.1:
        message = dice.choice(list(MALFORMED.values()))
        return message if isinstance(message, bytes) else encoded(message)
    user = f"user{dice.randrange(1000)}"
    valid = [
        envelope(user, {"city": "Paris", "level": None}),
        envelope(
            task="attributes.update_many", args=[[[user, {"city": "x"}], ["bob", {"city": "y"}, 1.7e9]]]
        ),
        envelope(user, eta="2026-11-25T12:00:00+00:00", expires="2027-11-25T12:00:00+00:00"),
        sealed({"task": "attributes.update", "id": "1", "args": [user, {"city": "x"}], "kwargs": {}}, {}),
    ]
    return mutated(dice, dice.choice(valid))


def _queued(client: redis.Redis) -> int:
    """Messages that the broker still has."""
    lists = sum(client.llen(key) for key in ("updates", "updates.taken", "deliveries"))
    return lists + client.hlen("unacked")
