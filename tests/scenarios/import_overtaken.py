"""A file of an hour ago is imported while live updates come: they overtake it, and the file overwrites none of them."""

from tests.fleet import Fleet
from tests.scenarios import Figures, figures, people
from worker.models import Update
from worker.state.buffer import MAX_UPDATES_PER_ADD, Guard


def run(fleet: Fleet) -> Figures:
    begin, users = fleet.world.monotonic(), people(5000)
    as_of_ms = fleet.world.us() // 1000 - 3_600_000
    fleet.buffer.begin_import("users.csv", as_of_ms)
    newest: dict[str, str] = {}
    waits = list[float]()
    stale = 0
    for first in range(0, len(users), MAX_UPDATES_PER_ADD):
        page = [
            Update(user, {"city": "file"}, as_of_ms) for user in users[first : first + MAX_UPDATES_PER_ADD]
        ]
        # Some before the file reaches them, some after, some who have been delivered already.
        for user in fleet.world.rng.sample(users, 20):
            newest[user] = f"live {first}"
            fleet.add([user], {"city": newest[user]})
        stale += fleet.buffer.add(page, lane="backfill", guard=Guard(as_of_ms=as_of_ms, way="import")).stale
        fleet.wait(1.0)
        waits.append(fleet.world.monotonic())
    fleet.buffer.end_import("users.csv")
    end = fleet.world.monotonic()

    remark = f"{len(newest)} users updated live meanwhile, {stale} of them before their line of the file"
    found = figures(fleet, begin, end, users=0, remark=remark)

    wanted = dict.fromkeys(users, "file") | newest
    assert {user: values["city"] for user, values in fleet.api.users.items()} == wanted, "the file won"
    assert stale > 50
    assert found.dead == 0
    return found
