"""A fleet in virtual time, watched for the pictures: what it does is the product's own, and the same each time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fleet import Fleet, Limits, fleet
from tests.schedules.wire import Wire
from worker.sandbox.redis_server import EmbeddedServer


@contextlib.contextmanager
def watched(
    *, workers: int, threads: int, limits: Limits | None = None, wire: Wire | None = None
) -> Iterator[Fleet]:
    """A fleet on a server of its own, unless there is one."""
    with contextlib.ExitStack() as stack:
        if wire is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            server = stack.enter_context(EmbeddedServer(Path(directory), persistent=False))
            wire = stack.enter_context(contextlib.closing(Wire(server.port)))
        yield stack.enter_context(fleet(wire, seed=1, workers=workers, threads=threads, limits=limits))
