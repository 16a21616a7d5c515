"""The way in: what is accepted, what is refused, and that nothing else is lost with it."""

from __future__ import annotations

import multiprocessing
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import redis

from tests.conftest import ManualClock
from worker.errors import BufferFull, InvalidUpdate
from worker.models import Acked, BulkResult, Refusal
from worker.producer import MEMORY_EVERY, Memory, NoRoom, Producer
from worker.sandbox.redis_server import EmbeddedServer, free_port
from worker.state.attribute_names import FRESH_FOR, AttributeNames
from worker.state.buffer import Buffer, new_batch_id
from worker.state.keys import Keys


@pytest.fixture
def producer(server: EmbeddedServer, keys: Keys) -> Producer:
    return Producer(server.url, keys.sdkappid)


def deliver_all(client: redis.Redis, keys: Keys) -> None:
    buffer, ticket = Buffer(client, keys), new_batch_id()
    client.zadd(keys.tickets, {ticket: 1})
    batch = buffer.claim(ticket, 1000)
    assert batch is not None
    buffer.settle(batch.id, {}, rest=Acked())


def test_set_says_what_became_of_the_update(producer: Producer, client: redis.Redis, keys: Keys) -> None:
    assert producer.set("ann", {"city": "Paris"}, 1_750_000_000) == "pending"
    assert producer.set("ann", {"level": "Gold"}) == "coalesced"
    deliver_all(client, keys)
    assert producer.set("ann", {"city": "Paris"}, 1_750_000_001) == "unchanged"
    assert producer.set("ann", {"city": "Rome"}, 1_700_000_000) == "stale"
    assert producer.set("ann", {"city": "Rome"}, 1_750_000_002) == "pending"


def test_an_invalid_update_is_refused_and_changes_nothing(
    producer: Producer, client: redis.Redis, keys: Keys
) -> None:
    with pytest.raises(InvalidUpdate, match=r"^user ann: the value of 'city' is 51 bytes, at most 50$"):
        producer.set("ann", {"city": "字" * 17})

    assert client.exists(keys.pending, keys.ledger) == 0


def test_a_full_buffer_refuses_new_users_only(server: EmbeddedServer, keys: Keys) -> None:
    producer = Producer(server.url, keys.sdkappid, max_pending=1)
    producer.set("ann", {"city": "Paris"})

    with pytest.raises(BufferFull, match=r"user bob: the buffer is full, 1 users are pending"):
        producer.set("bob", {"city": "Rome"})
    assert producer.set("ann", {"city": "Rome"}) == "coalesced"
    assert producer.set_many([("cid", {"city": "Oslo"}), ("ann", {"city": "Bern"})]) == BulkResult(
        accepted=1,
        coalesced=1,
        refused=[NoRoom(0, "cid", "the buffer is full, 1 users are pending (IMATTR_MAX_PENDING)")],
    )


def test_in_bulk_the_good_ones_go_through_and_the_others_come_back_with_reasons(producer: Producer) -> None:
    def given() -> Iterator[object]:
        yield ("ann", {"city": "Paris"})
        yield ("", {"city": "Paris"})
        yield ["bob", {"city": "x" * 60}, None]
        yield "nonsense"
        yield ("cid", {"city": "Rome"}, "2026-11-01T12:00:00Z")
        yield ("dan",)
        yield ("ann", {"city": "Rome"})

    result = producer.set_many(given())

    assert (result.accepted, result.coalesced) == (3, 1)
    assert result.refused == [
        Refusal(1, "''", "user id is empty"),
        Refusal(2, "bob", "the value of 'city' is 60 bytes, at most 50"),
        Refusal(3, "?", "an update must be (user, attributes[, occurred_at]), got str"),
        Refusal(5, "?", "an update must be (user, attributes[, occurred_at]), got tuple"),
    ]


def test_a_bulk_of_any_size_passes(producer: Producer) -> None:
    result = producer.set_many((f"user{number}", {"city": "Paris"}) for number in range(1701))

    assert result == BulkResult(accepted=1701)
    assert producer.set_many([]) == BulkResult()


def test_a_bulk_of_backfill_goes_behind(producer: Producer, client: redis.Redis, keys: Keys) -> None:
    producer.set_many([("ann", {"city": "Paris"})], lane="backfill")

    assert client.zcard(keys.backfill) == 1


def test_names_are_checked_where_they_are_known(producer: Producer, client: redis.Redis, keys: Keys) -> None:
    AttributeNames(client, keys, ManualClock()).set(["city"])

    with pytest.raises(InvalidUpdate, match=r"attribute 'shoe' is not one of the app's \(city\)"):
        producer.set("ann", {"shoe": "44"})


def test_names_are_read_once_in_a_while(client: redis.Redis, keys: Keys) -> None:
    clock = ManualClock()
    names = AttributeNames(client, keys, clock)
    assert names.get() == frozenset()

    client.sadd(keys.names, "city")
    assert names.get() == frozenset()
    clock.now += FRESH_FOR + 1
    assert names.get() == {"city"}

    names.set([])
    assert names.get() == frozenset()


def test_a_producer_is_made_from_the_environment(server: EmbeddedServer, keys: Keys) -> None:
    environ = {
        "IMATTR_REDIS_URL": server.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_MAX_PENDING": "1",
    }

    producer = Producer.from_env(environ)

    assert producer.set_many([("ann", {"a": "1"}), ("bob", {"a": "1"})]).accepted == 1


@pytest.fixture
def small_memory(server: EmbeddedServer, client: redis.Redis) -> Iterator[Callable[[float], None]]:
    """Sets the server's memory limit, as a share of what is in use."""

    def limit(share: float) -> None:
        client.config_set("maxmemory", round(client.info("memory")["used_memory"] / share))

    yield limit
    client.config_set("maxmemory", 0)


def test_near_the_memory_limit_of_redis_new_users_are_refused(
    server: EmbeddedServer, keys: Keys, small_memory: Callable[[float], None]
) -> None:
    Producer(server.url, keys.sdkappid).set("ann", {"city": "Paris"})
    small_memory(0.92)
    producer = Producer(server.url, keys.sdkappid)

    rule = "the buffer is full, Redis is near its memory limit (maxmemory)"
    with pytest.raises(BufferFull, match=re.escape(f"user bob: {rule}")):
        producer.set("bob", {"city": "Rome"})
    assert producer.set("ann", {"city": "Rome"}) == "coalesced"
    assert producer.set_many([("cid", {"city": "Oslo"})]).refused == [NoRoom(0, "cid", rule)]
    assert not producer.has_room()


def test_with_memory_to_spare_nobody_is_refused(
    server: EmbeddedServer, keys: Keys, small_memory: Callable[[float], None]
) -> None:
    small_memory(0.8)

    assert Producer(server.url, keys.sdkappid).set("bob", {"city": "Rome"}) == "pending"


def test_near_the_memory_limit_not_even_a_first_user_is_accepted_but_one_in_flight_is(
    server: EmbeddedServer, client: redis.Redis, keys: Keys, small_memory: Callable[[float], None]
) -> None:
    Producer(server.url, keys.sdkappid).set("ann", {"city": "Paris"})
    buffer, ticket = Buffer(client, keys), new_batch_id()
    client.zadd(keys.tickets, {ticket: 1})
    assert buffer.claim(ticket, 100)
    small_memory(0.95)

    result = Producer(server.url, keys.sdkappid).set_many([("ann", {"a": "1"}), ("bob", {"a": "1"})])

    assert (result.accepted, [refusal.user for refusal in result.refused]) == (1, ["bob"])


def test_the_memory_is_looked_at_once_a_second(
    client: redis.Redis, clock: ManualClock, small_memory: Callable[[float], None]
) -> None:
    memory = Memory(client, clock)
    assert not memory.is_short()
    small_memory(0.95)

    assert not memory.is_short()
    clock.now += MEMORY_EVERY
    assert memory.is_short()


def test_a_service_that_hides_its_memory_counts_as_roomy(client: redis.Redis, clock: ManualClock) -> None:
    class Hidden:
        def info(self, section: str) -> None:
            raise redis.ResponseError("unknown command 'INFO'")

    hidden: Any = Hidden()
    assert not Memory(hidden, clock).is_short()


def test_there_is_room_as_far_as_a_share_of_it_is_asked_for(server: EmbeddedServer, keys: Keys) -> None:
    assert Producer(server.url, keys.sdkappid).has_room(0.5)
    producer = Producer(server.url, keys.sdkappid, max_pending=10)
    producer.set_many((f"user{number}", {"a": "1"}) for number in range(9))

    assert (producer.has_room(), producer.has_room(0.2)) == (True, False)
    producer.set("last", {"a": "1"})
    assert not producer.has_room()


@pytest.mark.parametrize("many", [False, True])
def test_a_redis_that_never_answers_is_an_error_soon(many: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        producer = Producer(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", 1, timeout=0.1)
        give = (
            partial(producer.set_many, [("ann", {"a": "1"})])
            if many
            else partial(producer.set, "ann", {"a": "1"})
        )

        with pytest.raises(redis.exceptions.TimeoutError):
            give()


def test_errors_of_redis_pass_through_unchanged() -> None:
    with pytest.raises(redis.exceptions.ConnectionError):
        Producer(f"redis://127.0.0.1:{free_port()}/0", 1).set("ann", {"city": "Paris"})


def test_any_mapping_is_good_for_attributes(server: EmbeddedServer, keys: Keys) -> None:
    producer = Producer(server.url, keys.sdkappid)

    assert producer.set("ann", MappingProxyType({"city": "Paris"})) == "pending"


def test_a_refusal_beyond_the_first_500_has_its_place_in_the_whole_bulk(producer: Producer) -> None:
    given: list[object] = [(f"user{number}", {"city": "Paris"}) for number in range(1200)]
    given[3] = given[700] = given[1199] = ("", {"city": "Paris"})

    result = producer.set_many(given)

    assert [refusal.index for refusal in result.refused] == [3, 700, 1199]
    assert result.accepted == 1197


def test_a_full_buffer_names_the_right_user_when_invalid_ones_stand_before(
    server: EmbeddedServer, keys: Keys
) -> None:
    producer = Producer(server.url, keys.sdkappid, max_pending=1)
    good = {"city": "Paris"}

    result = producer.set_many([("", good), ("ann", good), (7, good), ("bob", good), ("ann", good)])

    assert sorted((refusal.index, refusal.user) for refusal in result.refused) == [
        (0, "''"),
        (2, "7"),
        (3, "bob"),
    ]
    assert (result.accepted, result.coalesced) == (2, 1)


def test_a_bulk_counts_what_is_unchanged_and_what_is_stale(
    producer: Producer, client: redis.Redis, keys: Keys
) -> None:
    producer.set("ann", {"city": "Paris"}, 1_750_000_000)
    deliver_all(client, keys)

    result = producer.set_many(
        [("ann", {"city": "Paris"}, 1_750_000_001), ("ann", {"city": "Rome"}, 1_700_000_000)]
    )

    assert result == BulkResult(accepted=2, unchanged=1, stale=1)


def test_names_are_checked_in_bulk_too(producer: Producer, client: redis.Redis, keys: Keys) -> None:
    AttributeNames(client, keys, ManualClock()).set(["city"])

    result = producer.set_many([("ann", {"shoe": "44"}), ("ann", {"city": "Paris"})])

    assert (result.accepted, result.refused[0].rule) == (1, "attribute 'shoe' is not one of the app's (city)")


def test_swapped_arguments_show_no_value(producer: Producer) -> None:
    with pytest.raises(InvalidUpdate, match="user <dict>: user id must be a string, got dict"):
        producer.set({"city": "Paris"}, "ann")  # type: ignore[arg-type]


def test_a_producer_made_before_a_fork_and_used_by_threads_is_safe(
    producer: Producer, client: redis.Redis, keys: Keys
) -> None:
    producer.set("parent", {"city": "Paris"})

    def work(name: str) -> None:
        for number in range(50):
            assert producer.set(f"{name}{number}", {"city": "Paris"}) == "pending"

    child = multiprocessing.get_context("fork").Process(target=work, args=("child",))
    threads = [threading.Thread(target=work, args=(f"thread{number}-",)) for number in range(4)]
    child.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    child.join(30)

    assert child.exitcode == 0
    assert client.hlen(keys.pending) == 1 + 50 * 5


def test_a_connection_that_the_server_dropped_is_made_anew(producer: Producer, client: redis.Redis) -> None:
    producer.set("ann", {"city": "Paris"})

    client.client_kill_filter(_type="normal", skipme=True)

    assert producer.set("ann", {"city": "Rome"}) == "coalesced"
