"""imattr: a producer that gives all events at once; the workers are the product's own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tests.bench.rivals.api import REDIS_URL
from worker.models import Attributes, UserId
from worker.producer import Producer


def enqueue(events: Sequence[tuple[UserId, Attributes, int]]) -> None:
    result = Producer(REDIS_URL, int(os.environ["IMATTR_SDKAPPID"])).set_many(events)
    assert not result.refused
