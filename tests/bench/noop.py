"""A task that does nothing, beside ours: what a message costs at least."""

from typing import Any

from worker.celery import app


@app.task(name="noop")
def noop(*_: Any) -> None:
    pass
