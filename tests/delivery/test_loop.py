"""The core loop: a real buffer, time held still, and an API that answers what a test wants."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import redis
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ManualClock, new_keys
from tests.virtual import EPOCH_US, scripts_on
from worker.delivery.answers import Answer, Failure, NoReply, Reply, UserError
from worker.delivery.api import Call, ChatApi
from worker.delivery.loop import Delivery
from worker.delivery.meter import Summary
from worker.delivery.policy import TABLE, Policy, Verdict
from worker.models import BatchId, Update
from worker.ratelimit import GRACE, Permit, RateLimiter
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer, new_batch_id
from worker.state.line import OUTAGE_AFTER, Line, LineState
from worker.state.scripts import text

Api = Callable[[list[str]], Answer]

OK = Reply(0)


class ScriptedCall:
    """A call whose answer is a function."""

    def __init__(self, sent: Callable[[], None], answer: Callable[[], Answer]) -> None:
        self.send, self.answer = sent, answer

    def abandon(self) -> None:
        pass


class ScriptedApi(ChatApi):
    """Answers by a function of the users in the call."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.calls: list[list[str]] = []
        #: Users, time and answer of each call.
        self.history: list[tuple[list[str], float, Answer]] = []
        self.clock: ManualClock | None = None
        self.bodies: list[dict[str, Any]] = []
        self.longest_call = 13.0
        self.renewals = 0
        #: Signatures older than this were given up.
        self.signed_at = 1
        self.names: Answer = Reply(0, names=frozenset({"city"}))
        #: What users have, and who was asked for; by default the API knows nobody.
        self.stored: Answer = Reply(0)
        self.reads: list[list[str]] = []

    def renew_signature(self) -> None:
        self.renewals += 1

    def adopt_signature(self, issued: int) -> None:
        self.signed_at = max(self.signed_at, issued)

    def _prepare(self, command: str, body: object) -> Call | NoReply:
        if command == "get_attr_name":
            return ScriptedCall(lambda: None, lambda: self.names)
        if command == "get_attr":
            asked = json.loads(json.dumps(body))["To_Account"]
            return ScriptedCall(lambda: self.reads.append(asked), lambda: self.stored)
        return ScriptedCall(lambda: self.bodies.append(json.loads(json.dumps(body))), self._answer)

    def _answer(self) -> Answer:
        users = [entry["To_Account"] for entry in self.bodies[-1]["UserAttrs"]]
        self.calls.append(users)
        answer = self._api(users)
        if isinstance(answer, Reply):
            answer = dataclasses.replace(answer, signed_at=self.signed_at)
        if self.clock:
            self.history.append((users, self.clock.now, answer))
        return answer


class ScriptedLimiter(RateLimiter):
    """A slot every 10 ms for ever, or as many as a test grants."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock, self.round_trip = clock, 0.0
        self.slots: list[float] | None = None
        self.pauses: list[tuple[float, int | None]] = []

    def reserve(self, *, now_us: int | None = None) -> Permit | None:
        if self.slots is None:
            return Permit(self._clock.monotonic() + 0.01, 0)
        return Permit(self.slots.pop(0), 0) if self.slots else None

    def reserve_isolating(self) -> Permit | None:
        return self.reserve()

    def take(self) -> Permit | None:
        permit = self.reserve()
        return permit if permit and self.redeem(permit) else None

    def redeem(self, permit: Permit) -> bool:
        self._clock.sleep(permit.due - self._clock.monotonic())
        return self._clock.monotonic() <= permit.due + GRACE

    def answered(self, seconds: float) -> None:
        pass

    def pause(
        self,
        seconds: float,
        reason: str,
        code: int | None = None,
        *,
        refused: Permit | None = None,
        now_us: int | None = None,
    ) -> bool:
        self.pauses.append((seconds, code))
        return True


class Loop:
    """A delivery loop and all that is around it."""

    def __init__(
        self, client: redis.Redis, api: Api, *, max_attempts: int = 4, reads_apart: bool = False
    ) -> None:
        self.redis, self.keys, self.clock = client, new_keys(), ManualClock()
        with scripts_on(self.us):
            self.buffer = Buffer(client, self.keys)
            self.line = Line(client, self.keys)
        self.limiter = ScriptedLimiter(self.clock)
        self.names = AttributeNames(client, self.keys, self.clock)
        self.names.set(["city"])
        self.api = ScriptedApi(api)
        self.api.clock = self.clock
        self.stopping = False
        #: Every batch that was delivered by way of this.
        self.summaries: list[Summary] = []
        self.delivery = Delivery(
            self.buffer,
            self.limiter,
            self.line,
            self.names,
            self.api,
            Policy(max_attempts=max_attempts, backoff_base=1, backoff_max=300, hold=5),
            self.clock,
            batch_size=100,
            lease=60,
            quota=100,
            rng=random.Random(1),
            stopping=lambda: self.stopping,
            reads=ScriptedLimiter(self.clock) if reads_apart else None,
        )

    def us(self) -> int:
        """The server's clock."""
        return EPOCH_US + round(self.clock.now * 1e6)

    def add(self, users: Iterable[str], name: str = "city") -> None:
        self.buffer.add([Update(user, {name: "Paris"}) for user in users])

    def others_succeed(self) -> None:
        """Somebody else is delivered, so that failures until now were not the service's."""
        answers, self.api._api = self.api._api, lambda users: OK
        delayed: list[Any] = self.redis.zrange(self.keys.delayed, 0, -1, withscores=True)
        self.clock.now += 0.002
        assert self.deliver([f"other at {self.clock.now:.3f}"]).acked == 1
        assert self.redis.zrange(self.keys.delayed, 0, -1, withscores=True) == delayed
        self.api._api = answers

    def ticket(self) -> BatchId:
        """A ticket, whatever the dispatcher thinks."""
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: 1})
        return ticket

    def make_due(self) -> None:
        """Let every delay be over."""
        latest: list[Any] = self.redis.zrange(self.keys.delayed, -1, -1, withscores=True)
        if latest:
            self.clock.now = max(self.clock.now, latest[0][1] / 1000 - EPOCH_US / 1e6 + 0.001)

    def deliver(self, users: Iterable[str] = ()) -> Summary:
        self.add(users)
        return self._carry(self.ticket())

    def probe(self) -> Summary:
        """Let the dispatcher issue the line's probe when it is due, and deliver it."""
        self.make_due()
        due = self.line.read().next_probe or 0
        self.clock.now = max(self.clock.now, due - EPOCH_US / 1e6)
        tick = self.buffer.tick(size=100, linger=0, ticket_ttl=9, quota=5, horizon=1.0)
        [ticket] = tick.tickets
        return self._carry(ticket)

    def _carry(self, ticket: BatchId) -> Summary:
        """Deliver with the ticket; returns what became of its own batch."""
        carried = self.delivery.carry(ticket)
        self.summaries += carried
        return carried[0]

    def dead(self) -> dict[str, Any]:
        letters: dict[bytes, bytes] = self.redis.hgetall(self.keys.dead)  # type: ignore[assignment]
        return {user.decode(): json.loads(letter) for user, letter in letters.items()}


def some(count: int) -> list[str]:
    return [f"user{number:03}" for number in range(count)]


@pytest.mark.parametrize(("users", "batches"), [(100, 1), (199, 1), (350, 3)])
def test_a_ticket_carries_a_worker_through_every_full_batch(
    client: redis.Redis, users: int, batches: int
) -> None:
    loop = Loop(client, lambda users: OK)
    loop.add(some(users))
    ticket = loop.ticket()

    carried = loop.delivery.carry(ticket)

    assert [summary.outcome for summary in carried] == ["delivered"] * batches
    assert carried[0].batch == ticket
    assert len({summary.batch for summary in carried}) == batches
    assert loop.buffer.snapshot().pending == users - 100 * batches
    assert loop.redis.zcard(loop.keys.tickets) == 0


@pytest.mark.parametrize(("round_trip", "batches"), [(0.003, 2), (0.04, 4), (3.0, 10)])
def test_a_worker_returns_to_celery_now_and_then(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, round_trip: float, batches: int
) -> None:
    loop = Loop(client, lambda users: OK)
    loop.limiter.round_trip = round_trip
    monkeypatch.setattr("worker.delivery.loop.MOST_BATCHES", 2)
    loop.add(some(1200))

    assert len(loop.delivery.carry(loop.ticket())) == batches
    assert loop.redis.zcard(loop.keys.tickets) == 0, "no ticket is left that nobody uses"


def test_a_full_batch_goes_out_in_one_call_and_is_acked(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    summary = loop.deliver(some(130))

    assert [len(call) for call in loop.api.calls] == [100]
    assert loop.api.bodies[0]["UserAttrs"][0] == {"To_Account": "user000", "Attrs": {"city": "Paris"}}
    assert (summary.outcome, summary.users, summary.acked, summary.calls) == ("delivered", 100, 100, 1)
    assert loop.buffer.snapshot().ledger["delivered"] == 100
    assert loop.buffer.snapshot().pending == 30


def test_the_batch_is_claimed_after_the_permit_so_it_has_the_newest_values(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.limiter.slots = [loop.clock.now + 2.0]
    loop.add(["ann"])
    sleep = loop.clock.sleep

    def meanwhile(seconds: float) -> None:
        loop.clock.sleep = sleep  # type: ignore[method-assign]
        loop.buffer.add([Update("ann", {"city": "Rome"})])
        sleep(seconds)

    loop.clock.sleep = meanwhile  # type: ignore[method-assign]
    loop.deliver()

    assert loop.api.bodies[0]["UserAttrs"][0]["Attrs"] == {"city": "Rome"}


def test_without_a_permit_nothing_is_claimed_and_the_ticket_goes_back(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.limiter.slots = []

    summary = loop.deliver(["ann"])

    assert summary.outcome == "no_permit"
    assert loop.buffer.snapshot().live == 1
    assert client.zcard(loop.keys.tickets) == 0


def test_a_ticket_that_comes_twice_delivers_once(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    ticket = loop.ticket()
    loop.add(["ann"])
    loop.delivery.carry(ticket)
    loop.add(["bob"])

    assert loop.delivery.carry(ticket)[0].outcome == "spent"
    assert loop.api.calls == [["ann"]]


def test_users_named_in_the_error_list_are_dead_letters_and_the_others_are_delivered(
    client: redis.Redis,
) -> None:
    errors = {"user001": UserError(70107, ""), "stranger": UserError(70107, "")}
    loop = Loop(client, lambda users: Reply(0, errors=errors))

    summary = loop.deliver(some(5))

    assert (summary.acked, summary.dead_lettered, summary.calls) == (4, 1, 1)
    assert loop.dead()["user001"]["code"] == 70107
    assert loop.dead()["user001"]["a"]["city"][0] == "Paris"


@pytest.mark.parametrize("bad", [1, 3, 10])
@pytest.mark.parametrize("code", [90033, 70107])
def test_poison_is_found_by_halving_and_nobody_else_suffers(client: redis.Redis, bad: int, code: int) -> None:
    poison = set(random.Random(bad).sample(some(100), bad))
    loop = Loop(client, lambda users: Reply(code, "refused") if poison & set(users) else OK)

    summary = loop.deliver(some(100))

    assert set(loop.dead()) == poison
    assert (summary.acked, summary.dead_lettered) == (100 - bad, bad)
    assert summary.calls == len(loop.api.calls) <= 1 + 14 * bad
    assert loop.line.read() == LineState()


@pytest.mark.parametrize("first", [0, 45, 90])
def test_poison_users_side_by_side_are_found_too(client: redis.Redis, first: int) -> None:
    poison = set(some(100)[first : first + 10])
    loop = Loop(client, lambda users: Reply(70107) if poison & set(users) else OK)

    loop.deliver(some(100))

    assert set(loop.dead()) == poison
    assert loop.line.read() == LineState()


def test_while_nobody_else_succeeds_failures_of_the_service_cost_no_attempt(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000))

    attempts: list[int] = []
    for _ in range(4):
        loop.make_due()
        attempts.append(loop.deliver(some(3) if not attempts else ()).attempt)

    assert attempts == [1, 1, 1, 1]
    assert loop.buffer.snapshot().delayed == 3
    assert not loop.dead()


def test_when_others_succeed_meanwhile_a_failure_costs_an_attempt(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000), max_attempts=8)

    attempts: list[int] = []
    for _ in range(4):
        loop.make_due()
        attempts.append(loop.deliver(some(1) if not attempts else ()).attempt)
        loop.others_succeed()

    assert attempts == [1, 2, 3, 4]


def test_a_user_that_spoils_its_calls_is_sent_apart_from_the_others(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000) if "user001" in users else OK, max_attempts=8)
    loop.deliver(["user001"])
    for _ in range(2):
        loop.others_succeed()
        loop.make_due()
        loop.deliver()
    loop.others_succeed()
    loop.make_due()
    loop.api.calls.clear()

    summary = loop.deliver(some(5))

    assert loop.api.calls == [["user000", "user002", "user003", "user004"], ["user001"]]
    assert (summary.acked, summary.retried) == (4, 1)


def test_used_up_attempts_isolate_each_user_before_giving_up(client: redis.Redis) -> None:
    broken = {"user001"}
    loop = Loop(client, lambda users: Reply(91000) if broken & set(users) else OK)

    loop.add(some(4))
    for _ in range(6):
        loop.make_due()
        loop.deliver()
        loop.others_succeed()

    assert set(loop.dead()) == broken
    assert loop.buffer.snapshot().ledger["delivered"] == 3 + 6


def test_call_after_call_that_fails_is_an_outage_and_stops_the_line(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000))

    outcomes = [loop.deliver([f"user{number}"]).outcome for number in range(OUTAGE_AFTER)]

    assert outcomes == [*["retried"] * (OUTAGE_AFTER - 1), "stopped"]
    state = loop.line.read()
    assert (state.state, state.kind, state.code) == ("stopped", "outage", 91000)


def test_an_hour_of_outage_costs_no_attempt_and_few_calls(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: NoReply(Failure.TIMEOUT))
    loop.add(some(300))
    start = loop.clock.now
    while loop.line.read().state == "open":
        loop.make_due()
        loop.deliver()

    while loop.clock.now < start + 3600:
        assert loop.probe().outcome == "stopped"

    assert len(loop.api.calls) < 80
    assert loop.buffer.snapshot().pending == 300
    assert not loop.dead()
    loop.api._api = lambda users: OK
    assert loop.probe().attempt == 1
    assert loop.line.read() == LineState()
    loop.make_due()
    assert loop.deliver().attempt == 1
    delivered = [summary for summary in loop.summaries if summary.outcome == "delivered"]
    assert [summary.users for summary in delivered] == [1, 100, 100, 99]
    assert [summary.attempt for summary in delivered] == [1, 1, 1, 1]


def test_after_a_probe_that_failed_others_are_sent_as_the_next_one(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000) if "user001" in users else OK)
    loop.line.stop(new_batch_id(), "outage", 91000, "internal error")
    loop.add(["user001"])
    assert loop.probe().outcome == "stopped"

    loop.add(["ann"])
    due = loop.line.read().next_probe or 0
    loop.clock.now = due - EPOCH_US / 1e6
    [ticket] = loop.buffer.tick(size=100, linger=0, ticket_ttl=9, quota=5, horizon=1.0).tickets
    loop.delivery.carry(ticket)

    assert loop.api.calls == [["user001"], ["ann"]]
    assert loop.line.read() == LineState()


def test_what_is_refused_for_every_user_stops_the_line_instead_of_burying_them(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(70107))

    summary = loop.deliver(some(100))

    assert (summary.outcome, summary.snoozed) == ("stopped", 100)
    assert len(loop.api.calls) < 60, "where halving to the end would take 199"
    assert not loop.dead()
    state = loop.line.read()
    assert (state.kind, state.code) == ("data", 70107)
    assert "every user is refused" in (state.reason or "")


def test_an_error_list_that_names_everybody_stops_the_line_too(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(0, errors=dict.fromkeys(users, UserError(70107, ""))))

    assert loop.deliver(some(100)).outcome == "stopped"
    assert not loop.dead()


def test_dead_letters_in_masses_stop_the_line(client: redis.Redis) -> None:
    def a_third_is_bad(users: list[str]) -> Answer:
        return Reply(0, errors={user: UserError(70107, "") for user in users if int(user[4:]) % 3 == 0})

    loop = Loop(client, a_third_is_bad)
    loop.add(some(500))

    outcomes = [loop.deliver().outcome for _ in range(5)]

    assert outcomes[-1] == "spent", "the line is stopped"
    assert len(loop.dead()) < 100
    assert "too many dead letters" in (loop.line.read().reason or "")
    buried = len(loop.dead())
    assert loop.probe().outcome == "stopped"
    assert len(loop.dead()) == buried, "a probe buries nobody"
    loop.api._api = lambda users: OK
    assert loop.probe().outcome == "delivered"
    assert loop.line.read() == LineState()


def test_after_a_person_has_seen_it_they_are_buried_all_the_same(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(0, errors=dict.fromkeys(users, UserError(70107, ""))))
    loop.deliver(some(100))

    loop.line.resume()
    summary = loop.deliver()

    assert (summary.outcome, summary.dead_lettered) == ("dead_lettered", 100)
    assert loop.line.read() == LineState()


def test_names_that_are_not_set_stop_the_line_and_the_reason_says_which(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(90033))
    client.delete(loop.keys.names_read)
    loop.api.names = Reply(0, names=frozenset({"city", "sex"}))
    loop.add(some(50))
    loop.add(some(50), "level")

    summary = loop.deliver()

    assert (summary.outcome, summary.calls, len(loop.api.calls)) == ("stopped", 2, 1)
    assert (
        loop.line.read().reason
        == "the app has no attribute 'level': add with imattr names set, or in the console"
    )
    assert loop.names.get() == {"city", "sex"}, "from now on producers are told at the door"
    assert not loop.dead()


def test_once_the_names_are_set_the_line_opens_by_itself(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(90033))
    client.delete(loop.keys.names_read)
    loop.add(some(50), "level")
    loop.deliver()

    assert loop.probe().outcome == "stopped"
    loop.api.names = Reply(0, names=frozenset({"city", "level"}))
    loop.api._api = lambda users: OK

    assert loop.probe().outcome == "delivered"
    assert loop.line.read() == LineState()


def test_who_has_an_unset_name_is_buried_alone_after_a_person_has_seen_it(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(90033) if "user000" in users else OK)
    loop.add(some(10))
    loop.add(["user000"], "citty")
    loop.deliver()
    loop.line.resume()

    summary = loop.deliver()

    assert set(loop.dead()) == {"user000"}
    assert (summary.acked, summary.calls) == (9, 2)
    assert "citty" in loop.dead()["user000"]["message"]


def test_names_that_cannot_be_read_leave_it_to_halving(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(90033) if "user003" in users else OK)
    client.delete(loop.keys.names_read)
    loop.api.names = NoReply(Failure.TIMEOUT)

    loop.deliver(some(10))

    assert set(loop.dead()) == {"user003"}


def test_a_code_that_nobody_lists_is_bounded_and_kept(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(12345, "what is this"))

    loop.add(["ann"])
    for _ in range(10):
        loop.make_due()
        loop.deliver()

    assert loop.dead()["ann"]["code"] == 12345
    assert len(loop.api.calls) == 3


def test_after_an_unknown_outcome_users_are_held_longer_than_the_old_call_can_land(
    client: redis.Redis,
) -> None:
    loop = Loop(client, lambda users: NoReply(Failure.TIMEOUT))

    before = loop.us()
    summary = loop.deliver(["ann"])

    due = client.zscore(loop.keys.delayed, "ann")
    assert isinstance(due, float)
    assert due * 1000 - before >= 5e6
    assert (summary.outcome, summary.failure) == ("retried", "timeout")


def test_a_rate_code_pauses_everyone_and_costs_no_attempt(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(60007))

    summary = loop.deliver(some(100))

    assert loop.limiter.pauses == [(1.0, 60007)]
    assert summary.snoozed == 100
    loop.make_due()
    assert loop.deliver().attempt == 1


@pytest.mark.parametrize("code", [c for c, rule in TABLE.items() if rule.verdict is Verdict.STOP])
def test_a_stop_code_stops_the_line_and_loses_nothing(client: redis.Redis, code: int) -> None:
    loop = Loop(client, lambda users: Reply(code))

    summary = loop.deliver(some(10))

    assert (summary.outcome, summary.snoozed, summary.calls) == ("stopped", 10, 1)
    state = loop.line.read()
    assert (state.state, state.code, state.reason) == ("stopped", code, TABLE[code].meaning)
    assert state.next_probe is not None
    assert state.since is not None
    assert state.next_probe - state.since == (60 if code == 70050 else 30)
    assert loop.buffer.snapshot().live == 10
    assert not loop.dead()


def test_while_the_line_is_stopped_only_its_probe_is_sent(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(90009))
    loop.deliver(["ann"])

    assert loop.deliver().outcome == "spent"

    loop.api._api = lambda users: OK
    summary = loop.probe()
    assert (summary.outcome, summary.attempt) == ("delivered", 1)
    assert loop.line.read() == LineState()


@pytest.mark.parametrize(
    ("answer", "opens"),
    [
        (OK, True),
        (Reply(60007), True),
        (Reply(90033), True),
        (Reply(91000), False),
        (Reply(90009), False),
        (NoReply(Failure.TIMEOUT), False),
    ],
    ids=str,
)
def test_a_probe_opens_the_line_when_the_api_lets_it_in(
    client: redis.Redis, answer: Answer, opens: bool
) -> None:
    loop = Loop(client, lambda users: Reply(60020))
    loop.deliver(["ann"])
    loop.api._api = lambda users: answer

    loop.probe()

    assert (loop.line.read().state == "open") is opens
    assert loop.buffer.snapshot().balanced


def test_a_refused_signature_is_made_again_once_before_the_line_stops(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(70001))

    first, signed_at = loop.deliver(["ann"]), loop.api.signed_at
    second = loop.deliver()

    assert (first.outcome, first.snoozed, second.outcome) == ("signature_renewed", 1, "stopped")
    assert signed_at == loop.us() // 10**6
    assert loop.line.read().code == 70001
    assert not loop.dead()


def test_a_probe_is_signed_anew_and_the_fleet_signs_after_it(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(70009))
    loop.deliver(["ann"])
    loop.api._api = lambda users: OK
    loop.api.signed_at = 77

    loop.probe()
    loop.api.signed_at = 1
    loop.deliver(["bob"])

    assert loop.api.renewals == 1
    assert loop.api.signed_at == 77


def test_a_stop_in_the_middle_of_halving_puts_all_the_rest_back(client: redis.Redis) -> None:
    answers = iter([Reply(90033), OK, Reply(60020)])
    loop = Loop(client, lambda users: next(answers))

    summary = loop.deliver(some(100))

    assert (summary.acked, summary.snoozed, summary.calls) == (50, 50, 3)


def test_a_line_stopped_by_others_ends_the_halving(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def api(users: list[str]) -> Answer:
        loop.line.pause("maintenance")
        return Reply(90033)

    loop.api._api = api
    summary = loop.deliver(some(100))

    assert (summary.outcome, summary.snoozed, summary.calls) == ("handed_back", 100, 1)


def test_without_a_slot_to_isolate_them_suspects_wait_and_are_not_mixed_again(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(90033) if "user001" in users else OK)
    loop.limiter.reserve_isolating = lambda: None  # type: ignore[method-assign]
    summary = loop.deliver(some(10))
    del loop.limiter.reserve_isolating
    assert (summary.outcome, summary.snoozed) == ("handed_back", 10)
    assert loop.deliver().outcome == "empty", "they wait"

    loop.make_due()
    loop.api.calls.clear()
    loop.deliver(["ann", "bob"])

    assert loop.api.calls[0] == ["ann", "bob"]
    assert set(loop.dead()) == {"user001"}


def test_a_shutdown_finishes_the_call_and_hands_back_the_rest(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def api(users: list[str]) -> Answer:
        loop.stopping = True
        return Reply(90033)

    loop.api._api = api
    summary = loop.deliver(some(100))

    assert (summary.outcome, summary.snoozed, summary.calls) == ("handed_back", 100, 1)
    assert loop.buffer.snapshot().live == 100


def test_a_worker_that_shuts_down_claims_nothing(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.stopping = True

    assert loop.deliver(["ann"]).outcome == "no_permit"
    assert loop.buffer.snapshot().live == 1


def test_a_worker_frozen_beyond_its_lease_sends_nothing(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    redeem = loop.limiter.redeem

    def frozen(permit: Permit) -> bool:
        loop.clock.now += 3600
        [batch] = client.hkeys(loop.keys.batches)
        client.zadd(loop.keys.leases, {bytes(batch): 1})  # type: ignore[arg-type]
        assert loop.buffer.reclaim()
        loop.limiter.redeem = redeem  # type: ignore[method-assign]
        return redeem(permit)

    loop.limiter.redeem = frozen  # type: ignore[method-assign]
    summary = loop.deliver(["ann"])

    assert loop.api.calls == []
    assert summary.outcome == "fenced"
    assert loop.buffer.snapshot().live == 1


def test_a_long_bisection_renews_its_lease(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def slow(users: list[str]) -> Answer:
        loop.clock.now += 12
        return Reply(90033) if "user007" in users else OK

    loop.api._api = slow
    extend, renewed = loop.buffer.extend, []

    def extended(batch: BatchId, **options: Any) -> Any:
        renewed.append(loop.clock.now)
        return extend(batch, **options)

    loop.buffer.extend = extended  # type: ignore[method-assign]
    loop.deliver(some(100))

    assert set(loop.dead()) == {"user007"}
    assert len(renewed) >= 3


def test_a_missed_slot_is_replaced_by_another(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    now = loop.clock.now
    loop.limiter.slots = [now + 0.2, now + 0.4]
    prepare = loop.api._prepare

    def slow(command: str, body: object) -> Call | NoReply:
        loop.clock.now += 0.3
        return prepare(command, body)

    loop.api._prepare = slow  # type: ignore[method-assign]

    assert loop.deliver(["ann"]).outcome == "delivered"
    assert loop.clock.now == pytest.approx(now + 0.4)


def test_when_no_other_slot_comes_the_batch_goes_back_at_no_cost(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.limiter.slots = [loop.clock.now - 1]

    summary = loop.deliver(["ann"])

    assert (summary.outcome, summary.snoozed, summary.calls) == ("handed_back", 1, 0)
    assert loop.buffer.snapshot().live == 1


def test_a_defect_in_our_own_code_holds_the_users_and_is_raised(client: redis.Redis) -> None:
    def broken(users: list[str]) -> Answer:
        raise ZeroDivisionError

    loop = Loop(client, broken)

    with pytest.raises(ZeroDivisionError):
        loop.deliver(["ann"])
    assert loop.buffer.snapshot().delayed == 1


def test_even_the_last_attempt_waits_until_the_old_call_can_land_no_more(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: NoReply(Failure.TIMEOUT))
    loop.add(["ann"])
    for _ in range(4):
        loop.make_due()
        loop.deliver()
        loop.others_succeed()

    loop.make_due()
    before = loop.clock.now
    loop.deliver()

    assert set(loop.dead()) == {"ann"}
    assert loop.clock.now - before >= 5


def test_an_unknown_code_isolates_only_those_whose_attempts_are_used_up(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(12345) if "user000" in users else OK)
    loop.deliver(["user000"])
    loop.make_due()
    loop.deliver()
    loop.make_due()

    # Its third and last attempt: with the fresh ones it is in the batch, but not in their call.
    summary = loop.deliver(some(3))

    assert set(loop.dead()) == {"user000"}
    assert (summary.acked, summary.dead_lettered) == (2, 1)


def test_of_one_call_those_with_attempts_left_are_retried_and_the_others_isolated(
    client: redis.Redis,
) -> None:
    loop = Loop(client, lambda users: Reply(12345), max_attempts=2)
    loop.deliver(["user000"])
    loop.make_due()
    loop.api._api = lambda users: OK if users == ["user000"] else Reply(12345)

    summary = loop.deliver(some(3))

    assert (summary.retried, summary.acked, summary.calls) == (2, 1, 2)


def test_a_probe_with_an_unknown_code_leaves_the_line_stopped_and_costs_nothing(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(60020))
    loop.deliver(["ann"])
    loop.api._api = lambda users: Reply(12345)

    for _ in range(5):
        assert loop.probe().outcome == "stopped"

    assert not loop.dead()
    assert loop.line.read().failed_probes == 5


def test_a_probe_of_bad_data_that_is_refused_as_a_whole_leaves_the_line_stopped(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(70107))
    loop.deliver(some(100))
    reason = loop.line.read().reason

    summary = loop.probe()

    assert (summary.outcome, summary.calls, summary.snoozed) == ("stopped", 1, 100)
    assert loop.line.read().reason == reason


def test_slots_missed_again_and_again_put_the_batch_back(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.limiter.redeem = lambda permit: False  # type: ignore[method-assign]

    summary = loop.deliver(["ann"])

    assert (summary.outcome, summary.snoozed, summary.calls) == ("handed_back", 1, 0)


def lose(loop: Loop) -> None:
    """Let somebody else take over whatever this worker holds."""
    loop.clock.now += 3600
    while loop.buffer.reclaim():
        pass


def test_a_batch_lost_while_the_answer_was_on_its_way_is_not_settled(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def slow(users: list[str]) -> Answer:
        lose(loop)
        return OK

    loop.api._api = slow

    assert loop.deliver(["ann"]).outcome == "fenced"
    assert loop.buffer.snapshot().live == 1


def test_a_batch_lost_in_the_middle_of_halving_sends_nothing_more(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def slow(users: list[str]) -> Answer:
        lose(loop)
        return Reply(70107)

    loop.api._api = slow

    assert loop.deliver(some(10)).outcome == "fenced"
    assert len(loop.api.calls) == 1


def test_an_error_of_redis_on_the_way_leaves_the_batch_to_its_lease(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(client, lambda users: OK)

    def unreachable(*_: object, **__: object) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(loop.buffer, "settle", unreachable)

    with pytest.raises(redis.ConnectionError):
        loop.deliver(["ann"])
    assert loop.buffer.snapshot().in_flight == 1


def test_a_second_pause_for_the_same_refusal_is_not_told_again(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(60007))
    loop.limiter.pause = lambda *_, **__: False  # type: ignore[method-assign]

    with structlog.testing.capture_logs() as lines:
        assert loop.deliver(["ann"]).outcome == "rate_limited"

    assert [line["event"] for line in lines] == ["batch_settled"]


def test_a_line_stopped_by_others_does_not_cut_the_hold_short(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: NoReply(Failure.TIMEOUT))
    loop.add(["ann"])
    for _ in range(4):
        loop.make_due()
        loop.deliver()
        loop.others_succeed()
    loop.make_due()

    def stopped_meanwhile(users: list[str]) -> Answer:
        loop.line.pause("maintenance")
        return NoReply(Failure.TIMEOUT)

    loop.api._api = stopped_meanwhile
    before = loop.clock.now
    loop.deliver()

    due = client.zscore(loop.keys.delayed, "ann") or 0
    assert loop.clock.now - before >= 5 or float(due) * 1000 - loop.us() >= 5e6


def removing(client: redis.Redis, api: Api) -> Loop:
    """A loop in which ann sets and removes, bob only sets, and eve only removes."""
    loop = Loop(client, api)
    loop.names.set(["city", "level"])
    loop.buffer.add(
        [
            Update("ann", {"city": "Paris", "level": None}),
            Update("bob", {"city": "Oslo"}),
            Update("eve", {"level": None}),
        ]
    )
    return loop


def test_what_is_removed_goes_out_after_what_is_set_in_a_call_of_its_own(client: redis.Redis) -> None:
    loop = removing(client, lambda users: OK)

    summary = loop.deliver()

    assert [body["UserAttrs"] for body in loop.api.bodies] == [
        [{"To_Account": "ann", "Attrs": {"city": "Paris"}}, {"To_Account": "bob", "Attrs": {"city": "Oslo"}}],
        [{"To_Account": "ann", "Attrs": ["level"]}, {"To_Account": "eve", "Attrs": ["level"]}],
    ]
    assert (summary.outcome, summary.acked, summary.calls) == ("delivered", 3, 2)
    assert loop.buffer.snapshot().balanced


def test_the_second_call_waits_for_its_slot_instead_of_beginning_anew(client: redis.Redis) -> None:
    """With more threads than slots within patience, a batch handed back after each first call would never end."""
    loop = removing(client, lambda users: OK)
    first, *refused, second = [True, *[False] * 5, True]
    turns = iter([first, *refused, second])
    give = loop.limiter.reserve
    loop.limiter.reserve = lambda **_: give() if next(turns) else None  # type: ignore[method-assign]

    summary = loop.deliver()

    assert (summary.outcome, summary.acked, summary.calls) == ("delivered", 3, 2)


@pytest.mark.parametrize("shutting_down", [False, True])
def test_the_wait_for_another_slot_ends_with_the_lease_or_the_worker(
    client: redis.Redis, shutting_down: bool
) -> None:
    loop = removing(client, lambda users: OK)
    began, turns = loop.clock.now, iter([True])
    give = loop.limiter.reserve

    def reserve(**_: Any) -> Permit | None:
        if next(turns, False):
            return give()
        loop.stopping = shutting_down
        return None

    loop.limiter.reserve = reserve  # type: ignore[method-assign]

    summary = loop.deliver()

    assert (summary.outcome, summary.snoozed, summary.calls) == ("handed_back", 2, 1)
    assert (loop.clock.now - began < 1) is shutting_down
    assert loop.clock.now - began < 60
    assert loop.buffer.snapshot().balanced


def test_a_removal_repeated_is_unchanged_and_a_new_value_ends_it(client: redis.Redis) -> None:
    loop = removing(client, lambda users: OK)
    loop.deliver()

    again = loop.buffer.add([Update("eve", {"level": None}), Update("ann", {"city": "Paris", "level": None})])
    anew = loop.buffer.add([Update("eve", {"level": "Gold"})])

    assert (again.unchanged, anew.unchanged) == (2, 0)
    loop.deliver()
    assert loop.api.bodies[-1]["UserAttrs"] == [{"To_Account": "eve", "Attrs": {"level": "Gold"}}]


def test_the_newest_of_set_and_remove_wins(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.buffer.add([Update("ann", {"city": None}), Update("bob", {"city": "Paris"})])
    loop.buffer.add([Update("ann", {"city": "Oslo"}), Update("bob", {"city": None})])

    loop.deliver()

    sent = [body["UserAttrs"] for body in loop.api.bodies]
    assert sent == [
        [{"To_Account": "ann", "Attrs": {"city": "Oslo"}}],
        [{"To_Account": "bob", "Attrs": ["city"]}],
    ]


def test_who_fails_in_the_first_call_is_not_in_the_second(client: redis.Redis) -> None:
    calls = iter([Reply(91000), OK])
    loop = removing(client, lambda users: next(calls))

    summary = loop.deliver()

    assert loop.api.calls == [["ann", "bob"], ["eve"]]
    assert (summary.retried, summary.acked) == (2, 1)


def test_who_fails_in_the_second_call_is_sent_again_as_a_whole(client: redis.Redis) -> None:
    calls = iter([OK, Reply(91000), OK, OK])
    loop = removing(client, lambda users: next(calls))
    assert loop.deliver().acked == 1

    loop.make_due()
    loop.deliver()

    assert loop.api.calls == [["ann", "bob"], ["ann", "eve"], ["ann"], ["ann", "eve"]]
    assert loop.buffer.snapshot().ledger["delivered"] == 3


@pytest.mark.parametrize("culprit", ["ann", "bob", "eve"])
def test_a_culprit_is_found_among_those_who_set_and_those_who_remove(
    client: redis.Redis, culprit: str
) -> None:
    loop = removing(client, lambda users: Reply(70107) if culprit in users else OK)

    loop.deliver()

    assert set(loop.dead()) == {culprit}
    assert loop.buffer.snapshot().ledger["delivered"] == 2
    assert loop.buffer.snapshot().balanced


def nothing_crosses_an_unknown_outcome(history: list[tuple[list[str], float, Answer]]) -> bool:
    """Whether nobody was sent again while a call without an answer could still be applied."""
    unknown: dict[str, float] = {}
    for users, at, answer in history:
        if any(at < unknown.get(user, 0) + 5 for user in users):
            return False
        if isinstance(answer, NoReply) and answer.sent:
            unknown |= dict.fromkeys(users, at)
    return True


codes = st.one_of(st.just(0), st.sampled_from(sorted(TABLE)), st.integers(-5, 99_999))
answers = st.one_of(
    st.builds(Reply, code=codes),
    st.builds(
        Reply,
        code=st.just(0),
        errors=st.dictionaries(
            st.sampled_from(some(12)), st.builds(UserError, codes.filter(bool), st.just("")), max_size=5
        ),
    ),
    st.builds(NoReply, st.sampled_from(Failure), st.booleans()),
)


@given(
    script=st.lists(st.tuples(answers, st.sampled_from([False, False, True])), max_size=25),
    patient=st.lists(st.booleans(), min_size=6, max_size=6),
    size=st.integers(1, 12),
    max_attempts=st.integers(1, 4),
)
def test_every_user_is_settled_exactly_once_whatever_the_api_answers(
    client: redis.Redis, script: list[tuple[Answer, bool]], patient: list[bool], size: int, max_attempts: int
) -> None:
    remaining = iter(script)

    def api(users: list[str]) -> Answer:
        answer, others_stop_the_line = next(remaining, (OK, False))
        if others_stop_the_line:
            loop.line.pause("maintenance")
        return answer

    loop = Loop(client, api, max_attempts=max_attempts)
    loop.add(some(size))
    loop.buffer.add([Update(user, {"city": None}) for user in some(size)[::3]])
    loop.buffer.add([Update(user, {"level": "Gold"}) for user in some(size)[::6]])

    for waits in patient:
        if waits:
            loop.make_due()
        if loop.line.read().state == "paused":
            loop.line.resume()
        stopped = waits and loop.line.read().state == "stopped"
        summary = loop.probe() if stopped and loop.buffer.snapshot().pending else loop.deliver()
        assert nothing_crosses_an_unknown_outcome(loop.api.history)
        settled = summary.acked + summary.retried + summary.snoozed + summary.dead_lettered
        assert settled == summary.users

        snapshot = loop.buffer.snapshot()
        assert snapshot.in_flight == 0
        assert snapshot.balanced
        assert client.exists(loop.keys.batches, loop.keys.leases) == 0
        assert snapshot.pending + snapshot.ledger["delivered"] + len(loop.dead()) == size


def test_names_that_no_app_can_have_leave_it_to_halving_and_good_users_are_delivered(
    client: redis.Redis,
) -> None:
    loop = Loop(client, lambda users: Reply(90033) if "bad" in users else OK)
    client.delete(loop.keys.names_read)
    loop.api.names = Reply(0, names=frozenset(f"name{number}" for number in range(11)))

    for _ in range(4):
        loop.deliver(["ann", "bad", "bob"] if not loop.summaries else [])
        loop.make_due()

    assert set(loop.dead()) == {"bad"}
    assert {"ann", "bob"} <= {text(user) for user in loop.redis.hkeys(loop.keys.shadow)}


def test_a_defect_of_ours_costs_nobody_an_attempt(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(client, lambda users: OK)
    monkeypatch.setattr("worker.delivery.loop.advance", lambda *_: 1 / 0)

    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            loop.deliver(["ann"])
        loop.make_due()
    monkeypatch.undo()
    summary = loop.deliver()

    assert (summary.outcome, summary.attempt) == ("delivered", 1)


# Unknown outcomes: read first, where that costs less.


def timed_out(loop: Loop, users: list[str], times: int = 1) -> None:
    """Let calls with the users time out, while others are delivered."""
    loop.api._api = lambda users: NoReply(Failure.TIMEOUT)
    loop.deliver(users)
    for _ in range(times - 1):
        loop.others_succeed()
        loop.make_due()
        loop.deliver()
    loop.others_succeed()
    loop.make_due()
    loop.api.calls.clear()
    loop.api._api = lambda users: OK


def having(users: Iterable[str], city: str = "Paris") -> Reply:
    return Reply(0, values={user: {"city": city, "level": "3"} for user in users})


def test_whoever_the_api_has_right_is_not_sent_again(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK, reads_apart=True)
    timed_out(loop, some(100))
    loop.api.stored = having(some(60))

    summary = loop.deliver()

    assert loop.api.reads == [some(100)]
    assert loop.api.calls == [some(100)[60:]]
    assert (summary.outcome, summary.acked, summary.found, summary.calls) == ("delivered", 100, 60, 1)
    assert loop.buffer.snapshot().balanced
    assert loop.buffer.add([Update("user000", {"city": "Paris"})]).unchanged == 1


def test_newer_values_are_sent_whatever_is_read(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK, reads_apart=True)
    timed_out(loop, ["ann", "bob"])
    loop.buffer.add([Update("ann", {"city": "Rome"}), Update("bob", {"level": None})])
    loop.api.stored = having(["ann", "bob"])

    loop.deliver()

    assert loop.api.bodies[-2]["UserAttrs"][0] == {"To_Account": "ann", "Attrs": {"city": "Rome"}}
    assert loop.api.bodies[-1]["UserAttrs"] == [{"To_Account": "bob", "Attrs": ["level"]}]


@pytest.mark.parametrize(
    "answer", [NoReply(Failure.TIMEOUT), Reply(91000), Reply(60007), Reply(70001), Reply(0)]
)
def test_what_cannot_be_read_is_sent_blindly(client: redis.Redis, answer: Answer) -> None:
    loop = Loop(client, lambda users: OK, reads_apart=True)
    timed_out(loop, ["ann"])
    loop.api.stored = answer

    summary = loop.deliver()

    assert loop.api.reads == [["ann"]]
    assert loop.api.calls == [["ann"]]
    assert (summary.acked, summary.found, summary.failure) == (1, 0, None)


def test_within_a_shared_quota_one_call_is_sent_rather_than_read(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    timed_out(loop, some(100))
    loop.api.stored = having(some(100))

    loop.deliver()

    assert (loop.api.reads, len(loop.api.calls)) == ([], 1)


def test_within_a_shared_quota_several_calls_are_worth_a_read(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    loop.buffer.add([Update(user, {"city": "Paris", "old": None}) for user in some(3)])
    timed_out(loop, [])
    loop.api.stored = having(some(2))

    summary = loop.deliver()

    assert (loop.api.reads, loop.api.calls) == ([some(3)], [["user002"]] * 2)
    assert (summary.found, summary.calls) == (2, 3)


def test_suspects_whose_calls_were_only_slow_are_found_delivered(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    timed_out(loop, some(20), times=3)
    loop.api.stored = having(some(20))

    summary = loop.deliver()

    assert (loop.api.calls, summary.found, summary.outcome) == ([], 20, "delivered")
    assert loop.buffer.snapshot().pending == 0


def test_a_failure_with_an_answer_is_no_unknown_outcome(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000), reads_apart=True)
    loop.deliver(["ann"])
    loop.others_succeed()
    loop.make_due()
    loop.deliver()
    assert loop.api.reads == []


def test_a_probe_writes(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: NoReply(Failure.TIMEOUT), reads_apart=True)
    for number in range(OUTAGE_AFTER):
        loop.deliver([f"user{number}"])
    assert loop.line.read().state == "stopped"
    loop.api._api = lambda users: OK
    loop.api.stored = having(f"user{number}" for number in range(OUTAGE_AFTER))

    assert loop.probe().acked
    assert loop.api.reads == []


def test_users_found_delivered_prove_nothing_about_writing(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK, reads_apart=True)
    timed_out(loop, ["ann"])
    before = client.hget(loop.keys.health, "ok_at")
    loop.clock.now += 10
    loop.api.stored = having(["ann"])

    assert loop.deliver().found == 1
    assert client.hget(loop.keys.health, "ok_at") == before


# A worker frozen between its last look at the lease and the socket.


@pytest.mark.parametrize("answered", [True, False])
def test_after_a_late_call_the_newest_values_are_sent_again(client: redis.Redis, answered: bool) -> None:
    loop = Loop(client, lambda users: OK)
    loop.add(["ann", "bob"])

    def frozen(users: list[str]) -> Answer:
        """Others take the batch over, and deliver newer values, before this call is applied."""
        lose(loop)
        loop.api._api = lambda users: OK
        loop.buffer.add([Update("ann", {"city": "Rome"})])
        loop._carry(loop.ticket())
        return OK if answered else NoReply(Failure.BROKEN)

    loop.api._api = frozen
    asleep = loop.clock.now
    summary = loop._carry(loop.ticket())

    assert summary.outcome == "fenced"
    assert (loop.clock.now - asleep >= 3600 + 5) is not answered
    # Bob has the same value in both calls.
    assert loop.buffer.snapshot().live == 1
    loop.deliver()
    assert loop.api.bodies[-1]["UserAttrs"] == [{"To_Account": "ann", "Attrs": {"city": "Rome"}}]
    assert loop.buffer.snapshot().balanced
