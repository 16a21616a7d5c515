"""Messages of Celery clients: whatever is in one, it is read, or refused with the reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import time
import zlib
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import drawn
from tests.intake.messages import EMBED, MALFORMED, encoded, envelope, mutated, sealed
from worker.errors import InvalidUpdate
from worker.intake.celery_message import MOST_BYTES, Call, legible, read, unpack
from worker.models import Update
from worker.producer import checked

TAKEN = 1_795_600_000_000


def opened(message: Any) -> Call:
    return read(unpack(encoded(message)), TAKEN)


def accepted(raw: bytes) -> list[Update]:
    call = read(unpack(raw), TAKEN)
    return [checked(update, frozenset(), call.event_ms) for update in call.updates]


def test_a_message_of_protocol_2_is_read() -> None:
    assert opened(envelope()) == Call([["ann", {"city": "Paris"}]], TAKEN)


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("compression", [None, "gzip", "bzip2", "lzma"])
def test_what_celery_itself_sends_is_read(protocol: int, compression: str | None) -> None:
    """By way of kombu's transport in memory, which makes the same envelopes as the one for Redis."""
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.task_protocol = protocol
    occurred = datetime(2026, 11, 25, 12, tzinfo=UTC)
    with app.connection_for_write() as connection:
        queue = f"updates-{protocol}-{compression}"
        app.send_task(
            "attributes.update",
            ["ann", {"city": "深圳"}],
            {"occurred_at": occurred},
            queue=queue,
            compression=compression,
            countdown=60,
            connection=connection,
        )
        raw = connection.default_channel._get(queue)

    call = opened(raw)

    [update] = call.updates
    assert checked(update, frozenset()).occurred_ms == round(occurred.timestamp() * 1000)
    assert call.eta_ms == call.event_ms
    assert abs(call.eta_ms - (time.time() + 60) * 1000) < 20_000


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (["ann", {"city": "Paris"}], {}),
        (["ann"], {"attrs": {"city": "Paris"}}),
        ([], {"attrs": {"city": "Paris"}, "user_id": "ann"}),
    ],
)
def test_arguments_may_be_named(args: list[Any], kwargs: dict[str, Any]) -> None:
    assert opened(envelope(args=args, kwargs=kwargs)).updates == [["ann", {"city": "Paris"}]]


def test_an_argument_that_is_missing_between_others_is_not_filled_by_the_next() -> None:
    with pytest.raises(InvalidUpdate, match="the arguments of attributes"):
        opened(envelope(args=["ann"], kwargs={"occurred_at": 1_700_000_000}))


def test_many_updates_in_one_message_are_read() -> None:
    updates = [["ann", {"city": "Paris"}], ["bob", {"city": None}, "2026-11-25T12:00:00Z"]]

    assert opened(envelope(task="attributes.update_many", args=[updates])).updates == updates


def test_eta_and_expiry_are_times_in_utc_unless_they_say_otherwise() -> None:
    call = opened(envelope(eta="2026-11-25T12:00:00", expires="2026-11-25T14:00:01+02:00"))

    noon = round(datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp() * 1000)
    assert (call.eta_ms, call.event_ms, call.expires_ms) == (noon, noon, noon + 1000)


@pytest.mark.parametrize(
    ("kind", "pack"),
    [
        ("application/x-gzip", zlib.compress),
        ("application/x-gzip", gzip.compress),
        ("application/x-bz2", bz2.compress),
        ("application/x-lzma", lzma.compress),
    ],
)
def test_a_compressed_body_is_read_and_a_bomb_is_not(kind: str, pack: Any) -> None:
    headers = {"task": "attributes.update", "id": "1", "compression": kind}
    good = json.dumps([["ann", {"city": "Paris"}], {}, EMBED]).encode()

    assert opened(sealed(None, headers, packed=pack(good))).updates == [["ann", {"city": "Paris"}]]
    with pytest.raises(InvalidUpdate, match="longer than 4,000,000 bytes"):
        opened(sealed(None, headers, packed=pack(b" " * 50 * MOST_BYTES)))
    with pytest.raises(InvalidUpdate, match="cut short"):
        opened(sealed(None, headers, packed=pack(good * 50)[:-12]))


def test_lzma_that_asks_for_gigabytes_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    headers = {"task": "attributes.update", "id": "1", "compression": "application/x-lzma"}

    with pytest.raises(InvalidUpdate, match="is not compressed with"):
        opened(sealed(None, headers, packed=lzma.compress(b"[]", filters=filters)))


def test_a_message_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(InvalidUpdate, match="longer than 4,000,000 bytes"):
        unpack(b"[" * (MOST_BYTES + 1))


def test_what_only_pythons_parser_accepts_is_read() -> None:
    assert opened(envelope(timelimit=[float("nan"), None])).updates


@pytest.mark.parametrize("what", MALFORMED)
def test_whatever_is_malformed_is_refused_with_the_reason(what: str) -> None:
    message = MALFORMED[what]
    raw = message if isinstance(message, bytes) else encoded(message)

    with pytest.raises(InvalidUpdate) as refused:
        accepted(raw)

    assert 10 < len(str(refused.value)) < 200
    assert "Paris" not in refused.value.rule


@settings(max_examples=drawn(4000))
@given(seed=st.integers(0, 2**32))
def test_whatever_becomes_of_a_message_it_is_read_or_refused(seed: int) -> None:
    dice = random.Random(seed)
    message = dice.choice(
        [
            envelope(attrs={"city": "Paris", "level": None}),
            envelope(
                task="attributes.update_many", args=[[["ann", {"city": "x"}], ["bob", {"city": "y"}, 1.7e9]]]
            ),
            envelope(eta="2026-11-25T12:00:00+00:00", expires="2027-11-25T12:00:00+00:00"),
            sealed(
                {"task": "attributes.update", "id": "1", "args": ["ann", {"city": "x"}], "kwargs": {}}, {}
            ),
        ]
    )
    raw = mutated(dice, message)

    refusals = []
    try:
        call = read(unpack(raw), TAKEN)
    except InvalidUpdate as refused:
        refusals.append(refused)
    else:
        for update in call.updates:
            try:
                assert checked(update, frozenset(), call.event_ms).occurred_ms > 0
            except InvalidUpdate as refused:
                refusals.append(refused)
    assert all(0 < len(refused.rule) < 1000 for refused in refusals)
    assert isinstance(legible(raw), str)
