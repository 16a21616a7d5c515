"""Builds the product from its settings: the one place where the parts are put together."""

from __future__ import annotations

import functools
import os
import random
import threading

import redis

from worker import logs
from worker.appnames import AppNames
from worker.buffer import Buffer
from worker.client import Client
from worker.clock import SystemClock
from worker.config import Settings
from worker.delivery import Delivery
from worker.keys import Keys
from worker.line import Line
from worker.names import AttributeNames
from worker.policy import Policy
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.refused import Refused
from worker.stream import StreamConsumer
from worker.usersig import Signer

#: Set when this process shuts down: what is in flight is finished, nothing new begins.
stopping = threading.Event()


@functools.cache
def settings() -> Settings:
    """The worker's settings from the environment; raises `ConfigError`."""
    found = Settings.from_env(os.environ)
    logs.protect(found.secret_key.reveal())
    return found


def connect(settings: Settings) -> redis.Redis:
    """A client whose calls end: half-open connections are noticed, dropped ones are made anew."""
    return redis.Redis.from_url(
        settings.redis_url.reveal(), socket_timeout=5, socket_connect_timeout=3, health_check_interval=15
    )


def build_buffer(settings: Settings, client: redis.Redis) -> Buffer:
    return Buffer(
        client,
        Keys(settings.sdkappid),
        lease=settings.lease,
        shadow_ttl=settings.shadow_ttl,
        shadow_max_users=settings.shadow_max_users,
    )


def build_client(settings: Settings) -> Client:
    signer = Signer(lambda: _secret_key(settings), settings.admin, settings.sdkappid)
    return Client(
        settings.base_url,
        signer,
        sdkappid=settings.sdkappid,
        identifier=settings.admin,
        api=settings.api,
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
    )


def _secret_key(settings: Settings) -> str:
    """The key as it is now: a key in a file may have been rotated since the start."""
    key = settings.current_key().reveal()
    logs.protect(key)
    return key


def build_limiter(settings: Settings, client: redis.Redis) -> RateLimiter:
    keys = Keys(settings.sdkappid)
    return RateLimiter(client, keys, quota=settings.quota, patience=settings.patience, clock=SystemClock())


def build_app_names(settings: Settings, client: redis.Redis) -> AppNames:
    clock = SystemClock()
    known = AttributeNames(client, Keys(settings.sdkappid), clock)
    return AppNames(build_client(settings), build_limiter(settings, client), known, clock)


def build_delivery(settings: Settings, client: redis.Redis) -> Delivery:
    clock, keys = SystemClock(), Keys(settings.sdkappid)
    return Delivery(
        build_buffer(settings, client),
        build_limiter(settings, client),
        Line(client, keys),
        AttributeNames(client, keys, clock),
        build_client(settings),
        Policy(
            max_attempts=settings.max_attempts,
            backoff_base=settings.backoff_base,
            backoff_max=settings.backoff_max,
            hold=settings.hold,
            rng=random.Random(),
        ),
        clock,
        batch_size=settings.batch_size,
        lease=settings.lease,
        quota=settings.quota,
        stopping=stopping.is_set,
    )


def build_stream_consumer(settings: Settings, worker: str) -> StreamConsumer:
    """A consumer with connections to itself: its reads block."""
    client, keys = connect(settings), Keys(settings.sdkappid)
    return StreamConsumer(client, keys, producer(), Refused(client, keys), SystemClock(), worker=worker)


# One of each a process, made at first use: with prefork that is after the fork, so that processes
# never share a connection.


@functools.cache
def _delivery(_pid: int) -> Delivery:
    return build_delivery(settings(), connect(settings()))


@functools.cache
def _producer(_pid: int) -> Producer:
    found = settings()
    return Producer(found.redis_url.reveal(), found.sdkappid, max_pending=found.max_pending)


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
