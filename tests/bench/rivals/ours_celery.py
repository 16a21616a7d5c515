"""imattr by way of Celery: any client, which sends a message for each event by name."""

from __future__ import annotations

from collections.abc import Sequence

from celery import Celery

from tests.bench.rivals.api import REDIS_URL
from worker.models import Attributes, UserId


def enqueue(events: Sequence[tuple[UserId, Attributes, int]]) -> None:
    app = Celery(broker=REDIS_URL)
    with app.producer_pool.acquire(block=True) as producer:
        for user, attrs, _ in events:
            app.send_task("attributes.update", (user, attrs), queue="updates", producer=producer)
