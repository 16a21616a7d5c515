"""The pictures that are the same each time: what is in `docs/` is what their scripts draw, and what they draw is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pictures import architecture, bisection, failover, outage, slots, states
from tests.schedules.wire import Wire
from worker.state import scripts

HOW = Path(__file__).parent.parent / "docs" / "how"

#: The pictures, each with what draws it.
DRAWN: dict[str, Callable[[Wire], str]] = {
    "architecture": lambda _: architecture.draw(),
    "state-machine": lambda _: states.draw(),
    "bisect": lambda _: bisection.draw(),
    "limiter": lambda wire: slots.draw(slots.run(wire)),
    "outage": lambda wire: outage.draw(outage.run(wire)),
    "failover": lambda wire: failover.draw(failover.run(wire)),
}

#: What has to do with where a user is.
_PLACES = "pending|live|backfill|delayed|flight|batches|dead|shadow"
_MOVES = re.compile(rf"redis\.call\('(?:HSET|HDEL|ZADD|ZREM\w*)', (?:{_PLACES})\b")
#: What puts right what is damaged is not drawn.
_NOT_DRAWN = {"dispatch", "repair"}


def _movers() -> set[str]:
    """The scripts that move a user, or the batch it is in."""
    return {name for name in scripts.names() if _MOVES.search(scripts.as_written(name))}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_what_its_script_draws(name: str, wire: Wire) -> None:
    drawn = DRAWN[name](wire)

    assert (HOW / f"{name}.svg").read_text(encoding="utf-8") == drawn, "draw it again: make pictures"


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_loads_nothing_and_runs_nothing(name: str) -> None:
    drawn = (HOW / f"{name}.svg").read_text(encoding="utf-8")

    assert set(re.findall(r"https?://[^\"' ]+", drawn)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|image|use|foreignObject)\b|@import|url\((?!#)", drawn)
    assert ("animation:" in drawn) <= ("prefers-reduced-motion: reduce" in drawn)
    assert len(drawn) < 60_000


def test_the_page_names_every_script_and_its_table_those_that_move_a_user() -> None:
    page = (HOW / "state-machine.md").read_text(encoding="utf-8")
    table = page.partition("## The transitions")[2].partition("\n## ")[0]

    moving = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))

    assert moving == _movers()
    assert set(scripts.names()) | set(scripts.SHARED) <= set(re.findall(r"`(\w+)`", page))


def test_the_picture_of_the_states_has_every_script_that_moves_a_user() -> None:
    words = {name for names, *_ in states.MOVES for name in names}
    outcomes = {"ack", "retry", "snooze", "dead_letter"}

    assert outcomes <= words
    assert words - outcomes | {"settle"} == _movers() - _NOT_DRAWN
    assert "settle" in states.draw()
