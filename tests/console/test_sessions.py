"""Sessions and the tokens of forms: what Redis has of them, and when they end."""

from __future__ import annotations

import redis

from worker.console import sessions
from worker.console.sessions import LASTS, FormTokens, Sessions
from worker.state.keys import Keys
from worker.state.scripts import text


class Wall:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_is_known_to_every_replica_until_it_ends(client: redis.Redis, keys: Keys) -> None:
    wall = Wall()
    one, other = Sessions(client, keys, wall), Sessions(client, keys, wall)

    secret = one.open("ann", "proof")

    found = other.find(secret)
    assert found is not None
    assert (found.name, found.proof) == ("ann", "proof")
    wall.now += LASTS
    assert other.find(secret) is None


def test_who_reads_redis_has_no_session(client: redis.Redis, keys: Keys) -> None:
    one = Sessions(client, keys)
    secret = one.open("ann", "proof")

    [(digest, about)] = client.hgetall(keys.console_sessions).items()

    assert secret not in text(digest) + text(about)
    assert one.find(text(digest)) is None


def test_a_session_that_is_closed_is_closed_everywhere(client: redis.Redis, keys: Keys) -> None:
    one, other = Sessions(client, keys), Sessions(client, keys)
    secret = one.open("ann", "proof")

    other.close(secret)

    assert one.find(secret) is None


def test_sessions_that_have_ended_and_too_many_are_forgotten(client: redis.Redis, keys: Keys) -> None:
    wall = Wall()
    one = Sessions(client, keys, wall)
    client.hset(keys.console_sessions, "damaged", "{")
    first = one.open("ann", "proof")
    wall.now += 1
    second = one.open("ann", "proof")
    assert one.find(first)

    for _ in range(sessions.MOST - 1):
        wall.now += 0.001
        one.open("bob", "proof")

    assert client.hlen(keys.console_sessions) == sessions.MOST
    assert one.find(first) is None
    assert one.find(second)
    wall.now += LASTS
    one.open("ann", "proof")
    assert client.hlen(keys.console_sessions) == 1


def test_what_is_damaged_in_redis_is_no_session(client: redis.Redis, keys: Keys) -> None:
    one = Sessions(client, keys)
    for about in (
        "{",
        "[]",
        "null",
        '{"name": 1}',
        '{"name": "a", "proof": "b", "until": "x"}',
        "[" * 99_999,
    ):
        client.hset(keys.console_sessions, sessions._digest("secret"), about)

        assert one.find("secret") is None


def test_a_token_belongs_to_one_session(client: redis.Redis, keys: Keys) -> None:
    tokens = FormTokens(client, keys)

    assert tokens.of_session("one") == FormTokens(client, keys).of_session("one") != tokens.of_session("two")


def test_a_visitors_token_cannot_be_made_from_its_cookie(client: redis.Redis, keys: Keys) -> None:
    wall = Wall()
    tokens = FormTokens(client, keys, wall)

    mine = tokens.of_visitor("cookie", "ann")

    assert mine == FormTokens(client, keys).of_visitor("cookie", "ann")
    assert (
        len(
            {
                mine,
                tokens.of_visitor("cookie", "bob"),
                tokens.of_visitor("other", "ann"),
                tokens.of_session("cookie"),
            }
        )
        == 4
    )
    # Another server, or one that was emptied: all consoles soon agree on the new key.
    client.set(keys.console_key, "another")
    wall.now += sessions.KEY_KEPT
    assert tokens.of_visitor("cookie", "ann") != mine
