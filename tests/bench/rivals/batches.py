"""celery-batches: messages are collected into calls of up to 100 users, which wait for a global limiter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery, Task
from celery_batches import Batches, SimpleRequest
from redis import RedisError

from tests.bench.rivals import celery_app
from tests.bench.rivals.api import BATCH, CallFailed, call
from worker.models import Attributes, UserId

#: Seconds after which messages are flushed although they are fewer than `BATCH`.
FLUSH_INTERVAL = 0.5
#: Attempts at a call, and the longest back-off between them, seconds.
ATTEMPTS, BACKOFF_MAX = 20, 5.0


def make(name: str, wait: Callable[[], None]) -> tuple[Celery, Task]:
    """The app and its task; `wait` returns when the limiter lets a call pass."""
    # Each thread needs a batch of its own among the messages that a worker may have.
    app = celery_app.make_app(name, worker_prefetch_multiplier=BATCH)

    @app.task(base=Batches, name="set_attributes", flush_every=BATCH, flush_interval=FLUSH_INTERVAL)
    def set_attributes(requests: Sequence[SimpleRequest]) -> None:
        users: dict[UserId, Attributes] = {}
        for request in requests:
            user, attrs = request.args
            users[user] = {**users.get(user, {}), **attrs}
        send(users, wait)

    task: Any = set_attributes
    return app, task


def send(users: dict[UserId, Attributes], wait: Callable[[], None]) -> None:
    """Call until it succeeds. Here, not by a message: a batch that raises counts as done and is lost."""
    for attempt in range(ATTEMPTS):
        try:
            # The limiter is in Redis, which may be failing over.
            wait()
            call(users)
        except (CallFailed, RedisError):
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, min(BACKOFF_MAX, 0.25 * 2**attempt)))
        else:
            return
