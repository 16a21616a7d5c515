"""celery-batches with the library `throttled-py`: GCRA in Redis, calls spaced evenly, no bursts."""

from __future__ import annotations

import time
from functools import partial

from throttled import Throttled, rate_limiter, store

from tests.bench.rivals import batches, celery_app
from tests.bench.rivals.api import QUOTA, REDIS_URL

_throttle = Throttled(
    key="im_set_attr",
    using="gcra",
    quota=rate_limiter.per_sec(QUOTA, burst=1),
    store=store.RedisStore(server=REDIS_URL),
)


def wait() -> None:
    """Return when a call may go; its own blocking wait sleeps 0.2 s at least, too long for 100 a second."""
    while (result := _throttle.limit()).limited:
        time.sleep(result.state.retry_after)


app, task = batches.make("batches_throttled", wait)
enqueue = partial(celery_app.enqueue, task)
