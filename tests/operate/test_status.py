"""What `imattr status` says, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import redis
from kombu.transport.redis import Channel

from worker.config import Secret, Settings
from worker.models import BatchId
from worker.operate import status
from worker.producer import Producer
from worker.ratelimit import SPACING
from worker.state.intake import PRIORITIES
from worker.state.keys import Keys
from worker.state.line import Line

BATCH = BatchId("batch")


@pytest.fixture
def settings(keys: Keys, server: Any) -> Settings:
    return Settings(sdkappid=keys.sdkappid, redis_url=Secret(server.url))


def line_of(client: redis.Redis, settings: Settings) -> dict[str, Any]:
    line: dict[str, Any] = status.read(client, settings)["line"]
    return line


def test_an_open_line_needs_one_word(client: redis.Redis, settings: Settings) -> None:
    assert line_of(client, settings)["words"] == "open"


def test_an_error_says_who_has_to_mend_it(client: redis.Redis, keys: Keys, settings: Settings) -> None:
    Line(client, keys).stop(BATCH, "error", 90009, "the calling account is not an administrator")

    line = line_of(client, settings)

    assert (line["state"], line["kind"], line["code"], line["failed_probes"]) == (
        "stopped",
        "error",
        90009,
        0,
    )
    words = line["words"]
    assert words.startswith(
        "stopped by an error 0 s ago: the calling account is not an administrator (90009)."
    )
    assert "Next probe in 30 s. Nothing is lost." in words
    assert "imattr doctor" in words


def test_an_outage_says_that_it_opens_by_itself(client: redis.Redis, keys: Keys, settings: Settings) -> None:
    line = Line(client, keys)
    line.stop(BATCH, "outage", 0, "timeout")
    client.hset(keys.line, "probe", BATCH)
    line.stop(BATCH, "outage", 0, "timeout")
    since = client.time()[0] * 1000 - 300_000
    client.hset(keys.line, "since", since)

    words = line_of(client, settings)["words"]

    assert words.startswith("stopped by an outage 5 min ago: timeout. Next probe in 2 s, 1 have failed.")
    assert words.endswith("It opens by itself when the service has recovered.")


def test_bad_data_says_where_to_look(client: redis.Redis, keys: Keys, settings: Settings) -> None:
    Line(client, keys).stop(BATCH, "data", 70107, "dead letters in masses")

    assert "imattr dead list" in line_of(client, settings)["words"]


def test_a_probe_that_is_out_is_told(client: redis.Redis, keys: Keys, settings: Settings) -> None:
    Line(client, keys).stop(BATCH, "error", 60020, "the plan has expired")
    client.hset(keys.line, "probe", BATCH)

    line = line_of(client, settings)

    assert line["state"] == "probing"
    assert "A probe is out." in line["words"]


def test_a_lower_limit_shows_in_the_rate(
    client: redis.Redis, server: Any, keys: Keys, settings: Settings
) -> None:
    Producer(server.url, keys.sdkappid).set_many((f"u{number}", {"city": "Paris"}) for number in range(5000))
    client.hset(keys.rate, mapping={"limit": 50, "good": 49, "bad": 52})

    state = status.read(client, settings)

    assert state["rate"] == {"quota": 100, "limit": 50, "current": round(50 / SPACING, 1)}
    assert state["line"]["words"] == "open, at 50 of 100 calls/s, climbing to what the API grants"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_a_span_is_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert status.span(seconds) == text


def test_the_queue_is_as_long_as_it_is_now(client: redis.Redis, server: Any, keys: Keys) -> None:
    prefix = f"{keys.sdkappid}."
    settings = Settings(sdkappid=keys.sdkappid, redis_url=Secret(server.url), broker_prefix=prefix)
    client.hset(keys.intake, "waiting", 7)
    for queue in ("updates", "updates\x06\x163"):
        client.lpush(prefix + queue, "message", "message")

    assert status.read(client, settings)["intake"]["waiting"] == 4

    elsewhere = dataclasses.replace(settings, broker_url=Secret(server.url.replace("/0", "/3")))
    assert status.read(client, elsewhere)["intake"]["waiting"] == 0

    nowhere = dataclasses.replace(settings, broker_url=Secret("redis://127.0.0.1:1/0"))
    assert status.read(client, nowhere)["intake"]["waiting"] == 7
    client.delete(prefix + "updates", prefix + "updates\x06\x163")


def test_the_lists_of_a_queue_are_those_of_kombu() -> None:
    channel = Channel.__new__(Channel)
    named: Any = channel._q_for_pri
    found = [named("updates", step) for step in channel.priority_steps]

    assert found == [f"updates{priority}" for priority in PRIORITIES]
