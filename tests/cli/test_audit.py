"""`imattr audit` over HTTP, against the simulator: what people read, and what scripts rely on."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator

import pytest
import redis

from tests.cli.test_cli import Terminal
from tests.conftest import SECRET_KEY
from tests.readback.test_audit import House, ids
from tests.simulation import Simulation, simulation
from worker.cli import audit as command
from worker.cli import terminal as cli
from worker.sandbox.faults import Fault
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.history import History
from worker.state.keys import Keys


class HastyClock:
    """A clock on which nobody waits for long."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.ahead += max(0.0, seconds)


@pytest.fixture
def imattr(
    server: EmbeddedServer, keys: Keys, sim: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> Terminal:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr(command, "SystemClock", HastyClock)
    terminal = Terminal(server, keys)
    terminal.environ |= {"IMATTR_SECRET_KEY": SECRET_KEY, "IMATTR_API_URL": sim.url}
    return terminal


@pytest.fixture
def sim(keys: Keys) -> Iterator[Simulation]:
    with simulation() as running:
        running.api.sdkappid = keys.sdkappid
        yield running


@pytest.fixture
def house(client: redis.Redis, keys: Keys, sim: Simulation) -> House:
    """What is delivered through it is what the simulator has."""
    made = House(client, keys)
    made.store.users = sim.api.users
    return made


def test_everything_is_as_delivered(imattr: Terminal, house: House) -> None:
    house.deliver(ids(250), city="Paris")
    result = imattr("audit", "--users", "120")

    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.output.splitlines()]
    assert lines[0] == "result  0 of 120 wrong: below 2.5 % with 95 % confidence"
    assert lines[1] == "users   120 at random of 250 that are remembered"
    assert lines[2].startswith("reads   2 calls in ")

    lines = [line.rstrip() for line in imattr("audit").output.splitlines()]
    assert lines[0] == "result  0 of 250 wrong"
    assert lines[1] == "users   all 250 that are remembered; 3,000 were asked for"


def test_a_planted_loss_of_one_percent_is_found_told_repaired_and_gone(
    imattr: Terminal, house: House, sim: Simulation, client: redis.Redis, keys: Keys
) -> None:
    users = ids(3000)
    house.deliver(users, city="Paris", level="Gold")
    lost = random.Random(5).sample(users, 30)
    for user in lost:
        sim.api.users[user].clear()

    found = json.loads(imattr("audit", "--users", "1400", "--json").stdout)
    assert 0 < found["wrong"] == found["lost"] <= 30
    assert found["wrong_at_least"] < found["wrong"] / 1400 < found["wrong_at_most"]

    result = imattr("audit", "--repair", "--show", "2")
    assert result.exit_code == cli.FAILED, "nobody said yes"
    assert "30 of 3,000 wrong: 1 %" in result.output
    assert "Queue again what 30 users should have? [y/N]" in result.output
    assert "... and 28 more" in result.output
    assert house.buffer.snapshot().pending == 0

    result = imattr("audit", "--repair", "--yes")
    assert result.exit_code == cli.WRONG
    assert "queued  30 users, in the backfill lane" in result.output
    house.send()
    assert all(sim.api.users[user] == {"city": "Paris", "level": "Gold"} for user in lost)

    result = imattr("audit")
    assert result.exit_code == 0
    assert re.search(r"^result +0 of 3,000 wrong *$", result.output, re.MULTILINE)
    events = [event for event in History(client, keys).newest(10) if event.event == "audit"]
    assert [event.details["lost"] for event in events] == ["0", "30", "30", str(found["lost"])]
    assert events[1].details["queued"] == "30"
    assert "@" in events[1].by
    assert "Paris" not in str(events)


def test_wrong_users_are_listed_with_values_only_on_demand(imattr: Terminal, house: House) -> None:
    house.deliver(ids(3), city="Paris", level="Gold")
    house.store.users["user00001"] = {"city": "Oslo", "level": "Gold"}
    house.store.users["user00002"] = {}

    told = imattr("audit")
    assert told.exit_code == cli.WRONG
    assert "lost     1: nothing of what was delivered is there" in told.output
    assert "changed  1: by somebody else, as far as we can tell" in told.output
    lines = {" ".join(line.split()) for line in told.output.splitlines()}
    assert {"user00001 changed city 1", "user00002 lost city, level 1"} <= lines
    assert "imattr audit --repair sends again what was lost" in told.output
    assert not any(value in told.output for value in ("Paris", "Oslo", "Gold"))
    assert not any(value in imattr("audit", "--json").output for value in ("Paris", "Oslo", "Gold"))

    told = imattr("audit", "--show-values")
    assert "city: Paris, the API has Oslo" in told.output
    assert "city: Paris, the API has none" in told.output
    facts = json.loads(imattr("audit", "--show-values", "--json").stdout)
    by_user = {one["user"]: one["attributes"] for one in facts["users"]}
    assert by_user["user00001"]["city"]["found"] == "Oslo"
    assert max(map(len, told.output.splitlines())) <= 80


def test_what_somebody_else_changed_is_repaired_by_explicit_wish(imattr: Terminal, house: House) -> None:
    house.deliver(ids(2), city="Paris", level="Gold")
    house.store.users["user00001"]["city"] = "Oslo"

    assert "queued" not in imattr("audit", "--repair", "--yes").output
    assert "queued  1 user, in the backfill lane" in imattr("audit", "--repair", "changed", "--yes").output
    house.send()
    assert house.store.users["user00001"] == {"city": "Paris", "level": "Gold"}


def test_nobody_in_motion_is_judged(imattr: Terminal, house: House) -> None:
    house.deliver(ids(3), city="Paris")
    house.store.users.clear()
    house.accept(ids(2), {"city": "Rome"})
    result = imattr("audit")

    assert "1 of 1 wrong" in result.output
    assert "skipped  2: in motion, or nothing certain is remembered about them" in result.output


def test_nothing_remembered_is_told_with_the_reason(imattr: Terminal) -> None:
    result = imattr("audit")
    assert result.exit_code == 0
    assert "nothing is remembered, so nothing was delivered in the last 15 min" in result.output

    result = imattr("audit", IMATTR_SHADOW_TTL="0")
    assert result.exit_code == cli.FAILED
    assert "IMATTR_SHADOW_TTL is 0" in result.output


def test_an_api_that_refuses_is_told_with_what_to_do(imattr: Terminal, house: House, sim: Simulation) -> None:
    house.deliver(ids(3), city="Paris")
    sim.fail(Fault("code", code=90009, times=None))
    result = imattr("audit")

    assert result.exit_code == cli.FAILED
    assert "the API refused with 90009" in result.output
    assert SECRET_KEY not in result.output


def test_what_passes_is_waited_out(imattr: Terminal, house: House, sim: Simulation) -> None:
    house.deliver(ids(250), city="Paris")
    sim.fail(
        Fault("status", code=502, times=1), Fault("truncated", times=1), Fault("code", code=91000, times=1)
    )

    assert "0 of 250 wrong" in imattr("audit").output


def test_the_status_has_one_line_about_audits(imattr: Terminal, house: House) -> None:
    assert "read back" not in imattr("status").output
    house.deliver(ids(4), city="Paris")
    imattr("audit")
    assert re.search(
        r"read back +4 users since 20[-\d]+, all as delivered; last \d+ s ago", imattr("status").output
    )
    house.store.users["user00003"] = {}
    imattr("audit")
    imattr("audit")

    assert re.search(r"read back +12 users since 20[-\d]+, lost 2; last \d+ s ago", imattr("status").output)
    told = json.loads(imattr("status", "--json").stdout)["audit"]
    assert (told["checked"], told["as_delivered"], told["lost"]) == (12, 10, 2)
    assert told["since"] <= told["at"]
