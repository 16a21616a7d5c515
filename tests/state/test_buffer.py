"""Arrows of the state machine that the model does not draw: dispatching, trimming, odd text, lost scripts."""

from __future__ import annotations

import contextlib
import json

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import new_keys
from worker.delivery.policy import dead_letter
from worker.models import Acked, BatchId, ClaimedUser, DeadLettered, Retried, Update
from worker.state.buffer import MAX_UPDATES_PER_ADD, Buffer, Guard, Lead, LostLead, Tick, new_batch_id
from worker.state.keys import Keys

NOW = 1_700_000_000_000


@pytest.fixture
def buffer(client: redis.Redis, keys: Keys) -> Buffer:
    return Buffer(client, keys)


def turn(buffer: Buffer, *, now_ms: int = NOW, most: int = 10) -> Tick:
    return buffer.tick(size=100, linger=0.25, ticket_ttl=10.0, quota=most, horizon=1.0, now_ms=now_ms)


def claim(buffer: Buffer, client: redis.Redis, *, now_ms: int = NOW) -> tuple[BatchId, list[ClaimedUser]]:
    ticket = new_batch_id()
    client.zadd(buffer._keys.tickets, {ticket: now_ms})
    batch = buffer.claim(ticket, 100, now_ms=now_ms)
    assert batch is not None
    return batch.id, list(batch.users)


def updates(count: int, value: str = "Paris") -> list[Update]:
    return [Update(f"user{number:04}", {"city": value}) for number in range(count)]


def test_the_first_update_after_a_quiet_time_goes_at_once(buffer: Buffer) -> None:
    buffer.add(updates(1), now_ms=NOW)

    assert len(turn(buffer, now_ms=NOW).tickets) == 1


def test_who_comes_soon_after_a_partial_batch_lingers_for_company(
    buffer: Buffer, client: redis.Redis
) -> None:
    buffer.add(updates(1), now_ms=NOW)
    [ticket] = turn(buffer).tickets
    assert buffer.claim(ticket, 100, now_ms=NOW)

    buffer.add(updates(3, "Rome")[1:2], now_ms=NOW + 100)
    assert turn(buffer, now_ms=NOW + 200) == Tick((), 0.15)
    assert turn(buffer, now_ms=NOW + 349) == Tick((), 0.001)
    assert len(turn(buffer, now_ms=NOW + 350).tickets) == 1


@pytest.mark.parametrize("gap", [10, 60, 120, 200, 240, 260, 400, 1000])
def test_a_steady_trickle_costs_no_more_calls_than_lingering_always(
    buffer: Buffer, client: redis.Redis, gap: int
) -> None:
    """One user every `gap` ms; those who linger always are sent when the oldest of them has waited 250 ms."""
    calls, lingering, oldest = 0, 0, -1
    for now in range(0, 20_000, 10):
        if now % gap < 10:
            buffer.add([Update(f"user{now}", {"city": "Paris"})], now_ms=NOW + now)
            oldest = now if oldest < 0 else oldest
        for ticket in turn(buffer, now_ms=NOW + now).tickets:
            calls += bool(buffer.claim(ticket, 100, now_ms=NOW + now).users)  # type: ignore[union-attr]
        if 0 <= oldest <= now - 250:
            lingering, oldest = lingering + 1, -1

    assert calls <= lingering + 1


def test_a_clock_that_was_set_back_keeps_nobody_lingering(buffer: Buffer) -> None:
    buffer.add(updates(1), now_ms=NOW + 3_600_000)
    [ticket] = turn(buffer, now_ms=NOW + 3_600_000).tickets
    assert buffer.claim(ticket, 100, now_ms=NOW + 3_600_000)

    buffer.add(updates(2)[1:], now_ms=NOW)

    assert len(turn(buffer, now_ms=NOW).tickets) == 1


def test_full_batches_go_at_once_and_the_rest_lingers(buffer: Buffer, client: redis.Redis) -> None:
    client.set(buffer._keys.partial_at, NOW)
    buffer.add(updates(230), now_ms=NOW)

    assert len(turn(buffer).tickets) == 2
    assert len(turn(buffer).tickets) == 0, "those are outstanding"
    assert len(turn(buffer, now_ms=NOW + 250).tickets) == 1


@pytest.mark.parametrize(
    ("ahead_ms", "issued"),
    # Workers that go on with one batch after another take slots without a ticket from the dispatcher. A slot further
    # away than any wait for it is from before the clock was set back.
    [(0, 10), (700, 3), (3_600_000, 10)],
)
def test_tickets_are_issued_only_for_slots_that_are_free(
    buffer: Buffer, client: redis.Redis, ahead_ms: int, issued: int
) -> None:
    buffer.add(updates(2000), now_ms=NOW)
    client.hset(buffer._keys.rate, "next", (NOW + ahead_ms) * 1000)

    assert len(turn(buffer, most=10).tickets) == issued


def test_settling_issues_a_ticket_for_a_full_batch_that_nobody_is_sent_for(
    buffer: Buffer, client: redis.Redis
) -> None:
    buffer.add(updates(399), now_ms=NOW)
    batches = [claim(buffer, client)[0] for _ in range(2)]
    first, second = new_batch_id(), new_batch_id()

    assert buffer.settle(batches[0], {}, rest=Acked(), successor=first, size=100) == (100, True)
    assert buffer.settle(batches[1], {}, rest=Acked(), successor=second, size=100) == (100, False)
    assert client.zrange(buffer._keys.tickets, 0, -1) == [first.encode()]


def test_no_more_tickets_than_the_most_are_outstanding(buffer: Buffer) -> None:
    buffer.add(updates(500), now_ms=NOW)

    assert [len(turn(buffer, most=3).tickets) for _ in range(3)] == [3, 0, 0]


def test_a_lost_ticket_is_replaced(buffer: Buffer) -> None:
    buffer.add(updates(100), now_ms=NOW)
    turn(buffer)

    assert len(turn(buffer, now_ms=NOW + 9_999).tickets) == 0
    assert len(turn(buffer, now_ms=NOW + 10_001).tickets) == 1


def test_a_ticket_from_before_the_clock_was_set_back_is_replaced(buffer: Buffer) -> None:
    buffer.add(updates(100), now_ms=NOW)
    turn(buffer)

    assert len(turn(buffer, now_ms=NOW - 3_600_000).tickets) == 1


def test_a_released_ticket_is_replaced_at_once(buffer: Buffer) -> None:
    buffer.add(updates(100), now_ms=NOW)

    buffer.release_tickets(turn(buffer).tickets)

    assert len(turn(buffer).tickets) == 1


def test_a_removal_that_was_delivered_is_remembered_as_one(buffer: Buffer, client: redis.Redis) -> None:
    for value in ("Paris", None):
        buffer.add([Update("ann", {"city": value})])
        batch, _ = claim(buffer, client)
        buffer.settle(batch, {}, rest=Acked())

    assert buffer.add([Update("ann", {"city": None})]).unchanged == 1


def test_nothing_is_issued_during_a_pause(buffer: Buffer, client: redis.Redis, keys: Keys) -> None:
    buffer.add(updates(100), now_ms=NOW)
    client.hset(keys.rate, mapping={"paused_at": NOW * 1000, "paused_until": (NOW + 1500) * 1000})

    assert turn(buffer, now_ms=NOW + 1000) == Tick((), 0.5)
    assert len(turn(buffer, now_ms=NOW + 1500).tickets) == 1


def test_backfill_fills_the_seats_that_live_leaves_free(buffer: Buffer, client: redis.Redis) -> None:
    buffer.add(
        [Update(f"old{number:03}", {"city": "Oslo"}) for number in range(150)], lane="backfill", now_ms=NOW
    )
    buffer.add(updates(30), now_ms=NOW + 1)

    _, users = claim(buffer, client, now_ms=NOW + 1)

    assert [user.user[:4] for user in users] == ["user"] * 30 + ["old0"] * 70


def test_the_oldest_memories_are_forgotten_first(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys, shadow_ttl=100.0, shadow_max_users=3)
    for number in range(5):
        buffer.add([Update(f"user{number}", {"city": "Paris"})], now_ms=NOW + number)
        batch, _ = claim(buffer, client, now_ms=NOW + number)
        buffer.settle(batch, {}, rest=Acked(), now_ms=NOW + number)

    assert buffer.forget(now_ms=NOW + 5) == 2
    assert client.zrange(keys.shadow_at, 0, -1) == [b"user2", b"user3", b"user4"]
    assert set(client.hkeys(keys.shadow)) == {b"user2", b"user3", b"user4"}

    late = NOW + 100_010
    buffer.add([Update("new", {"city": "Paris"})], now_ms=late)
    batch, _ = claim(buffer, client, now_ms=late)
    buffer.settle(batch, {}, rest=Acked(), now_ms=late)

    buffer.forget(now_ms=late)
    buffer.forget(now_ms=late)
    assert set(client.hkeys(keys.shadow)) == {b"new"}
    assert client.get(keys.forgotten_at) == str(NOW + 4).encode()


def test_without_a_shadow_nothing_is_remembered(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys, shadow_ttl=0)
    buffer.add(updates(3), now_ms=NOW)
    batch, _ = claim(buffer, client)
    buffer.settle(batch, {}, rest=Acked(), now_ms=NOW)

    assert client.exists(keys.shadow, keys.shadow_at) == 0


def test_a_repeated_value_costs_no_call(buffer: Buffer, client: redis.Redis) -> None:
    buffer.add(updates(3), now_ms=NOW)
    batch, _ = claim(buffer, client)
    buffer.settle(batch, {}, rest=Acked(), now_ms=NOW)

    assert buffer.add(updates(3), now_ms=NOW + 1).unchanged == 3
    assert buffer.add(updates(3, "Rome"), now_ms=NOW + 2).unchanged == 0


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(attrs=st.dictionaries(text, text, min_size=1, max_size=5))
def test_any_text_comes_back_as_it_went_in(client: redis.Redis, attrs: dict[str, str]) -> None:
    buffer = Buffer(client, new_keys())
    # Twice, so that the record passes through the script's own decoder and encoder.
    buffer.add([Update("ann", attrs)], now_ms=NOW)
    buffer.add([Update("ann", {"other": "1"})], now_ms=NOW + 1)

    _, [claimed] = claim(buffer, client)

    assert claimed.attrs == attrs | {"other": "1"}


def test_a_full_chunk_of_updates_with_ten_attributes_passes(buffer: Buffer) -> None:
    attrs = {f"name{number}": "字" * 16 for number in range(10)}

    added = buffer.add([Update(f"user{n}", attrs) for n in range(MAX_UPDATES_PER_ADD)], now_ms=NOW)

    assert added.accepted == MAX_UPDATES_PER_ADD


def test_scripts_are_sent_again_after_a_flush(buffer: Buffer, client: redis.Redis) -> None:
    buffer.add(updates(1), now_ms=NOW)
    client.script_flush()

    batch, users = claim(buffer, client)

    assert buffer.settle(batch, {users[0].user: Acked()}) == (1, False)


def test_every_key_of_an_app_is_on_one_node_and_in_the_catalogue(
    buffer: Buffer, client: redis.Redis, keys: Keys
) -> None:
    buffer.add(updates(3), now_ms=NOW)
    turn(buffer, now_ms=NOW + 300)
    batch, _ = claim(buffer, client)
    buffer.settle(batch, {}, rest=Acked())

    catalogue = {getattr(keys, name) for name, kind in vars(Keys).items() if isinstance(kind, property)}
    found = {key.decode() for key in client.scan_iter(keys.pattern.replace("{", "\\{"))}

    assert found
    assert found <= catalogue
    assert all(key.startswith(f"{{imattr:{keys.sdkappid}}}:") for key in catalogue)


def test_a_dead_letter_keeps_what_a_person_needs(buffer: Buffer, client: redis.Redis, keys: Keys) -> None:
    buffer.add(updates(1), now_ms=NOW)
    batch, [user] = claim(buffer, client, now_ms=NOW + 5)
    buffer.settle(batch, {user.user: DeadLettered(90033, "an attribute is invalid")}, now_ms=NOW + 9)

    letter = json.loads(client.hget(keys.dead, user.user) or "")
    assert letter == {
        "a": {"city": ["Paris", NOW]},
        "code": 90033,
        "message": "an attribute is invalid",
        "attempts": 1,
        "t": NOW,
        "at": NOW + 9,
    }


def test_a_half_character_in_the_apis_words_does_not_stop_a_dead_letter(
    client: redis.Redis, keys: Keys
) -> None:
    buffer, ticket = Buffer(client, keys), new_batch_id()
    buffer.add([Update("ann", {"city": "Paris"})])
    client.zadd(keys.tickets, {ticket: 1})
    batch = buffer.claim(ticket, 10)
    assert batch is not None

    letter = dead_letter(90033, json.loads('"value too long: caf\\ud83d"'))

    assert buffer.settle(batch.id, {"ann": letter}) == (1, False)


def attempts_after(buffer: Buffer, client: redis.Redis, keys: Keys, *, outage_ends_ms: int | None) -> int:
    """Attempts of a user who failed, while another's call that came later succeeded."""
    buffer.add(updates(1), now_ms=NOW)
    failed, _ = claim(buffer, client, now_ms=NOW)
    buffer.settle(failed, {}, rest=Retried(10.0, proven=False), now_ms=NOW)
    if outage_ends_ms is not None:
        client.hset(keys.health, "calm_at", outage_ends_ms)
    buffer.add([Update("another", {"city": "Oslo"})], now_ms=NOW + 100)
    other, _ = claim(buffer, client, now_ms=NOW + 200)
    buffer.settle(other, {}, rest=Acked(), claimed_ms=NOW + 200, now_ms=NOW + 300)
    again, [user] = claim(buffer, client, now_ms=NOW + 10_000)
    buffer.settle(again, {}, rest=Retried(1.0, proven=False), now_ms=NOW + 10_100)
    _, [once_more] = claim(buffer, client, now_ms=NOW + 20_000)
    assert once_more.attempts == user.attempts, "what counted once is kept"
    return user.attempts


def test_a_failure_counts_when_a_later_call_has_succeeded(
    buffer: Buffer, client: redis.Redis, keys: Keys
) -> None:
    assert attempts_after(buffer, client, keys, outage_ends_ms=None) == 1


def test_the_failures_of_an_outage_do_not_count_when_it_is_over(
    buffer: Buffer, client: redis.Redis, keys: Keys
) -> None:
    assert attempts_after(buffer, client, keys, outage_ends_ms=NOW + 50) == 0


def test_a_success_of_a_call_that_was_under_way_before_proves_nothing(
    buffer: Buffer, client: redis.Redis
) -> None:
    buffer.add(updates(2), now_ms=NOW)
    early, _ = claim(buffer, client, now_ms=NOW)
    buffer.add([Update("ann", {"city": "Oslo"})], now_ms=NOW)
    failed, _ = claim(buffer, client, now_ms=NOW + 10)
    buffer.settle(failed, {}, rest=Retried(1.0, proven=False), now_ms=NOW + 20)

    buffer.settle(early, {}, rest=Acked(), claimed_ms=NOW, now_ms=NOW + 30)

    _, [user] = claim(buffer, client, now_ms=NOW + 5000)
    assert (user.user, user.attempts) == ("ann", 0)


HOUR = 3_600_000


def test_after_the_clock_was_set_back_nobody_waits_for_it_to_catch_up(
    client: redis.Redis, keys: Keys
) -> None:
    buffer = Buffer(client, keys)

    def tick(now: int) -> int:
        issued = buffer.tick(size=100, linger=0.25, ticket_ttl=10, quota=100, horizon=1.0, now_ms=now).tickets
        buffer.release_tickets([*issued, BatchId("none")])
        return len(issued)

    buffer.add(updates(1), now_ms=NOW)
    assert tick(NOW - HOUR) == 1, "who lingers has lingered"

    batch, _ = claim(buffer, client, now_ms=NOW)
    buffer.settle(batch, {}, rest=Retried(1.0), now_ms=NOW)
    assert tick(NOW - HOUR) == 1, "who is delayed for longer than any delay is due"

    batch_id, _ = claim(buffer, client, now_ms=NOW - HOUR)
    client.zadd(keys.leases, {batch_id: NOW + HOUR})
    assert buffer.reclaim(now_ms=NOW - HOUR), "a lease that ends later than any has ended"
    assert buffer.snapshot().balanced


@pytest.mark.parametrize("ahead_ms", [0, 299_999, 300_000])
def test_an_event_a_little_ahead_is_accepted(client: redis.Redis, keys: Keys, ahead_ms: int) -> None:
    assert Buffer(client, keys).add([Update("ann", {"city": "x"}, NOW + ahead_ms)], now_ms=NOW).accepted == 1


def test_an_event_too_far_ahead_is_refused_alone(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys)
    given = [
        Update("ann", {"city": "x"}),
        Update("bob", {"city": "x"}, NOW + 300_001),
        Update("cid", {"city": "x"}, 5),
    ]

    added = buffer.add(given, now_ms=NOW)

    assert added.accepted == 2
    assert [index for index, rule in added.refused if "IMATTR_MAX_AHEAD" in rule] == [1]
    assert set(client.hkeys(keys.pending)) == {b"ann", b"cid"}
    assert buffer.snapshot().balanced


def test_who_has_lost_the_lead_adds_nothing(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys)
    client.set(keys.consumer, "w2")

    for lead, raises in ((Lead(keys.consumer, "w1"), True), (Lead(keys.consumer, "w2"), False)):
        with pytest.raises(LostLead) if raises else contextlib.nullcontext():
            buffer.add(updates(1), guard=Guard(lead=lead), now_ms=NOW)
    client.delete(keys.consumer)
    with pytest.raises(LostLead):
        buffer.add(updates(1), guard=Guard(lead=Lead(keys.consumer, "w1")), now_ms=NOW)


# An import never overwrites what happened after the time as of which it is true.


def delivered(
    buffer: Buffer, client: redis.Redis, user: str, value: str, now: int, lane: str = "live"
) -> None:
    buffer.add([Update(user, {"city": value}, now if lane == "backfill" else 0)], lane=lane, now_ms=now)
    batch, _ = claim(buffer, client, now_ms=now)
    buffer.settle(batch, {}, rest=Acked(), now_ms=now)


def imported(buffer: Buffer, user: str, as_of: int, now: int) -> str:
    added = buffer.add(
        [Update(user, {"city": "old"}, as_of)], lane="backfill", guard=Guard(as_of_ms=as_of), now_ms=now
    )
    return "refused" if added.refused else "stale" if added.stale else "accepted"


@pytest.mark.parametrize("ttl", [0.0, 900.0])
@pytest.mark.parametrize("later", [1, HOUR, 7 * 24 * HOUR])
def test_what_is_delivered_while_an_import_is_unfinished_is_not_forgotten(
    client: redis.Redis, keys: Keys, ttl: float, later: int
) -> None:
    buffer = Buffer(client, keys, shadow_ttl=ttl)
    buffer.begin_import("file", NOW)
    delivered(buffer, client, "ann", "new", NOW + 1000)

    buffer.forget(now_ms=NOW + 1000 + later)
    assert imported(buffer, "ann", NOW, NOW + 2000 + later) == "stale"
    assert imported(buffer, "bob", NOW, NOW + 2000 + later) == "accepted"

    buffer.end_import("file")
    buffer.forget(now_ms=NOW + 2 * later + 1_000_000)
    assert not client.exists(keys.shadow)


def test_an_import_as_of_before_what_was_forgotten_is_refused_where_nothing_is_known(
    client: redis.Redis, keys: Keys
) -> None:
    buffer = Buffer(client, keys)
    delivered(buffer, client, "ann", "new", NOW)
    delivered(buffer, client, "bob", "newer", NOW + 800_000)
    assert buffer.forget(now_ms=NOW + 1_000_000) == 1

    assert imported(buffer, "ann", NOW - 1000, NOW + 1_000_000) == "refused"
    assert imported(buffer, "bob", NOW - 1000, NOW + 1_000_000) == "stale", "what is known is compared"
    assert imported(buffer, "cid", NOW, NOW + 1_000_000) == "accepted", "nothing younger was forgotten"
    assert buffer.add([Update("dan", {"city": "x"}, NOW - 5000)], now_ms=NOW + 1_000_000).accepted == 1


def test_an_import_of_more_users_than_are_remembered_does_not_evict_what_protects_it(
    client: redis.Redis, keys: Keys
) -> None:
    buffer = Buffer(client, keys, shadow_max_users=10)
    buffer.begin_import("file", NOW)
    delivered(buffer, client, "ann", "new", NOW + 1000)
    for number in range(30):
        buffer.add(
            [Update(f"user{number}", {"city": "old"}, NOW)],
            lane="backfill",
            guard=Guard(as_of_ms=NOW),
            now_ms=NOW + 2000,
        )
        batch, _ = claim(buffer, client, now_ms=NOW + 2000)
        buffer.settle(batch, {}, rest=Acked(), now_ms=NOW + 2000)
        buffer.forget(now_ms=NOW + 2000)

    assert client.zcard(keys.shadow_at) == 10
    assert imported(buffer, "ann", NOW, NOW + 3000) == "stale"


def test_if_memory_is_too_short_to_protect_them_lines_are_refused(client: redis.Redis, keys: Keys) -> None:
    buffer = Buffer(client, keys, shadow_max_users=3)
    buffer.begin_import("file", NOW)
    for number in range(5):
        delivered(buffer, client, f"user{number}", "new", NOW + 1000 + number)
    buffer.forget(now_ms=NOW + 2000)

    assert imported(buffer, "user0", NOW, NOW + 3000) == "refused"
    assert imported(buffer, "user4", NOW, NOW + 3000) == "stale"
