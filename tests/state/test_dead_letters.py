"""Dead letters: found, shown, put back under anything newer, exported, thrown away; in any number."""

from __future__ import annotations

import json

import pytest
import redis

from worker.models import Acked, DeadLettered, Outcome, Update, UserId
from worker.state.buffer import Buffer, new_batch_id
from worker.state.dead_letters import PAGE, DeadLetters, Filter, Redriven, as_updates
from worker.state.keys import Keys

NOW = 1_700_000_000_000


class Case:
    """A buffer whose users can be delivered or buried at will."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self.client, self.keys = client, keys
        self.buffer, self.dead = Buffer(client, keys), DeadLetters(client, keys)

    def settle(self, outcome: Outcome, *, now_ms: int = NOW) -> None:
        while True:
            ticket = new_batch_id()
            self.client.zadd(self.keys.tickets, {ticket: now_ms})
            batch = self.buffer.claim(ticket, 1000, now_ms=now_ms)
            assert batch is not None
            if not batch.users:
                return
            self.buffer.settle(batch.id, {}, rest=outcome, now_ms=now_ms)

    def dead_letter(self, *users: str, code: int = 90033, at: int = NOW, **attrs: str) -> None:
        for first in range(0, len(users), 500):
            updates = [Update(user, attrs or {"city": "Paris"}) for user in users[first : first + 500]]
            self.buffer.add(updates, now_ms=at)
        self.settle(DeadLettered(code, "refused"), now_ms=at)

    def pending(self, user: str) -> dict[str, str]:
        packed = self.client.hget(self.keys.pending, user)
        return {name: value for name, (value, _) in json.loads(packed)["a"].items()} if packed else {}


@pytest.fixture
def case(client: redis.Redis, keys: Keys) -> Case:
    return Case(client, keys)


def test_letters_are_found_oldest_first_and_by_filter(case: Case) -> None:
    case.dead_letter("ann", at=NOW + 2)
    case.dead_letter("bob", code=70107, at=NOW + 1)
    case.dead_letter("cid", at=NOW + 3)

    def users(wanted: Filter) -> list[str]:
        return [letter.user for letter in case.dead.find(wanted)]

    assert users(Filter()) == ["bob", "ann", "cid"]
    assert users(Filter(code=90033)) == ["ann", "cid"]
    assert users(Filter(before_ms=NOW + 3)) == ["bob", "ann"]
    assert users(Filter(user="cid")) == ["cid"]
    assert users(Filter(user="nobody")) == []
    assert case.dead.count() == 3


@pytest.mark.parametrize("apart", [0, 1])
def test_any_number_is_read_in_pages_each_once(case: Case, apart: int) -> None:
    users = [f"user{number:05}" for number in range(2 * PAGE + 17)]
    case.dead_letter(*users)
    if apart:
        case.client.zadd(case.keys.dead_at, {user: NOW + place for place, user in enumerate(users)})

    assert [letter.user for letter in case.dead.find()] == users


def test_a_letter_put_back_is_sent_again_with_its_attempts_anew(case: Case) -> None:
    case.dead_letter("ann", city="Paris", level="Gold")

    assert case.dead.redrive({**case.dead.choose(), "nobody": 5}) == Redriven(1, 0)

    assert case.pending("ann") == {"city": "Paris", "level": "Gold"}
    assert case.dead.count() == 0
    assert case.client.zcard(case.keys.backfill) == 1
    assert case.buffer.snapshot().ledger["redriven"] == 1
    assert case.buffer.snapshot().balanced


def test_a_newer_update_takes_the_old_value_out_of_the_letter(case: Case) -> None:
    case.dead_letter("ann", city="Paris", level="Gold")

    case.buffer.add([Update("ann", {"city": "Rome"})], now_ms=NOW + 1)

    [letter] = case.dead.find()
    assert set(letter.values) == {"level"}
    case.buffer.add([Update("ann", {"level": "Silver"})], now_ms=NOW + 1)
    assert case.dead.count() == 0
    assert case.client.zcard(case.keys.dead_at) == 0


def test_a_letter_put_back_goes_under_what_is_pending(case: Case) -> None:
    case.dead_letter("ann", city="Paris", level="Gold")
    case.buffer.add([Update("ann", {"city": "Rome"})], now_ms=NOW + 1)

    case.dead.redrive(case.dead.choose())

    assert case.pending("ann") == {"city": "Rome", "level": "Gold"}
    assert case.buffer.snapshot().balanced


def test_a_letter_that_is_outdated_altogether_changes_nothing(case: Case) -> None:
    case.dead_letter("ann", city="Paris")
    letter = case.client.hget(case.keys.dead, "ann")
    case.buffer.add([Update("ann", {"city": "Rome"})], now_ms=NOW + 1)
    case.settle(Acked(), now_ms=NOW + 2)
    # As if the letter had come back from an old copy.
    case.client.hset(case.keys.dead, "ann", letter or b"")
    case.client.zadd(case.keys.dead_at, {"ann": NOW})

    assert case.dead.redrive({"ann": NOW}) == Redriven(1, 1)
    assert case.pending("ann") == {}
    assert case.buffer.snapshot().balanced


def test_letters_are_thrown_away_for_good(case: Case) -> None:
    case.dead_letter("ann", "bob")

    assert case.dead.purge({**case.dead.choose(Filter("ann")), "nobody": 5}) == 1
    assert [letter.user for letter in case.dead.find()] == ["bob"]
    assert case.buffer.snapshot().balanced


def test_what_was_looked_at_is_what_is_thrown_away_or_put_back(case: Case) -> None:
    case.dead_letter("ann", "bob", city="Paris")
    looked_at = case.dead.choose()

    # Meanwhile one of them is sent again and given up again, and another is new.
    case.dead.redrive(case.dead.choose(Filter("ann")))
    case.settle(DeadLettered(90033, "refused"), now_ms=NOW + 50)
    case.dead_letter("cid", city="Paris")

    assert case.dead.redrive({"ann": looked_at["ann"]}) == Redriven(0, 0)
    assert case.dead.purge(looked_at) == 1
    assert sorted(letter.user for letter in case.dead.find()) == ["ann", "cid"]


def test_an_exported_letter_keeps_the_time_of_each_value(case: Case) -> None:
    case.buffer.add([Update("ann", {"city": "Paris", "level": "Gold"}, NOW - 5)], now_ms=NOW)
    case.buffer.add([Update("ann", {"city": "Rome"}, NOW - 3)], now_ms=NOW)
    case.settle(DeadLettered(90033, "refused"))

    [letter] = case.dead.find()

    assert list(as_updates(letter)) == [
        {"user": "ann", "attrs": {"level": "Gold"}, "occurred_at": NOW - 5},
        {"user": "ann", "attrs": {"city": "Rome"}, "occurred_at": NOW - 3},
    ]


def test_an_update_after_the_clock_was_set_back_is_newer_than_the_dead_letter(
    client: redis.Redis, keys: Keys
) -> None:
    """Nothing else remembers the version that was given up: no shadow, nothing pending."""
    buffer, letters = Buffer(client, keys, shadow_ttl=0), DeadLetters(client, keys)
    buffer.add([Update("ann", {"city": "Rome", "level": "Gold"})], now_ms=NOW)
    ticket = new_batch_id()
    client.zadd(keys.tickets, {ticket: 1})
    buffer.claim(ticket, 100, now_ms=NOW)
    buffer.settle(ticket, {UserId("ann"): DeadLettered(70107, "")}, now_ms=NOW)

    buffer.add([Update("ann", {"city": "Oslo"})], now_ms=NOW - 60_000)
    letters.redrive(letters.choose())

    ticket = new_batch_id()
    client.zadd(keys.tickets, {ticket: 1})
    batch = buffer.claim(ticket, 100, now_ms=NOW)
    assert batch
    assert [user.attrs for user in batch.users] == [{"city": "Oslo", "level": "Gold"}]
