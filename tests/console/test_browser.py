"""The console in a real browser: every button, both roles, both themes, a narrow screen, the keyboard alone, no script, a proxy
in front; and what a stranger's page could make the browser do.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Error, Page, Request, expect, sync_playwright

from tests.console.proxy import HEADER, Proxy, proxy
from tests.console.site import PEOPLE, Console, accounts, console
from tests.console.stack import CHROMIUM, Stack, stack, until
from tests.console.test_stranger import PAGES
from worker.state.history import History
from worker.state.line import Line

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not CHROMIUM, reason="Debian's chromium is not installed"),
]

PREFIX = "/team/imattr"
#: Text that would do something, if a page took it for more than text; a user id has 32 characters at most.
SCRIPT, IMAGE = '"><script>alert(1)</script>', "<img src=x onerror=alert(2)>"
BREAKER = "'\"><svg onload=alert(3)><!--"
LONG = "w" * 32

#: Where there is something to see. {until} and {count} are those of the dead letters.
SEEN = {
    "overview": "/",
    "a day": "/?window=24h",
    "dead letters": "/dead",
    "one of them": f"/dead?user={LONG}",
    "redrive?": "/dead/confirm?verb=redrive&count=9",
    "delete?": "/dead/confirm?verb=purge&code=70107&count=9",
    "refused": "/refused",
    "delete refused?": "/refused/confirm?count=3",
    "user": f"/user?user={LONG}",
    "no user": "/user",
    "imports": "/imports",
    "history": "/history",
    "settings": "/settings",
    "a mistake": "/history?before=yesterday",
    "nowhere": "/nowhere",
}


@dataclass(slots=True)
class Site:
    """The console and those who look at it."""

    stack: Stack
    guarded: Console
    proxied: Proxy
    browser: Browser
    #: What pages did that no page of ours does.
    wrong: list[str] = field(default_factory=list)
    #: Paths of the forms that were sent.
    sent: set[str] = field(default_factory=set)
    _cookies: dict[str, Any] = field(default_factory=dict)
    _close: list[Callable[[], None]] = field(default_factory=list)

    def page(
        self,
        name: str = "",
        *,
        theme: str = "light",
        width: int = 1280,
        script: bool = True,
        behind: str = "",
    ) -> Page:
        """A page of a fresh browser, with somebody logged in, or behind the proxy as somebody."""
        url = self.proxied.url if behind else self.guarded.url
        login = {"username": behind, "password": self.proxied.passwords[behind]} if behind else None
        context = self.browser.new_context(
            base_url=url,
            viewport={"width": width, "height": 800},
            reduced_motion="reduce",
            color_scheme=theme,  # type: ignore[arg-type]
            java_script_enabled=script,
            http_credentials=login,  # type: ignore[arg-type]
            storage_state=self._logged_in(name) if name else None,
        )
        self._close.append(context.close)
        page = context.new_page()
        page.set_default_timeout(20_000)
        self._watch(page, url)
        return page

    def _logged_in(self, name: str) -> Any:
        if name not in self._cookies:
            page = self.page()
            log_in(page, name)
            self._cookies[name] = page.context.storage_state()
        return self._cookies[name]

    def _watch(self, page: Page, url: str) -> None:
        def request(one: Request) -> None:
            if not one.url.startswith(url) and not one.url.startswith("data:"):
                self.wrong.append(f"{page.url} asks for {one.url}")
            if one.method == "POST":
                self.sent.add(one.url.removeprefix(url))

        def said(one: ConsoleMessage) -> None:
            expected = re.match(r"Failed to load resource: the server responded with a status of 4", one.text)
            if one.type in ("error", "warning") and not expected:
                self.wrong.append(f"{page.url}: {one.text}")

        def asked(dialog: Dialog) -> None:
            self.wrong.append(f"{page.url}: {dialog.message}")
            dialog.dismiss()

        def broke(error: Error) -> None:
            self.wrong.append(f"{page.url}: {error}")

        page.on("request", request)
        page.on("console", said)
        page.on("pageerror", broke)
        page.on("dialog", asked)

    def close_pages(self) -> None:
        while self._close:
            self._close.pop()()


def log_in(page: Page, name: str) -> None:
    page.goto("/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PEOPLE[name][1])
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="The line")).to_be_visible()


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory: Path = tmp_path_factory.mktemp("site")
    with stack(directory) as running:
        # Every page has something to show, and some of it wants to be more than text.
        value = {"city": "<script>alert(4)</script>", BREAKER: IMAGE, "level": "o" * 50}
        running.give_up([LONG, SCRIPT, IMAGE, *(f"user{n}" for n in range(60))], value)
        running.refuse(
            ("nobody", "user id is 40 bytes, at most 32", {"city": "Paris"}),
            (SCRIPT, f"the value of {BREAKER!r} is 99 bytes, at most 50", {BREAKER: SCRIPT}),
            (LONG, "the value of 'city' is empty", "x" * 900),
        )
        running.redis.zadd(running.keys.imports, {f"{LONG}:/data/{BREAKER}.csv": 1_700_000_000_000})
        Line(running.redis, running.keys).pause(IMAGE, by=SCRIPT)
        Line(running.redis, running.keys).resume(by=BREAKER)
        running.sandbox.start_worker(1)()
        settings = running.settings | accounts(directory)
        header = {
            "IMATTR_CONSOLE_PREFIX": PREFIX,
            "IMATTR_CONSOLE_PROXY_HEADER": HEADER,
            "IMATTR_CONSOLE_PROXY_OPERATORS": "olga",
            "IMATTR_CONSOLE_PROXIES": "127.0.0.1",
        }
        with (
            running.importing("user,city\nu1,Paris\n,Rome\n"),
            console(directory, settings) as guarded,
            console(directory, running.settings | header) as behind,
            proxy(behind.port, PREFIX, "olga", "vera") as front,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(executable_path=CHROMIUM)
            yield Site(running, guarded, front, browser)
            browser.close()


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    """Whatever a test does, its pages are quiet, and load and run nothing but what is ours."""
    whole_site.wrong.clear()
    yield whole_site
    whole_site.close_pages()
    Line(whole_site.stack.redis, whole_site.stack.keys).resume()
    assert whole_site.wrong == []


def state(site: Site) -> str:
    return Line(site.stack.redis, site.stack.keys).read().state


def note(page: Page) -> Any:
    """What a page says of what was done on the page before."""
    return page.get_by_role("status")


# For everybody.


def test_axe_finds_nothing_on_any_page(site: Site) -> None:
    axe, found = Axe(), list[str]()

    def check(page: Page, where: str) -> None:
        """In light colours; and in dark ones, what is different then."""
        for theme, rules in (("light", None), ("dark", ["color-contrast", "link-in-text-block"])):
            page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
            only = {"runOnly": rules} if rules else {}
            results = axe.run(page, options={"resultTypes": ["violations"], **only})
            if results.violations_count:
                found.append(f"{where}, {theme}: {results.generate_report()}"[:2000])
        page.emulate_media(color_scheme="light")

    stranger, operator = site.page(), site.page("olga")
    stranger.goto("/login")
    check(stranger, "login")
    stranger.get_by_label("Name").fill("olga")
    stranger.get_by_label("Password").fill("not her password")
    stranger.get_by_role("button", name="Log in").click()
    expect(stranger.get_by_role("alert")).to_be_visible()
    check(stranger, "a wrong password")
    for where, path in SEEN.items():
        operator.goto(path)
        check(operator, where)
    for path, button in (
        ("/dead", "Show the values"),
        ("/refused", "Show what was sent"),
        (SEEN["user"], "Show the values"),
    ):
        operator.goto(path)
        operator.get_by_role("button", name=button).click()
        check(operator, f"{path} with values")
    viewer = site.page("vera")
    for where in ("overview", "dead letters", "imports"):
        viewer.goto(SEEN[where])
        check(viewer, f"{where} of a viewer")

    assert not found, "\n".join(found)


def test_no_page_scrolls_sideways_on_a_narrow_screen(site: Site) -> None:
    page = site.page("olga", width=360)
    for where, path in SEEN.items():
        page.goto(path)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, f"{where} is {wide} px wide"
        # Nor is anything cut off that can be pressed.
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 360), (
                where,
                button.inner_text(),
            )


def test_a_theme_that_was_chosen_stays_and_auto_follows_the_machine(site: Site) -> None:
    page = site.page("vera", theme="light")

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.goto("/history")

    def choose(name: str) -> None:
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        page.wait_for_load_state()

    light = ground()
    choose("dark")
    assert page.url.endswith("/history")
    dark = ground()
    page.goto("/dead")

    assert ground() == dark != light
    choose("light")
    page.emulate_media(color_scheme="dark")
    assert ground() == light
    choose("auto")
    assert ground() == dark


def test_the_overview_renews_itself_and_leaves_alone_what_somebody_is_doing(site: Site) -> None:
    page = site.page("olga")
    page.goto("/")
    page.get_by_label("Reason").fill("half a sen")
    page.locator("summary").first.click()
    page.evaluate("window.same = true")

    def renew() -> None:
        # As when somebody comes back to this tab.
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    Line(site.stack.redis, site.stack.keys).pause("a colleague was faster", by="colleague")

    def shows_the_pause() -> bool:
        renew()
        page.wait_for_timeout(300)
        return "colleague" in page.locator("#words").inner_text()

    until(shows_the_pause)

    expect(page.get_by_role("button", name="Resume", exact=True)).to_be_visible()
    expect(page.locator("details").first).to_have_attribute("open", "")
    assert page.locator("#reason").input_value() == "half a sen"
    assert page.evaluate("window.same")
    # Nothing is made up while the console is away, and nobody is left looking at what they may no longer see.
    page.route("**/live*", lambda route: route.abort())
    renew()
    expect(page.locator("#fresh")).to_contain_text("Not up to date")
    page.unroute("**/live*")
    page.context.clear_cookies()
    renew()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    log_in(page, "olga")
    page.get_by_role("button", name="Resume", exact=True).click()
    expect(note(page)).to_contain_text("Resumed")
    # What the browser itself says of the request that was cut off.
    site.wrong[:] = [words for words in site.wrong if "ERR_FAILED" not in words]


def test_everything_can_be_done_with_the_keyboard_alone(site: Site) -> None:
    page = site.page()
    page.goto("/")

    def focused() -> str:
        """What has the focus, which can be seen."""
        seen = page.evaluate(
            "() => { const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();"
            "return [style.outlineStyle !== 'none' || style.boxShadow !== 'none', box.width > 0, box.bottom > 0,"
            " one.id || one.innerText || one.name]; }"
        )
        assert seen[:3] == [True, True, True], seen
        return str(seen[3]).strip()

    def tab_to(wanted: str) -> None:
        for _ in range(120):
            page.keyboard.press("Tab")
            if focused() == wanted:
                return
        pytest.fail(f"no way to {wanted}")

    # The name is where one begins.
    expect(page.get_by_label("Name")).to_be_focused()
    page.keyboard.type("olga")
    page.keyboard.press("Tab")
    page.keyboard.type(PEOPLE["olga"][1])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="The line")).to_be_visible()
    page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    page.keyboard.press("Enter")
    tab_to("reason")
    page.keyboard.type("by hand")
    page.keyboard.press("Enter")
    expect(note(page)).to_contain_text("Paused")
    assert state(site) == "paused"
    tab_to("Resume")
    page.keyboard.press("Enter")
    expect(note(page)).to_contain_text("Resumed")
    tab_to("Dead letters")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dead")
    tab_to("user")
    page.keyboard.type("user7")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dead?*user=user7*")
    tab_to("Redrive all 1…")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Redrive 1 dead letter?")).to_be_visible()
    tab_to("Redrive 1")
    page.keyboard.press("Enter")
    expect(note(page)).to_contain_text("1 dead letter redriven")


def test_everything_works_without_a_script(site: Site) -> None:
    page = site.page(script=False)
    log_in(page, "olga")

    page.get_by_label("Reason").fill("no script here")
    page.get_by_role("button", name="Pause").click()
    expect(note(page)).to_contain_text("Paused")
    expect(page.locator("#words")).to_contain_text("no script here")
    page.get_by_role("link", name="Refresh").click()
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Resume")).to_be_hidden()
    page.get_by_role("link", name="24 hours").click()
    expect(page.get_by_role("link", name="24 hours")).to_have_attribute("aria-current", "true")
    page.get_by_text("As a table").first.click()
    expect(page.get_by_role("region", name="as a table").first).to_be_visible()
    page.get_by_role("link", name="Dead letters", exact=True).click()
    page.get_by_label("User").fill("user8")
    page.get_by_role("button", name="Show", exact=True).click()
    page.get_by_role("button", name="Redrive all 1").click()
    page.get_by_role("button", name="Redrive 1").click()
    expect(note(page)).to_contain_text("1 dead letter redriven")
    page.get_by_role("button", name="dark", exact=True).click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()


# Roles.


def test_a_viewer_sees_everything_and_has_nothing_to_press(site: Site) -> None:
    page = site.page("vera")
    for where, path in SEEN.items():
        answer = page.goto(path)
        assert answer
        if where.endswith("?"):
            assert answer.status == 403, where
            continue
        names = [button.inner_text() for button in page.get_by_role("button").all()]
        assert set(names) <= {"Log out", "auto", "light", "dark", "Show", "Look up"}, where
        assert "alert(4)" not in page.content(), "values"
    page.goto("/dead")
    expect(page.get_by_role("link", name=IMAGE)).to_be_visible()


def test_every_button_of_an_operator_does_what_it_says(site: Site, tmp_path: Path) -> None:
    page = site.page()
    site.sent.clear()

    def press(name: str) -> None:
        page.get_by_role("button", name=name).first.click()

    def downloaded(name: str) -> list[str]:
        with page.expect_download() as download:
            press(name)
        download.value.save_as(tmp_path / "file")
        return (tmp_path / "file").read_text().splitlines()

    log_in(page, "olga")
    page.get_by_label("Reason").fill("the campaign was wrong")
    press("Pause")
    expect(note(page)).to_contain_text("Paused. Batches in flight will finish")
    expect(page.locator("#words")).to_contain_text("the campaign was wrong")
    assert state(site) == "paused"
    press("Resume")
    expect(note(page)).to_contain_text("Resumed")
    assert state(site) == "open"

    # Dead letters: exactly those that were shown.
    page.goto("/dead?user=user3")
    press("Show the values on this page")
    expect(page.get_by_text("<script>alert(4)</script>").first).to_be_visible()
    assert "user3" in "".join(downloaded("Export 1, with values"))
    page.goto("/dead")
    shown = site.stack.dead
    press(f"Redrive all {shown}")
    expect(page.get_by_role("heading")).to_have_text(f"Redrive {shown} dead letters?")
    page.get_by_role("link", name="Cancel").click()
    assert site.stack.dead == shown
    page.get_by_label("User").fill("user3")
    press("Show")
    press("Delete all 1")
    press("Delete 1")
    expect(note(page)).to_contain_text("1 dead letter deleted.")
    page.goto("/dead")
    press("Redrive all")
    # One that comes after the question is not in the answer.
    site.stack.have_refused("latecomer", {"city": "Oslo"})
    press("Redrive")
    expect(note(page)).to_contain_text(f"{shown - 1} dead letters redriven.")
    until(lambda: site.stack.settled() and site.stack.dead == 1)
    page.reload()
    expect(page.get_by_role("link", name="latecomer")).to_be_visible()
    expect(note(page)).to_have_count(0)

    # One user.
    page.get_by_role("link", name="User", exact=True).click()
    page.get_by_label("User id").fill("latecomer")
    press("Look up")
    expect(page.get_by_role("heading", name="Dead letter")).to_be_visible()
    expect(page.get_by_text("Oslo")).to_have_count(0)
    press("Show the values")
    expect(page.get_by_text("Oslo").first).to_be_visible()

    # Refused updates.
    page.get_by_role("link", name="Refused", exact=True).click()
    page.get_by_label("Way in").select_option("celery")
    page.get_by_label("Rule contains").fill("40 bytes")
    press("Show")
    assert len(downloaded("Export 1, with values")) == 1
    press("Show what was sent")
    expect(page.get_by_text("Paris").first).to_be_visible()
    press("Delete all 1")
    press("Delete 1")
    expect(note(page)).to_contain_text("1 refused update deleted.")

    # Imports.
    page.get_by_role("link", name="Imports", exact=True).click()
    running = page.get_by_role("region", name=re.compile("pipe"))
    running.get_by_label("Reason").fill("not before noon")
    running.get_by_role("button", name="Pause").click()
    expect(note(page)).to_contain_text("The import is paused")
    expect(running).to_contain_text("not before noon")
    running.get_by_role("button", name="Resume").click()
    expect(note(page)).to_contain_text("The import continues")

    # Who did it.
    page.get_by_role("link", name="History", exact=True).click()
    page.get_by_label("Event", exact=True).select_option("purged")
    press("Show")
    expect(page.get_by_role("row", name=re.compile("purged.*olga@console")).first).to_be_visible()
    press("light")
    press("Log out")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()

    ways = {(one.method, one.path) for one in PAGES if one.method == "POST"}
    assert {("POST", path) for path in site.sent} == ways | {
        ("POST", f"/{one}") for one in ("login", "logout", "theme")
    }


def test_behind_a_proxy_and_a_prefix_everything_is_the_same(site: Site) -> None:
    viewer, operator = site.page(behind="vera"), site.page(behind="olga")
    site.proxied.strayed.clear()

    viewer.goto(PREFIX)
    expect(viewer.locator(".who")).to_contain_text("vera")
    expect(viewer.get_by_role("button", name="Pause")).to_have_count(0)
    expect(viewer.get_by_role("button", name="Log out")).to_have_count(0)
    for name in ("Dead letters", "Refused", "User", "Imports", "History", "Settings", "Overview"):
        viewer.get_by_role("link", name=name, exact=True).first.click()
        assert viewer.url.startswith(site.proxied.url)
        expect(viewer.get_by_role("navigation", name="Pages").locator("[aria-current]")).to_have_text(name)
        viewer.wait_for_load_state()
        assert viewer.evaluate("getComputedStyle(document.querySelector('.skip')).position") == "absolute", (
            "no style"
        )
    operator.goto(f"{PREFIX}/")
    operator.get_by_label("Reason").fill("behind a proxy")
    operator.get_by_role("button", name="Pause").click()
    expect(note(operator)).to_contain_text("Paused")
    expect(operator.locator("#fresh")).to_contain_text("every 5 s", timeout=15_000)
    operator.get_by_role("button", name="Resume").click()
    expect(note(operator)).to_contain_text("Resumed")

    assert site.proxied.strayed == []
    assert History(site.stack.redis, site.stack.keys).newest(1)[0].by == "olga@console"


# Strangers.


def test_text_that_others_wrote_stays_text(site: Site) -> None:
    page = site.page("olga")
    for path in [
        *SEEN.values(),
        "/user?user=%22%3E%3Cscript%3Ealert(1)%3C/script%3E",
        f"/dead?user={IMAGE}",
        f"/?window={SCRIPT}",
    ]:
        page.goto(path)
        # Whatever ran would have opened a dialog, which `site` tells of.
        assert page.locator("main script, main img, [onload], [onerror]").count() == 0, path
    for path in ("/dead", "/refused", "/user?user=%22%3E%3Cscript%3Ealert(1)%3C/script%3E"):
        page.goto(path)
        page.get_by_role("button", name=re.compile("Show (the values|what was sent)")).click()
        assert page.locator("main script, main img, [onload], [onerror]").count() == 0, path
    # If there were a hole all the same, the browser would not run what is in it.
    page.goto("/")
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=/x onerror=\"window.ran=1\"><a id=x href=\"javascript:window.ran=1\">x</a>');"
        "const one = document.createElement('script'); one.textContent = 'window.ran=1'; document.body.append(one)"
    )
    page.locator("#x").click()
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    site.wrong[:] = [words for words in site.wrong if "Content Security Policy" not in words]


@pytest.fixture
def elsewhere() -> Iterator[Callable[[str], str]]:
    """A stranger's site: returns the address of a page with this body."""
    pages: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages[-1].encode() if self.path == "/" else b""
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]

    def show(body: str) -> str:
        pages.append(body)
        return f"http://{{}}:{port}/"

    yield show
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["another site", "another port"])
def test_a_page_of_another_site_can_neither_act_nor_look_nor_frame(
    site: Site, elsewhere: Callable[[str], str], host: str
) -> None:
    page = site.page("olga")
    target = site.guarded.url
    body = (
        f'<form id=f method=post action="{target}/line/pause"><input name=reason value=mine><input name=token value=x></form>'
        f'<iframe id=i src="{target}/"></iframe><script>var read; fetch("{target}/status.json", {{credentials: "include"}})'
        f'.then(r => r.text()).then(t => read = t, e => read = "refused")</script>'
    )
    page.goto(elsewhere(body).format(host))

    page.wait_for_function("read")
    assert page.evaluate("read") == "refused"
    frame = page.frame_locator("#i")
    assert frame.get_by_role("heading", name="The line").count() == 0
    page.evaluate("document.getElementById('f').submit()")
    page.wait_for_url("**/line/pause")
    expect(page.get_by_role("heading")).to_be_visible()

    assert state(site) == "open"
    # All of it is what the browser says of the stranger's page.
    assert site.wrong
    site.wrong.clear()
