"""Scripts notice that they run on another server, or on data that went back."""

from __future__ import annotations

import pytest
import redis

from tests.conftest import ManualClock, new_keys
from worker.models import Acked, Batch, Update
from worker.ratelimit import Permit, RateLimiter
from worker.state import scripts
from worker.state.buffer import Added, Buffer, Known, add_arguments, add_keys, new_batch_id, read_added
from worker.state.keys import Keys


class App:
    """An app on a server that can be made to look like another one."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis, self.keys = client, new_keys()
        self.buffer = Buffer(client, self.keys)
        self.limiter = RateLimiter(client, self.keys, quota=100, patience=2.0, clock=ManualClock())

    def fail_over(self) -> None:
        """As if all that follows ran on a replica that was promoted."""
        self.redis.hset(self.keys.server, "id", "another")

    def claim(self, *, epoch: int | None = None) -> Batch | None:
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: 1})
        return self.buffer.claim(ticket, 100, epoch=epoch)

    def number_of_claim(self) -> int:
        batch = self.claim()
        return batch.number if batch else 0

    def server(self, field: str) -> int:
        return scripts.number(self.redis.hget(self.keys.server, field))

    def pause_left(self) -> float:
        """Seconds until somebody may send again."""
        seconds, micros = self.redis.time()
        until = scripts.number(self.redis.hget(self.keys.rate, "paused_until"))
        return until / 1e6 - seconds - micros / 1e6

    def add(self, known: Known) -> tuple[Added, Known]:
        script, arguments = scripts.load(self.redis, "add"), add_arguments(UPDATES, "live", 0, known=known)
        return read_added(script(add_keys(self.keys), arguments))


UPDATES = [Update("ann", {"city": "Paris"}), Update("bob", {"city": "Rome"})]


@pytest.fixture
def app(client: redis.Redis) -> App:
    return App(client)


def test_a_first_server_delays_nothing(app: App) -> None:
    app.buffer.add(UPDATES)

    assert isinstance(app.limiter.reserve(), Permit)
    assert app.server("servers") == 1


@pytest.mark.parametrize("step", ["reserve", "claim", "add", "extend", "dispatch"])
def test_every_step_that_grants_something_notices_another_server(app: App, step: str) -> None:
    app.buffer.add(UPDATES)
    permit = app.limiter.reserve()
    assert permit
    ticket = new_batch_id()
    app.redis.zadd(app.keys.tickets, {ticket: 1})
    app.fail_over()

    match step:
        case "reserve":
            assert app.limiter.reserve() is None
        case "claim":
            assert app.buffer.claim(ticket, 100, epoch=permit.epoch) is None
        case "add":
            app.buffer.add(UPDATES)
        case "extend":
            app.buffer.extend(new_batch_id())
        case "dispatch":
            assert app.buffer.tick(size=1, linger=0, ticket_ttl=10, quota=100, horizon=1).tickets == ()

    assert app.server("servers") == 2
    assert 2.5 < app.pause_left() <= 3
    assert not app.redis.exists(app.keys.tickets), "a ticket whose claim was lost would claim twice"
    assert app.claim(epoch=permit.epoch) is None, "the permit is from before"


@pytest.mark.parametrize("first_to_come", [True, False])
def test_a_claim_that_only_the_last_server_knew_keeps_everyone_waiting(app: App, first_to_come: bool) -> None:
    app.buffer.add(UPDATES)
    first = app.claim()
    assert first
    lost = first.number + 1
    app.fail_over()
    if not first_to_come:
        assert app.limiter.reserve() is None
        assert app.number_of_claim() > lost + 1000

    assert app.buffer.settle(new_batch_id(), {}, rest=Acked(), number=lost) is None

    assert 14 < app.pause_left() <= 15
    assert app.server("behind") == 1
    # What both knew, and what was claimed since, is no sign of it.
    app.redis.hset(app.keys.rate, "paused_until", 0)
    for number in (first.number, lost, lost + 1_000_000):
        assert app.buffer.settle(new_batch_id(), {}, rest=Acked(), number=number) is None
        assert app.buffer.extend(new_batch_id(), number=number) == "lost"
    assert app.pause_left() < 0, "noticed once"


@pytest.mark.parametrize("first", ["the one who remembers", "another"])
def test_data_that_went_away_is_noticed_by_who_remembers_it(app: App, first: str) -> None:
    app.redis.hset(app.keys.server, mapping={"id": "one", "number": 1000, "first": 1000})
    app.fail_over()
    app.limiter.reserve()
    app.redis.delete(*app.redis.keys(app.keys.pattern))
    if first == "another":
        app.buffer.tick(size=1, linger=0, ticket_ttl=10, quota=100, horizon=1)
        assert app.server("emptied") == 0, "it might be new"

    assert app.limiter.reserve() is None

    assert app.server("emptied") == 1
    assert 2.5 < app.pause_left() <= 3
    app.redis.hset(app.keys.rate, "paused_until", 0)
    app.limiter.reserve()
    assert app.pause_left() < 0, "noticed once"
    assert app.buffer.snapshot().balanced


def test_updates_that_were_accepted_and_lost_are_counted(app: App) -> None:
    _, known = app.add(Known())
    assert known.accepted == 2
    app.fail_over()

    # Five were accepted, of which this server has two.
    _, now = app.add(known._replace(accepted=5))
    app.add(known._replace(accepted=4))

    assert now == (known.server + 1, 4)
    assert app.buffer.snapshot().lost_with_servers == 3
    app.fail_over()
    app.add(now._replace(accepted=7))
    assert app.buffer.snapshot().lost_with_servers == 4
    assert app.buffer.snapshot().balanced


def test_what_was_delivered_before_a_failover_is_sent_again_when_it_comes_again(app: App) -> None:
    def deliver(**attrs: str) -> tuple[int, int]:
        """How many updates were accepted, and how many of them were unchanged."""
        added = app.buffer.add([Update("ann", attrs)])
        batch = app.claim()
        assert batch
        app.buffer.settle(batch.id, {}, rest=Acked())
        return added.accepted, added.unchanged

    deliver(city="Paris", level="3")
    assert deliver(city="Paris") == (1, 1)
    app.fail_over()
    app.limiter.reserve()
    app.redis.hset(app.keys.server, "at", app.redis.time()[0] * 1000 + 1000)

    # Rome may have been delivered meanwhile.
    assert deliver(city="Paris") == (1, 0)
    app.redis.hset(app.keys.server, "at", app.redis.time()[0] * 1000 - 1000)
    assert deliver(city="Paris") == (1, 1)
    # And so may another level, though the user's memory is fresh now.
    assert deliver(level="3") == (1, 0)
    assert deliver(level="3") == (1, 1)


def test_without_the_replica_it_needs_nobody_sends(client: redis.Redis, keys: Keys) -> None:
    limiter = RateLimiter(client, keys, quota=100, patience=2.0, clock=ManualClock(), needs_replica=True)

    assert limiter.reserve() is None

    assert client.hget(keys.rate, "reason") == b"no replica of Redis is in step"


def test_deleted_keys_are_made_up_for(app: App) -> None:
    app.buffer.add([Update(f"user{number}", {"city": "Paris"}) for number in range(1200)], max_pending=0)
    claimed = app.claim()
    assert claimed is not None
    assert app.buffer.repair() == (0, 0)

    app.redis.delete(app.keys.live)
    assert app.buffer.repair() == (0, 1100)
    app.redis.hdel(app.keys.pending, "user500")
    assert app.buffer.repair() == (1, 0)
    app.redis.delete(app.keys.ledger)
    lost, _ = app.buffer.repair()

    assert lost < 0, "more was found than the ledger knows of"
    assert app.buffer.snapshot().balanced
    assert app.buffer.snapshot().live == 1099


def test_users_in_flight_whose_batches_are_gone_come_back(app: App) -> None:
    app.buffer.add(UPDATES)
    assert app.claim()
    app.redis.delete(app.keys.batches, app.keys.leases)
    ours = Buffer(app.redis, app.keys, lease=0.0)

    assert ours.reclaim() is None, "their calls may be under way"
    [batch] = app.redis.hkeys(app.keys.batches)
    app.redis.zadd(app.keys.leases, {scripts.text(batch): 1})
    assert ours.reclaim()

    assert app.buffer.snapshot().live == 2
