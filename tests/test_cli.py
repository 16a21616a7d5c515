"""The command line: what people read, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from tests.test_deadletters import Case
from worker import cli
from worker.clock import SystemClock
from worker.embedded import EmbeddedServer, free_port
from worker.keys import Keys
from worker.ratelimit import RateLimiter


class Terminal:
    """Runs commands with the settings of an app of its own, and no others."""

    def __init__(self, server: EmbeddedServer, keys: Keys) -> None:
        self.environ = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": str(keys.sdkappid)}

    def __call__(self, *arguments: str, **environ: str) -> Result:
        return CliRunner().invoke(cli.main, arguments, env=self.environ | environ)


@pytest.fixture
def imattr(server: EmbeddedServer, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    # No sandbox of somebody else's is here.
    monkeypatch.chdir(tmp_path)
    return Terminal(server, keys)


def test_help_shows_examples_and_exit_codes(imattr: Terminal) -> None:
    text = imattr("--help").output

    assert "imattr put u1 city=Paris level=Gold" in text
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 update refused" in text


@pytest.mark.parametrize("command", ["put", "status", "pause", "resume", "simulate", "up", "demo"])
def test_every_command_explains_itself(imattr: Terminal, command: str) -> None:
    result = imattr(command, "--help")

    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_put_accepts_an_update(imattr: Terminal, client: redis.Redis, keys: Keys) -> None:
    assert imattr("put", "ann", "city=Paris", "motto=a=b").output == "accepted, pending\n"
    assert (
        imattr("put", "ann", "city=Rome", "--occurred-at", "2036-11-01T12:00:00Z").output
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
        (("a=b", "city"), "attribute 2 is no NAME=VALUE"),
        (("city=A", "city=B"), "attribute 'city' is given twice"),
    ):
        result = imattr("put", "ann", *arguments)
        assert result.exit_code == cli.USAGE
        assert words in result.output


def test_missing_settings_are_all_named(imattr: Terminal) -> None:
    result = imattr("status", IMATTR_REDIS_URL="", IMATTR_SDKAPPID="", IMATTR_QOTA="1")

    assert result.exit_code == cli.USAGE
    for name in ("IMATTR_REDIS_URL is not set", "IMATTR_SDKAPPID is not set", "IMATTR_QOTA is no setting"):
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


def test_status_prints_the_whole_state_as_json(imattr: Terminal) -> None:
    imattr("put", "ann", "city=Paris")

    state = json.loads(imattr("status", "--json").output)

    assert state["line"] == {"state": "open", "reason": None, "code": None, "since": None, "next_probe": None}
    assert state["pending"].keys() == {"live", "backfill", "delayed", "waiting", "oldest_age_s"}
    assert (state["pending"]["live"], state["in_flight"], state["dead"]) == (1, 0, 0)
    assert state["rate"] == {"quota": 100, "current": 98.0}
    assert state["ledger"] == {
        "accepted": 1,
        "redriven": 0,
        "coalesced": 0,
        "unchanged": 0,
        "stale": 0,
        "delivered": 0,
        "dead_lettered": 0,
        "balanced": True,
    }
    assert state["eta_s"] == 0.0


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
    assert "paused: the plan has expired (60020)" in imattr("status").output


def test_a_person_can_pause_and_resume(imattr: Terminal) -> None:
    assert imattr("pause").exit_code == cli.USAGE
    assert imattr("pause", "--reason", "maintenance").output == "paused; what is in flight is finished\n"
    line = json.loads(imattr("status", "--json").output)["line"]
    assert (line["state"], line["reason"], line["next_probe"]) == ("paused", "maintenance", None)
    assert "paused: maintenance, since" in imattr("status").output
    assert imattr("put", "ann", "city=Paris").output == "accepted, pending\n"
    assert imattr("resume").output == "resumed\n"
    assert imattr("resume").output == "the line was open\n"


def test_dead_letters_can_be_looked_at_put_back_and_thrown_away(
    imattr: Terminal, client: redis.Redis, keys: Keys
) -> None:
    assert imattr("dead", "list").output == "no dead letters\n"
    Case(client, keys).bury("ann", "bob", city="Paris")
    Case(client, keys).bury("cid", code=70107, city="Oslo")

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
    assert imattr("dead", "redrive", "--dry-run").output == "3 would be put back\n"
    assert imattr("dead", "redrive", "--code", "90033").output == "2 put back\n"
    assert imattr("dead", "purge", "--older-than", "3600", "--dry-run").output.endswith(
        "would be thrown away\n"
    )
    assert imattr("dead", "purge").exit_code == cli.FAILED, "nobody said yes"
    assert imattr("dead", "purge", "--yes").output == "1 thrown away\n"
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
