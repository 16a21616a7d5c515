"""Everything real: differences planted in the API are found, repaired, and found no more, while updates go on."""

from __future__ import annotations

import json
import random
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.test_end_to_end import System, running, wait_until
from worker.cli.main import main
from worker.sandbox.processes import Plan

#: Real workers start in seconds.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

USERS = [f"user{n:05}" for n in range(5000)]


def cli(system: System, *arguments: str) -> Any:
    done = CliRunner().invoke(main, [*arguments, "--json"], env=system.sandbox.environ)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def plant(system: System, values: dict[str, dict[str, str]]) -> None:
    system.simulator("users", values).raise_for_status()


def test_planted_differences_are_found_repaired_and_gone(tmp_path: Path) -> None:
    path, chance = tmp_path / "users.csv", random.Random(7)
    path.write_text("user,city,level\n" + "".join(f"{user},Paris,3\n" for user in USERS))
    plan = Plan(workers=2, concurrency=8, flower=False)
    with running(tmp_path / "sandbox", plan, IMATTR_READ_QUOTA="100") as system:
        system.simulator("quirks", {"reads": "apart"})
        # Half of them were delivered, and are remembered; the others are as somebody else has left them.
        system.producer.set_many((user, {"city": "Paris", "level": "3"}) for user in USERS[:2500])
        wait_until(system.settled)
        plant(system, {user: {"city": "Paris", "level": "3"} for user in USERS[2500:]})
        lost = chance.sample(USERS, 200)
        plant(system, {user: {"city": "Rome", "tier": "gold"} for user in lost})

        found = cli(system, "plan", str(path))

        assert (found["users_by_fate"]["differs"], found["users_by_fate"]["same"]) == (200, 4800)
        assert (found["change"], found["set"], found["remove"], found["calls"]) == (200, 200, 0, 50)
        lines = [json.loads(line) for line in (tmp_path / "users.csv.plan").read_text().splitlines()]
        assert {line["user"] for line in lines if "changes" in line} == set(lost)
        assert cli(system, "apply", f"{path}.plan", "--yes")["queued"] == 200
        wait_until(system.settled)
        assert cli(system, "plan", str(path))["users_by_fate"]["same"] == 5000
        applied = system.simulator("users")
        assert all(applied[user] == {"city": "Paris", "level": "3", "tier": "gold"} for user in lost)
        assert system.snapshot().balanced


def test_updates_that_come_meanwhile_are_never_overwritten(tmp_path: Path) -> None:
    path, chance = tmp_path / "users.csv", random.Random(8)
    path.write_text("user,city,level\n" + "".join(f"{user},Paris,3\n" for user in USERS))
    plan = Plan(workers=2, concurrency=8, flower=False)
    newest: dict[str, tuple[int, str]] = {}
    with running(tmp_path / "sandbox", plan, IMATTR_READ_QUOTA="100") as system:
        system.simulator("quirks", {"reads": "apart"})
        plant(system, {user: {"city": "Rome", "level": "2"} for user in USERS})
        ended = threading.Event()

        def update() -> None:
            # Among them what the API has, and what the file says.
            while not ended.wait(0.005):
                for user in chance.sample(USERS, 10):
                    city = chance.choice(["Rome", "Paris", "Oslo", "Bern"])
                    newest[user] = system.producer.now_ms(), city
                    system.producer.set(user, {"city": city})

        thread = threading.Thread(target=update)
        thread.start()
        try:
            found = cli(system, "plan", str(path))
            wait_until(lambda: len(newest) > 1000)
            done = cli(system, "apply", f"{path}.plan", "--yes")
        finally:
            ended.set()
            thread.join()
        wait_until(system.settled)

        applied = system.simulator("users")
        # What was accepted before the plan was begun is older than the file.
        began = datetime.fromisoformat(found["as_of"]).timestamp() * 1000
        after = {user: city for user, (at, city) in newest.items() if at > began}
        assert {user: applied[user]["city"] for user in after} == after
        assert len(after) > 900
        assert done["queued"] > 1000
        assert done["changed"] + done["in_motion"] > 0
        untouched = set(USERS) - newest.keys()
        assert all(applied[user] == {"city": "Paris", "level": "3"} for user in untouched)
        assert system.snapshot().balanced
