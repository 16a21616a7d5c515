"""What a stranger can try: everybody here has a way to the console's port, and no right to anything behind it.

Each test is an attack on the running program. What needs a browser to go wrong is in `test_browser.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis
import requests

from tests.console.site import PEOPLE, Console, accounts, console
from worker.console import (
    dead_letters,
    history,
    imports,
    line,
    overview,
    refused_updates,
    settings_page,
    user,
)
from worker.models import DeadLettered, Update
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.buffer import Buffer, new_batch_id
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.line import Line

pytestmark = pytest.mark.slow

APP = 1_499_000_001
ROOMS = (overview, line, dead_letters, refused_updates, user, imports, history, settings_page)
PAGES = [page for room in ROOMS for page in room.PAGES]
EVIL = "https://evil.example"
#: A request that never ends.
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
TOKEN = re.compile(r'name="token" value="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Place:
    """The consoles under attack: with accounts, with none, and behind a proxy that is elsewhere."""

    guarded: Console
    open: Console
    behind_proxy: Console
    redis: redis.Redis
    keys: Keys
    #: A connection that has begun a request before all tests, and said nothing since.
    silent: socket.socket


@pytest.fixture(scope="module")
def place(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("consoles")
    settings = {"IMATTR_SDKAPPID": str(APP), "IMATTR_REDIS_URL": server.url}
    guarded = settings | accounts(directory)
    header = {
        "IMATTR_CONSOLE_PROXY_HEADER": "X-Forwarded-User",
        "IMATTR_CONSOLE_PROXY_OPERATORS": "olga",
        # From a network that is set aside for examples.
        "IMATTR_CONSOLE_PROXIES": "192.0.2.7",
    }
    with (
        console(directory, guarded) as first,
        console(directory, settings) as second,
        console(directory, guarded | header) as third,
        redis.Redis.from_url(server.url) as client,
        socket.create_connection(("127.0.0.1", first.port), timeout=30) as silent,
    ):
        silent.sendall(HALF)
        yield Place(first, second, third, client, Keys(APP), silent)


@pytest.fixture(autouse=True)
def nothing_was_done(place: Place) -> Iterator[None]:
    """Whatever was tried, the line is open, nothing was deleted, and no event says otherwise."""
    yield
    assert Line(place.redis, place.keys).read().state == "open"
    assert not [event for event in History(place.redis, place.keys).newest(100) if event.event != "redriven"]


def give_up(place: Place, name: str, count: int) -> None:
    """Make so many users dead letters, as a delivery would."""
    buffer, batch = Buffer(place.redis, place.keys), new_batch_id()
    buffer.add([Update(f"{name}{number}", {"city": "Paris"}) for number in range(count)])
    place.redis.zadd(place.keys.tickets, {batch: 1})
    buffer.claim(batch, 100)
    buffer.settle(batch, {}, rest=DeadLettered(70107, "no such account"))


def logged_in(at: Console, name: str) -> requests.Session:
    session = requests.Session()
    reply = session.post(
        f"{at.url}/login",
        data={"name": name, "password": PEOPLE[name][1], "token": token_of(session, at, "/login")},
        timeout=30,
        allow_redirects=False,
    )
    assert reply.status_code == 303, reply.text
    return session


def token_of(session: requests.Session, at: Console, path: str) -> str:
    found = TOKEN.search(session.get(f"{at.url}{path}", timeout=30).text)
    assert found, path
    return found[1]


def raw(at: Console, request: bytes, *, patience: float = 15) -> bytes:
    """Send bytes as they are; returns the answer."""
    with socket.create_connection(("127.0.0.1", at.port), timeout=patience) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def get(target: str, *headers: str, host: str = "127.0.0.1") -> bytes:
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# Getting in.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.method} {page.path}")
def test_without_a_login_there_is_nothing_to_see_or_to_do(place: Place, page: object) -> None:
    for at in (place.guarded, place.behind_proxy):
        reply = requests.request(
            page.method,  # type: ignore[attr-defined]
            f"{at.url}{page.path}",  # type: ignore[attr-defined]
            timeout=30,
            allow_redirects=False,
            headers={"X-Forwarded-User": "olga"},
        )
        if reply.status_code == 303:
            assert reply.headers["Location"].startswith("/login")
        else:
            assert reply.status_code in (401, 403)
        assert str(APP) not in reply.text or "Log in" in reply.text


def test_a_header_from_an_address_that_is_no_proxy_names_nobody(place: Place) -> None:
    for header in (
        {"X-Forwarded-User": "olga"},
        {"X-Forwarded-User": "olga", "X-Forwarded-For": "192.0.2.7"},
    ):
        reply = requests.get(f"{place.behind_proxy.url}/", headers=header, timeout=30, allow_redirects=False)
        assert (reply.status_code, reply.headers["Location"]) == (303, "/login")


def test_guessing_passwords_is_slow_and_hits_only_the_name_that_is_guessed(place: Place) -> None:
    session = requests.Session()
    token = token_of(session, place.guarded, "/login")

    def guess(name: str, password: str, **headers: str) -> requests.Response:
        return session.post(
            f"{place.guarded.url}/login",
            data={"name": name, "password": password, "token": token},
            headers=headers,
            timeout=30,
            allow_redirects=False,
        )

    # A spoofed address does not help.
    answers = [guess("nobody", f"guess {n}", **{"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(15)]
    statuses = [answer.status_code for answer in answers]

    assert statuses[:10] == [401] * 10
    assert set(statuses[10:]) == {429}
    assert int(answers[-1].headers["Retry-After"]) >= 1
    # Nobody learns whether the name exists.
    assert not any("nobody" in answer.text for answer in answers[10:])
    assert logged_in(place.guarded, "olga").get(f"{place.guarded.url}/", timeout=30).ok
    assert "guess 3" not in place.guarded.said
    assert "nobody" not in place.guarded.said


def test_a_name_that_exists_answers_like_one_that_does_not(place: Place) -> None:
    session = requests.Session()
    token = token_of(session, place.guarded, "/login")

    def answer(name: str) -> tuple[int, str]:
        form = {"name": name, "password": "wrong password", "token": token}
        reply = session.post(f"{place.guarded.url}/login", data=form, timeout=30)
        return reply.status_code, reply.text.replace(name, "NAME")

    assert answer("vera") == answer("nora")


def test_a_session_that_was_planted_before_the_login_is_worth_nothing_after_it(place: Place) -> None:
    victim = requests.Session()
    name = f"imattr-{APP}-session"
    victim.cookies.set(name, "planted-by-a-stranger", domain="127.0.0.1", path="/")
    victim.post(
        f"{place.guarded.url}/login",
        data={
            "name": "olga",
            "password": PEOPLE["olga"][1],
            "token": token_of(victim, place.guarded, "/login"),
        },
        timeout=30,
        allow_redirects=False,
    )

    reply = requests.get(
        f"{place.guarded.url}/", cookies={name: "planted-by-a-stranger"}, timeout=30, allow_redirects=False
    )

    assert reply.status_code == 303
    assert {cookie.value for cookie in victim.cookies if cookie.name == name} != {"planted-by-a-stranger"}


def test_a_session_ends_with_the_log_out_for_everybody_who_has_its_cookie(place: Place) -> None:
    session = logged_in(place.guarded, "olga")
    stolen = session.cookies.get_dict()

    session.post(
        f"{place.guarded.url}/logout", data={"token": token_of(session, place.guarded, "/")}, timeout=30
    )

    reply = requests.get(f"{place.guarded.url}/", cookies=stolen, timeout=30, allow_redirects=False)
    assert reply.status_code == 303


def test_the_cookie_of_a_session_is_for_no_script_and_no_other_site(place: Place) -> None:
    session = requests.Session()
    reply = session.post(
        f"{place.guarded.url}/login",
        data={
            "name": "vera",
            "password": PEOPLE["vera"][1],
            "token": token_of(session, place.guarded, "/login"),
        },
        timeout=30,
        allow_redirects=False,
    )

    [cookie] = [part for part in reply.raw.headers.getlist("Set-Cookie") if "-session=" in part]
    assert "HttpOnly" in cookie
    assert re.search("samesite=(lax|strict)", cookie, re.IGNORECASE)
    # Redis does not have it either.
    assert session.cookies[f"imattr-{APP}-session"] not in str(
        place.redis.hgetall(place.keys.console_sessions)
    )


# Making others do it.


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": EVIL},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"},
        {"Origin": EVIL},
        {"Origin": "null"},
    ],
)
def test_a_form_of_another_site_does_nothing_even_with_the_right_token(
    place: Place, headers: dict[str, str]
) -> None:
    session = logged_in(place.guarded, "olga")
    form = {"reason": "because", "token": token_of(session, place.guarded, "/")}

    reply = session.post(f"{place.guarded.url}/line/pause", data=form, headers=headers, timeout=30)

    assert reply.status_code == 403


def test_a_form_needs_the_token_of_its_own_session(place: Place) -> None:
    olga, other = logged_in(place.guarded, "olga"), logged_in(place.guarded, "olga")
    foreign = token_of(other, place.guarded, "/")

    for token in ("", foreign, foreign[:-1], "0" * 64, "\udcff", "x" * 10_000):
        form = {"reason": "because", "token": token.encode(errors="surrogateescape")}
        assert olga.post(f"{place.guarded.url}/line/pause", data=form, timeout=30).status_code == 403, token


def test_without_accounts_another_site_cannot_send_a_form_either(place: Place) -> None:
    # Everybody on this machine is an operator there: so is a browser that shows a stranger's page.
    for headers in ({"Sec-Fetch-Site": "cross-site", "Origin": EVIL}, {"Origin": EVIL}, {}):
        reply = requests.post(
            f"{place.open.url}/line/pause", data={"reason": "because"}, headers=headers, timeout=30
        )
        assert reply.status_code == 403


def test_a_json_or_text_body_is_no_form(place: Place) -> None:
    session = logged_in(place.guarded, "olga")
    token = token_of(session, place.guarded, "/")
    for kind in ("text/plain", "application/json", "multipart/form-data; boundary=x"):
        reply = session.post(
            f"{place.guarded.url}/line/pause",
            data=f"reason=x&token={token}",
            headers={"Content-Type": kind},
            timeout=30,
        )
        assert reply.status_code == 415


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "@"]
)
def test_a_name_that_was_rebound_to_this_machine_gets_nothing(place: Place, host: str) -> None:
    for target in ("/", "/status.json", "/live", "/dead"):
        answer = raw(place.open, get(target, host=host))
        assert answer.split()[1] in (b"421", b"400"), (target, answer[:200])


def test_the_host_that_was_asked_for_is_in_no_answer(place: Place) -> None:
    for at, target in itertools.product(
        (place.guarded, place.open), ("/", "/dead/", "/nowhere", "/login", "//evil.example/")
    ):
        answer = raw(at, get(target, "X-Forwarded-Host: evil.example", host="evil.example"))
        assert b"evil.example" not in answer.replace(b"//evil.example/", b""), (target, answer[:400])


@pytest.mark.parametrize(
    "wanted",
    [
        EVIL,
        "//evil.example",
        r"/\evil.example",
        r"\\evil.example",
        "/%2f/evil.example/../..//evil.example",
        "javascript:alert(1)",
        "/\t/evil.example",
        "/ /evil.example",
        "/\r\nSet-Cookie: a=b",
        "https:evil.example",
        "/x\nLocation: //evil.example",
    ],
)
def test_a_login_leads_nowhere_else(place: Place, wanted: str) -> None:
    session = requests.Session()
    form = {
        "name": "vera",
        "password": PEOPLE["vera"][1],
        "token": token_of(session, place.guarded, "/login"),
        "next": wanted,
    }
    for target, form_ in (("/login", form), ("/theme", form | {"theme": "dark", "back": wanted})):
        reply = session.post(f"{place.guarded.url}{target}", data=form_, timeout=30, allow_redirects=False)
        if target == "/theme" and reply.status_code == 403:
            form_["token"] = token_of(session, place.guarded, "/")
            reply = session.post(
                f"{place.guarded.url}{target}", data=form_, timeout=30, allow_redirects=False
            )
        location = reply.headers["Location"]
        assert reply.status_code == 303
        assert re.fullmatch(r"/([^/\\].*)?", location), location
        assert "evil" not in requests.compat.urlsplit(location).netloc
        assert "a" not in reply.cookies


# Being more than one is.


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.needs == "operator"],
    ids=lambda page: f"{page.method} {page.path}",
)
def test_a_viewer_cannot_do_what_is_an_operators(place: Place, page: object) -> None:
    vera = logged_in(place.guarded, "vera")
    form = {
        "token": token_of(vera, place.guarded, "/"),
        "reason": "because",
        "name": "import",
        "user": "u1",
        "until": "9" * 13,
        "count": "9" * 9,
        "role": "operator",
    }

    reply = vera.request(
        page.method,  # type: ignore[attr-defined]
        f"{place.guarded.url}{page.path}",  # type: ignore[attr-defined]
        data=form,
        headers={"X-Forwarded-User": "olga", "X-HTTP-Method-Override": "GET"},
        timeout=30,
    )

    assert reply.status_code == 403


def test_all_that_changes_something_or_shows_values_is_a_post_of_an_operator() -> None:
    for page in PAGES:
        assert page.method == "GET" or page.needs == "operator", page.path
    assert len([page for page in PAGES if page.method == "POST"]) >= 10


def test_other_methods_do_nothing(place: Place) -> None:
    session = logged_in(place.guarded, "olga")
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "PROPFIND"):
        reply = session.request(method, f"{place.guarded.url}/line/pause", data={"reason": "x"}, timeout=30)
        assert reply.status_code in (400, 405), method
    assert session.head(f"{place.guarded.url}/", timeout=30).text == ""


# Reading what is not a page.


@pytest.mark.parametrize(
    "target",
    [
        "/static/../app.py",
        "/static/../../../../../../etc/passwd",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/%252e%252e/app.py",
        "/static//etc/passwd",
        r"/static/..\app.py",
        "/static/style.css/../../app.py",
        "/static/style.css%00.py",
        "/static/",
        "/static",
        "/templates/base.html",
        "/../../etc/passwd",
        "//etc/passwd",
        "/.git/config",
        "/accounts",
    ],
)
def test_only_the_static_files_are_served(place: Place, target: str) -> None:
    answer = raw(place.open, get(target))

    assert answer.split()[1] in (b"404", b"400", b"405"), answer[:200]
    assert b"root:" not in answer
    assert b"import " not in answer


def test_no_answer_has_a_second_line_from_what_was_sent(place: Place) -> None:
    session = logged_in(place.guarded, "olga")
    smuggled = "%0d%0aSet-Cookie:%20stolen=1%0d%0a%0d%0a<script>alert(1)</script>"
    for target in (
        f"/login?next=/{smuggled}",
        f"/user?user={smuggled}",
        f"/dead?user={smuggled}",
        f"/history?event={smuggled}",
        f"/{smuggled}",
        f"/?window={smuggled}",
    ):
        reply = session.get(f"{place.guarded.url}{target}", timeout=30, allow_redirects=False)
        assert reply.status_code < 500, target
        assert "stolen" not in reply.cookies, target
        assert "<script>alert" not in reply.text, target
    # Nor has the log.
    assert not re.search(r"^Set-Cookie", place.guarded.said, re.MULTILINE)


WEIRD = [
    *("9" * 400, "-1", "٣", "\0", "\u202e", "\ud800", "🦊" * 50, "x" * 5000),
    *("%%%", "{{7*7}}", "(a+)+$" * 20, "99999999999999999999-1"),
]


def test_no_question_is_one_that_the_console_fails_on(place: Place) -> None:
    session = logged_in(place.guarded, "olga")
    fields = (
        "window",
        "user",
        "code",
        "older",
        "newer",
        "until",
        "start",
        "source",
        "rule",
        "event",
        "before",
        "count",
        "verb",
        "next",
    )
    for page, weird in itertools.product((page for page in PAGES if page.method == "GET"), WEIRD):
        given = {field: weird.encode(errors="surrogatepass") for field in fields}
        reply = session.get(f"{place.guarded.url}{page.path}", params=given, timeout=30)
        assert reply.status_code in (200, 400), (page.path, weird[:40], reply.status_code)
        assert "49" not in re.findall(r'value="(\d\d)"', reply.text), "a template in a field was run"


def test_an_answer_says_nothing_of_the_inside(place: Place) -> None:
    for target in ("/nowhere", "/dead/nowhere", "/user?user=%00", "/history?before=x", "/%ff%fe"):
        answer = raw(place.open, get(target)).decode(errors="replace")
        assert not re.search(
            r"Traceback|File \"|uvicorn|starlette|/worker/|redis://", answer, re.IGNORECASE
        ), target


def test_every_answer_tells_browsers_what_they_must_not_do(place: Place) -> None:
    for target in ("/", "/login", "/nowhere", "/static/style.css", "/healthz", "/line/pause", "/dead"):
        answer = requests.get(f"{place.guarded.url}{target}", timeout=30, allow_redirects=False)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert target.startswith("/static") or answer.headers["Cache-Control"] == "no-store"


# Wearing it out.


def test_a_huge_form_is_refused_before_it_has_arrived(place: Place) -> None:
    head = (
        "POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        "Content-Length: 10000000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", place.guarded.port), timeout=30) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            # What is over the limit by one is answered, though most is still to come.
            connection.sendall(b"x" * 65_537)
            assert b" 413 " in connection.recv(20)
    fields = "&".join(f"a{n}=" for n in range(2000))
    reply = requests.post(
        f"{place.guarded.url}/login",
        data=fields,
        headers={"Content-Type": "application/x-www-form-urlencoded"},
        timeout=30,
    )
    assert reply.status_code == 400


def test_long_lines_and_many_headers_are_refused(place: Place) -> None:
    for request in (
        get("/" + "x" * 1_000_000),
        get("/", "X-Long: " + "x" * 1_000_000),
        get("/", *(f"X-{n}: x" for n in range(100_000))),
        get("/", "Cookie: " + "; ".join(f"c{n}=x" for n in range(100_000))),
    ):
        with contextlib.suppress(ConnectionError):
            answer = raw(place.open, request)
            assert answer[:12].split()[1:2] in ([b"400"], [b"414"], [b"431"], []), answer[:100]
    assert requests.get(f"{place.open.url}/healthz", timeout=30).ok


def test_garbage_gets_an_answer_or_none_and_harms_nobody(place: Place) -> None:
    for garbage in (
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
        b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"\0" * 1000 + b"\r\n\r\n",
    ):
        with contextlib.suppress(ConnectionError, TimeoutError):
            answer = raw(place.open, garbage, patience=0.5)
            assert b" 200 " not in answer[:20] or garbage.startswith(b"GET / HTTP/1.1\r\nHost: 127.0.0.1"), (
                answer[:80]
            )
    assert requests.get(f"{place.open.url}/healthz", timeout=30).ok


def test_connections_that_say_nothing_push_out_each_other_and_nobody_else(place: Place) -> None:
    """As Slowloris does it: many connections, each with half a request that never ends."""
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", place.open.port), timeout=30))
            for _ in range(400)
        ]
        for connection in held:
            with contextlib.suppress(ConnectionError):
                connection.sendall(HALF)

        assert requests.get(f"{place.open.url}/", timeout=30).ok
        with contextlib.suppress(ConnectionError):
            assert held[0].recv(4096) == b""


def test_a_request_that_does_not_arrive_is_waited_for_no_longer_than_a_while(place: Place) -> None:
    with contextlib.suppress(ConnectionError):
        assert place.silent.recv(4096) == b""


# Doing it twice.


def test_a_question_that_was_answered_cannot_be_answered_again(place: Place) -> None:
    buffer, session = Buffer(place.redis, place.keys), logged_in(place.guarded, "olga")
    give_up(place, "again", 3)
    form = {
        "token": token_of(session, place.guarded, "/"),
        "until": str(int(place.redis.time()[0]) * 1000 + 60_000),
        "count": "3",
    }
    redrive = f"{place.guarded.url}/dead/redrive"
    headers = {"Accept": "application/json"}

    first = session.post(redrive, data=form, headers=headers, timeout=30)
    again = session.post(redrive, data=form, headers=headers, timeout=30)
    # Those three, which are pending now, and five others.
    give_up(place, "fresh", 5)
    more = session.post(redrive, data=form, headers=headers, timeout=30)

    assert first.json() == {"done": "redriven", "numbers": [3, 0, 0]}
    assert again.json() == {"done": "redriven", "numbers": [0, 0, 3]}
    # More than the number that the person has agreed to: refused.
    assert more.status_code == 400
    assert buffer.snapshot().dead == 8
