"""The event time of an update that came as a Celery task without one of its own.

Messages that are taken in bulk count as of when they were taken, on Redis' clock, which is remembered. Any other broker hands
a message out again after a kill, and nothing shows that it was taken before. Celery puts no time of publishing into a
message, so the best time available is used, which keeps the order of the queue:

1. the header that our own app adds when it publishes,
2. the header `timestamp_in_ms` that RabbitMQ adds if it is configured to,
3. AMQP's property `timestamp`, in whole seconds,
4. the moment at which the message was taken from the queue first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from worker.errors import InvalidUpdate
from worker.models import check_occurred_at

#: Header with the time of publishing, in ms.
PUBLISHED = "imattr_published_ms"


class Stamps:
    """Gives times in ms since 1970, each later than the one before. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1_000_000)
            return self._last


def event_ms(headers: Mapping[str, Any], properties: Mapping[str, Any], taken_ms: int) -> int:
    """The event time of a message that was taken from the queue at `taken_ms`."""
    published = _ms(headers.get(PUBLISHED)) or _ms(headers.get("timestamp_in_ms"))
    if not published and (second := _ms(properties.get("timestamp"))):
        # The time lies within that second; using its end keeps the order with messages that were taken later.
        published = second + 999
    # Nothing is published after it was taken: a clock that is ahead must not always win.
    return min(published or taken_ms, taken_ms)


def _ms(moment: object) -> int:
    try:
        return check_occurred_at("?", moment)
    except InvalidUpdate:
        return 0
