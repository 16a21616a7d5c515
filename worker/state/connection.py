"""Connections to Redis: the one place that builds a client from a URL.

Everything outside `state/` takes `Redis` and the errors from here, so only this room knows the library.
"""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    DataError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from ..config import without_protocol

__all__ = [
    "AsyncRedis",
    "BusyLoadingError",
    "ConnectionError",
    "DataError",
    "OutOfMemoryError",
    "Redis",
    "RedisError",
    "ResponseError",
    "TimeoutError",
    "connect",
    "connect_async",
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
    return Redis.from_url(
        resp2(url), socket_timeout=timeout, socket_connect_timeout=connect_timeout, **options
    )


def resp2(url: str) -> str:
    """Return the URL of a connection that speaks RESP2, whatever it asked for.

    Every server speaks it. RESP3 has to be asked for with HELLO, which TencentDB for Redis, older Sentinels and many
    proxies refuse, and nothing here needs it.
    """
    url = without_protocol(url)
    return f"{url}{'&' if '?' in url else '?'}protocol=2"


def retry_once() -> Retry:
    """For callers that must hear of a failure at once: only a dropped connection is opened again, a single time.

    Repeating a command whose answer was lost is safe for every script here.
    """
    return Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))


def connect_async(url: str, *, timeout: float, connections: int) -> AsyncRedis:
    """Build a client for asyncio with at most so many connections; who needs one more waits for `timeout` seconds."""
    pool = BlockingConnectionPool.from_url(
        resp2(url),
        max_connections=connections,
        timeout=timeout,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=AsyncRetry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
    )
    return AsyncRedis(connection_pool=pool)
