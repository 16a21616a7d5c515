"""The verdict on one user, as far as it can be known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.readback.judgement import Judgement, judge
from worker.state.shadow import UNKNOWN, Known, Remembered

NAMES = ("city", "level", "plan", "sex")
values = st.sampled_from(["Paris", "Rome", "Gold"])
remembered = st.dictionaries(
    st.sampled_from(NAMES), st.tuples(st.one_of(values, st.none(), st.just(UNKNOWN)), st.integers(1, 3))
)
found = st.none() | st.dictionaries(st.sampled_from(NAMES), values)


def known(**remembers: tuple[Remembered, int]) -> Known:
    return Known(False, remembers, 7, "mark")


def verdict(about: Known, found: dict[str, str] | None) -> str:
    judgement = judge(about, found)
    return judgement.verdict if judgement else "unknown"


BOTH = known(city=("Paris", 1), level=("Gold", 1))


@pytest.mark.parametrize(
    ("about", "has", "is_"),
    [
        (BOTH, {"city": "Paris", "level": "Gold"}, "as_delivered"),
        # Of others nothing is known.
        (BOTH, {"city": "Paris", "level": "Gold", "plan": "free"}, "as_delivered"),
        (BOTH, {}, "lost"),
        (BOTH, {"city": "Rome", "level": "Silver"}, "lost"),
        # The call did land.
        (BOTH, {"city": "Paris", "level": "Silver"}, "changed"),
        (BOTH, {"city": "Paris"}, "changed"),
        (BOTH, None, "gone"),
        # Two deliveries, of which the second landed.
        (known(city=("Paris", 1), level=("Gold", 2)), {"level": "Gold"}, "lost"),
        # One of which something landed, and one of which nothing did: the worse is told.
        (known(city=("Paris", 1), level=("Gold", 1), plan=("free", 2)), {"city": "Paris"}, "lost"),
        # Removals travel in a call of their own: that one is gone says nothing about what was set.
        (known(city=("Paris", 1), level=(None, 1)), {}, "lost"),
        (known(city=("Paris", 1), level=(None, 1)), {"city": "Paris", "level": "Gold"}, "lost"),
        (known(city=(None, 1), level=(None, 1)), {"level": "Gold"}, "changed"),
        (known(city=(None, 1)), {}, "as_delivered"),
        (known(city=(None, 1)), None, "as_delivered"),
        # What nobody knows is not judged.
        (known(city=(UNKNOWN, 1), level=("Gold", 1)), {"city": "Rome", "level": "Gold"}, "as_delivered"),
        (known(city=(UNKNOWN, 1), level=("Gold", 1)), {"city": "Rome"}, "lost"),
        (known(city=(UNKNOWN, 1)), {}, "unknown"),
        (known(), {"city": "Rome"}, "unknown"),
    ],
)
def test_the_verdict(about: Known, has: dict[str, str] | None, is_: str) -> None:
    assert verdict(about, has) == is_


@given(remembered, found)
def test_a_user_is_wrong_exactly_if_an_attribute_is(
    remembers: dict[str, tuple[Remembered, int]], has: dict[str, str] | None
) -> None:
    judgement = judge(Known(False, remembers, 0, ""), has)
    comparable = {name: pair for name, pair in remembers.items() if pair[0] is not UNKNOWN}
    wrong = {name for name, (value, _) in comparable.items() if (has or {}).get(name) != value}

    assert (judgement is None) == (not comparable)
    if judgement:
        assert judgement.differences.keys() == wrong
        assert (judgement.verdict == "as_delivered") == (not wrong)
        assert judgement.verdict in {one.verdict for one in judgement.differences.values()} or not wrong
        for name, one in judgement.differences.items():
            assert (one.delivered, one.version) == remembers[name]
            assert one.found == (has or {}).get(name)


@given(remembered, found)
def test_the_order_of_attributes_does_not_matter(
    remembers: dict[str, tuple[Remembered, int]], has: dict[str, str] | None
) -> None:
    def judged(backwards: bool) -> Judgement | None:
        items = list(remembers.items())
        return judge(Known(False, dict(items[::-1] if backwards else items), 0, ""), has)

    assert judged(backwards=True) == judged(backwards=False)
