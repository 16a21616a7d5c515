"""Takes and acknowledges the messages of the broker's queue in bulk.

Whatever the broker, a message stays with it until `finish`, and a message that is taken again keeps the time of its first
taking: otherwise a redelivered message would count as newer than what happened in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from worker.intake.celery_message import MOST_BYTES, Envelope
from worker.state import scripts
from worker.state.connection import Redis
from worker.state.intake import queue_length
from worker.state.keys import Keys

#: Most messages, and bytes, of one taking: while a script takes more, every other client waits for Redis.
MOST, MOST_BYTES_AT_ONCE = 1000, 4_000_000
#: Messages that RabbitMQ sends ahead: two takings, so that none has to wait for it.
PREFETCH = 2 * MOST
#: Seconds between two heartbeats of RabbitMQ, and until one of its answers is overdue.
HEARTBEAT, ANSWER_TIMEOUT = 20.0, 10.0
#: Seconds for which RabbitMQ messages are remembered if they are never acknowledged.
REMEMBERED = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Taken:
    """Messages in the order of the queue, each with the ms at which it was first taken. `id` finds them again."""

    id: Any
    messages: Sequence[tuple[bytes | Envelope, int]]


class Queue(Protocol):
    """The broker's queue of updates. Its errors are those of the broker's library."""

    def take(self, now_ms: Callable[[], int]) -> Taken | None:
        """Take some messages, or those taken before and not finished; None if none.

        `now_ms` reads the state's clock. It is asked after the taking: an earlier time could be older than a message.
        """

    def finish(self, taken: Taken) -> None:
        """Acknowledge all of them: they are accepted, or kept as refused."""

    def wait(self, seconds: float) -> None:
        """Wait until there may be a message, at most that long."""

    def waiting(self) -> int:
        """How many messages are in the queue."""

    def close(self) -> None:
        """Disconnect from the broker. Raises nothing."""


class RedisQueue:
    """A queue of kombu's Redis transport: a list for each priority."""

    def __init__(self, redis: Redis, lists: Sequence[str], *, name: str, close: Callable[[], object]) -> None:
        """`lists` are the four keys of the queue, from the highest priority to the lowest; `name` is the prefix of our own
        keys.

        `close` releases what `redis` came from.
        """
        self._redis, self._close = redis, close
        self._lists = list(lists)
        self._taken, self._last = f"{name}.taken", f"{name}.taken_at"
        self._take = scripts.load(redis, "take")
        self._stamp = scripts.load(redis, "stamp")
        self._finish = scripts.load(redis, "finish")

    def take(self, now_ms: Callable[[], int]) -> Taken | None:
        at, *messages = self._take_some() or (b"",)
        if at.startswith(b"?"):
            at = self._stamp([self._taken, self._last], (at, now_ms()))
        return Taken(at, [(message, int(at)) for message in messages]) if at else None

    def _take_some(self) -> Any:
        keys = [*self._lists, self._taken, self._last]
        return self._take(keys, (MOST, MOST_BYTES_AT_ONCE, MOST_BYTES))

    def finish(self, taken: Taken) -> None:
        self._finish([self._taken], [taken.id])

    def wait(self, seconds: float) -> None:
        # Moves the oldest message to the place where it is already: there is no other way to wait without taking.
        self._redis.blmove(self._lists[0], self._lists[0], seconds, "RIGHT", "RIGHT")  # type: ignore[arg-type]

    def waiting(self) -> int:
        return queue_length(self._redis, self._lists)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._close()


class RabbitQueue:
    """A queue of RabbitMQ, consumed over a connection of py-amqp.

    RabbitMQ delivers a message again after its consumer is gone, and does not say when it first did. So the state remembers
    that, from before the message is accepted until RabbitMQ has seen the acknowledgement.
    """

    def __init__(self, connection: Any, queue: str, redis: Redis, keys: Keys) -> None:
        """`connection` is a `kombu.Connection`, `redis` a connection to the state; `close` closes both."""
        self._connection, self._queue, self._redis, self._key = connection, queue, redis, keys.taken
        self._buffer: list[Any] = []
        self._bytes = 0
        self._digests: list[bytes] = []
        self._checked_at = time.monotonic()
        try:
            self._channel = self._consume()
        except BaseException:
            self.close()
            raise

    def _consume(self) -> Any:
        channel = self._connection.channel()
        try:
            channel.queue_declare(self._queue, passive=True)
        except self._connection.channel_errors:
            # Nobody has sent anything yet. Declare queue and exchange as every Celery client does.
            channel = self._connection.channel()
            channel.exchange_declare(self._queue, "direct", durable=True, auto_delete=False)
            channel.queue_declare(self._queue, durable=True, auto_delete=False)
            channel.queue_bind(self._queue, self._queue, self._queue)
        channel.basic_qos(0, PREFETCH, False)
        channel.basic_consume(self._queue, callback=self._receive, on_cancel=self._cancelled)
        return channel

    def _receive(self, message: Any) -> None:
        self._buffer.append(message)
        self._bytes += len(message.body)

    def _cancelled(self, _tag: str) -> None:
        raise ConnectionError("the queue was deleted")

    def take(self, now_ms: Callable[[], int]) -> Taken | None:
        self._drain(0.0)
        if not self._buffer:
            return None
        size = count = 0
        while count < min(MOST, len(self._buffer)) and size < MOST_BYTES_AT_ONCE:
            size += len(self._buffer[count].body)
            count += 1
        messages = self._buffer[:count]
        del self._buffer[:count]
        self._bytes -= size
        envelopes = [_envelope(message) for message in messages]
        times = self._first_taken(messages, envelopes, now_ms())
        return Taken(messages[-1].delivery_tag, list(zip(envelopes, times, strict=True)))

    def _first_taken(self, messages: list[Any], envelopes: list[Envelope], now_ms: int) -> list[int]:
        digests = [_digest(envelope) for envelope in envelopes]
        again = [message.delivery_info.get("redelivered") for message in messages]
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.zremrangebyscore(self._key, "-inf", now_ms - REMEMBERED * 1000)
            fresh = {digest: now_ms for digest, old in zip(digests, again, strict=True) if not old}
            if fresh:
                pipe.zadd(self._key, fresh)
            if len(fresh) < len(digests):
                pipe.zadd(self._key, dict.fromkeys(digests, now_ms), nx=True)
                pipe.zmscore(self._key, digests)  # type: ignore[arg-type]
            scores = pipe.execute()[-1]
        self._digests = digests
        if not any(again):
            return [now_ms] * len(digests)
        return [int(score) if old else now_ms for score, old in zip(scores, again, strict=True)]

    def finish(self, taken: Taken) -> None:
        self._channel.basic_ack(taken.id, multiple=True)
        # The answer to this comes after the acknowledgement has been seen: only then may the times be forgotten.
        self._channel.queue_declare(self._queue, passive=True)
        self._redis.zrem(self._key, *self._digests)

    def wait(self, seconds: float) -> None:
        if not self._buffer:
            self._drain(seconds)

    def _drain(self, seconds: float) -> None:
        """Read what RabbitMQ has sent; waits at most that long for the first message."""
        now = time.monotonic()
        if now - self._checked_at >= HEARTBEAT / 4:
            self._checked_at = now
            self._connection.heartbeat_check(rate=4)
        # Enough reads to fill a taking: a message takes one or two.
        for _ in range(2 * MOST):
            # Further large messages stay in the socket.
            if len(self._buffer) >= MOST or self._bytes >= MOST_BYTES_AT_ONCE:
                return
            try:
                self._connection.drain_events(timeout=seconds if not self._buffer else 0.0005)
            except (TimeoutError, BlockingIOError):
                return

    def waiting(self) -> int:
        return int(self._channel.queue_declare(self._queue, passive=True).message_count) + len(self._buffer)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.release()
        self._redis.close()


def _envelope(message: Any) -> Envelope:
    properties = message.properties
    body = message.body
    body = body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body)
    headers = properties.get("application_headers")
    return Envelope(
        body, properties.get("content_type"), properties.get("content_encoding"), headers, properties
    )


def _digest(envelope: Envelope) -> bytes:
    """What distinguishes a message from others, and is the same when it is delivered again."""
    headers = envelope.headers if isinstance(envelope.headers, dict) else {}
    id = (
        headers.get("id")
        or envelope.properties.get("message_id")
        or envelope.properties.get("correlation_id")
    )
    return hashlib.blake2b(envelope.body + str(id).encode(errors="replace"), digest_size=12).digest()
