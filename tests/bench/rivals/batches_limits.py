"""celery-batches with the library `limits`: its moving window, the strictest of its strategies, in Redis."""

from __future__ import annotations

import time
from functools import partial

from limits import RateLimitItemPerSecond
from limits.storage import storage_from_string
from limits.strategies import MovingWindowRateLimiter

from tests.bench.rivals import batches, celery_app
from tests.bench.rivals.api import QUOTA, REDIS_URL

_limiter = MovingWindowRateLimiter(storage_from_string(REDIS_URL))
_rate = RateLimitItemPerSecond(QUOTA)


def wait() -> None:
    """Return when the window has room; it says when its oldest call leaves it."""
    while not _limiter.hit(_rate, "im_set_attr"):
        time.sleep(max(0.001, _limiter.get_window_stats(_rate, "im_set_attr").reset_time - time.time()))


app, task = batches.make("batches_limits", wait)
enqueue = partial(celery_app.enqueue, task)
