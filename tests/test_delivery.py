"""The core loop: a real buffer, time held still, and an API that answers what a test wants."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ManualClock, new_keys
from worker.buffer import Buffer, new_batch_id
from worker.client import Client, Failure, Gate, NoReply, Reply, UserError
from worker.delivery import Delivery, Summary
from worker.line import Line, LineState
from worker.models import BatchId, Update
from worker.policy import TABLE, Policy, Verdict
from worker.ratelimit import GRACE, Permit, RateLimiter

Answer = Reply | NoReply
Api = Callable[[list[str]], Answer]

OK = Reply(0)


class ScriptedClient(Client):
    """Passes the gate, and answers by a function of the users in the call."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.calls: list[list[str]] = []
        #: Users, time and answer of each call.
        self.history: list[tuple[list[str], float, Answer]] = []
        self.clock: ManualClock | None = None
        self.bodies: list[dict[str, Any]] = []
        self.signed_again = 0

    @property
    def longest_call(self) -> float:
        return 13.0

    def sign_again(self) -> None:
        self.signed_again += 1

    def send(self, body: bytes, gate: Gate) -> Answer:
        gate()
        self.bodies.append(json.loads(body))
        users = [entry["To_Account"] for entry in self.bodies[-1]["UserAttrs"]]
        self.calls.append(users)
        answer = self._api(users)
        if self.clock:
            self.history.append((users, self.clock.now, answer))
        return answer


class ScriptedLimiter(RateLimiter):
    """A slot every 10 ms for ever, or as many as a test grants."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.slots: list[float] | None = None
        self.pauses: list[tuple[float, int | None]] = []

    def reserve(self, *, now_us: int | None = None) -> Permit | None:
        if self.slots is None:
            return Permit(self._clock.monotonic() + 0.01, 0)
        return Permit(self.slots.pop(0), 0) if self.slots else None

    def redeem(self, permit: Permit) -> bool:
        self._clock.sleep(permit.due - self._clock.monotonic())
        return self._clock.monotonic() <= permit.due + GRACE

    def pause(
        self, seconds: float, reason: str, code: int | None = None, *, now_us: int | None = None
    ) -> None:
        self.pauses.append((seconds, code))


class Loop:
    """A delivery loop and all that is around it."""

    def __init__(self, client: redis.Redis, api: Api, *, max_attempts: int = 4) -> None:
        self.redis, self.keys, self.clock = client, new_keys(), ManualClock()
        self.buffer = Buffer(client, self.keys)
        self.limiter = ScriptedLimiter(self.clock)
        self.line = Line(client, self.keys)
        self.client = ScriptedClient(api)
        self.client.clock = self.clock
        self.stopping = False
        self.delivery = Delivery(
            self.buffer,
            self.limiter,
            self.line,
            self.client,
            Policy(max_attempts=max_attempts, backoff_base=1, backoff_max=300, hold=5, rng=random.Random(1)),
            self.clock,
            batch_size=100,
            lease=60,
            stopping=lambda: self.stopping,
        )

    def add(self, users: Iterable[str]) -> None:
        self.buffer.add([Update(user, {"city": "Paris"}) for user in users])

    def ticket(self) -> BatchId:
        """A ticket, whatever the dispatcher thinks."""
        ticket = new_batch_id()
        self.redis.zadd(self.keys.tickets, {ticket: 1})
        return ticket

    def make_due(self) -> None:
        """Let every delay be over."""
        users: list[Any] = self.redis.zrange(self.keys.delayed, 0, -1)
        for user in users:
            self.redis.zadd(self.keys.delayed, {user: 1})

    def deliver(self, users: Iterable[str] = ()) -> Summary:
        self.add(users)
        return self.delivery.deliver(self.ticket())

    def probe(self) -> Summary:
        """Let the dispatcher issue the line's probe now, and deliver it."""
        self.redis.hset(self.keys.line, "next_probe", 1)
        tick = self.buffer.tick("w", term=9, size=100, linger=0, ticket_ttl=9, most=5)
        [ticket] = tick.tickets
        return self.delivery.deliver(ticket)

    def dead(self) -> dict[str, Any]:
        letters: dict[bytes, bytes] = self.redis.hgetall(self.keys.dead)  # type: ignore[assignment]
        return {user.decode(): json.loads(letter) for user, letter in letters.items()}


def some(count: int) -> list[str]:
    return [f"user{number:03}" for number in range(count)]


def test_a_full_batch_goes_out_in_one_call_and_is_acked(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    summary = loop.deliver(some(130))

    assert [len(call) for call in loop.client.calls] == [100]
    assert loop.client.bodies[0]["UserAttrs"][0] == {"To_Account": "user000", "Attrs": {"city": "Paris"}}
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

    assert loop.client.bodies[0]["UserAttrs"][0]["Attrs"] == {"city": "Rome"}


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
    loop.delivery.deliver(ticket)
    loop.add(["bob"])

    assert loop.delivery.deliver(ticket).outcome == "spent"
    assert loop.client.calls == [["ann"]]


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
def test_poison_is_found_by_halving_and_nobody_else_suffers(client: redis.Redis, bad: int) -> None:
    poison = set(random.Random(bad).sample(some(100), bad))
    loop = Loop(client, lambda users: Reply(90033, "refused") if poison & set(users) else OK)

    summary = loop.deliver(some(100))

    assert set(loop.dead()) == poison
    assert (summary.acked, summary.dead_lettered) == (100 - bad, bad)
    assert summary.calls == len(loop.client.calls) <= 1 + 14 * bad


def test_a_transient_failure_costs_an_attempt_and_waits_longer_each_time(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(91000))

    attempts: list[int] = []
    for _ in range(3):
        loop.make_due()
        attempts.append(loop.deliver(some(3) if not attempts else ()).attempt)

    assert attempts == [1, 2, 3]
    assert loop.buffer.snapshot().delayed == 3
    assert not loop.dead()


def test_used_up_attempts_isolate_each_user_before_giving_up(client: redis.Redis) -> None:
    broken = {"user001"}
    loop = Loop(client, lambda users: Reply(91000) if broken & set(users) else OK)

    loop.add(some(4))
    for _ in range(4):
        loop.make_due()
        loop.deliver()

    assert set(loop.dead()) == broken
    assert loop.buffer.snapshot().ledger["delivered"] == 3


def test_a_code_that_nobody_lists_is_bounded_and_kept(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(12345, "what is this"))

    loop.add(["ann"])
    for _ in range(10):
        loop.make_due()
        loop.deliver()

    assert loop.dead()["ann"]["code"] == 12345
    assert len(loop.client.calls) == 3


def test_after_an_unknown_outcome_users_are_held_longer_than_the_old_call_can_land(
    client: redis.Redis,
) -> None:
    loop = Loop(client, lambda users: NoReply(Failure.TIMEOUT))

    before = client.time()[0]
    summary = loop.deliver(["ann"])

    due = client.zscore(loop.keys.delayed, "ann")
    assert isinstance(due, float)
    assert due / 1000 - before >= 5
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

    loop.client._api = lambda users: OK
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
    loop.client._api = lambda users: answer

    loop.probe()

    assert (loop.line.read().state == "open") is opens
    assert loop.buffer.snapshot().balanced


def test_a_refused_signature_is_made_again(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: Reply(70001))

    loop.deliver(["ann"])

    assert loop.client.signed_again == 1


def test_a_stop_in_the_middle_of_halving_puts_all_the_rest_back(client: redis.Redis) -> None:
    answers = iter([Reply(90033), OK, Reply(60020)])
    loop = Loop(client, lambda users: next(answers))

    summary = loop.deliver(some(100))

    assert (summary.acked, summary.snoozed, summary.calls) == (50, 50, 3)


def test_a_shutdown_finishes_the_call_and_hands_back_the_rest(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def api(users: list[str]) -> Answer:
        loop.stopping = True
        return Reply(90033)

    loop.client._api = api
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

    assert loop.client.calls == []
    assert summary.outcome == "fenced"
    assert loop.buffer.snapshot().live == 1


def test_a_long_bisection_renews_its_lease(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)

    def slow(users: list[str]) -> Answer:
        loop.clock.now += 12
        return Reply(90033) if "user007" in users else OK

    loop.client._api = slow
    extend, renewed = loop.buffer.extend, []

    def extended(batch: BatchId, *, now_ms: int | None = None) -> bool:
        renewed.append(loop.clock.now)
        return extend(batch, now_ms=now_ms)

    loop.buffer.extend = extended  # type: ignore[method-assign]
    loop.deliver(some(100))

    assert set(loop.dead()) == {"user007"}
    assert len(renewed) >= 3


def test_a_missed_slot_is_replaced_by_another(client: redis.Redis) -> None:
    loop = Loop(client, lambda users: OK)
    now = loop.clock.now
    loop.limiter.slots = [now + 0.2, now + 0.4]
    encode = loop.client.encode

    def slow(users: Any) -> bytes:
        loop.clock.now += 0.3
        return encode(users)

    loop.client.encode = slow  # type: ignore[method-assign]

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
    for _ in range(3):
        loop.make_due()
        loop.deliver()

    loop.make_due()
    before = loop.clock.now
    loop.deliver()

    assert set(loop.dead()) == {"ann"}
    assert loop.clock.now - before >= 5


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


@given(script=st.lists(answers, max_size=25), size=st.integers(1, 12), max_attempts=st.integers(1, 4))
def test_every_user_is_settled_exactly_once_whatever_the_api_answers(
    client: redis.Redis, script: list[Answer], size: int, max_attempts: int
) -> None:
    remaining = iter(script)
    loop = Loop(client, lambda users: next(remaining, OK), max_attempts=max_attempts)
    loop.add(some(size))

    for _ in range(4):
        loop.make_due()
        loop.client.history.clear()
        summary = loop.deliver()
        assert nothing_crosses_an_unknown_outcome(loop.client.history)
        settled = summary.acked + summary.retried + summary.snoozed + summary.dead_lettered
        assert settled == summary.users

        snapshot = loop.buffer.snapshot()
        assert snapshot.in_flight == 0
        assert snapshot.balanced
        assert client.exists(loop.keys.batches, loop.keys.leases) == 0
        assert snapshot.pending + snapshot.ledger["delivered"] + len(loop.dead()) == size
