"""The tasks. Any Celery client can send the first two by name, without importing this project:

app.send_task("attributes.update", ["u1", {"city": "Paris"}], queue="updates")

With Redis and RabbitMQ, messages are taken in bulk instead, and these two run only for messages that come another way.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import structlog
from celery.exceptions import Reject

from worker import runtime
from worker.celery import app
from worker.delivery.meter import Summary
from worker.errors import BufferFull, InvalidUpdate, NotConfirmed
from worker.models import BatchId
from worker.producer import NoRoom
from worker.state.connection import RedisError
from worker.steps import UPDATES

log = structlog.get_logger()

_Result = TypeVar("_Result")


class TaskFailed(Exception):
    """Raised in place of the exception that ended a task; its text only names the kind of failure."""


def contained(body: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let out only errors whose text may be shown.

    `BaseException`, because a thread pool loses a slot for good to anything that is not an `Exception`; a new exception,
    because events and logs carry the text and traceback of the one that leaves.
    """

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> _Result:
        try:
            return body(*args, **kwargs)
        except Reject:
            # For Celery: the message returns to the queue.
            raise
        except InvalidUpdate as error:
            failure = error.rule
            log.warning("update_refused", source="celery", rule=failure)
        except RedisError as error:
            failure = type(error).__name__
            log.warning("task_failed", error=failure)
        except BaseException as error:
            failure = type(error).__name__
            # Where it happened, without the error's text, which may quote user data.
            log.error("task_failed", error=failure, at="".join(traceback.format_tb(error.__traceback__)))
        raise TaskFailed(failure)

    return run


def well_called(body: Callable[..., _Result]) -> Callable[..., _Result]:
    """Refuse a message whose arguments do not fit the task, and keep it."""
    signature = inspect.signature(body)
    names = ", ".join(list(signature.parameters)[1:])

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> _Result:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            error = InvalidUpdate("?", f"the arguments of the task are ({names})")
            _keep(error, {"args": args[1:], "kwargs": kwargs})
            raise error from None
        return body(*args, **kwargs)

    return run


@app.task(name="attributes.update", bind=True)
@contained
@well_called
def update(task: Any, user_id: str, attrs: dict[str, str], occurred_at: str | float | None = None) -> str:
    """Accept one update; fails if it breaks a rule."""
    given = _timed(task, [user_id, attrs, occurred_at])
    try:
        return runtime.producer().set(*given)
    except (BufferFull, NotConfirmed, RedisError):
        _put_back([given])
        return "put back"
    except InvalidUpdate as error:
        _keep(error, given)
        raise


@app.task(name="attributes.update_many", bind=True)
@contained
@well_called
def update_many(task: Any, updates: list[list[Any]]) -> dict[str, Any]:
    """Accept many updates, each [user id, attributes] or [user id, attributes, occurred_at].

    Returns how many were accepted, coalesced, unchanged, stale, refused, and put back into the queue for lack of room. The
    log has the reason for each refusal.
    """
    if not isinstance(updates, list):
        error = InvalidUpdate("?", f"the updates must be a list, got {type(updates).__name__}")
        _keep(error, updates)
        raise error
    given = [_timed(task, update) for update in updates]
    try:
        result = runtime.producer().set_many(given)
    except (NotConfirmed, RedisError):
        _put_back(given)
        return {"put_back": len(given)}
    waiting = [given[refusal.index] for refusal in result.refused if isinstance(refusal, NoRoom)]
    if waiting:
        _put_back(waiting)
    for refusal in result.refused:
        if not isinstance(refusal, NoRoom):
            log.warning("update_refused", source="celery", index=refusal.index, rule=refusal.rule)
            error = InvalidUpdate(refusal.user, refusal.rule)
            _keep(error, given[refusal.index])
    refused = len(result.refused) - len(waiting)
    return {**dataclasses.asdict(result), "refused": refused, "put_back": len(waiting)}


def _timed(task: Any, update: Any) -> Any:
    """The update, with the event time of its message unless it has its own."""
    if isinstance(update, list) and len(update) in (2, 3) and (len(update) == 2 or update[2] is None):
        return [*update[:2], _event_ms(task.request)]
    return update


def _event_ms(request: Any) -> int | None:
    """When the message was published, or else taken, in ms on Redis' clock, which it is compared with."""
    found, taken = getattr(request, "event_ms", None), getattr(request, "taken_ms", None)
    if found is None or found != taken:
        return found
    ahead = runtime.producer().now_ms() - time.time_ns() // 1_000_000
    return int(found) + ahead


def _keep(error: InvalidUpdate, update: Any) -> None:
    try:
        runtime.refused().keep("celery", [(error, update)])
    except RedisError as failure:
        raise Reject(type(failure).__name__, requeue=True) from None


def _put_back(updates: list[Any]) -> None:
    """Send updates again as a new message with their event times, so that their order is kept.

    If the broker does not accept it, the old message returns to the queue.
    """
    try:
        app.send_task("attributes.update_many", [updates], queue=UPDATES)
    except Exception as error:
        raise Reject(type(error).__name__, requeue=True) from None
    log.debug("updates_put_back", updates=len(updates))


@app.task(name="attributes.deliver", bind=True)
@contained
def deliver(task: Any) -> list[dict[str, Any]]:
    """Deliver a batch, and more while full ones are waiting; the task id is the ticket, and the first batch's id."""
    structlog.contextvars.bind_contextvars(task=task.request.id)
    return [_shown(summary) for summary in runtime.delivery().carry(BatchId(task.request.id))]


def _shown(summary: Summary) -> dict[str, Any]:
    """What Flower shows of a batch: anything unusual, and a few figures."""
    return {name: value for name, value in dataclasses.asdict(summary).items() if value}
