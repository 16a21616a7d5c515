"""What all contestants on Celery share: an app set up so that a message outlives the worker that has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, Task

from tests.bench.rivals.api import REDIS_URL
from worker.models import Attributes, UserId

#: Seconds after which Redis' broker gives the messages of a worker that died to another one. It must be
#: longer than a message is ever kept: a call, its retries and waiting for the limiter.
VISIBILITY = 60


def broker(url: str) -> tuple[str, dict[str, str]]:
    """Celery's own way to write the address of Redis, and the options of its transport that belong to it."""
    parts = urlsplit(url)
    if parts.scheme != "redis+sentinel":
        return url, {}
    sentinels = ";".join(f"sentinel://{place}" for place in parts.netloc.split(","))
    return sentinels, {"master_name": parts.path.strip("/")}


def make_app(name: str, **settings: Any) -> Celery:
    url, options = broker(REDIS_URL)
    app = Celery(name, broker=url)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        broker_transport_options={"visibility_timeout": VISIBILITY, **options},
        broker_connection_retry_on_startup=True,
        # A failover may take longer than the hundred attempts that are the default.
        broker_connection_max_retries=None,
        **settings,
    )
    return app


def enqueue(task: Task, events: Sequence[tuple[UserId, Attributes, int]]) -> None:
    """One message an event, all on one connection, as any client sends them that knows the task's name."""
    with task.app.producer_pool.acquire(block=True) as producer:
        for user, attrs, _ in events:
            task.app.send_task(task.name, (user, attrs), producer=producer)
