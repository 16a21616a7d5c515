"""Many schedules at a time: a process and a private server for each processor."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import structlog

from tests.schedules.run import Result, run
from tests.schedules.wire import Wire
from worker.sandbox.redis_server import EmbeddedServer

#: Schedules that a process plays between two reports.
CHUNK = 50


@contextlib.contextmanager
def server() -> Iterator[int]:
    """A private server; yields its port."""
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedServer(Path(directory), persistent=False) as running,
    ):
        yield running.port


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """A private server, and the way to it; nothing is logged meanwhile."""
    _log_nothing()
    try:
        with server() as port, Wire(port) as connected:
            yield connected
    finally:
        structlog.reset_defaults()


def _log_nothing() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


#: This process' way to its server.
_wires: list[Wire] = []


def _begin(ports: SimpleQueue[int]) -> None:
    _log_nothing()
    _wires.append(Wire(ports.get()))


def _play(seeds: Sequence[int]) -> list[Result]:
    return [run(seed, _wires[0]) for seed in seeds]


def results(first: int, seeds: int, processes: int) -> Iterator[Result]:
    """The results of so many schedules, as they come."""
    context = multiprocessing.get_context("spawn")
    ports: SimpleQueue[int] = context.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            ports.put(stack.enter_context(server()))
        pool = stack.enter_context(ProcessPoolExecutor(processes, context, _begin, (ports,)))
        chunks = [range(at, min(at + CHUNK, first + seeds)) for at in range(first, first + seeds, CHUNK)]
        for played in as_completed([pool.submit(_play, chunk) for chunk in chunks]):
            yield from played.result()
