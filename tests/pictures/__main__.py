"""Draws the pictures that are named on the command line, or all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.pictures import arrivals, outage, states, terminal

DOCS = Path(__file__).parents[2] / "docs"

PICTURES: dict[str, Callable[[], object]] = {
    "how/state-machine.svg": lambda: _write("how/state-machine.svg", states.draw()),
    "how/limiter.svg": lambda: _write("how/limiter.svg", arrivals.draw(arrivals.arrivals())),
    "how/outage.svg": lambda: _write("how/outage.svg", outage.draw(outage.looks())),
    "status.svg": lambda: _write("status.svg", terminal.terminal()),
    "operate/flower.png": lambda: terminal.flower(DOCS / "operate" / "flower.png"),
}


def _write(name: str, drawn: str) -> None:
    (DOCS / name).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
        print(name)
