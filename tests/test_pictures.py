"""The pictures that do not depend on a run are those of their scripts; the others are drawn from what a run may show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from tests.pictures import arrivals, outage, states
from tests.pictures.__main__ import DOCS
from tests.pictures.outage import Look
from worker.state import scripts

#: Scripts that neither move a user nor change what is remembered of one.
OTHERS = {
    "campaign", "finish", "keep", "look", "make_group", "pause", "pause_import", "pause_line", "recall", "record_audit", "record_dead_letters", "record_failure", "renew_signature", "reopen", "reserve", "resume",
    "resume_import", "sample", "snapshot", "stop", "take",
}  # fmt: skip


def test_the_state_machine_is_drawn_as_the_script_says() -> None:
    assert (DOCS / "how" / "state-machine.svg").read_text() == states.draw(), "make pictures"


def test_every_script_that_moves_a_user_is_on_the_page_of_the_state_machine() -> None:
    page = (DOCS / "how" / "state-machine.md").read_text()
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))

    assert set(scripts.names()) - OTHERS == named


def test_arrivals_are_counted_over_the_second_before() -> None:
    drawn = arrivals.draw([number / 98 for number in range(300)])

    ElementTree.fromstring(drawn)
    assert "98 to 99 calls" in drawn


def test_an_outage_has_its_colours() -> None:
    lines = ["open"] * 8 + ["stopped"] * 8 + ["probing"] + ["open"] * 8
    seen = [Look(number / 4, 100 * number, 1000 - 40 * number, line) for number, line in enumerate(lines)]

    drawn = outage.draw(seen)

    ElementTree.fromstring(drawn)
    assert re.findall(r'<rect class="(open|stopped|probing)" x="[\d.]+" y="268"', drawn) == [
        "open",
        "stopped",
        "probing",
        "open",
    ]
