"""Dead letters and refused updates: exactly the set that was shown is redriven, exported or deleted."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
import redis
from starlette.testclient import TestClient

from tests.console.conftest import Opened, send
from tests.console.test_pages import bury, now_ms
from worker.errors import InvalidUpdate
from worker.models import Update
from worker.state.buffer import Buffer
from worker.state.dead_letters import DeadLetters
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.refused import Refused


def fields(page: str, action: str) -> dict[str, str]:
    """The hidden fields of a form."""
    [form] = re.findall(rf'action="{action}"[^>]*>(.*?)</form>', page, re.DOTALL)
    found = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form)
    return {name: html.unescape(value) for name, value in found}


def question(page: TestClient, verb: str, query: str = "") -> dict[str, str]:
    """Look at the list, press a button, and return what the question would send."""
    asked = [
        one
        for one in re.findall(
            r'<form method="get" action="/dead/confirm">(.*?)</form>',
            page.get(f"/dead{query}").text,
            re.DOTALL,
        )
        if f'value="{verb}"' in one
    ]
    given = {
        name: html.unescape(value) for name, value in re.findall(r'name="(\w+)" value="([^"]*)"', asked[0])
    }
    return fields(page.get("/dead/confirm", params=given).text, f"/dead/{verb}")


@pytest.fixture
def letters(client: redis.Redis, keys: Keys) -> DeadLetters:
    """Sixty letters of one code, forty of another, a minute apart."""
    now = now_ms(client)
    for n in range(100):
        bury(client, keys, f"u{n:03}", now - 60_000 * (n + 1), code=70107 if n < 60 else 40004)
    return DeadLetters(client, keys)


def test_the_list_is_paged_oldest_first_and_has_no_values(browser: Opened, letters: DeadLetters) -> None:
    page = browser().get("/dead").text

    assert re.findall(r">(u\d{3})<", page) == [f"u{n:03}" for n in range(99, 49, -1)]
    assert "Paris" not in page
    following = re.search(r'href="([^"]*)" rel="next"', page)
    assert following
    second = browser().get(html.unescape(following[1])).text
    assert re.findall(r">(u\d{3})<", second) == [f"u{n:03}" for n in range(49, -1, -1)]
    assert "70107 <small>× 60</small>" in page


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("code=40004", 40),
        ("user=u007", 1),
        ("user=u007&code=40004", 0),
        ("older=50m", 51),
        ("newer=50m", 49),
        ("older=50m&code=70107", 11),
        ("older=10m&newer=20m", 10),
        ("code=", 100),
        ("older=2d", 0),
    ],
)
def test_the_list_is_filtered(browser: Opened, letters: DeadLetters, query: str, count: int) -> None:
    page = browser().get(f"/dead?{query}").text

    found = re.search(r"<p>(\d+) dead letters? at", page)
    # The first letter is a minute old, so a second more or less makes no difference; ages are counted to a part of one.
    assert abs((int(found[1]) if found else 0) - count) <= (1 if "m" in query else 0)


@pytest.mark.parametrize(
    "query",
    [
        "code=x",
        "code=1e3",
        "older=5",
        "older=-5m",
        "newer=5 m",
        "start=x",
        "until=x",
        "code=99999999999999999",
    ],
)
def test_a_filter_that_means_nothing_is_refused_with_its_name(browser: Opened, query: str) -> None:
    answer = browser().get(f"/dead?{query}")

    assert answer.status_code == 400
    assert query.partition("=")[0] in answer.text


def test_exactly_the_set_that_was_shown_is_deleted(
    browser: Opened, client: redis.Redis, keys: Keys, letters: DeadLetters
) -> None:
    page = browser()
    form = question(page, "purge", "?code=70107")
    assert form["count"] == "60"
    # Meanwhile: one more comes, one changes, one goes.
    later = now_ms(client) + 5_000
    bury(client, keys, "new", later)
    bury(client, keys, "u001", later)
    letters.purge({"u002": letters.choose()["u002"]})

    answer = page.post("/dead/purge", data=form)

    assert answer.status_code == 303
    left = letters.choose()
    assert set(left) == {"new", "u001", *(f"u{n:03}" for n in range(60, 100))}
    said = page.get("/dead").text
    assert "58 dead letters deleted." in said
    assert "2 dead letters had changed or gone since you were asked, and were left alone." in said
    newest = History(client, keys).newest(1)[0]
    assert (newest.event, newest.by, newest.details["users"]) == ("purged", "console@loopback", "58")


def test_exactly_the_set_that_was_shown_is_redriven(
    browser: Opened, client: redis.Redis, keys: Keys, letters: DeadLetters
) -> None:
    page = browser()
    form = question(page, "redrive", "?code=40004")

    assert page.post("/dead/redrive", data=form).status_code == 303

    assert len(letters.choose()) == 60
    assert Buffer(client, keys).snapshot().backfill == 40
    assert "40 dead letters redriven." in page.get("/dead").text
    assert History(client, keys).newest(1)[0].by == "console@loopback"


def test_sending_the_form_again_does_nothing_more(browser: Opened, letters: DeadLetters) -> None:
    page = browser()
    form = question(page, "purge", "?code=40004")

    page.post("/dead/purge", data=form)
    page.post("/dead/purge", data=form)

    assert len(letters.choose()) == 60
    assert "0 dead letters deleted. 40 dead letters had changed or gone" in page.get("/dead").text


def test_the_question_says_what_has_changed_since_the_list(browser: Opened, letters: DeadLetters) -> None:
    page = browser()
    until = fields(page.get("/dead").text, "/dead/export")["until"]
    letters.purge({"u002": letters.choose()["u002"]})

    asked = page.get("/dead/confirm", params={"verb": "purge", "count": 100, "until": until}).text

    assert "Delete 99 dead letters for good?" in asked
    assert "1 letter of the 100 that you were shown has changed or gone since" in asked


def test_a_set_that_has_grown_is_not_touched(
    browser: Opened, client: redis.Redis, keys: Keys, letters: DeadLetters
) -> None:
    page = browser()
    form = question(page, "purge")
    # Only a clock that was set back can do that.
    bury(client, keys, "sneaked", int(form["until"]) - 1)

    answer = page.post("/dead/purge", data=form)

    assert answer.status_code == 400
    assert "101 letters instead of 100" in answer.text
    assert len(letters.choose()) == 101


def test_a_moment_to_come_is_now(browser: Opened, letters: DeadLetters, client: redis.Redis) -> None:
    asked = browser().get("/dead/confirm?verb=purge&until=9999999999999").text

    assert abs(int(fields(asked, "/dead/purge")["until"]) - now_ms(client)) < 60_000


@pytest.mark.parametrize(
    "form", [{}, {"count": "5"}, {"until": "5"}, {"count": "x", "until": "5"}, {"count": "5", "until": "x"}]
)
def test_a_deed_without_its_set_does_nothing(
    browser: Opened, letters: DeadLetters, form: dict[str, str]
) -> None:
    for path in ("/dead/purge", "/dead/redrive", "/refused/purge"):
        assert send(browser(), path, **form).status_code == 400
    assert len(letters.choose()) == 100


@pytest.mark.parametrize("verb", ["", "drop", "<b>"])
def test_a_question_has_one_of_two_verbs(browser: Opened, verb: str) -> None:
    answer = browser().get("/dead/confirm", params={"verb": verb})

    assert answer.status_code == 400
    assert "verb must be one of redrive, purge" in answer.text


def test_an_export_is_what_the_command_prints_and_can_be_imported(
    browser: Opened, client: redis.Redis, keys: Keys, letters: DeadLetters
) -> None:
    page = browser()
    form = fields(page.get("/dead?code=40004").text, "/dead/export")

    answer = page.post("/dead/export", data=form)

    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) == 40
    at = letters.choose()["u099"]
    assert lines[0] == {"user": "u099", "attrs": {"city": "Paris"}, "occurred_at": at}
    assert answer.headers["content-disposition"] == 'attachment; filename="dead-letters.jsonl"'
    assert answer.headers["cache-control"] == "no-store"
    assert len(letters.choose()) == 100
    newest = History(client, keys).newest(1)[0]
    assert (newest.event, newest.by) == ("exported", "console@loopback")


def test_a_letter_that_cannot_be_read_stops_nobody(
    browser: Opened, client: redis.Redis, keys: Keys, letters: DeadLetters
) -> None:
    bury(client, keys, "damaged", now_ms(client) - 1000)
    client.hset(keys.dead, "damaged", "{")

    assert "100 dead letters at" in browser().get("/dead").text


def test_a_user_whose_name_needs_quoting_is_chosen_exactly(
    browser: Opened, client: redis.Redis, keys: Keys
) -> None:
    names = ['a"b', "a b", "a&b=c", "a+b", "a%20b", "<a>"]
    for name in names:
        bury(client, keys, name, now_ms(client) - 1000)
    page = browser()

    for left, name in zip(range(5, -1, -1), names, strict=True):
        listed = page.get("/dead", params={"user": name}).text
        form = fields(listed, "/dead/export")
        assert form["user"] == name
        asked = fields(page.get("/dead/confirm", params=form | {"verb": "purge"}).text, "/dead/purge")
        page.post("/dead/purge", data=asked)
        assert DeadLetters(client, keys).count() == left


# Refused updates.


def keep(client: redis.Redis, keys: Keys, source: Any, user: str, rule: str = "a rule") -> None:
    Refused(client, keys).keep(source, [(InvalidUpdate(user, rule), {"user": user, "city": "Paris"})])


def refused_question(page: TestClient, query: str = "") -> dict[str, str]:
    given = fields(page.get(f"/refused{query}").text, "/refused/confirm")
    return fields(page.get("/refused/confirm", params=given).text, "/refused/purge")


def test_exactly_the_refused_updates_that_were_shown_are_deleted(
    browser: Opened, client: redis.Redis, keys: Keys
) -> None:
    for n in range(70):
        keep(client, keys, "celery" if n < 60 else "stream", f"u{n}")
    # The set ends before the millisecond in which it is looked at.
    while Refused(client, keys).now_ms() <= Refused(client, keys).newest(1)[0].at_ms:
        pass
    page = browser()
    form = refused_question(page, "?source=celery")
    assert form["count"] == "60"
    keep(client, keys, "celery", "new")
    gone = [one for one in Refused(client, keys).everyone() if one.user == "u5"]
    Refused(client, keys).purge_these([one.id for one in gone])

    assert page.post("/refused/purge", data=form).status_code == 303

    assert {one.user for one in Refused(client, keys).everyone()} == {
        "new",
        *(f"u{n}" for n in range(60, 70)),
    }
    said = page.get("/refused").text
    assert "59 refused updates deleted. 1 update had changed or gone since you were asked" in said
    assert History(client, keys).newest(1)[0].by == "console@loopback"


def test_refused_updates_are_filtered_paged_and_exported(
    browser: Opened, client: redis.Redis, keys: Keys
) -> None:
    for n in range(120):
        keep(client, keys, "stream", f"u{n}", "too long" if n % 2 else "no name")
    while Refused(client, keys).now_ms() <= Refused(client, keys).newest(1)[0].at_ms:
        pass
    page = browser()

    first = page.get("/refused?rule=LONG").text
    assert "60 refused updates at" in first
    assert "Paris" not in first
    assert re.findall(r">(u\d+)<", first)[:2] == ["u119", "u117"]
    assert "no refused updates" in page.get("/refused?source=celery").text.lower()
    assert page.get("/refused?source=mail").status_code == 400
    answer = page.post("/refused/export", data=fields(first, "/refused/export"))
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) == 60
    assert json.loads(lines[0]["payload"])["city"] == "Paris"


def test_a_newer_value_wins_over_a_redriven_letter(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    bury(client, keys, "ann", now_ms(client) - 60_000)
    page = browser()
    form = question(page, "redrive")
    Buffer(client, keys).add([Update("ann", {"city": "Oslo"})])

    page.post("/dead/redrive", data=form)

    packed: Any = client.hget(keys.pending, "ann")
    assert json.loads(packed)["a"]["city"][0] == "Oslo"
