"""Plays what an operator lives through, in a real sandbox, and takes the pictures of docs/operate/console.md: `make screenshots`.

An outage and its end; users that the API refuses, looked at, redriven when their cause is fixed; a pause, a resume, one user
looked up.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.console.png import shrink
from tests.console.site import accounts, console
from tests.console.stack import CHROMIUM, Stack, stack, until
from worker.state.buffer import Buffer
from worker.state.line import Line

PICTURES = Path(__file__).parents[2] / "docs" / "operate" / "console"
#: Users of the backlog, and how many of them were never imported into the app.
USERS, UNKNOWN = 60_000, 12
WIDTH, HEIGHT = 1180, 760


def play(directory: Path) -> None:
    """Play it, and write the pictures."""
    with stack(directory, names=("city", "level")) as running:
        for number in (1, 2):
            running.sandbox.start_worker(number)()
        with (
            console(directory, running.settings | accounts(directory)) as place,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(executable_path=CHROMIUM)
            context = browser.new_context(
                base_url=place.url, viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light"
            )
            page = context.new_page()
            page.goto("/login")
            page.get_by_label("Name").fill("olga")
            page.get_by_label("Password").fill("opens the line again")
            page.get_by_role("button", name="Log in").click()
            expect(page.get_by_role("heading", name="The line")).to_be_visible()
            _outage(running, page)
            _dead_letters(running, page)
            _pause(running, page)
            _user(page)
            browser.close()


def _outage(running: Stack, page: Page) -> None:
    # A minute of quiet work first, so that the charts have something to show.
    for turn in range(6):
        running.producer.set_many((f"user{n}", {"city": f"Oslo {turn}"}) for n in range(40_000))
        time.sleep(10)
    running.faults({"kind": "status", "code": 502, "times": None})
    running.producer.set_many((f"user{n}", {"city": "Shenzhen", "level": "Gold"}) for n in range(USERS))
    until(lambda: Line(running.redis, running.keys).read().kind == "outage")
    time.sleep(15)
    _picture(page, "/", "01-outage")
    running.faults()
    until(running.settled, 120)


def _dead_letters(running: Stack, page: Page) -> None:
    unknown = [f"guest-{number:04d}" for number in range(UNKNOWN)]
    running.faults(*({"kind": "user_code", "user": user, "code": 70107, "times": None} for user in unknown))
    for user in unknown:
        # As they come in real life: each beside many others.
        running.producer.set_many((f"user{n}", {"level": f"Gold {user}"}) for n in range(300))
        running.producer.set(user, {"city": "Paris", "level": "Silver"})
        until(running.settled)
    page.wait_for_timeout(3000)
    _picture(page, "/", "02-needs-a-person")
    _picture(page, "/dead", "03-dead-letters")
    # Somebody imports the accounts.
    running.faults()
    page.get_by_role("button", name="Redrive all").click()
    expect(page.get_by_role("heading")).to_contain_text("Redrive")
    _picture(page, "", "04-redrive")
    page.get_by_role("button", name="Redrive").click()
    expect(page.get_by_role("status")).to_contain_text("redriven")
    until(lambda: running.settled() and not Buffer(running.redis, running.keys).snapshot().dead)


def _pause(running: Stack, page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto("/")
    page.get_by_label("Reason").fill("the campaign went to the wrong city; Olga, until it is corrected")
    page.get_by_role("button", name="Pause").click()
    running.producer.set_many((f"user{n}", {"city": "Rome"}) for n in range(20_000))
    page.wait_for_timeout(7000)
    _picture(page, "", "05-paused")
    page.get_by_role("button", name="Resume").click()
    page.wait_for_timeout(12_000)
    _picture(page, "/", "06-resumed")


def _user(page: Page) -> None:
    page.emulate_media(color_scheme="light")
    page.goto("/user?user=guest-0007")
    page.get_by_role("button", name="Show the values").click()
    page.get_by_text("Evidence").first.click()
    _picture(page, "", "07-user")


def _picture(page: Page, path: str, name: str) -> None:
    """Take a picture of a page, or of the one that is shown."""
    if path:
        page.goto(path)
    page.mouse.move(0, 0)
    picture = shrink(page.screenshot())
    file = PICTURES / f"{name}.png"
    file.write_bytes(picture)
    print(f"{file.name}: {len(picture) / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    if not CHROMIUM:
        sys.exit("Debian's chromium is not installed")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        play(Path(made))
