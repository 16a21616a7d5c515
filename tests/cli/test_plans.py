"""`imattr plan` and `imattr apply`, over HTTP, as people see them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.cli.test_cli import Terminal
from tests.conftest import SECRET_KEY
from tests.simulation import Simulation, simulation
from worker.cli import terminal as cli
from worker.sandbox.faults import Fault
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.keys import Keys

ROOT = Path(__file__).parent.parent.parent

CSV = "user,city,level\nann,Paris,3\nbob,Oslo,4\ncid,Rome,\n"


@pytest.fixture
def imattr(server: EmbeddedServer, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(server, keys)


@pytest.fixture
def sim(imattr: Terminal, keys: Keys) -> Iterator[Simulation]:
    with simulation() as running:
        running.api.sdkappid = keys.sdkappid
        imattr.environ |= {"IMATTR_SECRET_KEY": SECRET_KEY, "IMATTR_API_URL": running.url}
        running.api.users |= {
            "ann": {"city": "Rome", "level": "3"},
            "bob": {"city": "Oslo"},
            "cid": {"city": "Rome"},
        }
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "users.csv"
    path.write_text(CSV)
    return path


def test_a_plan_is_shown_as_people_know_it(imattr: Terminal, sim: Simulation, file: Path) -> None:
    result = imattr("plan", "users.csv")

    assert result.exit_code == 0
    told = [line.rstrip() for line in result.output.splitlines()]
    assert told[0].startswith("3 users to compare, in 1 call: 0:01 at the full rate")
    assert told[1:3] == ['~ ann city = "Rome" -> "Paris"', '+ bob level = "4"']
    assert "Plan: + 1 to set, ~ 1 to change, - 0 to remove, = 3 same" in told
    assert "users  3 in 3 lines; of them, 2 differ" in told
    assert told[-2].startswith("Applying it takes 1 call to read again (0:01) and 1 call to deliver (0:01):")
    assert told[-1] == "  imattr apply users.csv.plan"
    assert stat.S_IMODE((file.parent / "users.csv.plan").stat().st_mode) == 0o600
    assert sim.api.users["ann"]["city"] == "Rome"


def test_a_plan_is_applied_after_a_question(
    imattr: Terminal, sim: Simulation, file: Path, client: redis.Redis, keys: Keys
) -> None:
    imattr("plan", "users.csv")

    asked = imattr("apply", "users.csv.plan")
    assert asked.exit_code == cli.USAGE
    assert "nobody can confirm the changes of 2 users here: use --yes" in asked.output
    assert not client.exists(keys.pending)

    done = imattr("apply", "users.csv.plan", "--yes")
    assert done.exit_code == 0
    assert '~ ann city = "Rome" -> "Paris"' in done.output
    assert re.search(r"queued +2 users", done.output)
    assert client.hlen(keys.pending) == 2
    assert "queued 2" in imattr("history", "--event", "applied").output


def test_both_print_json(imattr: Terminal, sim: Simulation, file: Path) -> None:
    plan = json.loads(imattr("plan", "users.csv", "--json").stdout)
    assert {name: plan[name] for name in ("state", "set", "change", "remove", "same", "users", "calls")} == {
        "state": "complete", "set": 1, "change": 1, "remove": 0, "same": 3, "users": 3, "calls": 1,
    }  # fmt: skip
    assert plan["to_apply"]["read"]["calls"] == plan["to_apply"]["deliver"]["calls"] == 1
    assert "Paris" not in str(plan)

    done = json.loads(imattr("apply", "users.csv.plan", "--yes", "--json").stdout)
    assert (done["state"], done["queued"], done["changed"], done["refusals"]) == ("complete", 2, 0, [])


def test_a_plan_of_stdin_goes_where_it_is_told(imattr: Terminal, sim: Simulation, tmp_path: Path) -> None:
    environ = os.environ | imattr.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "worker.cli", "plan", "-", "--out", "p"]

    done = subprocess.run(command, input=CSV, env=environ, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "  imattr apply p\n" in done.stdout
    assert (tmp_path / "p").exists()


def test_only_a_few_of_many_changes_are_shown_and_all_are_in_the_file(
    imattr: Terminal, sim: Simulation, tmp_path: Path
) -> None:
    (tmp_path / "many.csv").write_text("user,city\n" + "".join(f"user{n},Paris\n" for n in range(500)))

    result = imattr("plan", "many.csv")

    assert result.output.count("+ user") == 24
    assert "... 476 more changes in many.csv.plan" in result.output
    assert (tmp_path / "many.csv.plan").read_text().count('"changes"') == 500


def test_refused_lines_are_counted_and_shown_and_have_their_exit_code(
    imattr: Terminal, sim: Simulation, file: Path
) -> None:
    file.write_text(CSV + "eve," + "x" * 51 + ",\nfay\n")

    result = imattr("plan", "users.csv")

    assert result.exit_code == cli.REFUSED
    assert re.search(r"refused +2 lines", result.output)
    assert "line 5: user eve: the value of 'city' is 51 bytes, at most 50" in result.output
    assert "line 6: user ?: 1 cells, the header has 3" in result.output
    assert "xxx" not in result.output


def test_what_others_wrote_is_shown_and_not_obeyed(imattr: Terminal, sim: Simulation, file: Path) -> None:
    sim.api.users["ann"]["city"] = "\x1b[31mred\u202e"

    result = imattr("plan", "users.csv")

    assert "\x1b" not in result.output
    assert "\u202e" not in result.output


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "words"),
    [
        (("users.csv",), {"IMATTR_SECRET_KEY": ""}, cli.USAGE, "IMATTR_SECRET_KEY is not set"),
        (("users.csv",), {"IMATTR_REDIS_URL": "closed"}, cli.UNREACHABLE, "Redis does not answer"),
        (
            ("users.csv",),
            {"IMATTR_SECRET_KEY": "k" * 64},
            cli.FAILED,
            "IMATTR_SDKAPPID and IMATTR_SECRET_KEY",
        ),
        (("users.csv", "--as-of", "noon"), {}, cli.USAGE, "--as-of is not an ISO 8601 time"),
        (("users.csv", "--as-of", "9000000000"), {}, cli.FAILED, "--as-of"),
        (("users.csv", "--out", "users.csv"), {}, cli.FAILED, "is not a plan of imattr; it is left as it is"),
        (("users.csv", "--out", "/dev/null"), {}, cli.FAILED, "/dev/null is not a regular file"),
        (("users.csv", "--user-column", "id"), {}, cli.FAILED, "not a header with a column 'id'"),
        (("missing.csv",), {}, cli.USAGE, "does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_words(
    imattr: Terminal,
    sim: Simulation,
    file: Path,
    arguments: tuple[str, ...],
    environ: dict[str, str],
    code: int,
    words: str,
) -> None:
    if environ.get("IMATTR_REDIS_URL"):
        environ = {"IMATTR_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}

    result = imattr("plan", *arguments, **environ)

    assert result.exit_code == code, result.output
    # Wherever the terminal breaks its lines.
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert file.read_text() == CSV


@pytest.mark.parametrize("content", [CSV, "", '{"imattr_plan": 2}\n', '{"imattr_plan": 1}\n'])
def test_what_is_no_plan_is_not_applied(imattr: Terminal, sim: Simulation, file: Path, content: str) -> None:
    file.write_text(content)

    result = imattr("apply", "users.csv", "--yes")

    assert result.exit_code == cli.FAILED
    assert "plan of imattr" in result.output or "version 2" in result.output


def test_an_interrupted_plan_is_not_applied_by_accident_and_can_be_given_up(
    imattr: Terminal, sim: Simulation, file: Path, client: redis.Redis, keys: Keys
) -> None:
    imattr("plan", "users.csv")
    plan = file.parent / "users.csv.plan"
    plan.write_bytes(b"".join(plan.read_bytes().splitlines(keepends=True)[:-1]))

    assert "0 of 3 users were compared" in imattr("apply", "users.csv.plan", "--yes").output
    assert "no run of this plan was interrupted" in imattr("apply", "users.csv.plan", "--abandon").output
    # What an earlier run has left.
    (file.parent / "users.csv.plan.apply-progress").write_text("{")
    assert "is damaged; delete it" in imattr("apply", "users.csv.plan", "--yes", "--partial").output


def test_an_api_that_fails_for_good_says_how_far_the_plan_is(
    imattr: Terminal, sim: Simulation, tmp_path: Path
) -> None:
    (tmp_path / "many.csv").write_text("user,city\n" + "".join(f"user{n},Paris\n" for n in range(6000)))
    # The 40th call, again and again.
    sim.fail(Fault("code", code=90009, user="user3950", times=None))

    result = imattr("plan", "many.csv")

    assert result.exit_code == cli.FAILED
    assert "90009" in result.output
    assert "3,900 of 6,000 users compared; the same command continues there" in result.output
    sim.fail()
    before = sim.api.counts.requests
    assert imattr("plan", "many.csv").exit_code == 0
    assert sim.api.counts.requests - before == 21


# A real terminal, and a real process.


#: As from a shell that somebody types into: one that runs tests in the background lets its children ignore Ctrl-C.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from worker.cli.main import main
main()
"""


class Screen:
    """A command in a terminal of 80 columns."""

    def __init__(self, environ: dict[str, str], *arguments: str) -> None:
        environ = (
            os.environ | environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
        )
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments], env=environ, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.shown = ""

    def read(self, until: str) -> str:
        """What is shown up to some words, without colours."""
        while until not in self.shown:
            try:
                more = os.read(self._ours, 65_536)
            except OSError:
                break
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", more.decode(errors="replace"))
        return self.shown

    def write(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def press_ctrl_c(self) -> None:
        """As often as it takes: one right between the question and the reading of the answer is not heard."""
        for _ in range(100):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.3)
                return

    def end(self) -> int:
        self.read("\0")
        os.close(self._ours)
        return self.process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_person_is_asked_with_the_number_in_a_terminal(
    imattr: Terminal, sim: Simulation, file: Path, client: redis.Redis, keys: Keys
) -> None:
    plan = Screen(imattr.environ, "plan", "users.csv")
    assert plan.end() == 0
    assert all(len(line) <= 80 for line in plan.shown.splitlines())

    screen = Screen(imattr.environ, "apply", "users.csv.plan")
    assert "Queue the changes of 2 users? [y/N]" in screen.read("[y/N]")
    screen.write("n\n")
    assert screen.end() == 1
    assert not client.exists(keys.pending)

    screen = Screen(imattr.environ, "apply", "users.csv.plan")
    screen.read("[y/N]")
    screen.press_ctrl_c()
    assert screen.end() != 0
    assert not client.exists(keys.pending)

    screen = Screen(imattr.environ, "apply", "users.csv.plan")
    screen.read("[y/N]")
    screen.write("y\n")
    assert screen.end() == 0
    assert client.hlen(keys.pending) == 2


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGKILL])
def test_a_plan_that_is_interrupted_goes_on(
    imattr: Terminal, sim: Simulation, tmp_path: Path, signalled: signal.Signals
) -> None:
    users = [f"user{n:05}" for n in range(20_000)]
    sim.api.users |= {user: {"city": "Rome"} for user in users}
    (tmp_path / "many.csv").write_text("user,city\n" + "".join(f"{user},Rome\n" for user in users[:-7]))
    for user in users[::1000]:
        sim.api.users[user]["city"] = "Oslo"
    plan = tmp_path / "many.csv.plan"
    environ = imattr.environ | {"IMATTR_READ_QUOTA": "50"}

    screen = Screen(environ, "plan", "many.csv")
    while not plan.exists() or plan.read_text().count('"checkpoint"') < 3:
        os.sched_yield()
    screen.process.send_signal(signalled)
    assert screen.end() == (-9 if signalled == signal.SIGKILL else cli.STOPPED)
    if signalled != signal.SIGKILL:
        assert "stopped: " in screen.shown
        assert "the same command continues there" in screen.shown
    before = sim.api.counts.requests

    facts = json.loads(imattr("plan", "many.csv", "--json").stdout)

    assert facts["state"] == "complete"
    assert facts["users_by_fate"] == {
        "differs": 20, "same": 19_973, "newer": 0, "unknown": 0, "in_motion": 0, "forgotten": 0,
    }  # fmt: skip
    assert sim.api.counts.requests - before < 190
    found = [json.loads(line) for line in plan.read_text().splitlines()]
    assert [line["user"] for line in found if "changes" in line] == users[::1000]
