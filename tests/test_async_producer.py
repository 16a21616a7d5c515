"""The producer for asyncio: the same answers as `Producer`, many at once, and no call that waits for ever."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from worker.async_producer import AsyncProducer
from worker.errors import BufferFull, ConfigError, InvalidUpdate
from worker.producer import NoRoom, Producer
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.buffer import Buffer
from worker.state.keys import Keys

Play = Callable[[AsyncProducer], Coroutine[Any, Any, Any]]


@asynccontextmanager
async def producer(server: EmbeddedServer, keys: Keys, **options: Any) -> AsyncIterator[AsyncProducer]:
    async with AsyncProducer(server.url, keys.sdkappid, **options) as made:
        yield made


def play(server: EmbeddedServer, keys: Keys, story: Play, **options: Any) -> Any:
    async def run() -> Any:
        async with producer(server, keys, **options) as made:
            return await story(made)

    return asyncio.run(run())


#: What both producers are asked, in this order.
UPDATES: list[Any] = [
    ("ann", {"city": "Paris"}),
    ("ann", {"city": "Oslo"}),
    ("bob", {"city": "Rome"}, 1_700_000_000),
    ("bob", {"city": "Bern"}, 1_600_000_000),
    ("bob", {"city": None}),
]
BAD: list[Any] = [
    ("ann", {"city": "x" * 60}),
    ("", {"city": "Paris"}),
    ("eve",),
    ("eve", {"city": "Paris"}, "no time"),
]


def test_each_update_has_the_answer_that_producer_gives(server: EmbeddedServer, client: redis.Redis) -> None:
    keys, other = Keys(1_490_000_001), Keys(1_490_000_002)
    sync = Producer(server.url, keys.sdkappid)
    expected = [sync.set(*update) for update in UPDATES]

    async def story(producer: AsyncProducer) -> list[str]:
        return [await producer.set(*update) for update in UPDATES]

    assert play(server, other, story) == expected

    def kept(found: Keys) -> dict[Any, Any]:
        return {
            user: sorted(json.loads(record)["a"]) for user, record in client.hgetall(found.pending).items()
        }

    assert kept(keys) == kept(other)
    assert Buffer(client, other).snapshot().balanced


def test_a_bulk_has_the_result_that_producer_gives(server: EmbeddedServer) -> None:
    keys, other = Keys(1_490_000_003), Keys(1_490_000_004)
    given = [*UPDATES, *BAD, *((f"u{number}", {"city": "Paris"}) for number in range(500))]
    expected = Producer(server.url, keys.sdkappid).set_many(given)

    assert play(server, other, lambda producer: producer.set_many(given)) == expected


@pytest.mark.parametrize("update", BAD[:2])
def test_an_invalid_update_is_refused_with_its_rule(server: EmbeddedServer, keys: Keys, update: Any) -> None:
    with pytest.raises(InvalidUpdate):
        play(server, keys, lambda producer: producer.set(*update))


def test_a_name_that_the_app_does_not_have_is_refused(
    server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    client.sadd(keys.names, "city")

    async def story(producer: AsyncProducer) -> frozenset[str]:
        with pytest.raises(InvalidUpdate, match="level"):
            await producer.set("ann", {"level": "Gold"})
        return await producer.names()

    assert play(server, keys, story) == {"city"}


def test_new_users_find_no_room_and_pending_ones_do(server: EmbeddedServer, keys: Keys) -> None:
    async def story(producer: AsyncProducer) -> None:
        assert await producer.has_room()
        await producer.set("ann", {"city": "Paris"})
        assert await producer.set("ann", {"city": "Oslo"}) == "coalesced"
        with pytest.raises(BufferFull, match="1 users are pending"):
            await producer.set("bob", {"city": "Paris"})
        result = await producer.set_many([("bob", {"city": "Paris"})])
        assert isinstance(result.refused[0], NoRoom)
        assert not await producer.has_room()

    play(server, keys, story, max_pending=1)


def test_many_tasks_share_it(server: EmbeddedServer, client: redis.Redis, keys: Keys) -> None:
    async def story(producer: AsyncProducer) -> None:
        answers = await asyncio.gather(
            *(producer.set(f"u{number}", {"city": "Paris"}) for number in range(300))
        )
        assert set(answers) == {"pending"}
        assert abs(await producer.now_ms() / 1000 - client.time()[0]) < 60

    play(server, keys, story, timeout=30)

    assert client.hlen(keys.pending) == 300


def test_a_script_that_the_server_has_forgotten_is_sent_again(
    server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    async def story(producer: AsyncProducer) -> None:
        await producer.set("ann", {"city": "Paris"})
        client.script_flush()
        assert await producer.set("ann", {"city": "Oslo"}) == "coalesced"

    play(server, keys, story)


def test_a_server_that_never_answers_ends_the_call(keys: Keys) -> None:
    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
            async with AsyncProducer(url, keys.sdkappid, timeout=0.2) as producer:
                for call in (
                    producer.set("ann", {"city": "Paris"}),
                    producer.set_many([]),
                    producer.now_ms(),
                ):
                    with pytest.raises(redis.TimeoutError):
                        await call

    asyncio.run(story())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_redis_that_freezes_in_mid_life_ends_the_call(
    tmp_path: Path, keys: Keys, asynchronous: bool
) -> None:
    with EmbeddedServer(tmp_path, persistent=False) as own:
        sync = Producer(own.url, keys.sdkappid, timeout=0.2)

        async def story() -> None:
            async with AsyncProducer(own.url, keys.sdkappid, timeout=0.2) as producer:
                assert await producer.set("ann", {"city": "Paris"}) == "pending"
                os.kill(own.pid, signal.SIGSTOP)
                try:
                    with pytest.raises(redis.TimeoutError):
                        await producer.set("ann", {"city": "Oslo"})
                    with pytest.raises(redis.TimeoutError):
                        await producer.set_many((f"u{number}", {"city": "Oslo"}) for number in range(900))
                finally:
                    os.kill(own.pid, signal.SIGCONT)
                assert await producer.set("ann", {"city": "Rome"}) == "coalesced"

        if asynchronous:
            asyncio.run(story())
            return
        sync.set("ann", {"city": "Paris"})
        os.kill(own.pid, signal.SIGSTOP)
        try:
            for call in (
                lambda: sync.set("ann", {"city": "Oslo"}),
                lambda: sync.set_many((f"u{number}", {"city": "Oslo"}) for number in range(900)),
            ):
                with pytest.raises(redis.TimeoutError):
                    call()
        finally:
            os.kill(own.pid, signal.SIGCONT)
        assert sync.set("ann", {"city": "Rome"}) == "coalesced"


def test_the_environment_says_where_redis_is(server: EmbeddedServer, keys: Keys) -> None:
    environ = {
        "IMATTR_REDIS_URL": server.url,
        "IMATTR_SDKAPPID": str(keys.sdkappid),
        "IMATTR_MAX_PENDING": "1",
    }

    async def story() -> None:
        async with AsyncProducer.from_env(environ) as producer:
            await producer.set("ann", {"city": "Paris"})
            with pytest.raises(BufferFull):
                await producer.set("bob", {"city": "Paris"})

    asyncio.run(story())
    with pytest.raises(ConfigError):
        AsyncProducer.from_env({})


def test_a_redis_without_memory_to_spare_refuses_new_users(
    server: EmbeddedServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(producer: AsyncProducer) -> None:
        async def info(section: str) -> dict[str, int]:
            return {"maxmemory": 100, "used_memory": 95}

        monkeypatch.setattr(producer._redis, "info", info)
        assert not await producer.has_room()
        with pytest.raises(BufferFull, match="maxmemory"):
            await producer.set("ann", {"city": "Paris"})

    play(server, keys, story)


def test_a_service_that_hides_its_memory_has_room(
    server: EmbeddedServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(producer: AsyncProducer) -> None:
        async def info(section: str) -> dict[str, int]:
            raise redis.ResponseError("unknown command")

        monkeypatch.setattr(producer._redis, "info", info)
        assert await producer.has_room()

    play(server, keys, story)
