"""Structured logs on standard output: text on a terminal, else one JSON object a line.

Secrets cannot get in: a `Secret` prints as ``***``, and the last step before rendering removes every secret registered with
`protect`, and any UserSig in a URL. That covers other libraries' lines and tracebacks, too.
"""

from __future__ import annotations

import logging
import logging.config
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

HIDDEN = "***"

_secrets: set[str] = set()
_USERSIG = re.compile(r"(usersig[\"']?\s*[=:]\s*[\"']?)[^\s&\"']+", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^\s/:@]*:)[^\s/]+@")


def protect(*secrets: str) -> None:
    """Keep these texts out of every log line."""
    _secrets.update(secret for secret in secrets if len(secret) >= 4)


def scrub(text: str) -> str:
    """Return the text without secrets."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _URL_PASSWORD.sub(rf"\1{HIDDEN}@", _USERSIG.sub(rf"\1{HIDDEN}", text))
    # A lone surrogate could not be written, and the line would be lost.
    return text.encode(errors="replace").decode()


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(str(key)): _scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_scrubbed(inner) for inner in value]
    return value if isinstance(value, int | float | None) else scrub(str(value))


def _scrub_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    # Structlog's own entries (underscored: the raw record) are dropped by the formatter afterwards.
    return {key: value if key.startswith("_") else _scrubbed(value) for key, value in event.items()}


def _tidy(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put what the line is about first, and leave out what is not known."""
    first = ("timestamp", "level", "event")
    ordered = {key: event[key] for key in first if key in event} | dict(event)
    return {key: value for key, value in ordered.items() if value is not None}


def _levels(level: str) -> dict[str, dict[str, str]]:
    """Levels for loggers that would say too much."""
    # At DEBUG these write whole messages, arguments and all.
    talkative = "INFO" if level == "debug" else level.upper()
    levels = {
        **dict.fromkeys(("celery", "kombu", "amqp"), talkative),
        # One "received" line a task would double every canonical line.
        "celery.worker.strategy": "WARNING",
        # Our tasks log their own failures, without the error's text.
        "celery.app.trace": "CRITICAL",
        # urllib3 writes the whole URL, UserSig included, at DEBUG and WARNING.
        "urllib3": "ERROR",
    }
    return {name: {"level": least} for name, least in levels.items()}


def configure(level: str = "info", style: str = "") -> None:
    """Set up structlog and the standard library's logging; `style` is json, text or empty = by terminal."""
    text = style == "text" or (not style and sys.stdout.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _tidy,
        _scrub_event,
    ]
    for_people = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    for_machines = structlog.processors.JSONRenderer(ensure_ascii=False)
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": shared,
        "processors": [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            for_people if text else for_machines,
        ],
    }
    stdout = {"class": "logging.StreamHandler", "formatter": "structured", "stream": "ext://sys.stdout"}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"structured": formatter},
            "handlers": {"stdout": stdout},
            "root": {"handlers": ["stdout"], "level": level.upper()},
            "loggers": _levels(level),
        }
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
