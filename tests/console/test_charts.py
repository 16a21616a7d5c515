"""Curves from samples, and the drawings of them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from worker.console.charts import Chart
from worker.console.curves import WINDOWS, Remembered, curves
from worker.state.fleet import Fleet, Sample
from worker.state.keys import Keys

NOW = 1_800_000_000.0
LATELY, DAY = WINDOWS["15min"], WINDOWS["24h"]


def sample(at: float, calls: int, *, left: int = 0, oldest: float | None = None) -> Sample:
    return Sample(at, calls, 0.0, 100 * calls, 0, left, 0, oldest)


def test_a_rate_is_the_difference_of_counters_in_each_part() -> None:
    samples = [sample(NOW - 100 + 5 * n, 500 * n) for n in range(21)]

    found = curves(samples, LATELY, NOW)

    assert found.calls[-2] == 100.0
    assert found.users[-2] == 10_000.0
    assert found.calls[:70] == [None] * 70
    assert len(found.calls) == LATELY.parts == 90


def test_a_hole_and_counters_that_fell_are_unknown_and_not_a_rate() -> None:
    samples = [sample(NOW - 60, 1000), sample(NOW - 40, 9000), sample(NOW - 35, 3), sample(NOW - 30, 53)]

    assert [value for value in curves(samples, LATELY, NOW).calls if value is not None] == [10.0]


def test_of_what_is_left_the_most_counts() -> None:
    samples = [
        sample(NOW - 9, 0, left=5, oldest=1.0),
        sample(NOW - 4, 0, left=900, oldest=None),
        sample(NOW - 1, 0, left=7, oldest=3.0),
    ]

    found = curves(samples, LATELY, NOW)

    assert [value for value in found.left if value is not None] == [900.0]
    assert [value for value in found.oldest if value is not None] == [3.0]


@given(
    st.lists(st.tuples(st.floats(-90_000, 5_000), st.integers(0, 10**15)), max_size=30),
    st.sampled_from(list(WINDOWS.values())),
)
def test_any_samples_make_curves_that_can_be_drawn(points: list[tuple[float, int]], window: object) -> None:
    samples = [sample(NOW + at, calls, left=calls, oldest=float(calls)) for at, calls in points]
    for chosen in WINDOWS.values():
        found = curves(samples, chosen, NOW)
        for values in (found.calls, found.users, found.left, found.oldest):
            assert len(values) == chosen.parts
            chart = Chart("id", "Title", values, found.end, chosen.part, unit="calls/s", limit=100.0)
            ElementTree.fromstring(chart.svg)
            assert len(chart.table) <= 15


def test_only_new_samples_are_read_and_old_ones_forgotten(client: redis.Redis, keys: Keys) -> None:
    fleet, read = Fleet(client, keys), list[int]()
    remembered = Remembered(fleet)

    def counted(at: float) -> list[Sample]:
        found = Fleet.samples_since(fleet, at)
        read.append(len(found))
        return found

    fleet.samples_since = counted  # type: ignore[method-assign]
    for n in range(10):
        client.xadd(keys.samples, {"calls": 100 * n}, id=f"{round(1000 * NOW) + 5000 * n}-0")
    remembered.look(NOW + 50)
    remembered.look(NOW + 50)
    client.xadd(keys.samples, {"calls": 2000}, id=f"{round(1000 * NOW) + 50_000}-0")
    remembered.look(NOW + 55)

    assert read == [10, 0, 1]
    assert any(remembered.curves(LATELY, NOW + 55).calls)
    remembered.look(NOW + 5000)
    assert not any(remembered.curves(LATELY, NOW + 5000).calls)
    # The clock of another server is behind.
    remembered.look(NOW + 55)
    remembered.look(NOW - 5000)
    assert remembered.curves(LATELY, NOW - 5000).left == [None] * LATELY.parts


def chart(*values: float | None, unit: str = "calls/s", limit: float | None = None) -> Chart:
    return Chart("id", "Calls <a second>", values, NOW, 60.0, unit=unit, limit=limit)


def test_a_chart_is_told_in_a_sentence() -> None:
    assert (
        chart(1.0, None, 5.25, 3.0).label
        == "Calls <a second>: now 3 calls/s, least 1 calls/s, most 5.2 calls/s"
    )
    assert chart(None, None).label == "Calls <a second>: nothing is known"
    assert chart(90.0, 7200.0, unit="").label.endswith("now 2 h, least 90 s, most 2 h")


def test_a_drawing_says_what_it_shows_and_nothing_acts_in_it() -> None:
    drawn = ElementTree.fromstring(chart(1.0, 2.0, limit=100.0).svg)

    assert drawn.get("role") == "img"
    assert drawn.get("aria-label", "").startswith("Calls <a second>: now 2")
    assert {element.tag.rpartition("}")[2] for element in drawn.iter()} == {"svg", "path"}


def test_a_hole_is_a_hole_and_a_value_alone_can_be_seen() -> None:
    drawn = ElementTree.fromstring(chart(1.0, 1.0, None, 2.0, None).svg)

    [curve] = [path.get("d", "") for path in drawn if path.get("class") == "curve"]
    assert curve == "M0,50.0 1,50.0M3,0.0 3.6,0.0"


@pytest.mark.parametrize(
    ("most", "top"), [(0, 1), (0.3, 1), (3, 5), (100, 100), (101, 200), (230, 250), (9_999, 10_000)]
)
def test_the_scale_ends_at_a_round_number(most: float, top: float) -> None:
    assert chart(most).top == top
