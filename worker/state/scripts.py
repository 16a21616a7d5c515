"""Loads the Lua scripts beside this file: one file is one atomic step of the state machine.

`lua/prelude.lua` has the functions that several scripts share; those that a script uses go before it.
"""

import re
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
    """Return the text of ``lua/<name>.lua``, with what it uses of the prelude before it."""
    lua = resources.files(__package__).joinpath("lua")
    prelude, text = (lua.joinpath(f"{file}.lua").read_text(encoding="utf-8") for file in ("prelude", name))
    # From the last definition to the first, since each may use those above it. Only what is used, because Redis takes
    # 0.3 us for each function at every call of the script.
    for definition in reversed(prelude.split("\n\n")):
        defined = re.search(r"^local (?:function )?(\w+)", definition, re.MULTILINE)
        if defined and re.search(rf"\b{defined[1]}\b", text):
            text = f"{definition}\n\n{text}"
    return text


def text(value: bytes | str) -> str:
    """Return what Redis answered as text: connections here return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def number(value: bytes | str | None) -> int:
    """Return what Redis answered as a whole number; 0 if it is none, or longer than any of ours."""
    try:
        return int(value) if value and len(value) < 20 else 0
    except ValueError:
        return 0


def load(redis: Redis, name: str) -> Script:
    """Register ``lua/<name>.lua`` on the client; nothing is sent before the first call."""
    script: Script = redis.register_script(source(name))
    return script
