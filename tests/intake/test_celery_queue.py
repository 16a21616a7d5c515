"""The queue of Celery's messages: in bulk, in order, nothing lost between taking and finishing, nothing bad in the way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from tests.conftest import ManualClock, drawn
from tests.intake.messages import MALFORMED, encoded, envelope
from worker.intake.brokers import MOST, RedisQueue, Taken
from worker.intake.celery_message import MOST_BYTES
from worker.intake.celery_queue import FULL_PAUSE, REPORT_EVERY, TERM, QueueConsumer
from worker.models import Acked, Update
from worker.producer import Producer
from worker.sandbox.redis_server import EmbeddedServer
from worker.state.buffer import Added, Buffer, new_batch_id
from worker.state.intake import read_intake
from worker.state.keys import Keys
from worker.state.leader import RETRY_AFTER
from worker.state.refused import Refused
from worker.state.scripts import text


class Fixture:
    """A queue of an app's own, and consumers of it."""

    def __init__(self, server: EmbeddedServer, client: redis.Redis, keys: Keys, clock: ManualClock) -> None:
        self.server, self.redis, self.keys, self.clock = server, client, keys, clock
        self.name = f"updates-{keys.sdkappid}"
        self.lists = [self.name, *(f"{self.name}\x06\x16{step}" for step in (3, 6, 9))]
        self.buffer, self.refused = Buffer(client, keys), Refused(client, keys)
        self.reports: list[dict[str, int]] = []

    def queue(self) -> RedisQueue:
        return RedisQueue(self.redis, self.lists, name=self.name, close=lambda: None)

    def consumer(self, worker: str = "w1", max_pending: int = 0) -> QueueConsumer:
        return QueueConsumer(
            self.redis,
            self.keys,
            Producer(self.server.url, self.keys.sdkappid, max_pending=max_pending),
            self.refused,
            self.clock,
            self.queue,
            worker=worker,
            report=lambda counts, _: self.reports.append(counts),
        )

    def send(self, message: Any, priority: int = 0) -> None:
        """As kombu does: the newest on the left."""
        self.redis.lpush(self.lists[priority], message if isinstance(message, bytes) else encoded(message))

    def left(self) -> int:
        return sum(self.redis.llen(key) for key in (*self.lists, f"{self.name}.taken"))

    def pending(self) -> dict[str, dict[str, Any]]:
        return {
            text(user): {name: pair[0] for name, pair in json.loads(record)["a"].items()}
            for user, record in self.redis.hgetall(self.keys.pending).items()
        }

    def version(self, user: str, name: str = "city") -> int:
        record: Any = self.redis.hget(self.keys.pending, user)
        return int(json.loads(record)["a"][name][1])

    def deliver(self) -> None:
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: 1})
        self.buffer.claim(ticket, 1000)
        self.buffer.settle(ticket, {}, rest=Acked())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.intake.celery_queue.BLOCK", 0.005)


@pytest.fixture
def fix(server: EmbeddedServer, client: redis.Redis, keys: Keys, clock: ManualClock) -> Iterator[Fixture]:
    fixture = Fixture(server, client, keys, clock)
    yield fixture
    client.delete(*fixture.lists, f"{fixture.name}.taken", f"{fixture.name}.taken_at")


def test_messages_are_accepted_and_gone_from_the_queue(fix: Fixture) -> None:
    fix.send(envelope("ann", {"city": "Paris"}))
    fix.send(envelope(args=["bob"], kwargs={"attrs": {"level": "Gold"}}))
    fix.send(
        envelope(task="attributes.update_many", args=[[["cat", {"city": "Rome"}], ["dan", {"city": None}]]])
    )

    fix.consumer().turn()

    assert fix.pending() == {
        "ann": {"city": "Paris"},
        "bob": {"level": "Gold"},
        "cat": {"city": "Rome"},
        "dan": {"city": False},
    }
    assert fix.left() == 0


def test_a_turn_takes_hundreds_and_the_newest_value_of_a_user_wins(fix: Fixture) -> None:
    for number in range(950):
        fix.send(envelope(f"user{number % 300}", {"city": f"value {number}"}))

    fix.consumer().turn()

    assert fix.left() == 0
    last = {number % 300: number for number in range(950)}
    assert fix.pending() == {f"user{user}": {"city": f"value {number}"} for user, number in last.items()}


def test_higher_priorities_go_first(fix: Fixture) -> None:
    for priority in (3, 0, 2, 1):
        fix.send(envelope("ann", {"city": f"priority {priority}"}), priority)

    fix.consumer().turn()

    assert fix.pending() == {"ann": {"city": "priority 3"}}, "the last one accepted"
    assert fix.left() == 0


def test_what_a_killed_consumer_had_taken_is_accepted_by_the_next_with_the_same_time(fix: Fixture) -> None:
    fix.send(envelope("ann", {"city": "Paris"}))
    first = fix.queue().take(lambda: 1_795_600_000_000)
    # Something newer happened between the first taking and the second.
    fix.buffer.add([Update("ann", {"city": "Oslo"}, 1_795_600_001_000)])
    fix.redis.lpush(fix.name, encoded(envelope("bob", {"city": "Bonn"})))

    successor = fix.consumer("w2")
    successor.turn()
    successor.turn()

    assert first
    assert fix.pending() == {"ann": {"city": "Oslo"}, "bob": {"city": "Bonn"}}
    assert fix.buffer.snapshot().ledger["stale"] == 1
    assert fix.left() == 0


def test_a_message_is_not_older_than_what_was_accepted_before_it_was_sent(fix: Fixture) -> None:
    consumer, producer = fix.consumer(), Producer(fix.server.url, fix.keys.sdkappid)
    now_ms, asked = consumer._producer.now_ms, 0

    def slow() -> int:
        # Meanwhile a program sets a value, hears that it was accepted, and sends a newer one as a message.
        nonlocal asked
        asked += 1
        now = now_ms()
        if asked == 1:
            while now_ms() <= now:
                pass
            producer.set("ann", {"city": "Oslo"})
            fix.send(envelope("ann", {"city": "Paris"}))
        return now

    consumer._producer.now_ms = slow  # type: ignore[method-assign]
    consumer.turn()

    assert fix.pending() == {"ann": {"city": "Paris"}}
    assert fix.buffer.snapshot().ledger["stale"] == 0


def test_a_consumer_that_was_killed_before_it_noted_the_time_leaves_that_to_the_next(fix: Fixture) -> None:
    fix.send(envelope("ann", {"city": "Paris"}))

    def killed() -> int:
        raise SystemExit

    with pytest.raises(SystemExit):
        fix.queue().take(killed)
    taken = fix.queue().take(lambda: 1_795_600_000_000)

    assert taken
    assert [at for _, at in taken.messages] == [1_795_600_000_000]
    again = fix.queue().take(lambda: 1_795_600_000_999)
    assert again
    assert again.id == taken.id


def test_a_consumer_that_slept_before_it_noted_the_time_does_not_do_so_for_its_successors(
    fix: Fixture,
) -> None:
    def slept() -> int:
        # Its successor takes the same messages, finishes them, and takes more.
        taken = fix.queue().take(lambda: 1_795_600_000_000)
        assert taken
        fix.queue().finish(taken)
        fix.send(envelope("bob"))
        fix.queue()._take_some()
        return 1_795_500_000_000

    fix.send(envelope("ann"))

    assert fix.queue().take(slept) is None
    taken = fix.queue().take(lambda: 1_795_600_001_000)
    assert taken
    assert [at for _, at in taken.messages] == [1_795_600_001_000]


def test_what_was_delivered_before_the_kill_is_not_newer_the_second_time(fix: Fixture) -> None:
    fix.send(envelope("ann", {"city": "Paris"}))
    queue = fix.queue()
    taken = queue.take(lambda: 1_795_600_000_000)
    consumer = fix.consumer()
    consumer.turn()
    fix.deliver()
    # The acknowledgement was lost, and something newer has been delivered since.
    assert taken
    fix.redis.rpush(f"{fix.name}.taken", taken.id, *(raw for raw, _ in taken.messages))  # type: ignore[arg-type]
    fix.buffer.add([Update("ann", {"city": "Oslo"}, 1_795_600_000_500)])
    fix.deliver()

    consumer.turn()

    assert fix.pending() == {}
    shadow = fix.redis.hget(fix.keys.shadow, "ann")
    assert json.loads(shadow)["a"]["city"][0] == "Oslo"  # type: ignore[arg-type]


def test_each_taking_is_later_than_the_one_before_also_when_the_clock_was_set_back(fix: Fixture) -> None:
    queue, times = fix.queue(), []
    for now in (1_795_600_000_000, 1_795_600_000_000, 1_700_000_000_000):
        fix.send(envelope())
        taken = queue.take(lambda now=now: now)  # type: ignore[misc]
        assert taken
        times.append(taken.messages[0][1])
        queue.finish(taken)

    assert times == [1_795_600_000_000, 1_795_600_000_001, 1_795_600_000_002]


def test_a_consumer_that_slept_does_not_finish_its_successors_messages(fix: Fixture) -> None:
    queue = fix.queue()
    fix.send(envelope("ann"))
    slept = queue.take(lambda: 1)
    assert slept
    queue.finish(slept)
    fix.send(envelope("bob"))
    assert queue.take(lambda: 2)

    queue.finish(slept)

    assert fix.left() == 2, "the message and its time"


def test_the_order_of_the_queue_rules_and_no_publishers_clock(fix: Fixture) -> None:
    now = fix.consumer()._producer.now_ms()
    fix.send(envelope("ann", imattr_published_ms=1_795_600_000_000))
    fix.send(envelope("bob", imattr_published_ms=9_999_999_999_000))
    fix.send(envelope(args=["cat", {"city": "x"}, "2026-01-01T00:00:00Z"]))

    fix.consumer().turn()

    assert now <= fix.version("ann") <= fix.version("bob") < now + 60_000
    assert fix.version("cat") == round(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000)


def test_nothing_malformed_is_lost_or_in_the_way_of_what_is_behind_it(fix: Fixture) -> None:
    for number, message in enumerate(MALFORMED.values()):
        fix.send(message)
        fix.send(envelope(f"good{number}"))

    consumer = fix.consumer()
    for _ in range(3):
        consumer.turn()

    assert fix.left() == 0
    assert len(fix.pending()) == len(MALFORMED)
    assert fix.refused.count() == len(MALFORMED)
    assert all(kept.rule and kept.source == "celery" for kept in fix.refused.newest(100))


def test_one_bad_update_takes_no_others_along(fix: Fixture) -> None:
    uuid = {"__type__": "uuid", "__value__": {"hex": "0" * 32}}
    naive = {"__type__": "datetime", "__value__": "2026-11-25T12:00:00"}
    updates = [["ann", {"city": "Paris"}], [uuid, {"city": "x"}], ["bob", {"city": "y"}, naive], ["", {}], 7]
    fix.send(envelope(task="attributes.update_many", args=[[*updates, ["cat", {"city": "Rome"}]]]))

    fix.consumer().turn()

    assert fix.pending() == {"ann": {"city": "Paris"}, "cat": {"city": "Rome"}}
    rules = " / ".join(kept.rule for kept in fix.refused.newest(9))
    assert "got UUID" in rules
    assert "no time zone" in rules
    assert fix.refused.count() == 4


def test_a_defect_of_ours_loses_nothing(fix: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("Xanadu")

    fix.send(envelope("ann", {"city": "Xanadu"}))
    monkeypatch.setattr("worker.intake.celery_queue.read", broken)

    fix.consumer().turn()

    [kept] = fix.refused.newest(9)
    assert kept.rule == "it could not be read (KeyError)"
    assert "Xanadu" in kept.payload
    assert fix.left() == 0


def test_no_log_line_has_a_value(fix: Fixture, capsys: pytest.CaptureFixture[str]) -> None:
    for attrs in ({"city": ["Xanadu"]}, "Xanadu"):
        fix.send(envelope(attrs=attrs))
    fix.send(envelope(task="Xanadu" * 20, args=["Xanadu"]))

    fix.consumer().turn()

    said = capsys.readouterr()
    assert fix.refused.count() == 3
    assert "['Xanadu']" not in said.out + said.err


def test_an_expired_message_is_dropped_and_counted(fix: Fixture) -> None:
    fix.send(envelope("ann", expires="2026-01-01T00:00:00+00:00"))
    fix.send(envelope("bob", expires="2999-01-01T00:00:00+00:00"))
    # Nobody may schedule anything for so late a year.
    fix.send(envelope("cat", eta="2998-01-01T00:00:00Z", expires="2997-01-01T00:00:00Z"))

    consumer = fix.consumer()
    consumer.turn()
    fix.clock.now += REPORT_EVERY
    consumer.sign_of_life()

    assert set(fix.pending()) == {"bob"}
    assert fix.left() == 0
    assert fix.reports == [{"taken": 3, "accepted": 1, "refused": 1, "expired": 1}]


def test_a_message_with_an_eta_is_accepted_then_and_not_before(
    fix: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    eta = 1_895_600_000_000
    text_eta = datetime.fromtimestamp(eta / 1000, UTC).isoformat()
    fix.send(envelope("ann", {"city": "Paris"}, eta=text_eta))
    fix.send(envelope("bob", {"city": ["bad"]}, eta=text_eta))
    consumer = fix.consumer()
    consumer.turn()

    assert fix.pending() == {}
    assert fix.left() == 0
    assert fix.refused.count() == 1, "what is bad is refused at once"
    assert read_intake(fix.redis, fix.keys).queue["scheduled"] == 1

    monkeypatch.setattr(consumer._producer, "now_ms", lambda: eta + 5000)
    # Redis' own clock has not come so far.
    monkeypatch.setattr(consumer._producer, "_max_ahead", 10**9)
    consumer.turn()

    assert fix.pending() == {"ann": {"city": "Paris"}}
    assert fix.version("ann") == eta, "however late it is accepted"
    assert read_intake(fix.redis, fix.keys).queue["scheduled"] == 0


def test_without_room_messages_stay_in_the_broker(fix: Fixture) -> None:
    consumer = fix.consumer(max_pending=10)
    for number in range(3 * MOST):
        fix.send(envelope(f"user{number}"))

    assert consumer.turn() == FULL_PAUSE
    assert consumer.turn() == FULL_PAUSE
    assert len(fix.pending()) == 10
    assert fix.redis.llen(fix.name) == 2 * MOST, "no more than one taking is on its way"

    for _ in range(3 * MOST):
        fix.deliver()
        consumer.turn()
        if not fix.left() and not fix.pending():
            break
    assert fix.buffer.snapshot().ledger["delivered"] == 3 * MOST
    assert fix.buffer.snapshot().balanced


def test_a_message_of_megabytes_is_cut_and_refused(fix: Fixture) -> None:
    fix.send(b"[" * (2 * MOST_BYTES))
    fix.send(envelope("ann"))

    consumer = fix.consumer()
    consumer.turn()
    consumer.turn()

    [kept] = fix.refused.newest(9)
    assert "longer than 4,000,000 bytes" in kept.rule
    assert set(fix.pending()) == {"ann"}


def test_only_the_leader_takes_and_a_successor_goes_on_after_its_term(fix: Fixture) -> None:
    first, second = fix.consumer("w1"), fix.consumer("w2")
    first.turn()
    fix.send(envelope("ann"))

    assert 0 < second.turn() <= TERM + 0.2
    assert fix.left() == 1

    fix.redis.delete(fix.keys.queue_consumer)
    second.turn()

    assert fix.left() == 0


def test_an_outage_of_the_broker_is_waited_out(fix: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = fix.consumer()
    fix.send(envelope("ann"))
    take = RedisQueue.take

    def away(self: RedisQueue, now_ms: Callable[[], int]) -> Taken | None:
        raise redis.ResponseError("READONLY You can't write against a read only replica.")

    monkeypatch.setattr(RedisQueue, "take", away)
    assert consumer._try() == RETRY_AFTER
    monkeypatch.setattr(RedisQueue, "take", take)
    consumer._try()

    assert set(fix.pending()) == {"ann"}


def test_the_counts_are_reported_and_kept_for_the_status(fix: Fixture) -> None:
    consumer = fix.consumer()
    for user in ("ann", "ann", "bob", ""):
        fix.send(envelope(user))
    consumer.turn()
    fix.clock.now += REPORT_EVERY
    consumer.sign_of_life()
    fix.send(envelope("cat"))
    consumer.turn()
    fix.send(envelope("dan"))
    fix.clock.now += REPORT_EVERY
    consumer.sign_of_life()
    consumer.sign_of_life()

    assert fix.reports == [
        {"taken": 4, "accepted": 3, "coalesced": 1, "refused": 1},
        {"taken": 1, "accepted": 1},
    ]
    counted = read_intake(fix.redis, fix.keys).queue
    assert (counted["taken"], counted["accepted"], counted["refused"], counted["waiting"]) == (5, 4, 1, 1)


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("seed", range(drawn(40)))
def test_killed_at_any_call_nothing_is_lost_and_the_last_value_wins(
    fix: Fixture, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consumers die before or after a random call of Redis, while messages keep coming and others set values, too."""
    dice = random.Random(seed)
    last: dict[str, str] = {}
    sent = 0

    def send(count: int) -> None:
        nonlocal sent
        for _ in range(count):
            user = f"user{dice.randrange(15)}"
            last[user] = f"value {sent}"
            fix.send(envelope(user, {"city": last[user]}))
            sent += 1

    send(300)
    execute: Callable[..., Any] = redis.Redis.execute_command
    armed = [0]

    def deadly(self: redis.Redis, *args: Any, **options: Any) -> Any:
        armed[0] -= 1
        if armed[0] == 0 and dice.random() < 0.5:
            raise Killed
        answer = execute(self, *args, **options)
        if armed[0] == 0:
            raise Killed
        return answer

    for life in range(12):
        consumer = fix.consumer(f"w{life}")
        fix.redis.delete(fix.keys.queue_consumer)
        armed[0] = dice.randrange(1, 14)
        with monkeypatch.context() as patched:
            patched.setattr(redis.Redis, "execute_command", deadly)
            try:
                for _ in range(4):
                    consumer.turn()
            except Killed:
                pass
        armed[0] = 0
        send(dice.randrange(60))
        if dice.random() < 0.5:
            fix.deliver()
    consumer = fix.consumer("last")
    fix.redis.delete(fix.keys.queue_consumer)
    for _ in range(50):
        consumer.turn()

    assert fix.left() == 0
    shadow = {
        text(user): json.loads(record)["a"]["city"][0]
        for user, record in fix.redis.hgetall(fix.keys.shadow).items()
    }
    waiting = {user: attrs["city"] for user, attrs in fix.pending().items()}
    assert shadow | waiting == last
    assert fix.buffer.snapshot().balanced
    assert fix.buffer.snapshot().ledger["accepted"] >= sent


def test_a_consumer_that_was_frozen_beyond_its_term_brings_nothing_old_back(
    fix: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, successor = fix.consumer(), fix.consumer("w2")
    fix.send(envelope("ann", {"city": "Paris"}))
    fix.send(envelope("ann", {"city": "Rome"}))
    add = frozen._producer.add

    def freeze(updates: list[Update], **how: Any) -> Added:
        fix.redis.delete(fix.keys.queue_consumer)
        monkeypatch.setattr(frozen._producer, "add", add)
        for _ in range(3):
            successor.turn()
        return add(updates[:1], **how)

    monkeypatch.setattr(frozen._producer, "add", freeze)
    frozen.turn()

    assert fix.pending() == {"ann": {"city": "Rome"}}
    assert fix.left() == 0


def test_a_message_about_the_far_future_is_kept_with_the_rule(fix: Fixture) -> None:
    fix.send(envelope(args=["ann", {"city": "typo"}, "2126-11-25T00:00:00Z"]))
    fix.send(envelope("bob", {"city": "Rome"}))

    fix.consumer().turn()

    assert fix.pending() == {"bob": {"city": "Rome"}}
    (kept,) = fix.refused.newest(5)
    assert "IMATTR_MAX_AHEAD" in kept.rule
    assert fix.left() == 0
