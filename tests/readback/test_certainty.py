"""What may be said about everybody after a look at some: the bounds contain the truth as often as they say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.readback.certainty import CONFIDENCE, at_most, between, in_words

samples = st.integers(1, 3000).flatmap(lambda judged: st.tuples(st.integers(0, judged), st.just(judged)))


def chance(wrong: int, judged: int, share: float) -> float:
    return math.comb(judged, wrong) * share**wrong * (1 - share) ** (judged - wrong)


@pytest.mark.parametrize(
    ("wrong", "judged", "least", "most"),
    # From tables of Clopper's and Pearson's intervals.
    [
        (0, 10, 0.0, 0.308497),
        (1, 10, 0.002529, 0.445016),
        (5, 10, 0.187086, 0.812914),
        (10, 10, 0.691503, 1.0),
        (1, 100, 0.000253, 0.054459),
    ],
)
def test_the_interval_is_the_one_in_the_tables(wrong: int, judged: int, least: float, most: float) -> None:
    assert between(wrong, judged) == pytest.approx((least, most), abs=1e-6)


@pytest.mark.parametrize("judged", [1, 2, 100, 3000, 30_000, 10**9])
def test_none_wrong_is_the_rule_of_three(judged: int) -> None:
    assert at_most(0, judged) == pytest.approx(1 - 0.05 ** (1 / judged), rel=1e-6)
    assert at_most(0, judged) < 3 / judged


@given(samples)
def test_the_interval_has_what_was_seen_in_it(sample: tuple[int, int]) -> None:
    wrong, judged = sample
    least, most = between(wrong, judged)

    assert 0 <= least <= wrong / judged <= most <= 1
    assert at_most(wrong, judged) <= most


@given(samples)
def test_more_wrong_ones_raise_the_bounds_and_more_good_ones_lower_them(sample: tuple[int, int]) -> None:
    wrong, judged = sample

    assert at_most(wrong, judged + 1) <= at_most(wrong, judged) <= at_most(wrong + 1, judged + 1)
    assert between(wrong, judged + 1) <= between(wrong, judged) <= between(wrong + 1, judged + 1)


@given(samples)
def test_one_side_is_the_mirror_of_the_other(sample: tuple[int, int]) -> None:
    wrong, judged = sample
    least, most = between(judged - wrong, judged)

    assert between(wrong, judged) == pytest.approx((1 - most, 1 - least), abs=1e-9)


@pytest.mark.parametrize("judged", [1, 7, 40, 300])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.37, 0.5, 0.93, 0.999])
def test_the_bounds_hold_as_often_as_they_say(judged: int, share: float) -> None:
    """Over every outcome that a sample may have, each with its chance."""
    outcomes = [(wrong, chance(wrong, judged, share)) for wrong in range(judged + 1)]

    assert sum(p for wrong, p in outcomes if share <= at_most(wrong, judged)) >= CONFIDENCE - 1e-9
    inside = (p for wrong, p in outcomes if between(wrong, judged)[0] <= share <= between(wrong, judged)[1])
    assert sum(inside) >= CONFIDENCE - 1e-9


@pytest.mark.parametrize(
    ("wrong", "judged", "words"),
    [
        (0, 30_000, "0 of 30,000 wrong: below 0.01 % with 95 % confidence"),
        (0, 3000, "0 of 3,000 wrong: below 0.1 % with 95 % confidence"),
        (0, 100, "0 of 100 wrong: below 3 % with 95 % confidence"),
        (0, 1, "0 of 1 wrong: below 95 % with 95 % confidence"),
        (312, 30_000, "312 of 30,000 wrong: 1.04 %, between 0.93 and 1.16 % with 95 % confidence"),
        (3, 3, "3 of 3 wrong: 100 %, between 29.2 and 100 % with 95 % confidence"),
        (0, 0, "nobody could be judged"),
    ],
)
def test_the_result_in_words(wrong: int, judged: int, words: str) -> None:
    assert in_words(wrong, judged) == words


def test_a_sample_of_everybody_leaves_nothing_to_chance() -> None:
    assert in_words(0, 500, everybody=True) == "0 of 500 wrong"
    assert in_words(5, 500, everybody=True) == "5 of 500 wrong: 1 %"


def test_what_is_said_to_be_below_is_below() -> None:
    for judged in range(1, 2000):
        said = in_words(0, judged).partition("below ")[2].partition(" %")[0]
        assert float(said) >= 100 * at_most(0, judged) - 1e-9
