"""What a worker does beside its tasks: dispatch, and take in what came by Celery's queue and by the stream.

Each is a step of the worker, with a thread of its own in the main process, from start to shutdown. A step of the worker
rather than of the consumer, and a thread rather than a timer: a reconnect of the broker restarts the consumer and drops its
timers.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

import structlog
from celery import bootsteps
from celery.worker import state

from worker import runtime
from worker.clock import SystemClock
from worker.delivery.dispatcher import Dispatcher
from worker.intake.backpressure import Backpressure
from worker.intake.brokers import HEARTBEAT, Queue, RabbitQueue, RedisQueue
from worker.models import BatchId
from worker.operate import health
from worker.state.connection import Redis
from worker.state.leader import LeaderLoop

log = structlog.get_logger()

UPDATES, DELIVERIES = "updates", "deliveries"

#: Seconds a worker waits for each of its threads to finish a turn.
THREAD_PATIENCE = 10.0


def _name(worker: Any) -> str:
    return f"{worker.hostname or socket.gethostname()}"


class _ThreadStep(bootsteps.StartStopStep):
    """Runs a leader's loop in a thread of its own."""

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._loop: LeaderLoop | None = None
        self._thread: threading.Thread | None = None

    def loop(self, worker: Any) -> LeaderLoop | None:
        """Build what this worker runs, if anything."""
        raise NotImplementedError

    def start(self, worker: Any) -> None:
        self._loop = self.loop(worker)
        if self._loop:
            self._thread = threading.Thread(target=self._loop.run, name=type(self).__name__, daemon=True)
            self._thread.start()

    def stop(self, worker: Any) -> None:
        if self._loop and self._thread:
            self._loop.stop()
            self._thread.join(THREAD_PATIENCE)

    terminate = stop


class DispatcherStep(_ThreadStep):
    """This worker's dispatcher, and its health page."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._page: ThreadingHTTPServer | None = None
        self._last_turn = time.monotonic()
        self._intake: Backpressure | None = None

    def loop(self, worker: Any) -> LeaderLoop:
        settings = runtime.settings()
        # Only with a broker whose messages are taken by tasks, and never in a worker started with `-Q deliveries`.
        if UPDATES in worker.app.amqp.queues.consume_from:
            self._intake = Backpressure(
                runtime.producer().has_room, partial(_take_updates, worker), SystemClock()
            )
        if settings.health_port:
            self._page = health.serve(settings.health_port, lambda: time.monotonic() - self._last_turn)
        return Dispatcher(
            *runtime.build_dispatch(settings, _name(worker)),
            partial(_publish, worker.app),
            batch_size=settings.batch_size,
            linger=settings.linger,
            quota=settings.quota,
            on_turn=self._note_turn,
        )

    def stop(self, worker: Any) -> None:
        super().stop(worker)
        if self._page:
            self._page.shutdown()

    terminate = stop

    def _note_turn(self) -> None:
        self._last_turn = time.monotonic()
        if self._intake:
            self._intake.look()


def _publish(app: Any, ticket: BatchId) -> None:
    # A ticket that cannot be sent now is worthless later: no retries, and no expiry to clean up.
    app.send_task("attributes.deliver", task_id=ticket, queue=DELIVERIES, retry=False)


class StreamStep(_ThreadStep):
    """This worker's consumer of the stream."""

    def loop(self, worker: Any) -> LeaderLoop:
        return runtime.build_stream_consumer(runtime.settings(), _name(worker))


class QueueStep(_ThreadStep):
    """This worker's consumer of Celery's queue of updates, in place of Celery's own."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        queues = worker.app.amqp.queues
        self._open = _opener(worker.app) if UPDATES in queues.consume_from else None
        if self._open:
            queues.deselect(UPDATES)

    def loop(self, worker: Any) -> LeaderLoop | None:
        if not self._open:
            return None
        return runtime.build_queue_consumer(
            runtime.settings(),
            _name(worker),
            self._open,
            report=partial(_show, worker.app, _name(worker)),
            revoked=state.revoked,
        )


def _opener(app: Any) -> Any:
    """What opens the queue at this broker; None if its messages can only be taken by Celery."""
    scheme = runtime.settings().broker_url.reveal().partition("://")[0]
    if scheme.partition("+")[0] in ("redis", "rediss", "sentinel", "unix"):
        return partial(_open_redis, app)
    return partial(_open_rabbit, app) if scheme in ("amqp", "amqps", "pyamqp") else None


def _open_redis(app: Any) -> Queue:
    # Over kombu's own pool, which knows how to reach this broker, and without its client, which knows few commands.
    connection = app.connection_for_write()
    try:
        channel = connection.channel()
        prefix = channel.global_keyprefix
        lists = [prefix + channel._q_for_pri(UPDATES, step) for step in channel.priority_steps]
        return RedisQueue(
            Redis(connection_pool=channel.pool), lists, name=f"{prefix}{UPDATES}", close=connection.release
        )
    except BaseException:
        connection.release()
        raise


def _open_rabbit(app: Any) -> Queue:
    settings = runtime.settings()
    return runtime.build_rabbit_queue(settings, app.connection_for_write(heartbeat=HEARTBEAT), UPDATES)


def _show(app: Any, worker: str, counts: dict[str, int], seconds: float) -> None:
    """Show in Flower what was taken in, as if it were a task that has just ended."""
    id = str(uuid.uuid4())
    about = {"name": "attributes.intake", "args": "()", "kwargs": "{}", "retries": 0, "eta": None, "expires": None}
    # Events are for looking at: without a broker there is nobody to look.
    with contextlib.suppress(Exception), app.events.default_dispatcher(hostname=worker) as events:
        events.send("task-received", uuid=id, root_id=id, parent_id=None, **about)
        events.send("task-started", uuid=id)
        shown = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        events.send("task-succeeded", uuid=id, result=shown, runtime=round(seconds, 3))


def _take_updates(worker: Any, wanted: bool) -> None:
    """Start or stop consuming the queue of updates, soon."""
    consumer: Any = getattr(worker, "consumer", None)
    # There is no consumer at the start, and no `task_consumer` during a reconnect.
    taking = getattr(consumer, "task_consumer", None)
    if taking and taking.consuming_from(UPDATES) != wanted:
        consumer.call_soon(_switch_updates, consumer, wanted)


def _switch_updates(consumer: Any, wanted: bool) -> None:
    """Runs in the consumer's own thread, since its channel is not thread-safe.

    Celery's own `add_task_queue` forgets that the queue was deselected, so the next reconnect would drop it.
    """
    queues = consumer.app.amqp.queues
    if wanted:
        queues.select([*queues.consume_from, UPDATES])
    else:
        queues.deselect(UPDATES)
    taking = consumer.task_consumer
    if taking and wanted:
        taking.add_queue(queues[UPDATES])
        taking.consume()
    elif taking:
        taking.cancel_by_queue(UPDATES)
