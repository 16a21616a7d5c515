"""The consumer of Celery's queue, in a process of its own beside each worker.

Reading thousands of messages a second keeps an interpreter busy. A thread of the worker would delay the threads that deliver,
whose slots do not wait, and be delayed by them; measured on two cores, a separate process takes in half as much again, and
deliveries keep their slots. The worker starts it (`QueueProcess` in `steps.py`), and ends it by closing its standard input,
which also happens when the worker is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import uuid
from functools import partial

from worker import logs, runtime
from worker.celery import app
from worker.intake.brokers import HEARTBEAT, Queue, RedisQueue
from worker.state.connection import Redis
from worker.steps import UPDATES

#: How much the operating system prefers deliveries, whose slots do not wait, when there is too little CPU for both.
NICENESS = 5


def open_queue() -> Queue:
    """Connect to the broker's queue of updates."""
    settings = runtime.settings()
    connection = app.connection_for_write(heartbeat=HEARTBEAT)
    if connection.transport.driver_type != "redis":
        return runtime.build_rabbit_queue(settings, connection, UPDATES)
    # Uses kombu's connection pool, which knows how to reach this broker, but not its client, which knows few commands.
    try:
        channel = connection.channel()
        prefix = channel.global_keyprefix
        lists = [prefix + channel._q_for_pri(UPDATES, step) for step in channel.priority_steps]
        redis = Redis(connection_pool=channel.pool)
        return RedisQueue(redis, lists, name=f"{prefix}{UPDATES}", close=connection.release)
    except BaseException:
        connection.release()
        raise


def show(worker: str, counts: dict[str, int], seconds: float) -> None:
    """Show in Flower what was taken in, as if it were a task that has just ended."""
    id = str(uuid.uuid4())
    about = {
        "name": "attributes.intake",
        "args": "()",
        "kwargs": "{}",
        "retries": 0,
        "eta": None,
        "expires": None,
    }
    # Events are for people to see: without a broker, nobody can.
    with contextlib.suppress(Exception), app.events.default_dispatcher(hostname=worker) as events:
        events.send("task-received", uuid=id, root_id=id, parent_id=None, **about)
        events.send("task-started", uuid=id)
        shown = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        events.send("task-succeeded", uuid=id, result=shown, runtime=round(seconds, 3))


def main() -> None:
    # Ctrl-C and SIGTERM may reach everything at once; the worker says when to stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    settings, worker = runtime.settings(), sys.argv[1]
    logs.configure(settings.log_level, settings.log_format)
    consumer = runtime.build_queue_consumer(settings, worker, open_queue, report=partial(show, worker))

    def wait_for_the_worker() -> None:
        sys.stdin.buffer.read()
        consumer.stop()

    threading.Thread(target=wait_for_the_worker, daemon=True).start()
    consumer.run()


if __name__ == "__main__":
    main()
