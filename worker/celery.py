"""The Celery app: ``celery -A worker worker --pool threads --concurrency 16``.

Messages are tickets and updates, as JSON. A ticket carries no user data, so losing, repeating or delaying one costs nothing:
all state is in Redis. There is no beat, no ETA and no result backend. Settings below that are not obvious say what breaks
without them.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click
import structlog
from celery import Celery, Task, signals
from celery.concurrency import get_implementation
from celery.worker.request import Request
from kombu.entity import Exchange, Queue

from worker import logs, runtime, transport
from worker.config import Settings
from worker.delivery.loop import LONGEST_CARRY
from worker.errors import ConfigError
from worker.intake.event_time import PUBLISHED, Stamps, event_ms
from worker.operate.metrics import WorkerPage
from worker.state.connection import RedisError
from worker.steps import DELIVERIES, UPDATES, AuditStep, DispatcherStep, QueueStep, StreamStep

_stamps = Stamps()


class PrivateRequest(Request):
    """A task as Celery's events, `inspect` and Flower see it: without its arguments.

    The arguments of an update are user data, and clients copy them as text into the message's headers. Requests are created
    in queue order, so this is where a message gets its event time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._argsrepr, self._kwargsrepr = "(hidden)", "(hidden)"
        request = self._request_dict
        request["taken_ms"] = _stamps.next()
        request["event_ms"] = event_ms(request, request["properties"], request["taken_ms"])

    def info(self, safe: bool = False) -> Any:
        return super().info(safe=True)

    def send_event(self, type: str, **fields: Any) -> None:
        """Give a ticket whose batches were not all delivered a state of its own, since Celery counts it as succeeded."""
        if type == "task-succeeded" and (worst := worst_outcome(fields.get("result"))):
            type = f"task-{worst}"
        super().send_event(type, **fields)


#: What Flower shows in place of SUCCESS, the worst first. The other outcomes cost nothing.
_SHOWN = (
    "failed",
    "dead_lettered",
    "stopped",
    "fenced",
    "retried",
    "partly_delivered",
    "rate_limited",
    "snoozed",
)


def worst_outcome(result: object) -> str | None:
    """The worst outcome in the text of a ticket's result, if any batch in it was not delivered."""
    found = set(re.findall(r"'outcome': '(\w+)'", result if isinstance(result, str) else ""))
    return next((outcome for outcome in _SHOWN if outcome in found), None)


class PrivateTask(Task):
    """Base of all tasks."""

    Request = "worker.celery:PrivateRequest"
    #: Characters of a result in Flower: enough for every batch of one ticket.
    resultrepr_maxsize = 8192


def _settings() -> Settings:
    """The settings that the running program needs: all for a worker, none of the API's for Flower and Celery's other
    commands.

    A worker reads them all here, so that all its configuration errors are reported together.
    """
    command = click.get_current_context(silent=True)
    return _read(
        runtime.settings if command and command.info_name == "worker" else runtime.settings_without_key
    )


def _read(settings: Callable[[], Settings]) -> Settings:
    try:
        return settings()
    except ConfigError as error:
        # Celery's commands would print a traceback to someone who forgot a variable.
        print("imattr cannot start:", *error.mistakes, sep="\n  ", file=sys.stderr)
        raise SystemExit(2) from None


def _configuration(settings: Settings) -> dict[str, Any]:
    return {
        "broker_url": _broker_url(settings),
        "broker_use_ssl": dict(settings.broker.tls_options)
        if settings.broker and settings.broker.tls
        else None,
        # Objects, because Flower does not understand plain dictionaries.
        "task_queues": [_queue(UPDATES), _queue(DELIVERIES)],
        "worker_consumer": "worker.transport:SturdyConsumer",
        "task_default_queue": UPDATES,
        "task_routes": {"attributes.deliver": {"queue": DELIVERIES}},
        "accept_content": ["json"],
        "task_serializer": "json",
        # Nobody reads results; the events for Flower carry them anyway.
        "result_backend": None,
        "task_ignore_result": True,
        # A task that dies with its worker runs again; with one message at a time, a shutdown returns the rest.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        # With the threads pool, True would end the worker.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # After a reconnect, Celery would set the prefetch count from the pool's threads: with RabbitMQ they then read each
        # other's answers from the one connection, and hang.
        "worker_enable_prefetch_count_reduction": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_transport_options": _transport(settings),
    }


def _broker_url(settings: Settings) -> str:
    """The broker's URL in Celery's and Flower's notation; `worker.transport` connects to Redis from the settings
    themselves."""
    place = settings.broker
    if place is None:
        return settings.broker_url.reveal()
    account = f"{quote(place.username, '')}:{quote(place.password, '')}@" if place.password else ""
    if place.kind == "socket":
        return f"redis+socket://{account}{place.path}?virtual_host={place.database}"
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in place.hosts]
    if place.kind == "sentinel":
        return ";".join(f"sentinel://{account}{host}/{place.database}" for host in hosts)
    return f"{'rediss' if place.tls else 'redis'}://{account}{hosts[0]}/{place.database}"


def _queue(name: str) -> Queue:
    return Queue(name, Exchange(name), name)  # type: ignore[no-untyped-call]


def _transport(settings: Settings) -> dict[str, Any]:
    if settings.broker is None:
        # Without timeouts, a half-open connection stops the dispatcher for good.
        return {"confirm_publish": True, "connect_timeout": 3, "read_timeout": 10, "write_timeout": 10}
    return {
        "global_keyprefix": settings.celery_prefix,
        "place": transport.name_of(settings.broker),
        # For Flower, which looks up the queues itself.
        "master_name": settings.broker.service,
        # One message from each queue in turn, so that deliveries never wait behind updates. Any other ratio starves them: at
        # four updates to one delivery, they lose a third of the rate.
        "queue_order_strategy": "round_robin",
        # A message not acknowledged within this time runs again; far longer than any task takes.
        "visibility_timeout": max(120, round(3 * (settings.longest_task + LONGEST_CARRY))),
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        # Without timeouts, a half-open connection stops the worker for good.
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 5,
        "retry_on_timeout": False,
    }


app = Celery("imattr", task_cls=PrivateTask, include=["tasks.attributes"])
# Read when Celery first needs them, so that importing this module needs no settings.
app.add_defaults(lambda: _configuration(_settings()))


app.steps["worker"].update({AuditStep, DispatcherStep, QueueStep, StreamStep})


class _WithoutBodies(logging.Filter):
    """Celery logs the whole body of a message that it cannot use; this keeps only the first sentence."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "body" in str(record.msg):
            record.msg = record.getMessage().splitlines()[0].partition(" [type:")[0]
            record.args, record.exc_info = (), None
        return True


@signals.setup_logging.connect
def _configure_logs(**_: Any) -> None:
    settings = _settings()
    logs.configure(settings.log_level, settings.log_format)
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_WithoutBodies())


#: Pools that shut down cleanly and use every slot; each is tested. With gevent, eventlet and solo, Celery does not
#: acknowledge while it waits for work, and delivers a fraction.
POOLS = ("threads", "prefork")


@signals.worker_init.connect
def _refuse_other_pools(sender: Any, **_: Any) -> None:
    wanted = get_implementation(sender.pool_cls)
    if wanted not in [get_implementation(name) for name in POOLS]:
        name = wanted.__module__.rpartition(".")[2]
        print(
            f"imattr cannot start:\n  --pool {name} is not supported, use threads or prefork", file=sys.stderr
        )
        raise SystemExit(2)


@signals.worker_init.connect
def _refuse_eviction(**_: Any) -> None:
    settings = _read(runtime.settings)
    try:
        with runtime.connect(settings) as redis:
            policy = redis.info("memory").get("maxmemory_policy", "noeviction")
    except RedisError:
        # Redis is away for now, or the service hides this setting.
        return
    if policy != "noeviction" and not settings.allow_eviction:
        what = "accepted updates" if policy.startswith("allkeys") else "keys that expire, such as elections"
        print(
            f"imattr cannot start:\n  Redis' maxmemory-policy is {policy}: once full, it would delete {what}.\n"
            "  Set maxmemory-policy noeviction there, or IMATTR_ALLOW_EVICTION=1 to accept that.",
            file=sys.stderr,
        )
        raise SystemExit(2)


@signals.worker_init.connect
def _count(sender: Any, **_: Any) -> None:
    """Count what this worker does, if it has a page to show it on."""
    settings = runtime.settings()
    if not settings.health_port:
        return
    directory = None
    if get_implementation(sender.pool_cls) is get_implementation("prefork"):
        directory = tempfile.mkdtemp(prefix="imattr-metrics-")
        atexit.register(_remove, directory, os.getpid())
    sender.metrics = WorkerPage(settings.sdkappid, directory)
    runtime.report_to(sender.metrics.meter)


def _remove(directory: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)


@signals.worker_init.connect
def _tune_threads(**_: Any) -> None:
    # A thread whose slot has come needs the interpreter at once, not after the usual 5 ms.
    sys.setswitchinterval(0.0005)


@signals.worker_ready.connect
def _spare_the_collector(**_: Any) -> None:
    # Everything allocated so far stays. Each full collection would scan all of it, and for those 50 ms every thread would
    # miss its slot. After a reconnect the worker is ready again: garbage made since then is collected once.
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@signals.before_task_publish.connect
def _note_time_of_publishing(headers: dict[str, Any], **_: Any) -> None:
    headers[PUBLISHED] = _stamps.next()


@signals.worker_shutting_down.connect
def _stop_claiming(**_: Any) -> None:
    runtime.stopping.set()


@signals.task_prerun.connect
@signals.task_postrun.connect
def _forget_context(**_: Any) -> None:
    # A pool's thread runs one task after another: nothing bound for one may reach the next.
    structlog.contextvars.clear_contextvars()
