"""Loads the Lua scripts beside this file: one file is one atomic step of the state machine.

`lua/prelude.lua` goes before each of them. It has the functions that several scripts share.
"""

from collections.abc import Sequence
from importlib import resources
from typing import Any, Protocol

from redis import Redis

#: What a script takes as an argument.
Argument = str | int | float | bytes


class Script(Protocol):
    """A script registered on a connection pool. It is sent again by itself after SCRIPT FLUSH."""

    def __call__(self, keys: Sequence[str], args: Sequence[Argument]) -> Any: ...


def source(name: str) -> str:
    """Return the text of ``lua/<name>.lua``, with the prelude before it."""
    lua = resources.files(__package__).joinpath("lua")
    prelude, script = (lua.joinpath(f"{file}.lua").read_text(encoding="utf-8") for file in ("prelude", name))
    return f"{prelude}\n{script}"


def text(value: bytes | str) -> str:
    """Return what Redis answered as text: connections here return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def load(redis: Redis, name: str) -> Script:
    """Register ``lua/<name>.lua`` on the client; nothing is sent before the first call."""
    script: Script = redis.register_script(source(name))
    return script
