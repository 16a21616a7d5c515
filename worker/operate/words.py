"""Words for people, in a terminal and in a browser: foreign text made harmless, counts, times, events."""

from __future__ import annotations

import json
import re
from datetime import datetime

from worker.operate.status import span
from worker.state.history import Event

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def plain(text: object) -> str:
    """Return foreign text so that it can only be read: characters that a terminal would obey are shown as codes.

    These are control characters, and those that reverse, hide or join the text around them.
    """
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in str(text))


def is_shown(character: str) -> bool:
    """Whether a character is shown as it is."""
    return character.isprintable() or character in "\n\u3000\xa0"


def json_text(value: object, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """A value as JSON in which every character can be shown."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # Only strings have characters that are not ASCII, or not printable, so an escape can replace them.
    return "".join(
        c if (c.isascii() or not ascii_only) and is_shown(c) else json.dumps(c)[1:-1] for c in text
    )


def counted(count: int, what: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def age(given: str) -> int:
    """Read an age such as 90m, 12h or 2d, in seconds; raises `ValueError` with the rule."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", given)
    if not match:
        raise ValueError("must be an age such as 90m, 12h or 2d")
    return int(match[1]) * _UNITS[match[2]]


def moment(given: str, now: float) -> float:
    """Read a time, in seconds since 1970, given as an age or in ISO 8601; raises `ValueError`."""
    try:
        return now - age(given)
    except ValueError:
        return datetime.fromisoformat(given).astimezone().timestamp()


def details(one: Event) -> str:
    """The details of an event in words: durations in a suitable unit, counts with their names."""
    words = []
    for name, value in one.details.items():
        if name.endswith("_ms") and value.isdecimal():
            words.append(f"{name.removesuffix('_ms').replace('_', ' ')} {span(int(value) / 1000)}")
        elif name == "reason":
            words.insert(0, value)
        elif not (name == "code" and value == "0"):
            words.append(f"{name} {value}")
    return ", ".join(words)
