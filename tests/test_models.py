"""The rules at the door, at their edges; and that a refusal tells the length, never the value."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import InvalidUpdate
from worker.models import Update, check_names, check_update

GOOD: dict[str, str] = {"city": "Paris"}


def rule(
    user: object = "ann", attrs: object = GOOD, at: object = None, names: frozenset[str] = frozenset()
) -> str:
    with pytest.raises(InvalidUpdate) as caught:
        check_update(user, attrs, at, names)
    return caught.value.rule


@pytest.mark.parametrize("user", ["a", "a" * 32, "c d", "~!@#", "13000000000"])
def test_a_good_user_id_passes(user: str) -> None:
    assert check_update(user, GOOD) == Update(user, GOOD)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "user id is empty"),
        ("a" * 33, "user id is 33 bytes, at most 32"),
        ("用户", "user id must be printable ASCII"),
        ("a\nb", "user id must be printable ASCII"),
        ("a\x7f", "user id must be printable ASCII"),
        (42, "user id must be a string, got int"),
        (None, "user id must be a string, got NoneType"),
        (b"ann", "user id must be a string, got bytes"),
    ],
)
def test_a_bad_user_id_is_refused(user: object, expected: str) -> None:
    assert rule(user) == expected


def test_none_asks_for_the_attribute_to_be_removed() -> None:
    assert check_update("ann", {"city": None, "level": "Gold"}).attrs == {"city": None, "level": "Gold"}
    assert rule(attrs={"shoe": None}, names=frozenset({"city"})).startswith("attribute 'shoe' is not one")


@pytest.mark.parametrize("text", ["a", "a" * 50, "字" * 16, "é" * 25, "😀" * 12, "a\x00b", " "])
def test_a_text_of_1_to_50_bytes_passes(text: str) -> None:
    assert check_update("ann", {"city": text, text: "Paris"}).attrs["city"] == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("a" * 51, "is 51 bytes, at most 50"),
        ("字" * 17, "is 51 bytes, at most 50"),
        ("😀" * 13, "is 52 bytes, at most 50"),
        ("\ud800", "is not valid Unicode (it has a lone surrogate)"),
        (7, "must be a string, got int"),
        (True, "must be a string, got bool"),
        (["Paris"], "must be a string, got list"),
    ],
)
def test_any_other_value_or_name_is_refused(text: Any, expected: str) -> None:
    assert rule(attrs={"city": text}) == f"the value of 'city' {expected}"
    if text.__hash__:
        assert rule(attrs={text: "Paris"}) == f"an attribute name {expected}"


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        ({}, "0 attributes, must be 1 to 10"),
        ({f"name{n}": "x" for n in range(11)}, "11 attributes, must be 1 to 10"),
        ([("city", "Paris")], "attributes must be a mapping, got list"),
        (None, "attributes must be a mapping, got NoneType"),
    ],
)
def test_a_wrong_set_of_attributes_is_refused(attrs: object, expected: str) -> None:
    assert rule(attrs=attrs) == expected


def test_ten_attributes_pass() -> None:
    assert len(check_update("ann", {f"name{n}": "x" for n in range(10)}).attrs) == 10


def test_a_name_that_the_app_does_not_have_is_refused_where_the_names_are_known() -> None:
    names = frozenset({"city", "level"})

    assert check_update("ann", GOOD, names=names)
    assert rule(attrs={"shoe": "44"}, names=names) == "attribute 'shoe' is not one of the app's (city, level)"


@given(value=st.text(min_size=51))
def test_a_refusal_never_shows_the_value(value: str) -> None:
    with pytest.raises(InvalidUpdate) as caught:
        check_update("ann", {"city": value})

    assert value not in str(caught.value)
    assert "ann" in str(caught.value)


MOMENT = datetime(2026, 11, 1, 12, 0, 0, 250_000, tzinfo=UTC)
MS = 1_793_534_400_250


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, 0),
        (MOMENT, MS),
        (MOMENT.astimezone(timezone(timedelta(hours=8))), MS),
        ("2026-11-01T12:00:00.250Z", MS),
        ("2026-11-01T20:00:00.250+08:00", MS),
        (MS, MS),
        (MS / 1000, MS),
        (MS // 1000, MS - 250),
    ],
)
def test_an_event_time_is_understood(given: object, expected: int) -> None:
    assert check_update("ann", GOOD, given).occurred_ms == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (datetime(2026, 11, 1), "occurred_at has no time zone"),
        ("2026-11-01T12:00:00", "occurred_at has no time zone"),
        ("yesterday", "occurred_at is not an ISO 8601 time"),
        (True, "occurred_at must be a time, text or number, got bool"),
        ([], "occurred_at must be a time, text or number, got list"),
        *(
            (number, "occurred_at is outside the years 2001 to 2286")
            for number in (-1, 0, 1.5, 1e30, float("nan"))
        ),
        (float("inf"), "occurred_at is outside the years 2001 to 2286"),
    ],
)
def test_any_other_event_time_is_refused(given: object, expected: str) -> None:
    assert rule(at=given) == expected


def test_attribute_names_of_an_app_are_checked() -> None:
    assert check_names(["city", "等级"]) == {"city", "等级"}
    for bad in ([""], ["x" * 51], [7], [f"name{n}" for n in range(11)]):
        with pytest.raises(ValueError, match="attribute name"):
            check_names(bad)


@pytest.mark.parametrize("user", ["\x00", "a\x1f", "a\tb", "a\x80", "a\xa0b", "\ud800"])
def test_a_user_id_outside_printable_ascii_is_refused(user: str) -> None:
    with pytest.raises(InvalidUpdate, match="user id must be printable ASCII"):
        check_update(user, {"city": "Paris"})


@pytest.mark.parametrize("at", [float("-inf"), 1e308, 10**400, 999_999_999, 10_000_000_000_000])
def test_a_time_out_of_bounds_is_refused(at: float) -> None:
    with pytest.raises(InvalidUpdate, match="outside the years 2001 to 2286"):
        check_update("ann", {"city": "Paris"}, at)
