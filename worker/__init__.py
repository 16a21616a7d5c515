"""Deliver user attributes to Tencent Cloud Chat: coalesced, rate limited, nothing lost.

    from imattr import Producer

    producer = Producer("redis://localhost:6379/0", sdkappid=1400000000)
    producer.set("u1", {"city": "Paris"})

These names are the client's public face; they are the same in the installed package `imattr` and here, in `worker`. Each is
loaded when it is first used, so importing one module does not import them all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .async_producer import AsyncProducer
    from .errors import BufferFull, ConfigError, ImattrError, InvalidUpdate, NotConfirmed
    from .models import BulkResult, Refusal
    from .producer import NoRoom, Producer
    from .ratelimit import RateLimiter

__all__ = [
    "AsyncProducer",
    "BufferFull",
    "BulkResult",
    "ConfigError",
    "ImattrError",
    "InvalidUpdate",
    "NoRoom",
    "NotConfirmed",
    "Producer",
    "RateLimiter",
    "Refusal",
    "__version__",
]

#: The module that defines each name.
_HOME = {
    "AsyncProducer": "async_producer",
    "BufferFull": "errors",
    "BulkResult": "models",
    "ConfigError": "errors",
    "ImattrError": "errors",
    "InvalidUpdate": "errors",
    "NoRoom": "producer",
    "NotConfirmed": "errors",
    "Producer": "producer",
    "RateLimiter": "ratelimit",
    "Refusal": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
