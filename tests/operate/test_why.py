"""The answer to "why does the API not have this value?" is one sentence, and true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from worker.operate.why import explain, facts
from worker.state.dead_letters import Letter
from worker.state.refused import RefusedUpdate
from worker.state.users import Delivered, UserState, Waiting

NOW = 1_700_000_100_000
ANN = UserState("ann", NOW)
CITY = {"city": ("Rome", NOW - 60_000)}
PENDING = Waiting(CITY, NOW - 60_000, 0, suspect=False)
DELIVERED = Delivered({"city": ("Oslo", NOW - 90_000)}, frozenset(), NOW - 30_000, 7)
LETTER = Letter("ann", CITY, 40001, "the account does not exist", 1, NOW - 60_000, NOW - 50_000)
REFUSED = RefusedUpdate(f"{NOW}-0", "stream", "ann", "the value of 'city' is 51 bytes, at most 50", "{}")
OPEN = {
    "line": {"state": "open", "words": "open"},
    "workers": [{}],
    "measured": {"1min": {"users_per_s": 100.0}},
}


def sentence(user: UserState, state: dict[str, Any] = OPEN, *refused: RefusedUpdate) -> str:
    return explain(user, "city", state, refused, 900.0).sentence


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (ANN, "Nothing is known of city of ann"),
        (
            replace(ANN, delivered=DELIVERED),
            "The API has the newest value of city of ann: batch number 7 delivered it 30 s ago",
        ),
        (
            replace(ANN, delivered=replace(DELIVERED, values={"city": (None, 5)})),
            "The API has no longer the newest value",
        ),
        (
            replace(ANN, delivered=replace(DELIVERED, unknown=frozenset({"city"}))),
            "It is unknown what the API has",
        ),
        (replace(ANN, in_flight=PENDING, batch="b1"), "city of ann is being sent now, in batch b1."),
        (
            replace(ANN, in_flight=PENDING, batch="b1", pending=PENDING),
            "in batch b1, and a newer value waits behind it.",
        ),
        (
            replace(ANN, pending=PENDING, lane="live", place=1200),
            "1,200 users are ahead of it in the lane live, about 12 s",
        ),
        (
            replace(ANN, pending=PENDING, lane="live", delivered=DELIVERED),
            "not sent yet (the API has an older value)",
        ),
        (replace(ANN, pending=PENDING, delayed_until_ms=NOW + 5000), "it is held for another 5 s"),
        (
            replace(ANN, dead=LETTER),
            "given up 50 s ago after 1 attempt: the account does not exist (40001). imattr dead redrive",
        ),
    ],
)
def test_there_is_a_sentence_for_every_place(user: UserState, words: str) -> None:
    assert words in sentence(user)


def test_a_stopped_line_is_the_reason() -> None:
    stopped = OPEN | {
        "line": {"state": "stopped", "words": "stopped by an error 3 s ago: no administrator (90009)."}
    }

    assert sentence(replace(ANN, pending=PENDING, lane="live"), stopped).endswith(
        "the line is stopped by an error 3 s ago: no administrator (90009)."
    )


def test_without_workers_nobody_sends() -> None:
    assert sentence(replace(ANN, pending=PENDING, lane="live"), OPEN | {"workers": []}).endswith(
        "no worker is alive."
    )


def test_a_refusal_is_the_reason_if_nothing_was_accepted() -> None:
    assert "was refused: the value of 'city' is 51 bytes" in sentence(ANN, OPEN, REFUSED)
    assert "The API has" in sentence(replace(ANN, delivered=DELIVERED), OPEN, REFUSED)


def test_no_value_is_told_unless_asked_for() -> None:
    user = replace(ANN, pending=PENDING, delivered=DELIVERED, dead=LETTER, lane="live", in_flight=PENDING)

    answer = explain(user, "city", OPEN, [REFUSED], 900.0)

    for text in (answer.sentence, *answer.proof, str(facts(user, values=False))):
        assert "Rome" not in text
        assert "Oslo" not in text
    assert "Rome" in str(facts(user, values=True))
    assert len(answer.proof) == 5
