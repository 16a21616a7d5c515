"""Plain Celery: a task for each event, with Celery's own rate limit and automatic retries."""

from __future__ import annotations

from functools import partial

from tests.bench.rivals import celery_app
from tests.bench.rivals.api import QUOTA, CallFailed, call
from worker.models import Attributes, UserId

app = celery_app.make_app("each")


# Celery limits each worker by itself, so each of the two has half of the quota.
@app.task(
    rate_limit=f"{QUOTA // 2}/s",
    autoretry_for=(CallFailed,),
    retry_backoff=True,
    retry_backoff_max=10,
    retry_jitter=True,
    max_retries=None,
)
def set_attributes(user: UserId, attrs: Attributes) -> None:
    call({user: attrs})


enqueue = partial(celery_app.enqueue, set_attributes)
