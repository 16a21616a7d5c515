"""Connections to Redis: the one place that builds a client from a URL.

Everything outside `state/` takes `Redis` and the errors from here, so only this room and `AsyncProducer` know the library.
"""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

__all__ = [
    "BusyLoadingError",
    "ConnectionError",
    "OutOfMemoryError",
    "Redis",
    "RedisError",
    "ResponseError",
    "TimeoutError",
    "connect",
    "retry_once",
]

#: Seconds that connecting, and one answer, may take before the caller gets an error.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 3.0, 5.0


def connect(
    url: str, *, timeout: float = ANSWER_TIMEOUT, connect_timeout: float = CONNECT_TIMEOUT, **options: Any
) -> Redis:
    """Build a client; nothing is sent before its first command. Timeouts in seconds.

    A server that does not answer in time raises `TimeoutError`. `options` are those of `redis.Redis`.
    """
    return Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=connect_timeout, **options)


def retry_once() -> Retry:
    """For callers that must hear of a failure at once: only a dropped connection is opened again, a single time.

    Repeating a command whose answer was lost is safe for every script here.
    """
    return Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
