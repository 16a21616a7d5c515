"""People at the real console, over HTTP: they log in, look, and act on exactly what they were shown."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import requests

from worker.console.accounts import Role, hash_password
from worker.sandbox.processes import answers
from worker.sandbox.redis_server import free_port

#: Who may do what. The hashes of their passwords are cheap to make and to try.
PEOPLE: Mapping[str, Role] = {"ann": "operator", "ben": "operator", "vera": "viewer"}
CHEAP = (2, 8, 1)
#: Seconds that a page may take, and a start.
ANSWERS_IN, STARTS_IN = 10.0, 30.0

_FIELD = re.compile(r'name="(\w+)" value="([^"]*)"')


class Away(Exception):
    """Raised when the console, or Redis behind it, does not answer."""


class Console:
    """The program `imattr console`, with accounts. Can be killed and started again."""

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.port, self._log = free_port(), directory / "console.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.passwords = {name: secrets.token_hex(8) for name in PEOPLE}
        file = directory / "accounts"
        lines = (
            f"{name}:{role}:{hash_password(self.passwords[name], CHEAP)}\n" for name, role in PEOPLE.items()
        )
        file.write_text("".join(lines))
        # It calls no API, so it needs no key.
        needed = {name: text for name, text in settings.items() if "SECRET_KEY" not in name}
        self._environ = os.environ | needed | {"IMATTR_CONSOLE_ACCOUNTS_FILE": str(file)}
        self._people: dict[str, Person] = {}
        #: How often it ended by itself, which it must not; and pages that failed for another reason than Redis.
        self.ended, self.failed = 0, 0
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", "console", "--port", str(self.port)],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + STARTS_IN
        while not answers(f"{self.url}/healthz"):
            assert time.monotonic() < deadline, f"the console does not answer, see {self._log}"
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    close = kill

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Start it again if it has ended by itself, and count that."""
        if self._process.poll() is not None:
            self.ended += 1
            self.start()

    def person(self, name: str) -> Person:
        """Somebody at the console. A session outlives the console, and Redis' restart."""
        return self._people.setdefault(name, Person(self, name))


class Person:
    """One of `PEOPLE`, with a browser."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name, self._browser = console, name, requests.Session()

    def get(self, path: str, fields: Mapping[str, object] | None = None) -> dict[str, str]:
        """Open a page; returns the fields of its forms. Raises `Away`."""
        page = self._ask("GET", path, params=fields)
        if page.url.endswith("/login") or "/login?" in page.url:
            self._log_in(dict(_FIELD.findall(page.text)))
            page = self._ask("GET", path, params=fields)
        return dict(_FIELD.findall(page.text))

    def post(self, path: str, fields: Mapping[str, object], *, token: str = "") -> requests.Response:
        """Send a form that a page showed; `token` is that of the page. Raises `Away`."""
        given = {name: str(value) for name, value in fields.items()} | {"token": token}
        return self._ask("POST", path, data=given, headers={"Accept": "application/json"})

    def _log_in(self, form: Mapping[str, str]) -> None:
        given = {"name": self._name, "password": self._console.passwords[self._name], "token": form["token"]}
        self._ask("POST", "/login", data=given)

    def _ask(self, method: str, path: str, **how: object) -> requests.Response:
        try:
            reply = self._browser.request(method, self._console.url + path, timeout=ANSWERS_IN, **how)  # type: ignore[arg-type]
        except requests.RequestException as error:
            raise Away(type(error).__name__) from None
        if reply.status_code >= 500:
            self._console.failed += reply.status_code != 503
            raise Away(str(reply.status_code))
        return reply

    # What they do.

    def pause(self) -> bool:
        return self._act("/", "/line/pause", {"reason": "chaos"})

    def resume(self) -> bool:
        return self._act("/", "/line/resume", {})

    def _act(self, page: str, path: str, fields: Mapping[str, object]) -> bool:
        return self.post(path, fields, token=self.get(page).get("token", "")).status_code == 200

    def look_at_letters(self) -> dict[str, str]:
        """The set of dead letters as it is now: its moment, and how many there are."""
        return {name: text for name, text in self.get("/dead").items() if name in ("until", "count")}

    def decide(self, verb: str, shown: Mapping[str, str]) -> int:
        """Redrive or purge a set that was shown, perhaps to somebody else; returns how many letters that were."""
        token = self.get("/dead/confirm", {**shown, "verb": verb}).get("token", "")
        reply = self.post(f"/dead/{verb}", shown, token=token)
        return int(reply.json()["numbers"][0]) if reply.status_code == 200 else 0

    def export(self, shown: Mapping[str, str]) -> list[dict[str, object]]:
        """A set with its values, as updates. Raises `Away`, also when it comes in part."""
        reply = self.post("/dead/export", shown, token=self.get("/dead").get("token", ""))
        if reply.status_code != 200:
            raise Away(str(reply.status_code))
        return [json.loads(line) for line in reply.text.splitlines()]

    def pause_import(self, name: str, *, resume: bool = False) -> bool:
        fields = {"name": name} if resume else {"name": name, "reason": "chaos"}
        return self._act("/imports", f"/imports/{'resume' if resume else 'pause'}", fields)
