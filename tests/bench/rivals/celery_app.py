"""What all contestants on Celery share: an app set up so that a message outlives the worker that has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery, Task

from tests.bench.rivals.api import REDIS_URL
from worker.models import Attributes, UserId

#: Seconds after which Redis' broker gives the messages of a worker that died to another one. It must be
#: longer than a message is ever kept: a call, its retries and waiting for the limiter.
VISIBILITY = 60


def make_app(name: str, **settings: Any) -> Celery:
    app = Celery(name, broker=REDIS_URL)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        broker_transport_options={"visibility_timeout": VISIBILITY},
        broker_connection_retry_on_startup=True,
        **settings,
    )
    return app


def enqueue(task: Task, events: Sequence[tuple[UserId, Attributes, int]]) -> None:
    """One message an event, all on one connection."""
    with task.app.producer_pool.acquire(block=True) as producer:
        for user, attrs, _ in events:
            task.apply_async((user, attrs), producer=producer)
