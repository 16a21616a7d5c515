"""Dead letters: filters them, and redrives, exports or deletes exactly the set that was shown.

The set is every letter that matches the filter and existed at one moment of Redis' clock, "until". A letter that is removed,
or changes, leaves the set, and none can enter it: its time is later. So the moment and the number travel from the list
through the question to the action, however many letters there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from worker.console.asked import Asked, BadRequest, Page
from worker.operate.kept import letter_facts
from worker.state.dead_letters import Chosen, DeadLetters, Filter, Letter, as_updates

#: Letters on a page.
SHOWN = 50

VERBS = ("redrive", "purge")


@dataclass(frozen=True, slots=True)
class Shown:
    """A page of a set: the number of all letters, by code, and the letters from `start` on."""

    count: int
    codes: Counter[int]
    start: int
    letters: list[Letter]


def _letters(asked: Asked) -> DeadLetters:
    return DeadLetters(asked.shared.redis, asked.shared.keys)


def _until(asked: Asked) -> int:
    """The moment of the set: now, or that of the page shown before."""
    now = _letters(asked).now_ms()
    return min(now, asked.number("until") or now)


def _filter_until(asked: Asked, until: int) -> Filter:
    """The filter in the fields; ages count from the moment of the set, so that it stays the same."""
    older, newer = asked.age("older"), asked.age("newer")
    return Filter(
        user=asked.given("user") or None,
        code=asked.number("code"),
        before_ms=until if older is None else until - 1000 * older,
        since_ms=None if newer is None else until - 1000 * newer,
    )


def _fields(asked: Asked, until: int) -> dict[str, Any]:
    """The fields that define the set, for the page's links and forms."""
    return {name: asked.given(name) for name in ("code", "user", "older", "newer")} | {"until": until}


def _page_of(found: Iterator[Letter], start: int) -> Shown:
    count, codes, page = 0, Counter[int](), list[Letter]()
    for letter in found:
        if start <= count < start + SHOWN:
            page.append(letter)
        count += 1
        codes[letter.code] += 1
    return Shown(count, codes, start, page)


def show(asked: Asked) -> Response:
    """The list, without values."""
    return _show(asked, values=False)


def values(asked: Asked) -> Response:
    """The same list with values, at an operator's request."""
    asked.note("values_shown", page="dead letters")
    return _show(asked, values=True)


def _show(asked: Asked, *, values: bool) -> Response:
    until = _until(asked)
    wanted = _filter_until(asked, until)
    shown = _page_of(_letters(asked).find(wanted), max(0, asked.number("start", 10**7) or 0))
    rows = [(letter_facts(letter), letter.values if values else None) for letter in shown.letters]
    return asked.page(
        "dead_letters.html",
        flash=asked.flash(),
        fields=_fields(asked, until),
        shown=shown,
        size=SHOWN,
        rows=rows,
        values=values,
    )


def confirm(asked: Asked) -> Response:
    """Ask whether to redrive or delete the set that was shown, with the number of its letters."""
    verb, until = _verb(asked), _until(asked)
    count = len(_letters(asked).choose(_filter_until(asked, until)))
    return asked.page(
        "dead_letters_confirm.html",
        verb=verb,
        count=count,
        before=asked.number("count"),
        fields=_fields(asked, until),
    )


def _verb(asked: Asked) -> str:
    if asked.given("verb") not in VERBS:
        raise BadRequest(f"verb must be one of {', '.join(VERBS)}")
    return asked.given("verb")


def _chosen(asked: Asked) -> tuple[Chosen, int]:
    """The letters of the set, and how many have left it since the question; raises `BadRequest` if it may be a different
    set."""
    until, count = asked.number("until"), asked.number("count")
    if until is None or count is None:
        raise BadRequest("until and count must say which letters were shown")
    chosen = _letters(asked).choose(_filter_until(asked, until))
    if len(chosen) > count:
        # Only if Redis' clock was set back.
        raise BadRequest(f"there are {len(chosen):,} letters instead of {count:,}: look at them again first")
    return chosen, count


def redrive(asked: Asked) -> Response:
    chosen, count = _chosen(asked)
    total = _letters(asked).redrive(chosen, by=asked.actor)
    return asked.done("/dead", "redriven", total.redriven, total.outdated, count - total.redriven)


def purge(asked: Asked) -> Response:
    chosen, count = _chosen(asked)
    purged = _letters(asked).purge(chosen, by=asked.actor)
    return asked.done("/dead", "purged", purged, count - purged)


def export(asked: Asked) -> Response:
    """The set as updates that can be sent again, as `imattr dead export` prints them."""
    until = _until(asked)
    asked.note("exported", page="dead letters")
    found = _letters(asked).find(_filter_until(asked, until))
    return asked.download("dead-letters.jsonl", (update for letter in found for update in as_updates(letter)))


PAGES = (
    Page("/dead", show),
    Page("/dead", values, "operator", "POST"),
    Page("/dead/confirm", confirm, "operator"),
    Page("/dead/redrive", redrive, "operator", "POST"),
    Page("/dead/purge", purge, "operator", "POST"),
    Page("/dead/export", export, "operator", "POST"),
)
