"""The tasks. Any Celery client can send the first two by name, without importing this project:

app.send_task("attributes.update", ["u1", {"city": "Paris"}], queue="updates")
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import redis
import structlog

from worker import runtime
from worker.celery import app
from worker.errors import InvalidUpdate
from worker.models import BatchId

log = structlog.get_logger()

_Result = TypeVar("_Result")


class TaskFailed(Exception):
    """Raised in place of whatever ended a task; its text has the kind of failure only."""


def contained(body: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let out only errors whose text is fit to be shown.

    `BaseException` because a pool of threads loses a slot for ever to any that is no `Exception`; a new
    exception because events and logs carry the text and the traceback of the one that leaves.
    """

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> _Result:
        try:
            return body(*args, **kwargs)
        except InvalidUpdate as error:
            failure = error.rule
            log.warning("update_refused", rule=failure)
        except redis.RedisError as error:
            failure = type(error).__name__
            log.warning("task_failed", error=failure)
        except BaseException as error:
            failure = type(error).__name__
            # Where it happened, without the text of the error, which may quote what it stumbled over.
            log.error("task_failed", error=failure, at="".join(traceback.format_tb(error.__traceback__)))
        raise TaskFailed(failure)

    return run


@app.task(name="attributes.update")
@contained
def update(user_id: str, attrs: dict[str, str], occurred_at: str | float | None = None) -> str:
    """Accept one update; fails, alone, when it breaks a rule."""
    return runtime.producer().set(user_id, attrs, occurred_at)


@app.task(name="attributes.update_many")
@contained
def update_many(updates: list[list[Any]]) -> dict[str, Any]:
    """Accept many updates, each [user id, attributes] or [user id, attributes, occurred_at].

    Returns how many were accepted, coalesced, unchanged, stale and refused; the log has each reason.
    """
    result = runtime.producer().set_many(updates)
    for refusal in result.refused:
        log.warning("update_refused", index=refusal.index, rule=refusal.rule)
    return {**dataclasses.asdict(result), "refused": len(result.refused)}


@app.task(name="attributes.deliver", bind=True)
@contained
def deliver(task: Any) -> dict[str, Any]:
    """Deliver one batch; the task's id is the ticket."""
    return dataclasses.asdict(runtime.delivery().deliver(BatchId(task.request.id)))
