"""What a worker does beside its tasks: dispatching, taking in updates from the stream and Celery's queue, and auditing.

Each is a step of the worker, with a thread of its own in the main process, from start to shutdown. A step of the worker
rather than of the consumer, and a thread rather than a timer: reconnecting to the broker restarts the consumer and drops its
timers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any, Protocol

import structlog
from celery import bootsteps
from celery.worker.control import inspect_command
from celery.worker.state import active_requests

from worker import runtime
from worker.clock import SystemClock
from worker.delivery.dispatcher import Dispatcher
from worker.intake.backpressure import Backpressure
from worker.models import BatchId
from worker.operate import health
from worker.operate.settings_in_force import changed
from worker.state import fleet
from worker.state.connection import RedisError
from worker.state.fleet import Fleet
from worker.state.leader import Leader
from worker.version import VERSION

log = structlog.get_logger()

UPDATES, DELIVERIES = "updates", "deliveries"

#: Seconds a worker waits for each of its threads to finish a turn.
THREAD_PATIENCE = 10.0
#: Seconds until a process that ended is started again, and how long one that was asked to end may take.
RESTART_AFTER, PROCESS_PATIENCE = 1.0, 8.0


def _name(worker: Any) -> str:
    return f"{worker.hostname or socket.gethostname()}"


class _Loop(Protocol):
    """Something that runs in a thread until it is stopped."""

    def run(self) -> None: ...

    def stop(self) -> None: ...


class _ThreadStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no type hints
    """Runs a loop in a thread of its own."""

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._loop: _Loop | None = None
        self._thread: threading.Thread | None = None

    def loop(self, worker: Any) -> _Loop | None:
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
        self._last_turn = self._last_answer = time.monotonic()
        self._intake: Backpressure | None = None
        self._fleet: Fleet | None = None
        self._report: Callable[[], None] = lambda: None
        self._report_at = 0.0

    def loop(self, worker: Any) -> _Loop:
        settings = runtime.settings()
        # Only with a broker whose messages are taken by tasks, and never in a worker started with `-Q deliveries`.
        if UPDATES in worker.app.amqp.queues.consume_from:
            self._intake = Backpressure(
                runtime.producer().has_room, partial(_take_updates, worker), SystemClock()
            )
        leader, buffer, self._fleet, memory = runtime.build_dispatch(settings, _name(worker))
        self._report = partial(_report, self._fleet, worker, changed(settings))
        if settings.health_port:
            self._page = _serve(settings.health_port, self._pages(worker, leader))
        return Dispatcher(
            leader,
            buffer,
            self._fleet,
            partial(_publish, worker.app),
            batch_size=settings.batch_size,
            linger=settings.linger,
            quota=settings.quota,
            is_short_of_memory=memory.is_short,
            on_turn=self._note_turn,
            on_answer=self._note_answer,
            meter=runtime.meter,
        )

    def stop(self, worker: Any) -> None:
        super().stop(worker)
        if self._page:
            self._page.shutdown()
        if self._fleet:
            with contextlib.suppress(RedisError):
                self._fleet.leave(_name(worker))

    terminate = stop

    def _pages(self, worker: Any, leader: Leader) -> health.Pages:
        def metrics(accept: str) -> health.Answer:
            last_turn = time.time() - (time.monotonic() - self._last_turn)
            return health.Answer(200, *worker.metrics.render(accept, leads=leader.leads, last_turn=last_turn))

        live = health.live(lambda: time.monotonic() - self._last_turn)
        ready = health.ready(lambda: time.monotonic() - self._last_answer, partial(_is_registered, worker))
        return {**dict.fromkeys(health.LIVE_PATHS, live), "/readyz": ready, "/metrics": metrics}

    def _note_answer(self) -> None:
        self._last_answer = time.monotonic()
        if self._last_answer >= self._report_at:
            self._report_at = self._last_answer + fleet.EVERY
            # Only people look at it.
            with contextlib.suppress(RedisError):
                self._report()

    def _note_turn(self) -> None:
        self._last_turn = time.monotonic()
        if self._intake:
            self._intake.look()


def _serve(port: int, pages: health.Pages) -> ThreadingHTTPServer:
    try:
        return health.serve(port, pages)
    except OSError as error:
        print(f"imattr cannot start:\n  IMATTR_HEALTH_PORT: port {port}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_registered(worker: Any) -> bool:
    """Whether the broker sends this worker messages."""
    # There is no consumer at the start, and no `task_consumer` during a reconnect.
    return bool(getattr(getattr(worker, "consumer", None), "task_consumer", None))


def _report(to: Fleet, worker: Any, settings: Mapping[str, str]) -> None:
    """Report that this worker is alive, how busy its pool is, and how it is configured."""
    threads, busy = worker.concurrency, len(active_requests)
    to.report(_name(worker), threads=threads, busy=busy, version=VERSION, settings=settings)


def _publish(app: Any, ticket: BatchId) -> None:
    # A ticket that cannot be sent now is worthless later: no retries, and no expiry to clean up.
    app.send_task("attributes.deliver", task_id=ticket, queue=DELIVERIES, retry=False)


class StreamStep(_ThreadStep):
    """This worker's consumer of the stream."""

    def loop(self, worker: Any) -> _Loop:
        return runtime.build_stream_consumer(runtime.settings(), _name(worker))


class AuditStep(_ThreadStep):
    """This worker's auditor, if it is to have one."""

    def loop(self, worker: Any) -> _Loop | None:
        settings = runtime.settings()
        return runtime.build_auditor(settings, _name(worker)) if settings.audit else None


def has_bulk_intake(broker_url: str) -> bool:
    """Whether messages of this broker can be taken in bulk; else Celery's tasks take them one by one."""
    scheme = broker_url.partition("://")[0].partition("+")[0]
    return scheme in ("redis", "rediss", "sentinel", "unix", "amqp", "amqps", "pyamqp")


class QueueProcess:
    """Keeps the process that takes messages in bulk running, until `stop`."""

    def __init__(self, worker: str) -> None:
        """`worker` is the name of the worker that Flower shows."""
        self._command = [sys.executable, "-m", "worker.queue_process", worker]
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start it, and again whenever it ends."""
        while not self._stopped.is_set():
            # Modules are found as the worker found them, wherever it was started.
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            try:
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=environ)
                ended: dict[str, Any] = {"status": self._process.wait()}
            except OSError as error:
                # The machine has no process or memory to spare for now.
                ended = {"error": type(error).__name__}
            if not self._stopped.is_set():
                log.error("queue_process_ended", **ended)
                self._stopped.wait(RESTART_AFTER)

    def stop(self) -> None:
        """End it cleanly: what it has taken is accepted or stays with the broker."""
        self._stopped.set()
        process = self._process
        if process is None:
            return
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(PROCESS_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


class QueueStep(_ThreadStep):
    """Takes Celery's queue of updates in bulk, in place of Celery's own consumer."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        queues = worker.app.amqp.queues
        self._in_bulk = UPDATES in queues.consume_from and has_bulk_intake(worker.app.conf.broker_url)
        worker.takes_in_bulk = [queues[UPDATES]] if self._in_bulk else []
        if self._in_bulk:
            queues.deselect(UPDATES)

    def loop(self, worker: Any) -> _Loop | None:
        return QueueProcess(_name(worker)) if self._in_bulk else None


@inspect_command()  # type: ignore[untyped-decorator]  # Celery has no type hints
def active_queues(state: Any) -> list[dict[str, Any]]:
    """List the queues that this worker takes from, for `celery inspect` and Flower.

    Replaces Celery's own, which does not know of the queue that is taken in bulk, so that Flower would not show it.
    """
    taking = state.consumer.task_consumer
    queues = [*(taking.queues if taking else ()), *state.consumer.controller.takes_in_bulk]
    return [dict(queue.as_dict(recurse=True)) for queue in queues]


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
