"""What each page shows: to whom, and that what others wrote is only read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import redis
from starlette.testclient import TestClient

from tests.conftest import ManualClock
from tests.console.conftest import BOB, Opened, log_in, send, settings_of
from worker.console import app, look, sight
from worker.console.app import build_app
from worker.errors import InvalidUpdate
from worker.models import Update
from worker.operate.settings_in_force import changed, shown
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.audit import AuditLog
from worker.state.buffer import Buffer, new_batch_id
from worker.state.fleet import Fleet
from worker.state.history import History
from worker.state.import_pauses import ImportPauses
from worker.state.keys import Keys
from worker.state.line import Line
from worker.state.refused import Refused

PAGES = ("/", "/live", "/dead", "/refused", "/user?user=ann", "/imports", "/history", "/settings")

#: Text that would act if it were not escaped, or that would change how its surroundings read.
HOSTILE = '"><img src=x onerror=alert(1)>\u202egnp.exe\x1b[2J\u200b'


def bury(
    client: redis.Redis,
    keys: Keys,
    user: str,
    at_ms: int,
    *,
    code: int = 70107,
    value: str = "Paris",
    message: str = "not imported",
) -> None:
    """Let a user be a dead letter."""
    letter = {
        "a": {"city": [value, at_ms]},
        "code": code,
        "message": message,
        "attempts": 3,
        "t": at_ms,
        "at": at_ms,
    }
    client.hset(keys.dead, user, json.dumps(letter))
    client.zadd(keys.dead_at, {user: at_ms})


def now_ms(client: redis.Redis) -> int:
    return int(client.time()[0]) * 1000


@pytest.mark.parametrize("path", PAGES)
def test_a_page_of_an_app_of_which_nothing_is_known_is_shown(browser: Opened, path: str) -> None:
    answer = browser().get(path)

    assert answer.status_code == 200, answer.text
    assert "<h" in answer.text


@pytest.fixture
def hostile(client: redis.Redis, keys: Keys) -> None:
    """Everything that anybody else can write is hostile."""
    now = now_ms(client)
    bury(client, keys, HOSTILE, now, value=HOSTILE, message=HOSTILE)
    bury(client, keys, "ann", now, value=HOSTILE, message=HOSTILE)
    Refused(client, keys).keep(
        "celery", [(InvalidUpdate(user, HOSTILE), {"x": HOSTILE}) for user in (HOSTILE, "ann")]
    )
    Line(client, keys).pause(HOSTILE, by=HOSTILE)
    buffer = Buffer(client, keys)
    buffer.begin_import(HOSTILE, 1)
    buffer.show_import(
        HOSTILE, {"at": now / 1000, "state": HOSTILE, "lines": 3, "refused": 1, "refusals": [[HOSTILE] * 3]}
    )
    ImportPauses(client, keys).pause(HOSTILE, HOSTILE, by=HOSTILE)
    Fleet(client, keys).report(
        HOSTILE, threads=1, busy=0, version=HOSTILE, settings={"region": HOSTILE, HOSTILE: "x"}
    )
    History(client, keys).note(HOSTILE, HOSTILE, what=HOSTILE)


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("path", PAGES)
def test_what_others_wrote_is_only_read(browser: Opened, path: str) -> None:
    page = browser().get(path).text

    assert "<img" not in page
    # In what a reader sees; the hidden fields of a form give back what they were given.
    seen = re.sub(r'<input type="hidden"[^>]*>', "", page)
    assert not {"\x1b", "\u202e", "\u200b"} & set(seen)
    if path not in ("/user?user=ann", "/settings"):
        assert "&lt;img src=x" in page
    else:
        assert "img src" in page


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    ("path", "page"), [("/dead", "/dead"), ("/refused", "/refused"), ("/user", "/user?user=ann")]
)
def test_values_are_shown_to_an_operator_who_asks_and_that_is_in_the_history(
    browser: Opened, client: redis.Redis, keys: Keys, path: str, page: str
) -> None:
    answer = send(browser(), path, page, user="" if path != "/user" else "ann")

    assert answer.status_code == 200
    assert "gnp.exe" in answer.text
    assert "<img" not in answer.text
    newest = History(client, keys).newest(1)[0]
    assert (newest.event, newest.by) == ("values_shown", "console@loopback")
    assert "ann" not in json.dumps(dict(newest.details))


def test_a_viewer_never_sees_a_value(
    browser: Opened, accounts_file: Path, client: redis.Redis, keys: Keys
) -> None:
    secret = "a secret town"
    Buffer(client, keys).add([Update("ann", {"city": secret})])
    bury(client, keys, "ann", now_ms(client), value=secret)
    Refused(client, keys).keep("celery", [(InvalidUpdate("ann", "a rule"), {"city": secret})])
    page = browser(CONSOLE_ACCOUNTS_FILE=str(accounts_file))
    log_in(page, "bob", BOB)

    for path in (*PAGES, "/status.json", "/dead?values=1"):
        assert secret not in page.get(path).text
    for path in ("/dead", "/refused", "/user", "/dead/export", "/refused/export"):
        assert send(page, path, user="ann").status_code == 403


# The overview.


def test_what_needs_a_person_comes_first(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    Line(client, keys).stop(new_batch_id(), "error", 60020, "the plan has expired")
    bury(client, keys, "ann", now_ms(client))

    page = browser().get("/").text

    places = [
        page.index(words)
        for words in ("What needs a person", "the plan has expired (60020)", "1 user given up", 'id="line"')
    ]
    assert places == sorted(places)
    assert "Stopped by an error" in page or "stopped by an error" in page


def test_the_overview_has_what_the_status_has(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    Buffer(client, keys).add([Update(f"u{n}", {"city": "Paris"}) for n in range(1234)])
    Fleet(client, keys).report("celery@one", threads=16, busy=7, version="0.2")
    Fleet(client, keys).sample()

    page = browser().get("/").text

    assert "1,234" in page
    assert re.search(r"celery@one</th><td class=\"n\">7</td><td class=\"n\">16</td>", page)
    assert "balances" in page
    assert page.count('<svg class="chart"') == 4
    assert browser().get("/status.json").json()["pending"]["live"] == 1234


def test_the_overview_says_what_audits_have_found(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    assert "Audit" not in browser().get("/").text
    AuditLog(client, keys).add({"as_delivered": 29_999, "lost": 1, "skipped": 4})

    page = browser().get("/").text

    assert "1 of 30,000 wrong" in page
    assert "95 % confidence" in page


@pytest.mark.parametrize("window", ["15min", "6h", "24h", "", "nonsense", "<b>"])
def test_a_window_is_one_of_three(browser: Opened, window: str) -> None:
    page = browser().get("/", params={"window": window})

    chosen = window if window in ("15min", "6h", "24h") else "15min"
    assert f'/live?window={chosen}"' in page.text


def test_redis_is_read_once_however_many_browsers_look_and_not_at_all_when_nobody_does(
    server: EmbeddedServer,
    client: redis.Redis,
    keys: Keys,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[float] = []

    def counted(*given: Any) -> sight.Sight:
        reads.append(clock.now)
        return sight.see(*given)

    monkeypatch.setattr(app, "see", counted)
    site = build_app(settings_of(server, keys), client, clock)
    browsers = [TestClient(site, base_url="http://127.0.0.1") for _ in range(10)]
    assert reads == []

    for one in browsers:
        for path in ("/", "/live", "/status.json", "/imports"):
            assert one.get(path).status_code == 200
    assert len(reads) == 1

    clock.sleep(look.EVERY)
    assert browsers[0].get("/live").status_code == 200
    assert len(reads) == 2


def test_after_something_was_done_the_page_is_new(browser: Opened) -> None:
    page = browser()
    page.get("/")

    send(page, "/line/pause", reason="a test")

    assert "paused by console@loopback" in page.get("/").text


# Redis away.


@pytest.fixture
def gone(
    server: EmbeddedServer,
    client: redis.Redis,
    keys: Keys,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
) -> TestClient:
    """A console whose Redis is away, while `client.execute_command` is replaced."""

    def fail(*_: object, **__: object) -> Any:
        raise redis.ConnectionError("Error 111 connecting to secret.host:6379")

    away = redis.Redis.from_url(server.url)
    page = TestClient(
        build_app(settings_of(server, keys), away, clock), base_url="http://127.0.0.1", follow_redirects=False
    )
    assert page.get("/").status_code == 200
    monkeypatch.setattr(away, "execute_command", fail)
    monkeypatch.setattr(away, "pipeline", fail)
    clock.sleep(look.EVERY)
    return page


@pytest.mark.parametrize("path", [*PAGES, "/status.json"])
def test_while_redis_is_away_every_page_says_so(gone: TestClient, path: str) -> None:
    answer = gone.get(path, headers={"Accept": "application/json"} if path.endswith("json") else {})

    assert answer.status_code == 503
    assert "Redis does not answer" in answer.text
    assert "secret.host" not in answer.text
    assert answer.headers["retry-after"] == "5"


def test_the_health_page_and_the_styles_do_not_need_redis(gone: TestClient) -> None:
    assert gone.get("/healthz").status_code == 200
    assert gone.get("/static/style.css").status_code == 200


def test_the_console_recovers_when_redis_has(
    gone: TestClient, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gone.get("/live").status_code == 503

    monkeypatch.undo()
    clock.sleep(look.EVERY)

    assert gone.get("/live").status_code == 200


# The user's page.


def test_a_user_is_explained(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    Buffer(client, keys).add([Update("ann", {"city": "Paris", "level": "7"})])

    page = browser().get("/user?user=ann").text

    assert "city of ann is accepted and not sent yet: no worker is alive." in page
    assert "level of ann is accepted" in page
    assert "Paris" not in page
    assert "Nothing is known of the attributes of carl" in browser().get("/user?user=carl").text


@pytest.mark.parametrize("user", ["x" * 33, "caf\u00e9", "a\x00b", HOSTILE])
def test_what_can_be_no_user_is_named_with_its_rule(browser: Opened, user: str) -> None:
    answer = browser().get("/user", params={"user": user})

    assert answer.status_code == 400
    assert "<img" not in answer.text


# The history.


def test_the_history_is_paged_and_filtered(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    history = History(client, keys)
    for n in range(250):
        history.note("stopped" if n % 2 else "resumed", f"by{n:03}")

    seen, path = list[str](), "/history"
    while path:
        page = browser().get(path).text
        seen += re.findall(r"by\d{3}", page)
        following = re.search(r'href="(/history[^"]*)" rel="next"', page)
        path = following[1].replace("&amp;", "&") if following else ""

    assert seen == [f"by{n:03}" for n in reversed(range(250))]
    page = browser().get("/history?event=stopped").text
    assert re.findall(r"by\d{3}", page) == [f"by{n:03}" for n in reversed(range(51, 250, 2))]


@pytest.mark.parametrize("query", ["event=a b", "event=%3Cb%3E", "before=x", "before=1", "before=(1-1"])
def test_a_history_that_cannot_be_asked_for_is_refused(browser: Opened, query: str) -> None:
    assert browser().get(f"/history?{query}").status_code == 400


# Settings.


def test_no_secret_is_among_the_settings(server: EmbeddedServer, keys: Keys) -> None:
    settings = settings_of(
        server,
        keys,
        REDIS_URL="redis://me:hunter22@host:6380/3",
        BROKER_URL="amqp://you:hunter33@rabbit:5672/vhost",
        SECRET_KEY="hunter44" * 8,
        API_URL="http://us:hunter55@api.example/path?hunter66",
    )

    found = shown(settings)

    assert "hunter" not in json.dumps(found)
    assert found["redis_url"] == "host:6380, database 3"
    assert found["broker_url"] == "amqp://rabbit:5672"
    assert found["api_url"] == "http://api.example"
    assert found["secret_key"] == "set, and hidden"
    assert changed(settings).keys() == {"sdkappid", "secret_key", "redis_url", "broker_url", "api_url"}


def test_workers_that_disagree_are_named(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    fleet = Fleet(client, keys)
    fleet.report("one", threads=1, busy=0, version="0.2", settings={"quota": "50", "health_port": "1"})
    fleet.report("two", threads=1, busy=0, version="0.2", settings={"health_port": "2"})

    page = browser().get("/settings").text

    assert "Workers disagree on QUOTA." in page
    assert re.search(r"<b>50</b> <small>one</small>", page)
    assert "workers have different settings: QUOTA" in browser().get("/").text


# Imports.


def test_an_import_is_paused_and_resumed(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    buffer, pauses, page = Buffer(client, keys), ImportPauses(client, keys), browser()
    buffer.begin_import("host:/a file.csv", 1)
    buffer.show_import(
        "host:/a file.csv",
        {
            "at": now_ms(client) / 1000,
            "state": "accepting",
            "lines": 7,
            "refused": 2,
            "share": 0.5,
            "eta": 3,
            "refusals": [[3, "eve", "a rule"]],
        },
    )
    assert "eve" in page.get("/imports").text

    assert send(page, "/imports/pause", name="host:/a file.csv", reason="later").status_code == 303
    pause = pauses.find("host:/a file.csv")
    assert pause is not None
    assert (pause.by, pause.reason) == ("console@loopback", "later")
    assert "The import is paused" in page.get("/imports").text
    assert "is paused by console@loopback: later" in page.get("/").text

    assert send(page, "/imports/resume", name="host:/a file.csv").status_code == 303
    assert pauses.find("host:/a file.csv") is None
    send(page, "/imports/pause", name="another", reason="later")
    assert "Nothing was done" in page.get("/imports").text


@pytest.mark.parametrize("reason", ["", " ", "x" * 201, "\n\t"])
@pytest.mark.parametrize("path", ["/line/pause", "/imports/pause"])
def test_a_pause_needs_a_reason(
    browser: Opened, client: redis.Redis, keys: Keys, path: str, reason: str
) -> None:
    answer = send(browser(), path, reason=reason, name="x")

    assert answer.status_code == 400
    assert "1 to 200 characters" in answer.text
    assert History(client, keys).newest(1) == []


def test_what_was_done_is_said_once_and_nobody_can_make_it_up(browser: Opened) -> None:
    page = browser()
    send(page, "/line/pause", reason="a test")
    assert "Paused. Batches in flight will finish" in page.get("/").text
    assert "Paused. Batches in flight will finish" not in page.get("/").text

    [visitor] = [name for name in page.cookies if name.endswith("-visitor")]
    for planted in ("<script>", "purged.x", "a" * 99, "purged." + "9" * 99, "x.1.2.3"):
        page.cookies.set(visitor.replace("visitor", "flash"), planted)
        answer = page.get("/")
        assert answer.status_code == 200
        assert planted not in answer.text
