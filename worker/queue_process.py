"""The consumer of Celery's queue, in a process of its own beside each worker.

Reading thousands of messages a second keeps an interpreter busy. In a thread of the worker it would hold up the threads
that deliver, whose slots do not wait, and they would hold it up; measured on two cores, a process of its own takes half as
much again, and deliveries keep their slots. The worker starts it, starts it again if it ends, and ends it by closing its
standard input, which happens by itself when the worker is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import uuid
from functools import partial
from typing import IO, Any

import structlog

from worker import logs, runtime
from worker.intake.brokers import HEARTBEAT, Queue, RedisQueue
from worker.state.connection import Redis

log = structlog.get_logger()

UPDATES = "updates"

#: How much the operating system prefers deliveries, whose slots do not wait, when there is not enough processor for both.
NICENESS = 5
#: Seconds until a process that ended is started again, and that one which was asked to end may take.
RESTART_AFTER, PATIENCE = 1.0, 10.0


def has_bulk_intake(broker_url: str) -> bool:
    """Whether messages of this broker can be taken in bulk; else Celery's tasks take them one by one."""
    scheme = broker_url.partition("://")[0].partition("+")[0]
    return scheme in ("redis", "rediss", "sentinel", "unix", "amqp", "amqps", "pyamqp")


class QueueProcess:
    """Keeps the process running until `stop`."""

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
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=environ)
            status = self._process.wait()
            if not self._stopped.is_set():
                log.error("queue_process_ended", status=status)
                self._stopped.wait(RESTART_AFTER)

    def stop(self) -> None:
        """End it in order: what it has taken is accepted or stays with the broker."""
        self._stopped.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError):
            self._stdin(process).close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()

    def _stdin(self, process: subprocess.Popen[bytes]) -> IO[bytes]:
        assert process.stdin
        return process.stdin


def open_queue(app: Any) -> Queue:
    """Connect to the broker's queue of updates."""
    settings = runtime.settings()
    connection = app.connection_for_write(heartbeat=HEARTBEAT)
    if connection.transport.driver_type != "redis":
        return runtime.build_rabbit_queue(settings, connection, UPDATES)
    # Over kombu's own pool, which knows how to reach this broker, and without its client, which knows few commands.
    try:
        channel = connection.channel()
        prefix = channel.global_keyprefix
        lists = [prefix + channel._q_for_pri(UPDATES, step) for step in channel.priority_steps]
        redis = Redis(connection_pool=channel.pool)
        return RedisQueue(redis, lists, name=f"{prefix}{UPDATES}", close=connection.release)
    except BaseException:
        connection.release()
        raise


def show(app: Any, worker: str, counts: dict[str, int], seconds: float) -> None:
    """Show in Flower what was taken in, as if it were a task that has just ended."""
    id = str(uuid.uuid4())
    about = {"name": "attributes.intake", "args": "()", "kwargs": "{}", "retries": 0, "eta": None, "expires": None}
    # Events are for looking at: without a broker there is nobody to look.
    with contextlib.suppress(Exception), app.events.default_dispatcher(hostname=worker) as events:
        events.send("task-received", uuid=id, root_id=id, parent_id=None, **about)
        events.send("task-started", uuid=id)
        shown = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        events.send("task-succeeded", uuid=id, result=shown, runtime=round(seconds, 3))


def main() -> None:
    from worker.celery import app

    # Ctrl-C and SIGTERM may reach everything at once; the worker says when to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    settings, worker = runtime.settings(), sys.argv[1]
    logs.configure(settings.log_level, settings.log_format)
    consumer = runtime.build_queue_consumer(
        settings, worker, partial(open_queue, app), report=partial(show, app, worker)
    )

    def wait_for_the_worker() -> None:
        sys.stdin.buffer.read()
        consumer.stop()

    threading.Thread(target=wait_for_the_worker, daemon=True).start()
    consumer.run()


if __name__ == "__main__":
    main()
