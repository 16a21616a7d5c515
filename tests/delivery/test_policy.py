"""The policy: a verdict for every documented code, and what follows from each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import docs
from worker.delivery.answers import UNNUMBERED, Failure, NoReply, Reply
from worker.delivery.policy import (
    TABLE,
    UNKNOWN_ATTEMPTS,
    Action,
    Bisect,
    Deliver,
    Pause,
    Policy,
    RenewSignature,
    RetryCounted,
    RetryUncounted,
    Stop,
    Verdict,
    dead_letter,
    decide,
    rule_for,
)
from worker.models import ClaimedUser, DeadLettered, Outcome, Retried, Snoozed

#: The documents' own classes, read off their pages once more, independently of the table.
DOCUMENTED = {
    Verdict.TRANSIENT: [
        60008,
        60013,
        60014,
        70169,
        70202,
        70500,
        90992,
        90994,
        90995,
        91000,
        10002,
        20004,
        20005,
    ],
    # 429 is HTTP's own.
    Verdict.RATE: [429, 60007, 60011, 60018, 60019],
    Verdict.CREDENTIAL: [60004, 60005, 70001, 70002, 70003, 70005, 70052],
    Verdict.STOP: [
        *(60002, 60006, 60009, 60010, 60012, 60016, 60017, 60020, 60021, 60025, 60026, 60027, 60028),
        *(70009, 70013, 70014, 70016, 70020, 70050, 70051, 70346, 70347, 70348, 70398, 70403, 72000, 72002),
        *(80005, 90009, 90045),
    ],
    Verdict.SHAPE: [60003, 70206, 70402, 80002, 90001, 90018, 90055, 90056, 93000],
    Verdict.USER: [60015, 70107, 70399, 90003, 90012, 90030, 90033, 90035, 90048],
    Verdict.UNKNOWN: [
        *(60022, 60023, 60024, 40006, 40601, 70114, 70404, 71000, 72001, 72010, 72011, 72012),
        *(90002, 90005, 90007, 90010, 90020, 90022, 90024, 90026, 90032, 90034, 90039, 90040, 90047, 90057),
    ],
}
ROWS = [(code, verdict) for verdict, codes in DOCUMENTED.items() for code in codes]


def policy(**changes: float) -> Policy:
    options = {"max_attempts": 8, "backoff_base": 1.0, "backoff_max": 300.0, "hold": 5.0} | changes
    return Policy(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "verdict"), ROWS)
def test_a_documented_code_has_its_verdict_and_its_meaning(code: int, verdict: Verdict) -> None:
    assert rule_for(code).verdict is verdict
    assert len(rule_for(code).meaning) > 10


def test_the_table_has_every_documented_code_and_no_other() -> None:
    assert TABLE.keys() == {code for code, _ in ROWS} | {UNNUMBERED}


def test_a_code_in_no_table_is_unknown() -> None:
    assert rule_for(12345).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        (Reply(0), Deliver()),
        (Reply(91000), RetryUncounted(hold=False)),
        (Reply(12345), RetryCounted(UNKNOWN_ATTEMPTS)),
        (Reply(UNNUMBERED), RetryCounted(UNKNOWN_ATTEMPTS)),
        (Reply(60007), Pause(1.0)),
        (Reply(70001), RenewSignature()),
        (Reply(90009), Stop(0.0)),
        (Reply(70050), Stop(60.0)),
        (Reply(90033), Bisect(names=True)),
        (Reply(70402), Bisect(names=True)),
        (Reply(90018), Bisect(names=False)),
        (Reply(70107), Bisect(names=False)),
        (NoReply(Failure.TIMEOUT), RetryUncounted(hold=True)),
        (NoReply(Failure.HTTP_STATUS, http_status=502), RetryUncounted(hold=True)),
        (NoReply(Failure.UNREADABLE), RetryUncounted(hold=True)),
        (NoReply(Failure.UNREACHABLE, sent=False), RetryUncounted(hold=False)),
    ],
    ids=str,
)
def test_an_answer_decides_the_action(answer: Reply | NoReply, action: Action) -> None:
    assert decide(answer) == action


@pytest.mark.parametrize(
    ("code", "attempts", "outcome"),
    [
        (70107, 0, DeadLettered(70107, "the account does not exist: import it (words)")),
        (90001, 0, DeadLettered),
        (60007, 7, Snoozed(1.0)),
        (90009, 7, Snoozed(30.0)),
        (70001, 7, Snoozed(30.0)),
        (91000, 0, Retried),
        (91000, 6, Retried),
        (91000, 7, DeadLettered),
        (12345, 1, Retried),
        (12345, 2, DeadLettered),
    ],
)
def test_a_user_refused_by_name_gets_its_outcome(
    code: int, attempts: int, outcome: Outcome | type[Outcome]
) -> None:
    decided = policy().decide_user(code, "words", attempts, 0.5)

    assert isinstance(decided, outcome) if isinstance(outcome, type) else decided == outcome


@given(attempts=st.integers(0, 10_000), jitter=st.floats(0, 1))
def test_the_back_off_doubles_has_full_jitter_and_a_bound(attempts: int, jitter: float) -> None:
    longest = policy().backoff(attempts, 1.0)

    assert longest == min(300.0, 2.0 ** min(attempts, 9))
    assert policy().backoff(attempts, jitter) == jitter * longest


@given(attempts=st.integers(0, 7), jitter=st.floats(0, 1))
def test_after_an_unknown_outcome_the_hold_comes_on_top(attempts: int, jitter: float) -> None:
    held = policy().retry_uncounted(RetryUncounted(hold=True), attempts, jitter)

    assert held == Retried(5.0 + policy().backoff(attempts, jitter), proven=False, unknown=True)


def test_only_a_failure_that_is_not_the_services_costs_an_attempt_at_once() -> None:
    assert not policy().retry_uncounted(RetryUncounted(hold=False), 0, 0.5).proven
    assert policy().retry(0, 0.5).proven


@pytest.mark.parametrize(
    ("attempts", "marked", "most", "suspect"),
    [
        (0, False, 8, False),
        (1, False, 8, False),
        (2, False, 8, True),
        (0, True, 8, True),
        (1, False, 1, True),
    ],
)
def test_who_failed_twice_or_was_in_a_refused_request_is_suspected(
    attempts: int, marked: bool, most: int, suspect: bool
) -> None:
    user = ClaimedUser("ann", {"city": "Paris"}, attempts, 0, marked)

    assert policy(max_attempts=most).suspects(user) is suspect


@pytest.mark.parametrize(("attempts", "spent"), [(7, False), (8, True), (9, True)])
def test_failures_that_count_use_up_the_attempts(attempts: int, spent: bool) -> None:
    assert policy().spent(attempts) is spent


@pytest.mark.parametrize(
    ("attempts", "most", "spent"),
    [(6, None, False), (7, None, True), (1, 3, False), (2, 3, True), (7, 99, True)],
)
def test_attempts_are_bounded(attempts: int, most: int | None, spent: bool) -> None:
    assert policy().exhausted(attempts, most) is spent


def test_a_dead_letter_is_in_plain_words_and_bounded() -> None:
    assert dead_letter(90033, "").message.startswith("an attribute is invalid")
    assert len(dead_letter(90033, "x" * 10_000).message) < 400


def test_the_page_on_error_codes_is_what_the_table_says() -> None:
    assert docs.ERROR_CODES.read_text(encoding="utf-8") == docs.error_codes(), "run make docs"


@pytest.mark.parametrize(("asked", "seconds"), [(0.0, 1.0), (7.0, 7.0), (10**9, 60.0)])
def test_a_pause_is_as_long_as_is_asked_for_within_reason(asked: float, seconds: float) -> None:
    assert decide(Reply(429, retry_after=asked)) == Pause(seconds)
