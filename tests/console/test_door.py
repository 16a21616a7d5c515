"""Who is let in, as whom, and what a stranger can make a browser do."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
import redis
from starlette.testclient import TestClient

from tests.conftest import ManualClock
from tests.console.conftest import ANN, BOB, Opened, log_in, send, settings_of, token
from worker.config import Settings
from worker.console import app, attempts
from worker.console.accounts import new_token
from worker.console.door import check_settings
from worker.errors import ConfigError
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.line import Line

#: Every page that needs somebody, with its method.
GETS = (
    "/",
    "/live",
    "/status.json",
    "/dead",
    "/dead/confirm",
    "/refused",
    "/refused/confirm",
    "/user",
    "/imports",
    "/history",
    "/settings",
)
POSTS = (
    "/line/pause",
    "/line/resume",
    "/dead",
    "/dead/redrive",
    "/dead/purge",
    "/dead/export",
    "/refused",
    "/refused/purge",
    "/refused/export",
    "/user",
    "/imports/pause",
    "/imports/resume",
)


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


# Without login.


def test_on_this_machine_everybody_is_an_operator_and_told_so(
    browser: Opened, client: redis.Redis, keys: Keys
) -> None:
    page = browser()

    assert "Nobody has to log in" in page.get("/").text
    assert send(page, "/line/pause", reason="a test").status_code == 303
    assert History(client, keys).newest(1)[0].by == "console@loopback"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "169.254.1.1",
        "",
        "[::2]",
        "localhost.evil.example:8300",
        "0.0.0.0",
    ],
)
def test_a_name_that_leads_here_is_not_this_machine(browser: Opened, host: str) -> None:
    answer = browser().get("/", headers={"Host": host})

    assert answer.status_code in (400, 421)
    assert "Pending" not in answer.text


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8300", "localhost:8300", "LOCALHOST", "[::1]:8300", "imattr.localhost", "127.8.8.8"]
)
def test_the_names_of_this_machine_are(browser: Opened, host: str) -> None:
    assert browser().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host", "X-Forwarded-Proto"]
)
def test_nobody_comes_through_a_proxy_without_login(browser: Opened, header: str) -> None:
    assert browser().get("/", headers={header: "127.0.0.1"}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "console.example", "127.0.0.1.example"])
def test_it_does_not_listen_elsewhere_without_login(server: EmbeddedServer, keys: Keys, host: str) -> None:
    with pytest.raises(ConfigError, match="nobody would have to log in"):
        check_settings(settings_of(server, keys, CONSOLE_HOST=host))


def test_it_listens_nowhere_behind_a_proxy_without_login(server: EmbeddedServer, keys: Keys) -> None:
    with pytest.raises(ConfigError, match="IMATTR_CONSOLE_PROXIES is set"):
        check_settings(settings_of(server, keys, CONSOLE_PROXIES="10.0.0.1"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.9"])
def test_it_listens_on_this_machine(server: EmbeddedServer, keys: Keys, host: str) -> None:
    check_settings(settings_of(server, keys, CONSOLE_HOST=host))


# With accounts.


@pytest.fixture
def guarded(browser: Opened, accounts_file: Path) -> TestClient:
    return browser("http://console.example", "203.0.113.9", CONSOLE_ACCOUNTS_FILE=str(accounts_file))


@pytest.mark.parametrize("path", GETS)
def test_a_stranger_sees_nothing(guarded: TestClient, path: str) -> None:
    answer = guarded.get(path)

    assert answer.status_code in (303, 401)
    assert answer.status_code == 401 or answer.headers["location"].startswith("/login")
    assert guarded.get(path, headers={"Accept": "application/json"}).status_code == 401


@pytest.mark.parametrize("path", POSTS)
def test_a_stranger_does_nothing(guarded: TestClient, client: redis.Redis, keys: Keys, path: str) -> None:
    form = {"token": token(guarded.get("/login").text), "reason": "x", "until": "1", "count": "1"}

    assert guarded.post(path, data=form).status_code == 401
    assert History(client, keys).newest(10) == []


def test_every_page_is_in_these_lists(guarded: TestClient) -> None:
    served: Any = guarded.app
    routes = {route.path: route.endpoint for route in served._app._app.routes}
    pages = {
        path: endpoint._pages for path, endpoint in routes.items() if isinstance(endpoint, app._Endpoint)
    }

    known = {
        (path, method) for path, methods in pages.items() for method, page in methods.items() if page.needs
    }
    assert known == {(path, "GET") for path in GETS} | {(path, "POST") for path in POSTS}
    assert routes.keys() - pages.keys() == {
        "/healthz",
        "/static/style.css",
        "/static/script.js",
        "/static/icon.svg",
    }


def test_whoever_logs_in_is_known_by_name(guarded: TestClient, client: redis.Redis, keys: Keys) -> None:
    answer = log_in(guarded, "ann", ANN, next="/dead?code=70107")

    assert (answer.status_code, answer.headers["location"]) == (303, "/dead?code=70107")
    send(guarded, "/line/pause", reason="a test")
    assert Line(client, keys).read().by == "ann@console"


def test_the_cookie_of_a_session_is_for_the_browser_alone(
    guarded: TestClient, browser: Opened, accounts_file: Path
) -> None:
    plain = log_in(guarded, "ann", ANN).headers["set-cookie"]
    tls = browser("https://console.example", CONSOLE_ACCOUNTS_FILE=str(accounts_file))
    secure = log_in(tls, "ann", ANN).headers["set-cookie"]

    for cookie in (plain, secure):
        assert re.search("; HttpOnly; Max-Age=43200; Path=/; SameSite=lax", cookie)
    assert "Secure" not in plain
    assert secure.startswith("__Host-imattr-")
    assert "; Secure" in secure
    assert "Domain" not in secure


@pytest.mark.parametrize(
    ("name", "password"),
    [("ann", BOB), ("nobody", ANN), ("", ""), ("ann", ""), ("ann'--", "x"), ("\u202eann", ANN)],
)
def test_a_wrong_login_says_the_same_whatever_is_wrong(guarded: TestClient, name: str, password: str) -> None:
    answer = log_in(guarded, name, password)

    assert answer.status_code == 401
    assert "do not match" in answer.text
    assert guarded.get("/").status_code == 303


def test_a_log_out_ends_the_session_and_not_only_its_cookie(guarded: TestClient) -> None:
    log_in(guarded, "ann", ANN)
    cookies = dict(guarded.cookies)

    assert send(guarded, "/logout").headers["location"] == "/login"

    guarded.cookies.update(cookies)
    assert guarded.get("/").status_code == 303


def test_a_login_makes_a_new_session(guarded: TestClient) -> None:
    log_in(guarded, "ann", ANN)
    first = dict(guarded.cookies)
    log_in_again = guarded.get("/login")
    assert log_in_again.headers["location"] == "/"
    send(guarded, "/logout")
    log_in(guarded, "bob", BOB)

    [name] = [name for name in first if name.endswith("-session")]
    assert guarded.cookies[name] != first[name]


def test_whoever_is_taken_out_of_the_file_is_out(
    guarded: TestClient, accounts_file: Path, clock: ManualClock
) -> None:
    log_in(guarded, "ann", ANN)
    accounts_file.write_text(accounts_file.read_text().splitlines()[1] + "\n")
    clock.sleep(1)

    assert guarded.get("/").status_code == 303


def test_too_many_wrong_logins_must_wait_even_when_the_next_is_right(
    guarded: TestClient, clock: ManualClock
) -> None:
    for _ in range(attempts.NAME[0]):
        log_in(guarded, "ann", "a wrong password")

    answer = log_in(guarded, "ann", ANN)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
    assert guarded.get("/", headers=basic("ann", ANN)).status_code == 429

    clock.sleep(attempts.NAME[1])
    assert log_in(guarded, "ann", ANN).status_code == 303


def test_nobody_gets_more_attempts_by_naming_other_addresses(guarded: TestClient) -> None:
    codes = [
        guarded.get("/", headers={**basic(f"n{n}", "x"), "X-Forwarded-For": f"10.0.0.{n}"}).status_code
        for n in range(attempts.ADDRESS[0] + 1)
    ]

    assert codes == [401] * attempts.ADDRESS[0] + [429]


@pytest.mark.parametrize("path", [path for path in POSTS if path not in ("/line/resume",)])
def test_a_viewer_does_nothing(guarded: TestClient, client: redis.Redis, keys: Keys, path: str) -> None:
    log_in(guarded, "bob", BOB)

    assert send(guarded, path, reason="x", until=1, count=1, name="x").status_code == 403
    assert History(client, keys).newest(10) == []


def test_a_viewer_is_offered_nothing_to_do(guarded: TestClient, client: redis.Redis, keys: Keys) -> None:
    Line(client, keys).pause("a test")
    log_in(guarded, "bob", BOB)

    for path in ("/", "/dead", "/refused", "/user?user=x", "/imports"):
        page = guarded.get(path).text
        assert "viewer" in page
        assert set(re.findall(r'method="post" action="([^"]*)"', page)) == {"/logout", "/theme"}
    assert guarded.get("/dead/confirm?verb=purge").status_code == 403


# Programs.


def test_a_program_acts_with_its_token_and_nothing_else(
    browser: Opened, accounts_file: Path, client: redis.Redis, keys: Keys
) -> None:
    secret, hash = new_token()
    accounts_file.write_text(f"{accounts_file.read_text()}robot:operator:{hash}\n")
    guarded = browser("http://console.example", CONSOLE_ACCOUNTS_FILE=str(accounts_file))
    headers = {"Authorization": f"Bearer {secret}", "Accept": "application/json"}

    assert guarded.get("/status.json", headers=headers).json()["line"]["state"] == "open"
    answer = guarded.post("/line/pause", headers=headers, data={"reason": "a deployment"})
    assert answer.json() == {"done": "paused", "numbers": []}
    assert Line(client, keys).read().by == "robot@console"
    assert "set-cookie" not in answer.headers

    for wrong in (
        f"Bearer {hash}",
        "Bearer ",
        "Bearer",
        f"Basic {secret}",
        f"Digest {secret}",
        "Bearer " + "x" * 9000,
    ):
        answer = guarded.get("/status.json", headers={"Authorization": wrong})
        assert answer.status_code == 401
        # A browser that was asked for a password would send it to whatever site makes it.
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_name_and_a_password_do_for_programs_too(guarded: TestClient) -> None:
    assert guarded.get("/status.json", headers=basic("bob", BOB)).status_code == 200
    assert guarded.post("/line/pause", headers=basic("bob", BOB), data={"reason": "x"}).status_code == 403
    assert guarded.post("/line/pause", headers=basic("ann", ANN), data={"reason": "x"}).status_code == 303
    assert guarded.get("/status.json", headers={"Authorization": "Basic =?"}).status_code == 401


# Other sites.


def test_a_form_without_its_token_does_nothing(guarded: TestClient, client: redis.Redis, keys: Keys) -> None:
    log_in(guarded, "ann", ANN)
    mine = token(guarded.get("/").text)

    for given in ("", mine[:-1], mine.upper() + "x", "0" * 64, "\u00e9"):
        assert guarded.post("/line/pause", data={"reason": "x", "token": given}).status_code == 403
    assert guarded.post("/line/pause", data={"reason": "x"}).status_code == 403
    assert guarded.post(f"/line/pause?token={mine}", data={"reason": "x"}).status_code == 403
    assert Line(client, keys).read().state == "open"


def test_a_token_of_another_session_is_worth_nothing(
    browser: Opened, accounts_file: Path, guarded: TestClient
) -> None:
    other = browser("http://console.example", CONSOLE_ACCOUNTS_FILE=str(accounts_file))
    log_in(other, "bob", BOB)
    log_in(guarded, "ann", ANN)

    stolen = token(other.get("/").text)

    assert guarded.post("/line/pause", data={"reason": "x", "token": stolen}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://console.example.evil.example"},
        {"Origin": "http://console.example:81"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://console.example"},
    ],
)
def test_a_form_from_another_site_does_nothing_even_with_the_token(
    guarded: TestClient, client: redis.Redis, keys: Keys, headers: dict[str, str]
) -> None:
    log_in(guarded, "ann", ANN)
    form = {"token": token(guarded.get("/").text), "reason": "x"}

    assert guarded.post("/line/pause", data=form, headers=headers).status_code == 403
    assert (
        guarded.post("/line/pause", data={"reason": "x"}, headers=headers | basic("ann", ANN)).status_code
        == 403
    )
    assert Line(client, keys).read().state == "open"


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://console.example"}, {"Sec-Fetch-Site": "same-origin", "Origin": "null"}, {}]
)
def test_a_form_from_our_own_page_does(guarded: TestClient, headers: dict[str, str]) -> None:
    log_in(guarded, "ann", ANN)
    form = {"token": token(guarded.get("/").text), "reason": "x"}

    assert guarded.post("/line/pause", data=form, headers=headers).status_code == 303


def test_a_login_cannot_be_forged(guarded: TestClient) -> None:
    assert guarded.post("/login", data={"name": "ann", "password": ANN}).status_code == 403
    form = {"name": "ann", "password": ANN, "token": token(guarded.get("/login").text)}
    guarded.cookies.clear()
    assert guarded.post("/login", data=form).status_code == 403


def test_a_visitors_cookie_that_somebody_has_planted_has_tokens_that_only_we_can_make(
    browser: Opened,
) -> None:
    victim, attacker = browser(), browser(CONSOLE_PREFIX="/x")
    [name] = [name for name in dict(attacker.get("/").cookies) if name.endswith("-visitor")]
    theirs = token(attacker.get("/").text)
    victim.cookies.set(name, "A" * 32)

    assert victim.post("/line/pause", data={"token": theirs, "reason": "x"}).status_code == 403


ELSEWHERE = (
    "//evil.example",
    "https://evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "/\t/evil.example",
    "javascript:alert(1)",
    "/%0d%0aSet-Cookie:x=y\r\nX: y",
    "evil.example",
    "/\u202e",
    " //evil.example",
    "/ ok",
)


@pytest.mark.parametrize("wanted", ELSEWHERE)
def test_nobody_is_led_elsewhere(guarded: TestClient, wanted: str) -> None:
    form = {"token": token(guarded.get("/login").text), "theme": "dark", "back": wanted}
    assert guarded.post("/theme", data=form).headers["location"] == "/"
    shown = guarded.get("/login", params={"next": wanted}).text
    assert 'name="next" value="/"' in shown
    answer = log_in(guarded, "ann", ANN, next=wanted)
    assert answer.headers["location"] == "/"


def test_a_path_with_two_slashes_leads_nowhere(guarded: TestClient) -> None:
    for path in ("//evil.example", "//evil.example/", "/dead/", "/..//evil.example"):
        answer = guarded.request("GET", f"http://console.example{path}")
        assert answer.status_code in (303, 404)
        assert answer.headers.get("location", "/login").startswith("/login")


# Behind a proxy.


def proxied(browser: Opened, peer: str = "10.0.0.1", **environ: str) -> TestClient:
    given = {"CONSOLE_PROXY_HEADER": "X-Forwarded-User", "CONSOLE_PROXIES": "10.0.0.0/24, ::1"} | environ
    return browser("http://console.example", peer, **{"CONSOLE_PROXY_OPERATORS": "ann, carl"} | given)


def test_the_proxy_says_who_it_is(browser: Opened, client: redis.Redis, keys: Keys) -> None:
    page = proxied(browser)
    page.headers["X-Forwarded-User"] = "ann"

    assert send(page, "/line/pause", reason="a test").status_code == 303
    assert Line(client, keys).read().by == "ann@console"
    assert "Log out" not in page.get("/").text

    page.headers["X-Forwarded-User"] = "bob"
    assert send(page, "/line/resume").status_code == 403


def test_nobody_else_says_who_they_are(browser: Opened) -> None:
    stranger = proxied(browser, peer="203.0.113.9")

    answer = stranger.get("/", headers={"X-Forwarded-User": "ann", "X-Forwarded-For": "10.0.0.1"})

    assert answer.status_code == 403
    assert "Pending" not in answer.text


@pytest.mark.parametrize("names", [[], [""], ["ann", "bob"], ["a\x01nn"], ["x" * 200]])
def test_a_proxy_that_names_nobody_or_several_lets_nobody_in(browser: Opened, names: list[str]) -> None:
    answer = proxied(browser).get("/", headers=[("X-Forwarded-User", name) for name in names])

    assert answer.status_code in (400, 403)


def test_a_token_made_for_one_user_of_the_proxy_is_not_anothers(browser: Opened) -> None:
    page = proxied(browser)
    mine = token(page.get("/", headers={"X-Forwarded-User": "carl"}).text)

    answer = page.post(
        "/line/pause", data={"token": mine, "reason": "x"}, headers={"X-Forwarded-User": "ann"}
    )

    assert answer.status_code == 403


def test_what_our_proxy_says_of_the_request_is_believed_as_far_as_it_can_know(
    browser: Opened, accounts_file: Path
) -> None:
    page = proxied(
        browser, CONSOLE_PROXY_HEADER="", CONSOLE_PROXY_OPERATORS="", CONSOLE_ACCOUNTS_FILE=str(accounts_file)
    )
    page.headers |= {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "ops.example"}
    answer = log_in(page, "ann", ANN)
    assert answer.headers["set-cookie"].startswith("__Host-")

    # The last address is the proxy's word, those before it are anybody's.
    codes = [
        page.get(
            "/", headers={**basic(f"n{n}", "x"), "X-Forwarded-For": f"10.0.0.9, 198.51.100.{n}, 203.0.113.9"}
        ).status_code
        for n in range(attempts.ADDRESS[0] + 1)
    ]
    assert codes[-2:] == [401, 429]


def test_it_is_shown_below_a_prefix_whether_the_proxy_takes_it_off_or_not(
    browser: Opened, accounts_file: Path
) -> None:
    page = browser(
        "http://console.example", CONSOLE_ACCOUNTS_FILE=str(accounts_file), CONSOLE_PREFIX="/ops/imattr"
    )

    for path in ("/dead", "/ops/imattr/dead"):
        assert page.get(path).headers["location"] == "/ops/imattr/login?next=%2Fdead"
    assert page.get("/ops/imattr").headers["location"] == "/ops/imattr/login"
    assert page.get("/ops/imattrx").status_code == 404
    assert page.get("/ops/imattr/healthz").json() == {"healthy": True}
    assert log_in(page, "ann", ANN, next="/dead").headers["location"] == "/ops/imattr/dead"
    targets = re.findall(r'(?:href|src|action|data-source)="([^"#][^"]*)"', page.get("/ops/imattr/").text)
    assert len(targets) > 20
    assert all(target.startswith("/ops/imattr/") for target in targets), targets


# What every answer says.


@pytest.mark.parametrize(
    "path", ["/", "/login", "/nothing", "/static/style.css", "/healthz", "/live", "/dead/export"]
)
def test_every_answer_tells_browsers_to_be_careful(guarded: TestClient, path: str) -> None:
    headers = guarded.get(path).headers

    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert "permissions-policy" in headers
    assert headers["cache-control"] == ("no-cache" if "static" in path else "no-store")
    assert "server" not in headers


def test_pages_run_and_load_nothing_inline(browser: Opened) -> None:
    for path in ("/", "/dead", "/user?user=x", "/settings"):
        page = browser().get(path).text
        assert not re.search(r"<style|<script(?! src=)|\son\w+=|style=|javascript:|https?://", page)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "application/json"}, b"{}", 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", 415),
        ({"Content-Type": "text/plain"}, b"token=x", 415),
        ({}, b"a=" + b"x" * app.MOST_BYTES, 413),
        ({}, b"&".join(b"a%d=1" % n for n in range(app.MOST_FIELDS + 1)), 400),
        ({}, b"\xff\xfe=\x00", 400),
        ({"Transfer-Encoding": "chunked", "Content-Length": "3"}, b"a=b", 400),
        ({}, b"", 403),
    ],
)
def test_a_form_is_small_and_a_form(
    browser: Opened, headers: dict[str, str], body: bytes, status: int
) -> None:
    given = {"Content-Type": "application/x-www-form-urlencoded"} | headers

    assert browser().post("/line/pause", content=body, headers=given).status_code == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST", "FOO"])
def test_other_methods_are_refused(browser: Opened, method: str) -> None:
    assert browser().request(method, "/history").status_code == 405


def test_the_health_page_needs_nobody_and_no_redis(guarded: TestClient) -> None:
    assert guarded.get("/healthz").json() == {"healthy": True}


def test_unknown_settings_of_the_console_are_mistakes(server: EmbeddedServer, keys: Keys) -> None:
    wrong = {
        "CONSOLE_PREFIX": "imattr/",
        "CONSOLE_PROXY_HEADER": "X User",
        "CONSOLE_PROXIES": "10.0.0.0/33",
        "CONSOLE_PROXY_OPERATORS": "ann",
        "CONSOLE_PORT": "0",
    }
    with pytest.raises(ConfigError) as raised:
        settings_of(server, keys, **wrong)

    assert len(raised.value.mistakes) == 5
    with pytest.raises(ConfigError, match="needs IMATTR_CONSOLE_PROXIES"):
        settings_of(server, keys, CONSOLE_PROXY_HEADER="X-User")
    assert Settings().console_host == "127.0.0.1"
