"""Loads the Lua scripts beside this file: one file is one atomic step of the state machine.

`SHARED` are the files with functions that several scripts share; those that a script uses go before it. A script names its
keys first. The text that is sent has ``KEYS[1]`` and so on in place of the names, because some services run only scripts in
which every key is visible.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from itertools import islice
from typing import Any, Protocol, TypeVar

from redis import Redis

T = TypeVar("T")

#: What a script accepts as an argument.
Argument = str | int | float | bytes

#: Files with functions that several scripts share; each may use what those before it define.
SHARED = ("prelude", "failover")

#: The lines with which a script names its keys.
_NAMING = re.compile(r"^local ([\w, ]+) =\s+((?:KEYS\[\d+\][,\s]*)+)\n", re.MULTILINE)


class Script(Protocol):
    """A script registered on a connection pool. It is sent again automatically after SCRIPT FLUSH."""

    def __call__(self, keys: Sequence[str], args: Sequence[Argument]) -> Any: ...


def names() -> list[str]:
    """Return the names of all scripts."""
    files = resources.files(__package__).joinpath("lua").iterdir()
    found = (file.name.removesuffix(".lua") for file in files if file.name.endswith(".lua"))
    return sorted(name for name in found if name not in SHARED)


def source(name: str) -> str:
    """Return the text that is sent to run ``lua/<name>.lua``."""
    return _with_literal_keys(as_written(name))


def as_written(name: str) -> str:
    """Return the text of ``lua/<name>.lua``, with what it uses of the shared functions before it."""
    text = _body(name)
    # From the last definition to the first, since each may use those above it. Only those used, because each function costs
    # Redis 0.3 us at every call of the script.
    for definition in reversed("\n\n".join(_body(file).strip() for file in SHARED).split("\n\n")):
        defined = re.search(r"^local (?:function )?(\w+)", definition, re.MULTILINE)
        if defined and re.search(rf"\b{defined[1]}\b", text):
            text = f"{definition}\n\n{text}"
    return text


def _body(file: str) -> str:
    """The text of a file, without its header and comments, in which a function's name is only a word."""
    lua = resources.files(__package__).joinpath("lua", f"{file}.lua")
    return re.sub(r"^ *--.*\n", "", lua.read_text(encoding="utf-8").partition("]]\n")[2], flags=re.MULTILINE)


def _with_literal_keys(text: str) -> str:
    named = {
        name: key
        for match in _NAMING.finditer(text)
        for name, key in zip(re.findall(r"\w+", match[1]), re.findall(r"KEYS\[\d+\]", match[2]), strict=True)
    }
    # A name after a dot is a field, and one in quotes is a word.
    names = rf"(?<![.'\w])({'|'.join(named)})(?![\w'])"
    return re.sub(names, lambda match: named[match[1]], _NAMING.sub("", text))


def text(value: bytes | str) -> str:
    """Return what Redis answered as text: connections here return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def number(value: bytes | str | None) -> int:
    """Return what Redis answered as a whole number; 0 if it is none, or longer than any of ours."""
    try:
        return int(value) if value and len(value) < 20 else 0
    except ValueError:
        return 0


def pages(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Split into lists of up to `size`, each for one call of a script."""
    rest = iter(items)
    while page := list(islice(rest, size)):
        yield page


def load(redis: Redis, name: str) -> Script:
    """Register ``lua/<name>.lua`` on the client; nothing is sent before the first call."""
    script: Script = redis.register_script(source(name))
    return script
