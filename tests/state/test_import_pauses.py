"""A person's wish that an import waits: who has it, and that it goes with the import."""

from __future__ import annotations

import redis

from worker.state.buffer import Buffer
from worker.state.history import History
from worker.state.import_pauses import ImportPauses
from worker.state.keys import Keys


def test_only_an_unfinished_import_is_paused_and_by_the_first_who_says_so(
    client: redis.Redis, keys: Keys
) -> None:
    pauses, buffer = ImportPauses(client, keys), Buffer(client, keys)
    assert not pauses.pause("host:/a.csv", "later", by="ann")
    buffer.begin_import("host:/a.csv", 1)

    assert pauses.pause("host:/a.csv", "later", by="ann")
    assert not pauses.pause("host:/a.csv", "never", by="bob")

    found = pauses.find("host:/a.csv")
    assert found is not None
    assert (found.by, found.reason) == ("ann", "later")
    assert pauses.everyone() == {"host:/a.csv": found}
    assert pauses.resume("host:/a.csv", by="bob")
    assert not pauses.resume("host:/a.csv", by="bob")
    assert pauses.find("host:/a.csv") is None
    events = History(client, keys).newest(2)
    assert [(event.event, event.by, event.details.get("reason")) for event in events] == [
        ("import_resumed", "bob", None),
        ("import_paused", "ann", "later"),
    ]


def test_an_import_that_has_ended_is_not_paused_the_next_time_and_the_history_has_no_user(
    client: redis.Redis, keys: Keys
) -> None:
    pauses, buffer = ImportPauses(client, keys), Buffer(client, keys)
    buffer.begin_import("host:/a.csv", 1)
    pauses.pause("host:/a.csv", "later", by="ann")
    buffer.show_import("host:/a.csv", {"lines": 7, "refusals": [[3, "secretuser", "rule"]]})

    buffer.end_import("host:/a.csv")

    assert pauses.everyone() == {}
    ended = History(client, keys).newest(1)[0]
    assert ended.details["last_seen"] == '{"lines":7}'


def test_a_pause_that_cannot_be_read_is_one(client: redis.Redis, keys: Keys) -> None:
    client.hset(keys.import_pauses, "host:/a.csv", "{")

    found = ImportPauses(client, keys).find("host:/a.csv")

    assert found is not None
    assert found.by == "somebody"
