"""What was refused after it had left its sender: kept, capped, and shown to a person only."""

from __future__ import annotations

import json

import pytest
import redis
from click.testing import CliRunner

from worker.cli.main import main
from worker.errors import InvalidUpdate
from worker.sandbox.redis_server import EmbeddedServer
from worker.state import refused as module
from worker.state.keys import Keys
from worker.state.refused import MAX_PAYLOAD, Refused


@pytest.fixture
def refused(client: redis.Redis, keys: Keys) -> Refused:
    return Refused(client, keys)


def keep(refused: Refused, user: str = "ann", value: str = "Xanadu") -> None:
    refused.keep("celery", [(InvalidUpdate(user, "a rule"), [user, {"city": value}])])


def test_the_newest_come_first_with_all_that_is_known(refused: Refused, client: redis.Redis) -> None:
    keep(refused, "ann")
    keep(refused, "bob", "字")

    newest, older = refused.newest(10)

    assert (newest.source, newest.user, newest.rule) == ("celery", "bob", "a rule")
    assert json.loads(newest.payload) == ["bob", {"city": "字"}]
    assert refused.find(older.id) == older
    seconds, _ = client.time()
    assert abs(newest.at_ms / 1000 - seconds) < 60
    assert [kept.user for kept in refused.newest(1)] == ["bob"]
    assert refused.find("1-1") is None


def test_a_long_payload_is_cut_and_half_a_character_does_no_harm(refused: Refused) -> None:
    keep(refused, "ann", "x" * 5000)
    keep(refused, "bob", "\ud800")

    odd, long = refused.newest(2)

    assert len(long.payload) == MAX_PAYLOAD
    assert "?" in odd.payload


def test_only_the_newest_are_kept(
    refused: Refused, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 200)

    for number in range(1000):
        keep(refused, f"user{number}")

    # Redis drops whole blocks, so there may be some more.
    assert 200 <= refused.count() <= 400
    assert refused.newest(1)[0].user == "user999"


def test_purge_throws_all_away(refused: Refused) -> None:
    keep(refused)
    keep(refused)

    newest = refused.newest(1)[0].id
    keep(refused)

    assert refused.purge(newest) == 2
    assert refused.count() == 1, "what came since stays"
    assert refused.purge(newest) == 0


def imattr(server: EmbeddedServer, keys: Keys, *arguments: str, given: str = "") -> tuple[int, str]:
    environ = {"IMATTR_REDIS_URL": server.url, "IMATTR_SDKAPPID": str(keys.sdkappid)}
    result = CliRunner().invoke(main, ["refused", *arguments], env=environ, input=given)
    return result.exit_code, result.output


def test_the_list_shows_no_payload_and_show_does(
    refused: Refused, server: EmbeddedServer, keys: Keys
) -> None:
    keep(refused, "ann")
    keep(refused, "bob")

    code, text = imattr(server, keys, "list")
    assert code == 0
    assert "Xanadu" not in text
    assert text.index("bob") < text.index("ann")
    code, text = imattr(server, keys, "list", "--json", "--limit", "1")
    (fact,) = map(json.loads, text.splitlines())
    assert fact.keys() == {"id", "refused_at", "source", "user", "rule"}
    assert (fact["source"], fact["user"], fact["rule"]) == ("celery", "bob", "a rule")

    code, text = imattr(server, keys, "show", fact["id"])
    assert (code, json.loads(text)["payload"]) == (0, '["bob", {"city": "Xanadu"}]')


@pytest.mark.parametrize("id", ["1-1", "nonsense"])
def test_what_is_not_kept_cannot_be_shown(server: EmbeddedServer, keys: Keys, id: str) -> None:
    code, text = imattr(server, keys, "show", id)

    assert (code, text) == (1, f"error: there is no refused update with id {id}\n")


def test_purge_asks_first(refused: Refused, server: EmbeddedServer, keys: Keys) -> None:
    assert imattr(server, keys, "purge") == (0, "0 deleted\n")
    keep(refused)

    code, text = imattr(server, keys, "purge", given="n\n")
    assert code == 1
    assert "Delete 1 refused update for good?" in text
    assert refused.count() == 1
    assert imattr(server, keys, "purge", "--yes") == (0, "1 deleted\n")
    assert refused.count() == 0
    assert imattr(server, keys, "list") == (0, "no refused updates\n")
