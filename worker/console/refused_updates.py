"""Refused updates: filters them, and exports or deletes exactly the set that was shown (see `dead_letters`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

from starlette.responses import Response

from worker.console.asked import Asked, BadRequest, Page
from worker.operate.kept import refused_facts
from worker.state.refused import Refused, RefusedUpdate, Source

#: Updates on a page.
SHOWN = 50


def _refused(asked: Asked) -> Refused:
    return Refused(asked.shared.redis, asked.shared.keys)


def _until(asked: Asked) -> int:
    now = _refused(asked).now_ms()
    return min(now, asked.number("until") or now)


def _found(asked: Asked, until: int) -> Iterator[RefusedUpdate]:
    """The set: newest first."""
    older, newer = asked.age("older"), asked.age("newer")
    source, user, rule = asked.given("source"), asked.given("user"), asked.given("rule").lower()
    if source and source not in get_args(Source):
        raise BadRequest(f"source must be one of {', '.join(get_args(Source))}")
    before = until if older is None else until - 1000 * older
    since = 0 if newer is None else until - 1000 * newer
    for one in _refused(asked).everyone(before_ms=before, since_ms=since):
        if (
            (not source or one.source == source)
            and (not user or one.user == user)
            and rule in one.rule.lower()
        ):
            yield one


def _fields(asked: Asked, until: int) -> dict[str, Any]:
    names = ("source", "user", "rule", "older", "newer")
    return {name: asked.given(name) for name in names} | {"until": until}


def show(asked: Asked) -> Response:
    """The list, without what was sent."""
    return _show(asked, values=False)


def values(asked: Asked) -> Response:
    """The same list with what was sent, at an operator's request."""
    asked.note("values_shown", page="refused")
    return _show(asked, values=True)


def _show(asked: Asked, *, values: bool) -> Response:
    until, start = _until(asked), max(0, asked.number("start", 10**7) or 0)
    count, rules, rows = 0, Counter[str](), list[tuple[dict[str, Any], str | None]]()
    for one in _found(asked, until):
        if start <= count < start + SHOWN:
            rows.append((refused_facts(one), one.payload if values else None))
        count += 1
        rules[one.rule] += 1
    return asked.page(
        "refused.html",
        flash=asked.flash(),
        fields=_fields(asked, until),
        sources=get_args(Source),
        count=count,
        rules=rules.most_common(10),
        start=start,
        size=SHOWN,
        rows=rows,
        values=values,
    )


def confirm(asked: Asked) -> Response:
    """Ask whether to delete the set that was shown, with the number of its updates."""
    until = _until(asked)
    count = sum(1 for _ in _found(asked, until))
    return asked.page(
        "refused_confirm.html", count=count, before=asked.number("count"), fields=_fields(asked, until)
    )


def purge(asked: Asked) -> Response:
    until, count = asked.number("until"), asked.number("count")
    if until is None or count is None:
        raise BadRequest("until and count must say which updates were shown")
    ids = [one.id for one in _found(asked, until)]
    if len(ids) > count:
        raise BadRequest(f"there are {len(ids):,} updates instead of {count:,}: look at them again first")
    purged = _refused(asked).purge_these(ids, by=asked.actor)
    return asked.done("/refused", "refused_purged", purged, count - purged)


def export(asked: Asked) -> Response:
    """The set with what was sent, as JSON lines."""
    asked.note("exported", page="refused")
    found = _found(asked, _until(asked))
    return asked.download("refused.jsonl", (refused_facts(one) | {"payload": one.payload} for one in found))


PAGES = (
    Page("/refused", show),
    Page("/refused", values, "operator", "POST"),
    Page("/refused/confirm", confirm, "operator"),
    Page("/refused/purge", purge, "operator", "POST"),
    Page("/refused/export", export, "operator", "POST"),
)
