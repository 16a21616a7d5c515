"""The limiter: slots on an injected clock, on a real server; and the measuring of Redis' clock."""

from __future__ import annotations

import bisect
import heapq
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import FAST, ManualClock, drawn, new_keys
from tests.fleet import Limits, fleet
from tests.scenarios import people
from tests.schedules.wire import Wire
from tests.virtual import EPOCH_US, World, scripts_on
from worker.models import Update
from worker.ratelimit import (
    DWELL,
    EXACT_ENOUGH,
    GRACE,
    HORIZON,
    ISOLATING_PATIENCE,
    LATE,
    AnswerTimes,
    ClockSync,
    Permit,
    RateLimiter,
    read_rate,
    reads,
)
from worker.sandbox.redis_server import EmbeddedServer
from worker.state import scripts
from worker.state.buffer import Buffer
from worker.state.keys import Keys
from worker.state.scripts import Argument

START = 1_700_000_000_000_000
INTERVAL = 10_200
PATIENCE = 2_000_000
HORIZON_US = round(HORIZON * 1e6)
DWELL_US = round(DWELL * 1e6)

Reserve = Callable[[int], tuple[bool, int]]


def limiter_keys(keys: Keys) -> list[str]:
    """The keys of the script `reserve`."""
    return [keys.rate, keys.quotas, keys.server, keys.tickets, keys.ledger]


@pytest.fixture
def reserve(client: redis.Redis, keys: Keys) -> Reserve:
    script = scripts.load(client, "reserve")

    def call(now: int) -> tuple[bool, int]:
        granted, wait, *_ = script(
            limiter_keys(keys), (now, 100, PATIENCE, 0, DWELL_US, "", 0, 0, 0, "next_isolating")
        )
        return bool(granted), wait

    return call


def limiter(client: redis.Redis, keys: Keys, clock: ManualClock) -> RateLimiter:
    return RateLimiter(client, keys, quota=100, patience=2.0, clock=clock)


def test_slots_follow_each_other_first_come_first_served(reserve: Reserve) -> None:
    assert [reserve(START) for _ in range(3)] == [(True, 0), (True, INTERVAL), (True, 2 * INTERVAL)]


def test_an_idle_limiter_saves_nothing_up(reserve: Reserve) -> None:
    reserve(START)

    later = START + 60_000_000

    assert [reserve(later) for _ in range(2)] == [(True, 0), (True, INTERVAL)]


@pytest.mark.parametrize("notice", [0, 200_000])
def test_a_slot_leaves_its_caller_the_time_that_it_needs(
    client: redis.Redis, keys: Keys, notice: int
) -> None:
    script = scripts.load(client, "reserve")

    def reserve(now: int) -> int:
        _, wait, *_ = script(
            limiter_keys(keys), (now, 100, PATIENCE, 0, DWELL_US, "", 0, 0, notice, "next_isolating")
        )
        return now + int(wait)

    # Those who ask one after another wait no longer than one alone: nobody's slot is lost.
    times = [START + number * INTERVAL for number in range(50)]
    assert [reserve(now) for now in times] == [now + notice for now in times]


@pytest.mark.parametrize(("round_trip", "notice"), [(0.003, 0.0), (0.08, 0.2), (3.0, 0.5)])
def test_the_farther_away_redis_is_the_more_notice_it_takes(
    client: redis.Redis, keys: Keys, clock: ManualClock, round_trip: float, notice: float
) -> None:
    far = limiter(client, keys, clock)
    far.round_trip = round_trip

    assert far._notice() == pytest.approx(notice)


def test_a_slot_beyond_patience_is_not_reserved(reserve: Reserve) -> None:
    granted = 0
    while reserve(START)[0]:
        granted += 1

    assert granted == HORIZON_US // INTERVAL + 1
    assert reserve(START) == reserve(START), "asking in vain takes nothing"


@given(gaps=st.lists(st.integers(0, 40_000), min_size=150, max_size=400))
def test_no_rolling_second_has_more_slots_than_the_quota(client: redis.Redis, gaps: list[int]) -> None:
    reserve, keys, now, slots = client.register_script(scripts.source("reserve")), new_keys(), START, []
    with client.pipeline(transaction=False) as pipe:
        for gap in gaps:
            now += gap
            reserve(
                limiter_keys(keys),
                (now, 100, PATIENCE, 0, DWELL_US, "", 0, 0, 0, "next_isolating"),
                client=pipe,
            )
        for granted, wait, now, *_ in pipe.execute():
            if granted:
                slots.append(now + wait)

    for index, slot in enumerate(slots):
        assert sum(slot <= other < slot + 1_000_000 for other in slots[index:]) <= 99
        assert index == 0 or slot - slots[index - 1] >= INTERVAL


@pytest.mark.parametrize("jump", [-3_600_000_000, -1_000_000, -100_000])
def test_a_clock_set_back_neither_adds_slots_nor_stops_the_line(reserve: Reserve, jump: int) -> None:
    before = [reserve(START)[1] for _ in range(50)]

    # From here on, times are counted from the moment of the jump, on which both clocks agree.
    asked = [10_000 * call for call in range(300)]
    answers = [(at, reserve(START + jump + at)) for at in asked]
    after = [at + wait for at, (granted, wait) in answers if granted]

    assert min(after) >= max(before) + INTERVAL
    assert max(after) <= asked[-1] + PATIENCE
    assert all(later - earlier >= INTERVAL for earlier, later in itertools.pairwise(after))


def test_a_pause_holds_for_everyone_and_ends(client: redis.Redis, keys: Keys, reserve: Reserve) -> None:
    pausing = limiter(client, keys, ManualClock())

    pausing.pause(5.0, "too many requests", 60007, now_us=START)

    assert reserve(START + 1) == (False, 5_000_000 - HORIZON_US - 1)
    assert reserve(START + 4_000_000) == (True, 1_000_000)
    assert reserve(START + 6_000_000)[0]


def test_the_longer_of_two_pauses_stands(client: redis.Redis, keys: Keys, reserve: Reserve) -> None:
    pausing = limiter(client, keys, ManualClock())

    pausing.pause(60.0, "blocked", 70050, now_us=START)
    pausing.pause(1.0, "too many requests", 60007, now_us=START)

    assert not reserve(START + 10_000_000)[0]
    assert client.hget(keys.rate, "reason") == b"blocked"


def test_a_pause_from_before_the_clock_was_set_back_is_void(
    client: redis.Redis, keys: Keys, reserve: Reserve
) -> None:
    limiter(client, keys, ManualClock()).pause(60.0, "blocked", now_us=START)

    assert reserve(START - 3_600_000_000)[0]


def test_a_missed_slot_is_not_used(client: redis.Redis, keys: Keys, clock: ManualClock) -> None:
    pacing = limiter(client, keys, clock)

    assert pacing.redeem(Permit(clock.now + 0.5, 0))
    assert not pacing.redeem(Permit(clock.now - GRACE - 0.001, 0))


def test_after_a_call_that_left_late_a_slot_stays_empty(
    client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    pacing = limiter(client, keys, clock)
    permits = [Permit(clock.now + 0.0102 * slot, 0) for slot in range(5)]

    assert pacing.redeem(permits[0])
    clock.now += LATE - 0.001
    pacing.sent(permits[0])
    assert pacing.redeem(permits[1])
    clock.now += LATE + 0.001
    pacing.sent(permits[1])

    assert [pacing.redeem(permit) for permit in permits[3:]] == [False, True]


def test_calls_that_leave_late_make_no_second_too_full(wire: Wire) -> None:
    with fleet(wire, threads=16, limits=Limits(batch_size=10)) as running:
        dice = running.world.rng
        running.stall = lambda: dice.uniform(LATE, 0.2) if dice.random() < 0.03 else 0.0
        running.add(people(10_000))

        running.wait_until(running.drained, 60)

        assert running.api.arrivals.worst <= 100


def test_a_permit_from_before_a_pause_claims_nothing(
    client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    pacing, buffer = limiter(client, keys, clock), Buffer(client, keys)
    buffer.add([Update("ann", {"city": "Paris"})])
    tickets = buffer.tick(size=1, linger=0, ticket_ttl=9, quota=5, horizon=1.0).tickets
    permit = pacing.reserve(now_us=START)
    assert permit is not None

    limiter(client, keys, clock).pause(1.0, "too many requests", now_us=START)

    assert buffer.claim(tickets[0], 100, epoch=permit.epoch) is None
    assert buffer.snapshot().live == 1


@pytest.mark.parametrize(("delays", "asked"), [([0.435, 0.001, 0.001], [2, 1]), ([0.3] * 9, [4, 1])])
def test_a_slot_is_not_used_while_the_servers_clock_is_hardly_known(
    client: redis.Redis, keys: Keys, clock: ManualClock, delays: list[float], asked: list[int]
) -> None:
    """After a late first answer a slot may be anywhere within that time. Where all are late, it is used all the same."""
    pacing, began, times = limiter(client, keys, clock), clock.now, list(delays)
    script, calls = pacing._reserve, 0

    def late(keys: Sequence[str], args: Sequence[Argument]) -> Any:
        nonlocal calls
        calls += 1
        answer = script(keys, (START + round((clock.now - began) * 1e6), *args[1:]))
        clock.now += times.pop(0)
        return answer

    pacing._reserve = late
    seen = []
    for _ in asked:
        calls = 0
        permit = pacing.reserve()
        seen.append(calls)
        assert permit
        slot = int(client.hget(keys.rate, "next") or 0) - 10_200
        due = began + (slot - START) / 1e6
        assert abs(permit.due - due) <= (EXACT_ENOUGH if delays[-1] < EXACT_ENOUGH else 0.151)
    assert seen == asked


def test_a_clock_that_jumps_ahead_pauses_the_line_for_one_patience(
    client: redis.Redis, keys: Keys, clock: ManualClock, reserve: Reserve
) -> None:
    pacing = limiter(client, keys, clock)
    assert pacing.reserve(now_us=START)

    # Two seconds pass here, an hour there: slots reserved before would overlap with those from now on.
    clock.now += 2.0
    jumped = START + 3_600_000_000
    assert pacing.reserve(now_us=jumped) is None

    assert client.hget(keys.rate, "reason") == b"the clock of Redis jumped"
    clock.now += 5.0
    assert pacing.reserve(now_us=jumped + 5_000_000), "and afterwards all is as before"


def test_slots_of_many_threads_on_the_servers_own_clock_never_overlap(
    server: EmbeddedServer, keys: Keys
) -> None:
    client = redis.Redis.from_url(server.url)
    script = scripts.load(client, "reserve")
    slots: list[int] = []

    def take() -> None:
        for _ in range(10):
            granted, wait, now, *_ = script(
                limiter_keys(keys), ("", 100, PATIENCE, 0, DWELL_US, "", 0, 0, 0, "next_isolating")
            )
            assert granted
            slots.append(now + wait)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(slots) == 80
    assert all(later - earlier >= INTERVAL for earlier, later in itertools.pairwise(sorted(slots)))


offsets = st.floats(-1e6, 1e6, allow_nan=False)
calls = st.lists(
    st.tuples(st.floats(0.0001, 0.3), st.floats(0.0001, 0.3), st.floats(0, 5)), min_size=2, max_size=30
)


@given(offset=offsets, calls=calls)
def test_slow_answers_are_never_taken_for_a_jump(
    offset: float, calls: list[tuple[float, float, float]]
) -> None:
    sync, now = ClockSync(), 100.0
    for request, response, pause in calls:
        answered = now + request
        assert sync.observe(now, answered + offset, answered + response)
        assert abs(sync.local(answered + offset) - answered) <= 0.35
        now = answered + response + pause


@given(offset=offsets, jump=st.floats(1.0, 1e6), ahead=st.booleans(), calls=calls)
def test_a_jump_is_noticed_at_the_first_answer(
    offset: float, jump: float, ahead: bool, calls: list[tuple[float, float, float]]
) -> None:
    sync, now = ClockSync(), 100.0
    for request, response, pause in calls:
        sync.observe(now, now + request + offset, now + request + response)
        now += request + response + pause

    moved = offset + (jump if ahead else -jump)

    assert not sync.observe(now, now + 0.001 + moved, now + 0.002)
    assert sync.observe(now + 1, now + 1.001 + moved, now + 1.002), "and it is measured anew"


class Service:
    """An API that grants `quota` calls in every rolling second, and greedy callers of it.

    Time is the server's, given to the scripts; a refusal is known a reply's time later.
    """

    LATENCY = 50_000

    def __init__(self, client: redis.Redis, keys: Keys, quota: int, configured: int = 100) -> None:
        self.redis, self.quota, self.now = client, quota, START
        self.reserve, self.keys = scripts.load(client, "reserve"), keys
        self.limiter = RateLimiter(client, keys, quota=configured, patience=2.0, clock=ManualClock())
        self.slots = (configured, PATIENCE)
        #: Seconds by which calls are delayed at most on their way, evenly spread.
        self.jitter = 0.0
        self.rng = random.Random(1)
        self.times = AnswerTimes()
        self.arrived: list[int] = []
        self.refused: list[int] = []

    def run(self, seconds: float) -> None:
        """Let callers take every slot for so long."""
        until, answers = self.now + round(seconds * 1e6), list[tuple[int, Permit]]()
        while self.now < until:
            while answers and answers[0][0] <= self.now:
                answered, refused = answers.pop(0)
                self.limiter.pause(1.0, "too many", 60007, refused=refused, now_us=answered)
            seen = "" if self.times.spread is None else round(self.times.spread * 1e6)
            args = (self.now, *self.slots, 0, DWELL_US, seen, 0, 0, 0, "next_isolating")
            granted, wait, _, _, *made_for = self.reserve(limiter_keys(self.keys), args)
            if not granted:
                self.now += max(wait, 1000)
                continue
            self.now += wait
            if made_for[0] != int(self.redis.hget(self.keys.rate, "epoch") or 0):
                continue
            delay = self.rng.uniform(0, self.jitter)
            at = self.now + round(delay * 1e6)
            bisect.insort(self.arrived, at)
            if sum(at - 1_000_000 < other <= at for other in self.arrived[-200:]) > self.quota:
                self.refused.append(at)
                bisect.insort(
                    answers, (at + self.LATENCY, Permit(0.0, *made_for)), key=lambda answer: answer[0]
                )
            else:
                self.times.note(delay + self.LATENCY / 1e6)

    def rate(self, seconds: float) -> float:
        """Calls a second lately."""
        return sum(self.now - seconds * 1e6 < at for at in self.arrived) / seconds


@pytest.mark.parametrize("granted", [50, 10, 97, 73])
def test_the_rate_settles_closely_below_what_is_granted_and_stays(
    wire: Wire, keys: Keys, granted: int
) -> None:
    service = Service(wire, keys, granted)

    service.run(30)
    refused = len(service.refused)
    service.run(30)

    assert 0.95 * granted <= service.rate(20) <= granted
    assert len(service.refused) - refused <= 5


@pytest.mark.parametrize(("jitter", "least"), [(0.0, 98.0), (0.02, 97.0), (0.05, 94.0), (0.1, 90.0)])
def test_slots_are_as_far_apart_as_the_network_needs(
    wire: Wire, keys: Keys, jitter: float, least: float
) -> None:
    service = Service(wire, keys, 100)
    service.jitter = jitter

    service.run(120)

    assert service.rate(60) >= least
    assert len(service.refused) <= len(service.arrived) / 5000


def test_the_rate_follows_a_network_that_changes(wire: Wire, keys: Keys) -> None:
    service = Service(wire, keys, 100)
    service.jitter = 0.05
    service.run(60)

    service.jitter = 0.0
    service.run(60)
    calm = service.rate(20)
    service.jitter = 0.05
    service.run(60)

    assert calm > 97.5
    assert 94 <= service.rate(20) < 96
    assert len(service.refused) <= 30, "and learning it costs little"


@pytest.mark.slow
def test_a_service_whose_answers_take_turns_does_not_cost_calls_for_long(
    wire: Wire, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(wire, keys, 100)
    # As if some answers took 60 ms longer, though every call arrives at once.
    monkeypatch.setattr(service.times, "note", lambda _: None)
    service.times.spread = 0.06

    service.run(30)
    slow = service.rate(20)
    service.run(640)

    assert 93 < slow < 95
    assert service.rate(20) > slow + 1.5


def test_the_rate_climbs_back_when_more_is_granted_again(wire: Wire, keys: Keys) -> None:
    service = Service(wire, keys, 30)
    service.run(30)

    service.quota = 100
    service.run(150)

    assert service.rate(5) > 97
    assert wire.hget(keys.rate, "limit") is None, "nothing is left of it"


def test_a_single_refusal_costs_little(wire: Wire, keys: Keys) -> None:
    service = Service(wire, keys, 100)
    service.run(2)
    service.quota = 20
    service.run(0.02)
    service.quota = 100
    service.run(12)

    assert service.rate(3) > 95


def test_a_limit_that_nobody_uses_up_does_not_climb(client: redis.Redis, keys: Keys) -> None:
    script, now = scripts.load(client, "reserve"), START
    client.hset(keys.rate, mapping={"limit": 20, "step": 10, "granted": 0, "climb_at": START})

    for _ in range(15):
        now += 1_000_000
        script(limiter_keys(keys), (now, 100, PATIENCE, 0, DWELL_US, "", 0, 0, 0, "next_isolating"))

    assert client.hget(keys.rate, "limit") == b"20", "a call a second proves nothing about thirty"


def test_only_the_first_refusal_of_an_epoch_lowers_the_limit(client: redis.Redis, keys: Keys) -> None:
    pacing = limiter(client, keys, ManualClock())
    client.hset(keys.rate, "limit", 100)
    refused = Permit(0.0, 0, 100)

    news = [pacing.pause(1.0, "too many", 60007, refused=refused, now_us=START + n) for n in range(5)]

    assert news == [True, False, False, False, False]
    assert client.hget(keys.rate, "limit") == b"75"


def test_a_few_refusals_in_a_second_are_one_small_step(
    client: redis.Redis, keys: Keys, reserve: Reserve
) -> None:
    pacing = limiter(client, keys, ManualClock())
    reserve(START)

    news = [pacing.pause(1.0, "too many", 60007, refused=Permit(0.0, 0, 100), now_us=START) for _ in range(9)]

    assert news == [True] + 8 * [False]
    assert client.hget(keys.rate, "limit") is None
    assert reserve(START + 1) == (True, 3 * INTERVAL - 1), "two slots stay empty, and nobody pauses"


def test_many_refusals_in_a_second_lower_the_limit(client: redis.Redis, keys: Keys) -> None:
    pacing = limiter(client, keys, ManualClock())

    for _ in range(10):
        pacing.pause(1.0, "too many", 60007, refused=Permit(0.0, 0, 100), now_us=START)

    assert client.hget(keys.rate, "limit") == b"75"


def test_refusals_of_different_seconds_are_not_added_up(client: redis.Redis, keys: Keys) -> None:
    pacing = limiter(client, keys, ManualClock())

    for second in range(30):
        now = START + second * 1_000_000
        assert pacing.pause(1.0, "too many", 60007, refused=Permit(0.0, 0, 100), now_us=now)

    assert client.hget(keys.rate, "limit") is None
    assert client.hget(keys.rate, "stretch") == b"300000"


def test_calls_that_isolate_get_every_tenth_slot_while_others_wait(client: redis.Redis, keys: Keys) -> None:
    script, now = scripts.load(client, "reserve"), START
    isolating, others = 0, 0
    while now < START + 10_000_000:
        # Others keep half a second of slots reserved.
        while True:
            granted = script(
                limiter_keys(keys), (now, 100, 500_000, 0, DWELL_US, "", 0, 0, 0, "next_isolating")
            )[0]
            if not granted:
                break
            others += 1
        granted, *_ = script(
            limiter_keys(keys), (now, 100, PATIENCE, 10, DWELL_US, "", 0, 0, 0, "next_isolating")
        )
        isolating += granted
        now += 5000

    assert 0.07 <= isolating / (isolating + others) <= 0.1


@pytest.mark.parametrize(("share", "least", "most"), [(0.05, 0.03, 0.05), (0.0, 0.0, 0.0), (1.0, 0.2, 1.0)])
def test_reads_get_their_share_while_deliveries_wait(
    client: redis.Redis, keys: Keys, share: float, least: float, most: float
) -> None:
    script, now, kind = scripts.load(client, "reserve"), START, reads(share)
    found, others = 0, 0
    while now < START + 10_000_000:
        while script(limiter_keys(keys), (now, 100, 500_000, 0, DWELL_US, "", 0, 0, 0, "next_isolating"))[0]:
            others += 1
        found += script(limiter_keys(keys), (now, 100, PATIENCE, kind[0], DWELL_US, "", 0, 0, 0, kind[1]))[0]
        now += 5000

    assert least <= found / (found + others) <= most


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_reads_get_every_slot_that_deliveries_leave_free(
    client: redis.Redis, keys: Keys, share: float
) -> None:
    script, kind = scripts.load(client, "reserve"), reads(share)
    for number in range(50):
        args = (START + number * INTERVAL, 100, PATIENCE, kind.one_in, DWELL_US, "", 0, 0, 0, kind.field)
        assert script(limiter_keys(keys), args)[:2] == [1, 0]


def test_reads_with_a_quota_of_their_own_take_nothing_from_deliveries(
    client: redis.Redis, keys: Keys
) -> None:
    deliveries = limiter(client, keys, ManualClock())
    apart = RateLimiter(client, keys, quota=10, patience=2.0, clock=ManualClock(), apart=True)
    while apart.reserve(now_us=START):
        pass
    apart.pause(5.0, "too many", 60007, now_us=START)

    assert deliveries.reserve(now_us=START)
    assert read_rate(client, keys).quotas == (100,)


def test_calls_that_isolate_get_every_slot_while_nobody_waits(client: redis.Redis, keys: Keys) -> None:
    script, now, granted = scripts.load(client, "reserve"), START, 0
    for _ in range(50):
        granted += script(
            limiter_keys(keys), (now, 100, PATIENCE, 10, DWELL_US, "", 0, 0, 0, "next_isolating")
        )[0]
        now += 2 * INTERVAL

    assert granted == 50


def test_waiting_for_a_slot_to_isolate_is_bounded(
    client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    pacing = limiter(client, keys, clock)
    # Others are always faster.
    monkeypatch.setattr(pacing, "_ask", lambda *_: 0.1)

    assert pacing.reserve_isolating() is None
    assert sum(clock.slept) == pytest.approx(ISOLATING_PATIENCE, abs=0.11)


def test_a_slot_to_isolate_is_waited_for(client: redis.Redis, keys: Keys) -> None:
    clock = ManualClock()
    with scripts_on(lambda: EPOCH_US + round(clock.now * 1e6)):
        pacing = limiter(client, keys, clock)
    for _ in range(30):
        pacing.reserve()

    first, second = pacing.reserve_isolating(), pacing.reserve_isolating()

    assert first is not None
    assert second is not None
    assert sum(clock.slept) > 0


def test_a_program_of_ones_own_shares_the_slots(
    server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    own = RateLimiter.connect(server.url, keys.sdkappid)

    assert own.acquire()

    taken = int(client.hget(keys.rate, "next") or 0)
    theirs = limiter(client, keys, ManualClock()).reserve(now_us=taken - INTERVAL)
    assert int(client.hget(keys.rate, "next") or 0) == taken + INTERVAL
    assert theirs is not None


def test_without_a_slot_within_patience_nothing_is_acquired(
    server: EmbeddedServer, client: redis.Redis, keys: Keys
) -> None:
    limiter(client, keys, ManualClock()).pause(60, "too many")

    assert not RateLimiter.connect(server.url, keys.sdkappid).acquire()


# What one caller asks for changes nothing for the others.


@pytest.mark.parametrize("patience", [0, 100_000, 989_999])
def test_an_impatient_caller_changes_nothing(client: redis.Redis, keys: Keys, patience: int) -> None:
    script = scripts.load(client, "reserve")

    def ask(patience: int) -> Any:
        return script(limiter_keys(keys), (START, 100, patience, 0, DWELL_US, "", 0, 0, 0, "next_isolating"))

    while ask(PATIENCE)[0]:
        pass
    before = client.hgetall(keys.rate)

    assert ask(patience)[0] == 0
    assert client.hgetall(keys.rate) == before


def test_nobody_reserves_beyond_the_horizon_however_patient(client: redis.Redis, keys: Keys) -> None:
    script = scripts.load(client, "reserve")
    waits = []
    while (
        answer := script(limiter_keys(keys), (START, 100, 10**8, 0, DWELL_US, "", 0, 0, 0, "next_isolating"))
    )[0]:
        waits.append(answer[1])

    assert max(waits) <= HORIZON * 1e6
    assert len(waits) == 99


@pytest.mark.parametrize("first", [20, 100])
def test_the_lowest_quota_named_lately_is_everybodys(client: redis.Redis, keys: Keys, first: int) -> None:
    script = scripts.load(client, "reserve")

    def limit(quota: int, at: float) -> Any:
        args = (START + round(at * 1e6), quota, PATIENCE, 0, DWELL_US, "", 0, 0, 0, "next_isolating")
        return script(limiter_keys(keys), args)[5]

    assert limit(first, 0) == first
    assert [limit(quota, 10 * at) for at, quota in enumerate((100, 20, 100, 50), 1)] == [first, 20, 20, 20]
    assert limit(100, 3600) == 20, "idle time is not time in which it could be named"
    assert limit(100, -3600) == 20
    for second in range(60 * 20):
        used = limit(100, 3600 + second)
        if used > 20:
            break
    assert used == 50
    assert second > 1100


def test_permits_of_a_higher_quota_lapse_when_a_lower_one_is_named(client: redis.Redis, keys: Keys) -> None:
    clock = ManualClock()
    with scripts_on(lambda: EPOCH_US + round(clock.now * 1e6)):
        fast = RateLimiter(client, keys, quota=100, patience=2.0, clock=clock)
        slow = RateLimiter(client, keys, quota=20, patience=2.0, clock=clock)
    permits = [fast.reserve() for _ in range(50)]

    permit = slow.reserve()

    assert permit is not None
    assert permit.due >= clock.now + 1.0, "calls of the second before may have been too many"
    assert all(old and old.epoch < permit.epoch for old in permits)


class Fleets:
    """Clients of all settings on one app, in virtual time; some die before they use their permit."""

    def __init__(self, client: redis.Redis, keys: Keys, seed: int) -> None:
        self.redis, self.keys, self.rng = client, keys, random.Random(seed)
        self.clock, self.jump = ManualClock(), 0.0
        settings = [(quota, patience) for quota in (100, 100, 100, 40) for patience in (0.0, 0.3, 2.0, 100.0)]
        with scripts_on(lambda: EPOCH_US + round((self.clock.now + self.jump) * 1e6)):
            self.clients = [
                RateLimiter(client, keys, quota=quota, patience=patience, clock=self.clock)
                for quota, patience in settings
            ]
        self.quotas = [quota for quota, _ in settings]
        self.named: list[tuple[float, int]] = []
        self.sent: list[float] = []
        self.granted: list[int] = [0] * len(settings)
        self.dues: list[float] = []

    def run(self, seconds: float, jumps: Sequence[float]) -> None:
        began, waiting = self.clock.now, list[tuple[float, int, Permit]]()
        jumps_at = sorted((began + self.rng.uniform(3, seconds), jump) for jump in jumps)
        # Everybody has compared clocks once.
        for limiter in self.clients:
            limiter.reserve()
        while self.clock.now < began + seconds:
            at = self.clock.now + self.rng.expovariate(400)
            while waiting and waiting[0][0] <= at:
                due, who, permit = heapq.heappop(waiting)
                self.clock.now = max(self.clock.now, due)
                # What claiming a batch checks.
                stands = int(self.redis.hget(self.keys.rate, "epoch") or 0) == permit.epoch
                if stands and self.clients[who].redeem(permit):
                    self.sent.append(self.clock.now)
                    self.clients[who].sent(permit)
            self.clock.now = at
            while jumps_at and jumps_at[0][0] <= at:
                self.jump += jumps_at.pop(0)[1]
            # The one with the low quota is there for a third of the time only.
            slow_is_there = (at - began) % 50 < 17
            who = self.rng.randrange(len(self.clients) if slow_is_there else 12)
            granted = self.clients[who].reserve()
            self.named.append((at, self.quotas[who]))
            if granted:
                self.granted[who] += 1
                self.dues.append(granted.due)
                if self.rng.random() > 0.05:
                    heapq.heappush(waiting, (granted.due, who, granted))

    def excess(self) -> list[float]:
        """When a rolling second had more calls than the lowest quota named lately, before it."""
        found = []
        for last, at in enumerate(self.sent):
            first = bisect.bisect_right(self.sent, at - 1)
            lately = slice(
                bisect.bisect_left(self.named, (at - 58, 0)), bisect.bisect_left(self.named, (at - 1, 0))
            )
            quota = min((quota for _, quota in self.named[lately]), default=100)
            if last - first + 1 > quota:
                found.append(at)
        return found


@pytest.mark.parametrize("seed", range(drawn(8)))
def test_whatever_a_client_asks_for_the_lowest_quota_holds(wire: Wire, keys: Keys, seed: int) -> None:
    rng = random.Random(seed)
    fleets = Fleets(wire, keys, seed)

    fleets.run(
        30 if FAST else 60,
        [rng.choice([-1, 1]) * rng.choice([0.5, 5, 60, 3600]) for _ in range(4 * (seed % 2))],
    )

    assert not fleets.excess()
    assert fleets.dues == sorted(fleets.dues), "first come, first served"
    patient = [count for place, count in enumerate(fleets.granted) if place % 4 >= 2]
    assert min(patient[:6]) > 0.5 * max(patient[:6]), "nobody is starved"
    assert len(fleets.sent) > 600, "and the quota is used"


@pytest.mark.slow
def test_a_client_with_the_usual_patience_gets_its_turn_in_a_long_line(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By chance, a client waits for long now and then.
    monkeypatch.setattr("worker.ratelimit.random", random.Random(1))
    world, keys = World(7), new_keys()
    with scripts_on(world.us):
        patient = RateLimiter(client, keys, quota=100, patience=100.0, clock=world)
        other = RateLimiter(client, keys, quota=100, patience=2.0, clock=world)
    got = []

    def queue_again() -> None:
        while True:
            patient.acquire()

    def try_now_and_then() -> None:
        while True:
            got.append(other.acquire())
            world.sleep(0.3)

    for _ in range(150):
        world.spawn(queue_again)
    world.spawn(try_now_and_then)
    world.sleep(10)
    world.end()

    assert sum(got) >= 2


def test_a_permit_from_before_a_pause_is_void(client: redis.Redis, keys: Keys) -> None:
    clock = ManualClock()
    with scripts_on(lambda: EPOCH_US + round(clock.now * 1e6)):
        pacing = limiter(client, keys, clock)
    permit = pacing.reserve()
    assert permit

    pacing.pause(60, "too many")

    assert not pacing.redeem(permit)


def test_acquire_notices_that_another_process_has_paused_the_fleet(client: redis.Redis, keys: Keys) -> None:
    clock = ManualClock()
    with scripts_on(lambda: EPOCH_US + round(clock.now * 1e6)):
        mine, theirs = limiter(client, keys, clock), limiter(client, keys, ManualClock())
    for _ in range(50):
        mine.reserve()
    sleep, paused = clock.sleep, list[bool]()

    def sleep_and_be_paused(seconds: float) -> None:
        sleep(seconds)
        if not paused:
            paused.append(theirs.pause(60, "too many", now_us=EPOCH_US + round(clock.now * 1e6)))

    clock.sleep = sleep_and_be_paused  # type: ignore[method-assign]

    assert not mine.acquire()
