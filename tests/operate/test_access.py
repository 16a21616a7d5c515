"""The users that `imattr doctor --acl` names: for which servers, and what their rules cover. A real server judges them in
`tests/test_access.py`."""

from __future__ import annotations

import re

from worker.config import Settings
from worker.operate.access import Access, accesses
from worker.state import scripts


def named(redis_url: str, **environ: str) -> list[Access]:
    environ = {f"IMATTR_{name}": value for name, value in environ.items()}
    settings = environ | {"IMATTR_REDIS_URL": redis_url, "IMATTR_SDKAPPID": "14"}
    return accesses(Settings.from_env(settings, "producer"))


def rules(given: Access) -> set[str]:
    return set(given.rules.split(" "))


def test_one_server_has_one_user_with_the_keys_of_the_app_and_of_celery() -> None:
    [given] = named("redis://app:hunter22@h/2")

    assert given.line.startswith(
        "ACL SETUSER app reset on >PASSWORD resetchannels -@all ~{imattr:14}:* ~updates "
    )
    assert {"&/2.celery.pidbox", "&/2.celeryev/*", "+select", "+brpop", "+script|load"} <= rules(given)
    assert "hunter22" not in f"{given}"


def test_another_server_for_the_broker_has_a_user_of_its_own() -> None:
    state, broker = named("redis://h", BROKER_URL="redis://celery:hunter22@b", BROKER_PREFIX="ours:")

    assert (state.user, broker.user) == ("imattr", "celery")
    assert (state.server, broker.server) == (
        "the state, h:6379, database 0",
        "Celery's broker, b:6379, database 0",
    )
    assert {rule for rule in rules(state) if rule[0] in "~&"} == {"~{imattr:14}:*"}
    assert {"~ours:updates", "~ours:unacked", "&ours:/0.celery.pidbox"} <= rules(broker)
    assert not any(rule.startswith("~{imattr") for rule in rules(broker))
    assert not {"+brpop", "+publish", "+eval", "+select"} & rules(state)
    assert not {"+xadd", "+hgetall", "+select"} & rules(broker)


def test_another_database_of_the_same_server_has_the_same_user_and_another_user_none_of_his_rules() -> None:
    [both] = named("redis://app@h", BROKER_URL="redis://app@h/1")
    _, broker = named("redis://app@h", BROKER_URL="redis://celery@h/1")

    assert {"&/1.celery.pidbox", "+select"} <= rules(both)
    assert broker.user == "celery"


def test_rabbitmq_needs_no_user_of_redis() -> None:
    [given] = named("redis://h", BROKER_URL="amqp://guest@b//")

    assert {"+zmscore", "+zremrangebyscore"} <= rules(given)
    assert not {"+brpop", "~updates"} & rules(given)


def test_a_cluster_is_asked_where_the_slot_is_and_has_celerys_keys_in_it() -> None:
    [given] = named("redis+cluster://a:1,b:2")

    assert {"+cluster|slots", "~{imattr:14}.updates", "&{imattr:14}./0.celery.pidbox"} <= rules(given)


def test_sentinels_have_a_user_of_their_own_if_they_have_one_at_all() -> None:
    assert len(named("redis+sentinel://app@a,b/mine")) == 1

    _, sentinels = named("redis+sentinel://app@a,b/mine?sentinel_username=asks&sentinel_password=hunter22")

    assert (
        sentinels.line
        == "ACL SETUSER asks reset on >PASSWORD resetchannels -@all +sentinel|get-master-addr-by-name +sentinel|master"
    )


def test_whoever_waits_for_replicas_may_do_so() -> None:
    assert "+wait" in rules(*named("redis://h", REPLICAS="1"))
    assert "+waitaof" in rules(*named("redis://h", REPLICAS="1", REPLICAS_FSYNC="1"))
    assert not {"+wait", "+waitaof"} & rules(*named("redis://h"))


def test_a_user_that_everybody_is_gets_a_name() -> None:
    assert [named(url)[0].user for url in ("redis://h", "redis://:pw@h", "redis://default:pw@h")] == [
        "imattr"
    ] * 3


def test_what_any_script_runs_is_allowed() -> None:
    [given] = named("redis://h")

    for name in scripts.names():
        for command in re.findall(r"redis\.p?call\('(\w+)'", scripts.source(name)):
            allowed = {rule[1:].partition("|")[0] for rule in rules(given) if rule[0] == "+"}
            assert command.lower() in allowed, (name, command)


def test_nothing_that_endangers_others_on_the_server_is_allowed() -> None:
    for given in named("redis+cluster://a", BROKER_URL="redis+sentinel://b/mine", REPLICAS="1"):
        assert not re.search(
            r"\+(@|\*|all|config|acl|flush|keys|debug|shutdown|save|slaveof|replicaof|module|client|monitor)",
            given.rules,
        )
        assert not {"~*", "&*", "nopass", "allkeys", "allchannels"} & rules(given)
