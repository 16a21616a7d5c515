"""The command line: what people read, and the exit codes that scripts rely on."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from tests.conftest import SECRET_KEY
from tests.simulation import Simulation, simulation
from tests.state.test_dead_letters import Case
from worker.cli import terminal as cli
from worker.cli.main import main
from worker.clock import SystemClock
from worker.errors import InvalidUpdate
from worker.models import Update
from worker.producer import Producer
from worker.ratelimit import RateLimiter
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.buffer import Added, Buffer
from worker.state.keys import Keys
from worker.state.refused import Refused


class Terminal:
    """Runs commands with the settings of an app of its own, and no others."""

    def __init__(self, server: EmbeddedServer, keys: Keys) -> None:
        self.environ = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": str(keys.sdkappid)}

    def __call__(self, *arguments: str, **environ: str) -> Result:
        return CliRunner().invoke(main, arguments, env=self.environ | environ)


@pytest.fixture
def imattr(server: EmbeddedServer, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    # No sandbox of somebody else's is here.
    monkeypatch.chdir(tmp_path)
    return Terminal(server, keys)


def test_help_shows_examples_and_exit_codes(imattr: Terminal) -> None:
    text = imattr("--help").output

    assert "imattr put u1 city=Paris --remove level" in text
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 update refused" in text


@pytest.mark.parametrize(
    "command",
    ["put", "import", "status", "audit", "pause", "resume", "doctor", "simulate", "up", "demo", "faults"],
)
def test_every_command_explains_itself(imattr: Terminal, command: str) -> None:
    result = imattr(command, "--help")

    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_put_accepts_an_update(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    assert imattr("put", "ann", "city=Paris", "motto=a=b").output == "accepted, pending\n"
    assert (
        imattr("put", "ann", "city=Rome", "--occurred-at", str(time.time() + 60)).output
        == "accepted, coalesced\n"
    )
    assert imattr("put", "ann", "city=Oslo", "--occurred-at", "1700000000").output == "accepted, stale\n"

    record = json.loads(client.hget(keys.pending, "ann") or "")
    assert {name: value for name, (value, _) in record["a"].items()} == {"city": "Rome", "motto": "a=b"}


def test_a_refused_update_says_user_rule_and_length_and_never_the_value(imattr: Terminal) -> None:
    result = imattr("put", "ann", "city=" + "字" * 17)

    assert result.exit_code == cli.REFUSED
    assert "user ann: the value of 'city' is 51 bytes, at most 50" in result.output
    assert "字" not in result.output


def test_wrong_usage_is_explained(imattr: Terminal) -> None:
    for arguments, words in (
        (("a=b", "city"), "attribute 2 is not NAME=VALUE"),
        (("city=A", "city=B"), "attribute 'city' is given twice"),
    ):
        result = imattr("put", "ann", *arguments)
        assert result.exit_code == cli.USAGE
        assert words in result.output


def test_missing_settings_are_all_named(imattr: Terminal) -> None:
    result = imattr("status", IMATTR_REDIS_URL="", IMATTR_SDKAPPID="", IMATTR_QOTA="1")

    assert result.exit_code == cli.USAGE
    for name in ("IMATTR_REDIS_URL is not set", "IMATTR_SDKAPPID is not set", "unknown setting IMATTR_QOTA"):
        assert name in result.output


@pytest.mark.parametrize("command", [("status",), ("put", "ann", "city=Paris")])
def test_a_redis_that_is_away_is_no_traceback(imattr: Terminal, command: tuple[str, ...]) -> None:
    result = imattr(*command, IMATTR_REDIS_URL=f"redis://:hunter22@127.0.0.1:{free_port()}/0")

    assert result.exit_code == cli.UNREACHABLE
    assert "Redis does not answer" in result.output
    assert "Traceback" not in result.output
    assert "hunter22" not in result.output


def test_a_full_buffer_has_a_code_of_its_own(imattr: Terminal) -> None:
    imattr("put", "ann", "city=Paris")

    assert imattr("put", "bob", "city=Paris", IMATTR_MAX_PENDING="1").exit_code == cli.FULL


def test_put_removes_attributes(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    assert imattr("put", "ann", "city=Paris", "--remove", "level").output == "accepted, pending\n"

    [record] = map(json.loads, client.hvals(keys.pending))
    assert {name: pair[0] for name, pair in record["a"].items()} == {"city": "Paris", "level": False}


@pytest.mark.parametrize("arguments", [("ann",), ("ann", "city=Paris", "--remove", "city")])
def test_put_needs_something_to_do(imattr: Terminal, arguments: tuple[str, ...]) -> None:
    assert imattr("put", *arguments).exit_code == cli.USAGE


def test_status_prints_the_whole_state_as_json(imattr: Terminal) -> None:
    imattr("put", "ann", "city=Paris")

    state = json.loads(imattr("status", "--json").output)

    unset = dict.fromkeys(("reason", "code", "since", "next_probe", "kind", "by"))
    assert state["line"] == {"state": "open", **unset, "failed_probes": 0, "words": "open"}
    assert state["pending"].keys() == {"live", "backfill", "delayed", "waiting", "oldest_age_s", "oldest_s"}
    assert (state["pending"]["live"], state["in_flight"], state["dead"]) == (1, 0, 0)
    assert state["rate"] == {"quota": 100, "limit": 100, "current": 98.0}
    assert state["ledger"] == {
        "accepted": 1,
        "redriven": 0,
        "coalesced": 0,
        "unchanged": 0,
        "stale": 0,
        "delivered": 0,
        "dead_lettered": 0,
        "quarantined": 0,
        "lost": 0,
        "imbalance": 0,
        "balanced": True,
    }
    assert state["eta_s"] is None, "no worker runs"


def test_status_is_readable(imattr: Terminal) -> None:
    text = imattr("status").output

    assert "open" in text
    assert "balances" in text


def test_a_pause_shows_with_its_reason(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    limiter = RateLimiter(client, keys, quota=100, patience=2.0, clock=SystemClock())
    limiter.pause(60, "the plan has expired", 60020)

    line = json.loads(imattr("status", "--json").output)["line"]

    assert (line["state"], line["reason"], line["code"]) == ("paused", "the plan has expired", 60020)
    assert line["since"] < line["next_probe"]
    assert re.search(r"until in (60|59) s: the plan has expired \(60020\)", imattr("status").output)


def test_a_person_can_pause_and_resume(imattr: Terminal) -> None:
    assert imattr("pause").exit_code == cli.USAGE
    assert imattr("pause", "--reason", "maintenance").output == "paused; batches in flight will finish\n"
    line = json.loads(imattr("status", "--json").output)["line"]
    assert (line["state"], line["reason"], line["next_probe"]) == ("paused", "maintenance", None)
    assert "maintenance. Run imattr resume to send again." in imattr("status").output
    assert imattr("put", "ann", "city=Paris").output == "accepted, pending\n"
    assert imattr("resume").output == "resumed\n"
    assert imattr("resume").output == "the line was already open\n"


def test_a_person_can_pause_and_resume_an_import(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    Buffer(client, keys).begin_import("host:/a.csv", 1)

    assert imattr("pause", "--import", "host:/a.csv", "--reason", "later").output.startswith("paused; ")
    assert "already paused by " in imattr("pause", "--import", "host:/a.csv", "--reason", "x").output
    assert ": later" in imattr("status").output
    assert json.loads(imattr("status", "--json").output)["imports"][0]["paused"]["reason"] == "later"
    assert json.loads(imattr("status", "--json").output)["line"]["state"] == "open"
    assert imattr("resume", "--import", "host:/a.csv").output == "resumed\n"
    assert imattr("resume", "--import", "host:/a.csv").output == "that import was not paused\n"
    another = imattr("pause", "--import", "another", "--reason", "x")
    assert (another.exit_code, "no import under way is called another" in another.output) == (1, True)


def test_dead_letters_can_be_looked_at_put_back_and_thrown_away(
    imattr: Terminal, client: redis.Redis, keys: Keys
) -> None:
    assert imattr("dead", "list").output == "no dead letters\n"
    Case(client, keys).dead_letter("ann", "bob", city="Paris")
    Case(client, keys).dead_letter("cid", code=70107, city="Oslo")

    listed = imattr("dead", "list").output
    assert all(word in listed for word in ("ann", "bob", "cid", "90033", "70107", "refused"))
    assert "Paris" not in listed
    assert [
        json.loads(line)["user"]
        for line in imattr("dead", "list", "--code", "70107", "--json").output.splitlines()
    ] == ["cid"]
    assert json.loads(imattr("dead", "show", "ann").output)["attributes"] == {"city": "Paris"}
    assert imattr("dead", "show", "nobody").exit_code == cli.FAILED
    assert json.loads(imattr("dead", "export", "--user", "cid").output)["attrs"] == {"city": "Oslo"}
    assert imattr("dead", "redrive", "--dry-run").output == "3 would be redriven\n"
    assert imattr("dead", "redrive", "--code", "90033").output == "2 redriven\n"
    assert imattr("dead", "purge", "--older-than", "3600", "--dry-run").output.endswith("would be deleted\n")
    assert imattr("dead", "purge").exit_code == cli.FAILED, "nobody said yes"
    assert imattr("dead", "purge", "--yes").output == "1 deleted\n"
    assert imattr("dead", "list").output == "no dead letters\n"


def test_a_ledger_that_does_not_balance_is_shouted(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    client.hset(keys.ledger, "accepted", 3)

    assert "DOES NOT BALANCE" in imattr("status").output


def test_the_simulator_needs_an_app_and_a_key(imattr: Terminal) -> None:
    result = imattr("simulate", IMATTR_SDKAPPID="")

    assert result.exit_code == cli.USAGE
    assert "IMATTR_SECRET_KEY is not set" in result.output


def test_epoch_seconds_may_have_a_fraction(imattr: Terminal) -> None:
    assert imattr("put", "ann", "a=b", "--occurred-at", "1700000000.25").output == "accepted, pending\n"


def test_a_bad_port_is_a_mistake_of_the_settings(imattr: Terminal) -> None:
    assert imattr("status", IMATTR_REDIS_URL="redis://:hun/ter22@h:1/0").exit_code == cli.USAGE


@pytest.fixture
def sim(imattr: Terminal, keys: Keys) -> Iterator[Simulation]:
    """The API, for the commands that ask it."""
    with simulation() as running:
        running.api.sdkappid = keys.sdkappid
        imattr.environ |= {"IMATTR_SECRET_KEY": SECRET_KEY, "IMATTR_API_URL": running.url}
        yield running


def test_the_doctor_tells_what_is_good_and_how_to_mend_the_rest(imattr: Terminal, sim: Simulation) -> None:
    result = imattr("doctor")

    lines = [line.rstrip() for line in result.output.splitlines()]
    assert result.exit_code == 0, "warnings are no errors"
    assert "✓ redis eviction    noeviction: a full server deletes nothing" in lines
    place = lines.index("! workers           no worker is running: updates are accepted and wait")
    fix = "                    → start one: celery -A worker worker --pool threads --concurrency 16"
    assert lines[place + 1] == fix
    assert lines[-1] == "good: 13, warnings: 2, errors: 0"
    assert "\x1b" not in result.output


def test_the_doctor_ends_with_1_when_something_is_an_error(imattr: Terminal, sim: Simulation) -> None:
    result = imattr("doctor", IMATTR_SECRET_KEY="of another app")

    assert result.exit_code == cli.FAILED
    assert "the API refused with 70009, the UserSig was made with the key of another app" in result.output
    assert result.output.endswith("errors: 1\n")


@pytest.mark.parametrize(("key", "code"), [(SECRET_KEY, 0), ("of another app", cli.FAILED)])
def test_the_doctor_talks_to_programs_too(imattr: Terminal, sim: Simulation, key: str, code: int) -> None:
    result = imattr("doctor", "--json", IMATTR_SECRET_KEY=key)

    findings = json.loads(result.output)
    assert result.exit_code == code
    assert findings[0] == {
        "check": "settings",
        "level": "ok",
        "found": f"complete, for app {sim.api.sdkappid}",
        "fix": "",
    }
    assert any(finding["level"] == "error" for finding in findings) == bool(code)


def test_the_doctor_explains_settings_that_are_no_good(imattr: Terminal) -> None:
    result = imattr("doctor", IMATTR_QOTA="1")

    assert result.exit_code == cli.FAILED
    assert "✗ settings          unknown setting IMATTR_QOTA; did you mean IMATTR_QUOTA?" in result.output


def test_the_doctor_shows_no_secret(imattr: Terminal, sim: Simulation) -> None:
    broker = f"redis://:hunter22@127.0.0.1:{free_port()}/0"

    for arguments in (("doctor",), ("doctor", "--json")):
        output = imattr(*arguments, IMATTR_BROKER_URL=broker).output
        assert "Connection refused" in output
        assert not any(secret in output for secret in ("hunter22", SECRET_KEY, "usersig"))


def test_the_doctor_names_the_users_of_redis_without_asking_any_server(imattr: Terminal) -> None:
    away = f"redis://app:hunter22@127.0.0.1:{free_port()}/0"
    environ = {"IMATTR_REDIS_URL": away, "IMATTR_BROKER_URL": away.replace("app", "celery")}

    result = imattr("doctor", "--acl", **environ)
    read = json.loads(imattr("doctor", "--acl", "--json", **environ).output)

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines == [f"ACL SETUSER {each['user']} {each['rules']}" for each in read]
    assert [each["user"] for each in read] == ["app", "celery"]
    assert "for Celery's broker, 127.0.0.1" in result.stderr
    assert "hunter22" not in result.output


def test_names_are_listed_and_set(imattr: Terminal, sim: Simulation, client: redis.Redis, keys: Keys) -> None:
    assert imattr("names", "list").output == "city\nlevel\n"
    assert imattr("names", "set", "vip", "city", "age").output == "added: vip, age\nalready there: city\n"
    assert imattr("names", "set", "vip").output == "already there: vip\n"
    assert json.loads(imattr("names", "list", "--json").output) == ["age", "city", "level", "vip"]
    assert client.smembers(keys.names) == {b"age", b"city", b"level", b"vip"}


def test_an_app_without_names_is_told_how_to_get_some(imattr: Terminal, sim: Simulation) -> None:
    sim.api.names = []

    assert imattr("names", "list").output == "the app has no attribute names; see imattr names set\n"
    assert imattr("names", "list", "--json").output == "[]\n"


def test_names_that_no_app_can_have_are_wrong_usage(imattr: Terminal, sim: Simulation) -> None:
    for wanted, words in ((["x" * 51], "must be 1 to 50 bytes"), (list("abcdefghijk"), "at most 10")):
        result = imattr("names", "set", *wanted)
        assert result.exit_code == cli.USAGE
        assert words in result.output
    assert sim.api.counts.requests == 0


def test_what_the_api_refuses_is_told_with_what_to_do(imattr: Terminal, sim: Simulation) -> None:
    for command in (("names", "list"), ("names", "set", "vip")):
        result = imattr(*command, IMATTR_ADMIN="nobody")
        assert result.exit_code == cli.FAILED
        assert "the API refused with 90009, the calling account is not an administrator" in result.output
        assert "make IMATTR_ADMIN an administrator of the app" in result.output


def test_a_permit_is_drawn_from_the_rate_that_all_share(
    imattr: Terminal, client: redis.Redis, keys: Keys
) -> None:
    assert imattr("permit").exit_code == 0

    assert client.hget(keys.rate, "next") is not None


def test_no_permit_in_time_has_an_exit_code_of_its_own(
    imattr: Terminal, client: redis.Redis, keys: Keys
) -> None:
    RateLimiter(client, keys, quota=100, patience=2.0, clock=SystemClock()).pause(60, "too many")

    result = imattr("permit", "--wait", "0.1", "--", "true")

    assert result.exit_code == cli.NO_PERMIT
    assert "no slot was free within 0.1 s" in result.stderr


def test_a_permit_runs_a_command(server: EmbeddedServer, keys: Keys) -> None:
    environ = {
        "IMATTR_REDIS_URL": server.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "PATH": os.environ["PATH"],
    }
    program = [sys.executable, "-m", "worker.cli", "permit", "--", "echo", "-n", "called"]

    assert subprocess.run(program, env=environ, capture_output=True, text=True, timeout=60).stdout == "called"


def test_a_command_that_does_not_exist_is_told(imattr: Terminal) -> None:
    result = imattr("permit", "--", "no-such-program")

    assert (result.exit_code, "no-such-program" in result.stderr) == (cli.FAILED, True)


def test_an_import_says_what_became_of_the_lines(
    imattr: Terminal, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    (tmp_path / "users.csv").write_text("user,city\nann,Paris\nann,Rome\n,Oslo\n")

    result = imattr("import", "users.csv", "--as-of", "1700000000")

    assert result.exit_code == cli.REFUSED
    for words in (
        "lines     3, this run",
        "accepted  2, of them 1 coalesced, 0 unchanged, 0 stale",
        "refused   1, listed in users.csv.refused.jsonl",
        "as of     2023-11-14T22:13:20.000+00:00, for lines without a time",
    ):
        assert words in result.stdout
    assert json.loads(client.hget(keys.pending, "ann") or "")["a"] == {"city": ["Rome", 1_700_000_000_000]}
    listed = (tmp_path / "users.csv.refused.jsonl").read_text()
    assert listed == '{"line": 4, "user": "\'\'", "rule": "user id is empty"}\n'


def test_an_import_sums_itself_up_as_json(imattr: Terminal, tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user,city\nann,Paris\n")

    result = imattr("import", "users.csv", "--json", "--as-of", "2023-11-14T22:13:20Z")

    assert result.exit_code == 0
    end = json.loads(result.stdout)
    assert end.pop("seconds") > 0
    assert end.pop("lines_per_second") > 0
    assert end == {
        "state": "complete",
        "lines": 1,
        "accepted": 1,
        "coalesced": 0,
        "unchanged": 0,
        "stale": 0,
        "refused": 0,
        "refused_file": None,
        "as_of": "2023-11-14T22:13:20.000+00:00",
        "notes": [],
        "resumed_after": 0,
    }


def test_a_rehearsal_of_an_import_says_what_it_would_take(imattr: Terminal, tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user,city\n,Oslo\n" + "".join(f"u{n},Paris\n" for n in range(150)))

    result = imattr("import", "users.csv", "--dry-run")

    assert result.exit_code == cli.REFUSED
    for words in ("lines    151", "users    about 150", "line 2: user '': user id is empty", "calls    2"):
        assert words in result.stdout
    assert json.loads(imattr("import", "users.csv", "--dry-run", "--json").stdout)["refusals"] == [
        {"line": 2, "user": "''", "rule": "user id is empty"}
    ]
    assert json.loads(imattr("status", "--json").output)["ledger"]["accepted"] == 0


def test_what_cannot_be_imported_is_explained(imattr: Terminal, tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("id,city\nann,Paris\n")

    for arguments, code, words in (
        (("users.csv",), cli.FAILED, "not a header with a column 'user'"),
        (("users.csv", "--as-of", "2023-11-14T22:13:20"), cli.USAGE, "--as-of has no time zone"),
        (("users.csv", "--as-of", "yesterday"), cli.USAGE, "--as-of is not an ISO 8601 time"),
        (("nothing.csv",), cli.USAGE, "does not exist"),
    ):
        result = imattr("import", *arguments)
        assert (result.exit_code, words in result.stderr) == (code, True)


def test_an_import_that_loses_redis_says_how_far_it_came(
    imattr: Terminal, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users.csv").write_text("user,city\n" + "".join(f"u{n},Paris\n" for n in range(1200)))
    real, left = Producer.add, iter(range(2))

    def add(self: Producer, updates: list[Update], **options: Any) -> Added:
        if next(left, None) is None:
            raise redis.exceptions.ConnectionError("connection refused")
        return real(self, updates, **options)

    monkeypatch.setattr(Producer, "add", add)
    result = imattr("import", "users.csv")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    assert result.exit_code == cli.UNREACHABLE
    assert "400 lines accepted, all up to line 401; the same command resumes there" in result.stderr
    assert "Redis does not answer: connection refused" in result.stderr
    assert "resuming after line 401" in imattr("import", "users.csv").output


HOSTILE = [
    "[/x]",
    "[red]x",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\u202eb",
    "a\r\nb",
    "\x00",
    ":smile:",
    "\x7f",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_what_others_wrote_is_shown_and_never_obeyed(
    imattr: Terminal, client: redis.Redis, keys: Keys, words: str
) -> None:
    case = Case(client, keys)
    case.dead_letter(words if words.isascii() and words.isprintable() else "ann", city="Paris")
    (user, letter), *_ = client.hgetall(keys.dead).items()
    client.hset(keys.dead, user, json.dumps(json.loads(letter) | {"message": words}))
    Refused(client, keys).keep("stream", [(InvalidUpdate(words, words), words)])
    client.hset(keys.quarantine, f"pending:1:{words}", words)
    imattr("pause", "--reason", words or "x")

    for command in (
        ("dead", "list"),
        ("dead", "list", "--json"),
        ("dead", "export"),
        ("refused", "list"),
        ("refused", "list", "--json"),
        ("quarantine", "list"),
        ("quarantine", "show"),
        ("status",),
        ("status", "--json"),
        ("put", words, "city=x"),
        ("dead", "show", words),
        ("refused", "show", words),
    ):
        result = imattr(*command)
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        assert all(c.isprintable() or c == "\n" for c in result.output), command
        if "[" in words and words.isprintable() and command[-1] == "list":
            assert words in result.output, "nothing of it was taken for markup"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_no_encoding_of_the_terminal_ends_a_command(
    imattr: Terminal, client: redis.Redis, keys: Keys, encoding: str
) -> None:
    Case(client, keys).dead_letter("ann", city="深圳")
    environ = {**os.environ, **imattr.environ, "PYTHONIOENCODING": encoding}

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "worker.cli", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, timeout=60, check=False)

    for arguments in (("status",), ("--help",), ("pause", "--reason", "维护 ✓"), ("status",)):
        done = run(*arguments)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), arguments
    export = run("dead", "export")
    assert json.loads(export.stdout.decode(encoding))["attrs"] == {"city": "深圳"}, "data is never replaced"


def test_who_paused_first_and_when_stays(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    imattr("pause", "--reason", "upgrade by ann")
    since = client.hget(keys.line, "since")

    second = imattr("pause", "--reason", "bob, too").output

    assert "already paused by " in second
    assert "upgrade by ann" in second
    assert (client.hget(keys.line, "reason"), client.hget(keys.line, "since")) == (b"upgrade by ann", since)


def test_redriving_everything_asks_first(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    Case(client, keys).dead_letter("ann", "bob")

    unsure = imattr("dead", "redrive")
    assert (unsure.exit_code, client.hlen(keys.dead)) == (1, 2)
    assert "Redrive all 2 dead letters?" in unsure.output
    assert imattr("dead", "redrive", "--user", "ann").output == "1 redriven\n"
    assert imattr("dead", "redrive", "--yes").output == "1 redriven\n"


def test_the_quarantine_can_be_looked_at_exported_and_dropped(
    imattr: Terminal, client: redis.Redis, keys: Keys
) -> None:
    client.hset(
        keys.quarantine, mapping={"flight:1700000000000:ann": b"{\xff", "pending:1700000000000:b:c": b"x"}
    )

    assert "2023-11-14T22:13:20" in imattr("quarantine", "list").output
    (line,) = imattr("quarantine", "show", "ann").output.splitlines()
    assert base64.b64decode(json.loads(line)["base64"]) == b"{\xff"
    assert "could not be read" in imattr("status").output
    assert imattr("quarantine", "drop", "ann", "--yes").output == "1 deleted\n"
    assert imattr("quarantine", "show", "b:c").exit_code == 0
    assert imattr("quarantine", "show", "ann").exit_code == cli.FAILED
    assert imattr("quarantine", "drop", "--yes").output == "1 deleted\n"


def test_the_history_says_what_happened_and_who_did_it(imattr: Terminal) -> None:
    assert imattr("history").output == "nothing has happened\n"
    imattr("pause", "--reason", "new year")
    imattr("resume")

    shown = imattr("history").output
    assert "new year" in shown
    assert "stopped for 0 s" in shown
    first, second = (
        json.loads(line) for line in imattr("history", "--json", "--since", "1h").output.splitlines()
    )
    assert (first["event"], second["event"], second["reason"]) == ("resumed", "paused", "new year")
    assert "@" in second["by"]
    assert imattr("history", "--event", "stopped").output == "nothing has happened\n"
    assert imattr("history", "--since", "2126-01-01").output == "nothing has happened\n"
    wrong = imattr("history", "--since", "yesterday")
    assert wrong.exit_code == cli.USAGE
    assert "must be an age such as 90m" in wrong.output


def test_a_user_can_be_looked_up_without_its_values(imattr: Terminal) -> None:
    imattr("put", "ann", "city=Paris")

    told = imattr("why", "ann", "city").output
    assert "city of ann is accepted and not sent yet: no worker is alive." in told.replace("\n", " ")
    assert "pending since" in told
    assert (
        "Paris"
        not in told + imattr("user", "show", "ann").output + imattr("user", "show", "ann", "--json").output
    )
    assert json.loads(imattr("user", "show", "ann", "--json").output)["pending"]["lane"] == "live"
    assert "Paris" in imattr("user", "show", "ann", "--values").output
    assert "Nothing is known of city of bob" in imattr("why", "bob", "city").output.replace("\n", " ")
    assert imattr("why", "b\u00f6b", "city").exit_code == cli.REFUSED
    assert json.loads(imattr("why", "ann", "city", "--json").output)["proof"]


def test_status_goes_on_while_redis_is_away(imattr: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[dict[str, int] | BaseException] = [{"found": 1}, redis.ConnectionError(), {"found": 2}]

    def read(*_: object) -> dict[str, int]:
        look = looks.pop(0) if looks else KeyboardInterrupt()
        if isinstance(look, BaseException):
            raise look
        return look

    monkeypatch.setattr("worker.operate.status.read", read)
    monkeypatch.setattr("worker.cli.status.EVERY", 0.0)

    result = imattr("status", "--watch", "--json")

    assert result.exit_code == cli.STOPPED
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert lines == [{"found": 1}, {"error": "Redis does not answer: ConnectionError"}, {"found": 2}]


def test_an_outage_is_played_by_command(imattr: Terminal, sim: Simulation) -> None:
    assert imattr("faults").output == "no call fails on purpose\n"

    rows = imattr("faults", "set", "91000:0.1", "502").output
    assert imattr("faults", "set", "91000:0.9", "502:0.1").exit_code == 0
    assert imattr("names", "list").exit_code == cli.FAILED
    seen = json.loads(imattr("faults", "--json").output)

    assert "the shares must not add up to more than 1" in rows
    assert [(each["what"], round(each["share"], 6)) for each in seen] == [("91000", 0.9), ("502", 0.1)]
    assert sum(each["struck"] for each in seen) > 0
    assert re.search(r"91000 +0\.9 +\d+ +internal error of the service", imattr("faults").output)
    assert imattr("faults", "clear").output == "no call fails on purpose now\n"
    assert imattr("names", "list").exit_code == 0


def test_faults_need_a_simulator(imattr: Terminal, sim: Simulation) -> None:
    for url, words in (("", "no simulator is known"), (f"{sim.url}/v4", "is not a simulator")):
        result = imattr("faults", "set", "502", IMATTR_API_URL=url)
        assert (result.exit_code, words in result.stderr) == (cli.NO_SANDBOX, True)


def test_a_fault_that_cannot_be_read_is_wrong_usage(imattr: Terminal, sim: Simulation) -> None:
    for command in (("faults", "set", "91"), ("simulate", "--fail", "91")):
        result = imattr(*command)
        assert (result.exit_code, "91: must be WHAT or WHAT:SHARE" in result.stderr) == (cli.USAGE, True)


class Elsewhere:
    """What `imattr up` leaves in its directory for other commands."""

    def __init__(self, directory: Path, keys: Keys, url: str) -> None:
        directory.mkdir()
        (directory / cli.SETTINGS_FILE).write_text(
            f"IMATTR_REDIS_URL={url}\nIMATTR_SDKAPPID={keys.sdkappid}\n"
        )


@pytest.mark.parametrize(
    "command", [("status", "--json"), ("dead", "list"), ("permit",), ("refused", "list")]
)
def test_a_command_uses_the_sandbox_that_it_is_told(
    imattr: Terminal, server: EmbeddedServer, keys: Keys, tmp_path: Path, command: tuple[str, ...]
) -> None:
    Elsewhere(tmp_path / "box", keys, server.url)
    # Who names a sandbox means it, whatever is exported.
    imattr.environ = {"IMATTR_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0", "IMATTR_SDKAPPID": ""}

    told = imattr(*command, "--directory", "box")

    assert (told.exit_code, told.stderr) == (0, "using the sandbox in box\n")
    assert imattr(*command).exit_code == cli.USAGE
    nothing = imattr(*command, "--directory", "none")
    assert (nothing.exit_code, "no sandbox runs in none" in nothing.stderr) == (cli.USAGE, True)


@pytest.mark.parametrize("named", ["nothing", "the same Redis", "another Redis"])
def test_the_sandbox_of_the_working_directory_fills_in_what_is_not_set(
    imattr: Terminal, server: EmbeddedServer, keys: Keys, tmp_path: Path, named: str
) -> None:
    Elsewhere(tmp_path / ".imattr", keys, server.url)
    redis_url = {"nothing": "", "the same Redis": server.url, "another Redis": f"{server.url}?a"}[named]
    imattr.environ = {"IMATTR_REDIS_URL": redis_url, "IMATTR_SDKAPPID": ""}

    result = imattr("status")

    assert (result.exit_code == 0, "using the sandbox" in result.stderr) == ((named != "another Redis",) * 2)
