"""The composition root: builds the product from its settings."""

from __future__ import annotations

import functools
import mmap
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from worker import logs
from worker.clock import SystemClock
from worker.config import Settings
from worker.delivery import dispatcher
from worker.delivery.api import ChatApi
from worker.delivery.attribute_catalog import AttributeCatalog
from worker.delivery.loop import Delivery
from worker.delivery.meter import Meter
from worker.delivery.policy import Policy
from worker.delivery.usersig import Signer
from worker.intake.brokers import Queue, RabbitQueue
from worker.intake.celery_queue import QueueConsumer
from worker.intake.stream import StreamConsumer
from worker.producer import Memory, Producer
from worker.ratelimit import DELIVERS, RateLimiter, reads
from worker.readback import auditor
from worker.readback.auditor import Auditor
from worker.readback.reader import Reader
from worker.state import connection
from worker.state.attribute_names import AttributeNames
from worker.state.audit import AuditLog
from worker.state.buffer import Buffer
from worker.state.connection import Redis
from worker.state.fleet import Fleet
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.leader import Leader
from worker.state.line import Line
from worker.state.refused import Refused
from worker.state.shadow import Shadow


class Flag:
    """A flag shared with processes forked from this one. Setting it takes no lock, so a signal handler may."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def clear(self) -> None:
        self._byte[0] = 0

    def is_set(self) -> bool:
        return self._byte[0] == 1


#: Set when this worker shuts down: batches in flight are finished, and no new ones begin.
stopping = Flag()

#: Where this worker's processes report their work. A worker that serves metrics replaces it before it forks.
meter = Meter()


def report_to(other: Meter) -> None:
    """Report to another meter from now on."""
    global meter
    meter = other


@functools.cache
def settings() -> Settings:
    """The worker's settings from the environment; raises `ConfigError`."""
    found = Settings.from_env(os.environ)
    logs.protect(found.secret_key.reveal())
    return found


@functools.cache
def settings_without_key() -> Settings:
    """What Celery needs in every program, Flower included: nothing of the API's. Raises `ConfigError`."""
    return Settings.from_env(os.environ, "producer")


def connect(settings: Settings) -> Redis:
    """A client for the worker's own state, which notices half-open connections."""
    return connection.connect(settings.redis, key=Keys(settings.sdkappid).pending, health_check_interval=15)


def build_buffer(settings: Settings, redis: Redis) -> Buffer:
    return Buffer(
        redis,
        Keys(settings.sdkappid),
        lease=settings.lease,
        shadow_ttl=settings.shadow_ttl,
        shadow_max_users=settings.shadow_max_users,
        longest_delay=settings.longest_delay,
        longest_call=settings.hold + settings.read_timeout,
    )


def build_api(settings: Settings) -> ChatApi:
    signer = Signer(lambda: _secret_key(settings), settings.admin, settings.sdkappid)
    return ChatApi(
        settings.base_url,
        signer,
        sdkappid=settings.sdkappid,
        identifier=settings.admin,
        api=settings.api,
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
    )


def _secret_key(settings: Settings) -> str:
    """The current key: a key in a file may have been rotated since the start."""
    key = settings.current_key().reveal()
    logs.protect(key)
    return key


def build_limiter(settings: Settings, redis: Redis) -> RateLimiter:
    keys = Keys(settings.sdkappid)
    return RateLimiter(
        redis,
        keys,
        quota=settings.quota,
        patience=settings.patience,
        clock=SystemClock(),
        needs_replica=settings.needs_replica,
    )


def build_read_limiter(settings: Settings, redis: Redis) -> RateLimiter:
    """The slots of reads: what deliveries leave of the quota, or a quota of their own."""
    apart = settings.read_quota > 0
    return RateLimiter(
        redis,
        Keys(settings.sdkappid),
        quota=settings.read_quota or settings.quota,
        patience=settings.patience,
        clock=SystemClock(),
        needs_replica=settings.needs_replica and not apart,
        kind=DELIVERS if apart else reads(settings.read_share),
        apart=apart,
    )


def build_reader(settings: Settings, redis: Redis, stopping: Callable[[], bool] = lambda: False) -> Reader:
    limiter = build_read_limiter(settings, redis)
    return Reader(build_api(settings), limiter, SystemClock(), stopping=stopping)


def build_auditor(settings: Settings, worker: str) -> Auditor:
    """The auditor of `worker`, with a connection of its own."""
    redis, keys, clock = connect(settings), Keys(settings.sdkappid), SystemClock()
    return Auditor(
        Leader(redis, keys.auditor, worker, clock, term=auditor.TERM),
        Shadow(redis, keys),
        partial(build_reader, settings, redis),
        Line(redis, keys),
        AuditLog(redis, keys),
        History(redis, keys),
        clock,
        calls_a_minute=settings.audit,
    )


def build_attribute_catalog(settings: Settings, redis: Redis) -> AttributeCatalog:
    clock = SystemClock()
    known = AttributeNames(redis, Keys(settings.sdkappid), clock)
    return AttributeCatalog(build_api(settings), build_limiter(settings, redis), known, clock)


def build_delivery(settings: Settings, redis: Redis) -> Delivery:
    clock, keys = SystemClock(), Keys(settings.sdkappid)
    return Delivery(
        build_buffer(settings, redis),
        build_limiter(settings, redis),
        Line(redis, keys),
        AttributeNames(redis, keys, clock),
        build_api(settings),
        Policy(
            max_attempts=settings.max_attempts,
            backoff_base=settings.backoff_base,
            backoff_max=settings.backoff_max,
            hold=settings.hold,
        ),
        clock,
        batch_size=settings.batch_size,
        lease=settings.lease,
        quota=settings.quota,
        rng=random.Random(),
        stopping=stopping.is_set,
        meter=meter,
        reads=build_read_limiter(settings, redis) if settings.read_quota else None,
    )


def build_dispatch(settings: Settings, worker: str) -> tuple[Leader, Buffer, Fleet, Memory]:
    """What the dispatcher of `worker` needs to know about the fleet."""
    redis, keys = connect(settings), Keys(settings.sdkappid)
    leader = Leader(redis, keys.dispatcher, worker, SystemClock(), term=dispatcher.TERM)
    return leader, build_buffer(settings, redis), Fleet(redis, keys), Memory(redis, SystemClock())


def build_stream_consumer(settings: Settings, worker: str) -> StreamConsumer:
    """A consumer with connections of its own, since its reads block."""
    redis, keys = connect(settings), Keys(settings.sdkappid)
    return StreamConsumer(redis, keys, producer(), Refused(redis, keys), SystemClock(), worker=worker)


def build_queue_consumer(
    settings: Settings,
    worker: str,
    open_queue: Callable[[], Queue],
    *,
    report: Callable[[dict[str, int], float], None],
) -> QueueConsumer:
    """A consumer of the broker's queue, which `open_queue` connects to."""
    redis, keys = connect(settings), Keys(settings.sdkappid)
    return QueueConsumer(
        redis, keys, producer(), Refused(redis, keys), SystemClock(), open_queue, worker=worker, report=report
    )


def build_rabbit_queue(settings: Settings, connection: Any, name: str) -> RabbitQueue:
    """The queue at RabbitMQ, with what it cannot remember kept in the state."""
    return RabbitQueue(connection, name, connect(settings), Keys(settings.sdkappid))


# One of each per process, created on first use: with prefork that is after the fork, so processes never share a
# connection.


@functools.cache
def _delivery(_pid: int) -> Delivery:
    return build_delivery(settings(), connect(settings()))


@functools.cache
def _producer(_pid: int) -> Producer:
    found = settings()
    # A worker has nothing better to do than to wait.
    return Producer.of(found, timeout=connection.ANSWER_TIMEOUT, way="celery")


@functools.cache
def _refused(_pid: int) -> Refused:
    found = settings()
    return Refused(connect(found), Keys(found.sdkappid))


def delivery() -> Delivery:
    """This process' delivery loop."""
    return _delivery(os.getpid())


def producer() -> Producer:
    """This process' producer."""
    return _producer(os.getpid())


def refused() -> Refused:
    """Where this process keeps refused updates."""
    return _refused(os.getpid())
