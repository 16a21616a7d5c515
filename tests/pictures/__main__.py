"""Draws the pictures that are named on the command line, or all of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import structlog

from tests.pictures import architecture, bisection, failover, outage, slots, states, terminal

DOCS = Path(__file__).parents[2] / "docs"

#: Drawn from the code or from a run in virtual time: the same each time.
DRAWN: dict[str, Callable[[], str]] = {
    "how/architecture.svg": architecture.draw,
    "how/state-machine.svg": states.draw,
    "how/bisect.svg": bisection.draw,
    "how/limiter.svg": lambda: slots.draw(slots.run()),
    "how/outage.svg": lambda: outage.draw(outage.run()),
    "how/failover.svg": lambda: failover.draw(failover.run()),
}
#: Taken of a sandbox; the second needs Chromium.
TAKEN: dict[str, Callable[[], object]] = {
    "status.svg": lambda: (DOCS / "status.svg").write_text(terminal.terminal(), encoding="utf-8"),
    "operate/flower.png": lambda: terminal.flower(DOCS / "operate" / "flower.png"),
}


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    for name in sys.argv[1:] or [*DRAWN, *TAKEN]:
        if name in DRAWN:
            (DOCS / name).write_text(DRAWN[name](), encoding="utf-8")
        else:
            TAKEN[name]()
        print(name)


if __name__ == "__main__":
    main()
