"""Loads the Lua scripts beside this file: one file is one atomic step of the state machine."""

from collections.abc import Sequence
from importlib import resources
from typing import Any, Protocol

from redis import Redis

#: What a script takes as an argument.
Argument = str | int | float | bytes


class Script(Protocol):
    """A script registered on a connection pool; sends it again by itself after SCRIPT FLUSH."""

    def __call__(self, keys: Sequence[str], args: Sequence[Argument]) -> Any: ...


def source(name: str) -> str:
    """The text of ``lua/<name>.lua``."""
    return resources.files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


def text(value: bytes | str) -> str:
    """What Redis answered, as text: connections here return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def load(redis: Redis, name: str) -> Script:
    """Register ``lua/<name>.lua`` on the redis; nothing is sent before the first call."""
    script: Script = redis.register_script(source(name))
    return script
