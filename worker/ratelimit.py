"""One rate limit for the whole fleet: slots on Redis' clock, reserved first come, first served.

Why reservations: one script call tells a caller *when* it may send, and it sleeps until then. Nobody polls, nobody races,
and the cost stays at one call per permit however many wait.

Why slots are at least 2 % further apart than the quota needs: the API counts arrivals, and a call arrives a little later
than its slot. With 100 calls a second and a slot every 10.2 ms, a rolling second has 98 or 99 slots; a 101st arrival needs
one call to be 20 ms later than another. So a permit that is not used within `GRACE` of its slot is given up for a new one,
and everything slow (the claim, signing, encoding, connecting) happens before the slot. A network that delays some calls
more than others by up to J seconds needs slots (1 + J) / quota apart: workers see J in the times of answers, and the
script keeps the fleet's average. `make bench` counts the worst rolling second at the API.

Other programs that call the API for the same app can take their permits here, so that all of them together keep the
quota::

    limiter = RateLimiter.connect("redis://redis:6379/0", sdkappid=1400000000)
    if limiter.acquire():
        call_the_api()

The lowest quota that any of them has named lately applies to all, and nobody reserves a slot more than `HORIZON` ahead, so
none can take what the others rely on.

The API may grant less than the quota. A single refusal moves slots one percent apart. Several within a second pause
everyone, void all permits and lower the limit; it then climbs towards the lowest limit refused by halving the distance,
settles below it, and tries the next step ever more rarely. All of this is in the scripts, so the fleet learns it once.

A thread can still be suspended between its last look at the clock and the socket. The difference between `GRACE` and the
20 ms is the room for that. And when a call still leaves later than `LATE`, its process leaves the next slot empty: each late
call adds one to the second it falls into, however late it is.

Weakness: a process whose next slot comes more than a second after a late call makes room too late.
"""

from __future__ import annotations

import math
import os
import random
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from .clock import Clock, SystemClock
from .redis_url import RedisUrl, with_password_file
from .state import scripts
from .state.connection import Redis, connect
from .state.keys import Keys
from .state.scripts import number, text

#: Slots are at least this many times further apart than 1 / quota; the script has the same number.
SPACING = 1.02
#: Nobody is given a slot further ahead than this, in seconds, or than two slots if those are longer. Less than the usual
#: patience, so that an occasional caller has a chance beside many that always wait. The script has the same number.
HORIZON = 1.0
#: Seconds before its slot by which `acquire` has checked a permit again.
CHECK_BEFORE = 0.05
#: Round trips to Redis that a caller needs from asking for a slot to using it: the way back, a claim, and one to spare. Where
#: they take less than the second number, in seconds, a slot that is free now can be used now; at most the third is asked for.
TRIPS_NEEDED, SHORT_TRIPS, LONGEST_NOTICE = 2.5, 0.01, 0.5
#: Seconds after its slot at which a permit lapses.
GRACE = 0.010
#: A call is late if it left more than this many seconds after its slot.
LATE = 0.015
#: Seconds for which a limit is tried before the next one; longer than the API's window.
DWELL = 1.5
#: Seconds to stay below a known ceiling before the next step is tried: at first, and at most.
SHORTEST_HOLD, LONGEST_HOLD = 60.0, 960.0
#: Seconds that a call which isolates suspects may wait for a slot; longer if its slots are rarer.
ISOLATING_PATIENCE = 0.5
#: How fast two machines' clocks may drift apart, in seconds per second; far above any real drift.
DRIFT = 0.001
#: A slot is not used while Redis' clock is known less exactly than this, in seconds; but at most this many in a row are given
#: up for that: if every answer is slow, there is nothing better to wait for.
EXACT_ENOUGH, MOST_UNSURE = 0.010, 3
#: A step of Redis' clock below this is taken to be a measuring error, in seconds.
SMALLEST_JUMP = 0.010
#: Answers whose times are remembered, and how many are needed for an estimate.
ANSWERS_KEPT, ANSWERS_NEEDED = 300, 20


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to send one request at `due` (this machine's monotonic clock), or shortly after.

    Void once the fleet's `epoch` has changed. `limit` is the rate it was made for, in calls a second.
    """

    due: float
    epoch: int
    limit: int = 0


class Kind(NamedTuple):
    """A kind of call: one in how many slots it gets while others wait, 0 = every one, -1 = none, and the field that counts."""

    one_in: int
    field: str


DELIVERS, ISOLATES = Kind(0, "next_isolating"), Kind(10, "next_isolating")


def reads(share: float) -> Kind:
    """Calls that read: they get this share of the slots, from 0 to 1, while others wait."""
    return Kind(0 if share >= 1 else round(1 / share) if share > 0 else -1, "next_reading")


@dataclass(frozen=True, slots=True)
class RateState:
    """What the limiter does now. Times in seconds since 1970 on Redis' clock."""

    #: The calls a second being tried, if below the quota, else None.
    limit: int | None = None
    #: Seconds between two slots; 0 before the first.
    apart: float = 0.0
    #: The quotas that processes sharing the rate have named lately, in calls a second, ascending.
    quotas: tuple[int, ...] = ()
    paused_at: float = 0.0
    paused_until: float = 0.0
    reason: str = ""
    code: int | None = None


class ClockSync:
    """The offset between Redis' clock and this machine's monotonic clock.

    Each answer carries the time at which Redis made it, which was between our asking and our receiving it. All these
    intervals contain the true offset, so their intersection is far narrower than one round trip, and an interval that misses
    it proves that Redis' clock has jumped.
    """

    def __init__(self) -> None:
        self._low, self._high, self._at = -math.inf, math.inf, 0.0

    def observe(self, asked: float, redis_time: float, heard: float) -> bool:
        """Take one answer into account (seconds); False if Redis' clock has jumped since the last one."""
        slack = DRIFT * max(0.0, heard - self._at)
        low, high = self._low - slack, self._high + slack
        self._at = heard
        if asked - redis_time > high + SMALLEST_JUMP or heard - redis_time < low - SMALLEST_JUMP:
            self._low, self._high = asked - redis_time, heard - redis_time
            return False
        self._low = min(max(low, asked - redis_time), heard - redis_time)
        self._high = max(min(high, heard - redis_time), self._low)
        return True

    @property
    def uncertainty(self) -> float:
        """Seconds between the earliest and the latest time that `local` may mean."""
        return self._high - self._low

    def local(self, redis_time: float) -> float:
        """Convert a time of Redis' clock to this machine's monotonic clock."""
        return redis_time + (self._low + self._high) / 2


class AnswerTimes:
    """How long the last answers took, and what that says about the network.

    An answer's time includes the service's share; while that is steady, the differences are the network's.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=ANSWERS_KEPT)
        self._since_estimate = 0
        #: Seconds by which the times differ, leaving out the fastest and the slowest tenth; None if not known yet.
        self.spread: float | None = None

    def note(self, seconds: float) -> None:
        self._times.append(seconds)
        self._since_estimate += 1
        if self._since_estimate >= ANSWERS_NEEDED:
            self._since_estimate = 0
            times = sorted(self._times)
            tenth = len(times) // 10
            # Evenly spread delays have eight tenths of their range between these two.
            self.spread = (times[-1 - tenth] - times[tenth]) / 0.8


class RateLimiter:
    """Permits to send, shared through Redis by every process that uses the same keys. Thread-safe."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        quota: int,
        patience: float,
        clock: Clock,
        needs_replica: bool = False,
        kind: Kind = DELIVERS,
        apart: bool = False,
    ) -> None:
        """`quota` in calls a second; `patience` in seconds, the longest wait for a permit.

        If the primary `needs_replica`, nobody gets a slot while no replica is in step with it. `apart` is for reads with a
        quota of their own.
        """
        self._redis, self._clock, self._patience = redis, clock, patience
        self._needs_replica = int(needs_replica)
        self._kind = kind
        own = (keys.read_rate, keys.read_quotas, keys.read_server)
        self._rate, *others = own if apart else (keys.rate, keys.quotas, keys.server)
        self._keys = [self._rate, *others, keys.tickets, keys.ledger]
        self._reserve = scripts.load(redis, "reserve")
        self._pause = scripts.load(redis, "pause")
        #: The rate that the last permit was made for.
        self._limit = quota
        self._quota = quota
        #: The newest epoch heard of; permits of older ones are void.
        self._epoch = 0
        #: Seconds that asking Redis takes, smoothed.
        self.round_trip = 0.0
        #: The number of the server that answered last.
        self._server = 0
        self._sync, self._unsure, self._answers = ClockSync(), 0, AnswerTimes()
        #: Late calls for which no slot has been left empty yet.
        self._late = 0
        self._lock = threading.Lock()

    @classmethod
    def connect(
        cls,
        redis_url: str | RedisUrl,
        sdkappid: int,
        *,
        quota: int = 100,
        patience: float = 2.0,
        needs_replica: bool = False,
        password_file: str | os.PathLike[str] = "",
    ) -> Self:
        """Return the limiter that an app's workers share, for another program that calls the API.

        `quota` in calls a second, the same as the workers'; `patience` in seconds, the longest that `acquire` waits;
        `needs_replica` if the workers have IMATTR_REPLICAS; `password_file` as in `Producer`. Nothing is sent to Redis before
        the first permit; its errors pass through.
        """
        if password_file:
            redis_url = with_password_file(redis_url, os.fspath(password_file))
        keys = Keys(sdkappid)
        redis = connect(redis_url, key=keys.rate)
        return cls(
            redis, keys, quota=quota, patience=patience, clock=SystemClock(), needs_replica=needs_replica
        )

    def acquire(self) -> bool:
        """Wait for a slot and return when it comes: make one call, at once. False if no slot is free within patience."""
        return self.take() is not None

    def take(self) -> Permit | None:
        """The same, but return the permit, for `sent` and for a refusal."""
        give_up_at = self._clock.monotonic() + self._patience
        left = self._patience
        while left >= 0:
            granted = self._ask(self._kind, None, left)
            if isinstance(granted, Permit):
                if self._confirm(granted) and self.redeem(granted):
                    return granted
            elif granted is not None:
                # Otherwise, all who wait for the horizon to move would ask at the same moment.
                wait = granted + random.uniform(0, CHECK_BEFORE)
                if self._clock.monotonic() + granted > give_up_at:
                    return None
                self._clock.sleep(wait)
            left = give_up_at - self._clock.monotonic()
        return None

    def reserve(self, *, now_us: int | None = None) -> Permit | None:
        """Reserve the next slot; None if none is free within patience, or `HORIZON`."""
        granted = self._ask(self._kind, now_us, self._patience)
        return granted if isinstance(granted, Permit) else None

    def reserve_isolating(self) -> Permit | None:
        """Reserve a slot for a call that isolates suspects: a tenth of all slots while good work waits.

        None if none comes soon, because threads that wait here deliver nothing else meanwhile.
        """
        give_up_at = self._clock.monotonic() + max(ISOLATING_PATIENCE, 15 / self._limit)
        while True:
            granted = self._ask(ISOLATES, None, self._patience)
            if granted is None or isinstance(granted, Permit):
                return granted
            if self._clock.monotonic() + granted > give_up_at:
                return None
            self._clock.sleep(granted)

    def _ask(self, kind: Kind, now_us: int | None, patience: float) -> Permit | float | None:
        """Return a permit, or the seconds until asking again is worthwhile; None if Redis' clock has jumped."""
        asked = self._clock.monotonic()
        spread = self._answers.spread
        seen = "" if spread is None else _us(spread)
        now = "" if now_us is None else now_us
        args = (
            now,
            self._quota,
            _us(patience),
            kind.one_in,
            _us(DWELL),
            seen,
            self._server,
            self._needs_replica,
            _us(self._notice()),
            kind.field,
        )
        granted, wait_us, answered_us, server, *made_for = self._reserve(self._keys, args)
        heard = self._clock.monotonic()
        with self._lock:
            self.round_trip += (heard - asked - self.round_trip) / 8
            if server != self._server:
                # Another server has another clock: none of the last one's slots is valid here.
                self._server, self._sync = server, ClockSync()
            steady = self._sync.observe(asked, answered_us / 1e6, heard)
            due = self._sync.local((answered_us + wait_us) / 1e6)
            self._unsure = self._unsure + 1 if self._sync.uncertainty > EXACT_ENOUGH else 0
            unsure = 0 < self._unsure <= MOST_UNSURE
        if not steady:
            # Slots from before and after the jump overlap. Those from before have passed within the horizon.
            self.pause(max(HORIZON, 2 * SPACING / self._limit), "the clock of Redis jumped")
            return None
        if not granted:
            return max(float(wait_us) / 1e6, 0.001)
        if unsure:
            # The first answer came late: our slot may be anywhere in that time, even in a second that is full.
            return self._ask(kind, now_us, patience)
        permit = Permit(due, *made_for)
        self._limit, self._epoch = permit.limit, max(self._epoch, permit.epoch)
        return permit

    def _notice(self) -> float:
        """Seconds before a slot at which its caller must hear of it."""
        needed = TRIPS_NEEDED * self.round_trip
        return min(needed, LONGEST_NOTICE) if needed > SHORT_TRIPS else 0.0

    def _confirm(self, permit: Permit) -> bool:
        """Wait until shortly before the slot, and ask whether the permit still stands."""
        wait = permit.due - CHECK_BEFORE - self.round_trip - self._clock.monotonic()
        if wait <= 0:
            return True
        self._clock.sleep(wait)
        epoch: Any = self._redis.hget(self._rate, "epoch")
        return number(epoch) == permit.epoch

    def redeem(self, permit: Permit) -> bool:
        """Wait for the slot; False if it was missed, is void, or must stay empty. Call `sent` once the call has left.

        This knows nothing of a pause by another process: a claim or a check just before the slot finds out.
        """
        self._clock.sleep(permit.due - self._clock.monotonic())
        if permit.epoch < self._epoch:
            return False
        if self._late:
            with self._lock:
                if self._late:
                    self._late -= 1
                    return False
        return self._clock.monotonic() <= permit.due + GRACE

    def sent(self, permit: Permit) -> None:
        """Note that the call has left. If it was late, the next slot stays empty."""
        if self._clock.monotonic() > permit.due + LATE:
            with self._lock:
                self._late += 1

    def answered(self, seconds: float) -> None:
        """Note how long a successful call took to be answered: what the fleet knows of the network."""
        with self._lock:
            self._answers.note(seconds)

    def pause(
        self,
        seconds: float,
        reason: str,
        code: int | None = None,
        *,
        refused: Permit | None = None,
        now_us: int | None = None,
    ) -> bool:
        """Let nobody in the fleet reserve a slot for a while, and void all permits; returns whether that was new.

        `refused` is the permit of a call that the API refused for its frequency. A few such calls in a second only move the
        slots apart; more make the limit drop below the one that the permit was made for.
        """
        now, permit_epoch = "" if now_us is None else now_us, "" if refused is None else refused.epoch
        limit = refused.limit if refused else 0
        bounds = (_us(DWELL), _us(SHORTEST_HOLD), _us(LONGEST_HOLD))
        args = (now, _us(seconds), reason, "" if code is None else code, permit_epoch, limit, *bounds)
        took_effect, epoch = self._pause([self._rate], args)
        self._epoch = max(self._epoch, epoch)
        return bool(took_effect)


def read_rate(redis: Redis, keys: Keys) -> RateState:
    """Return what an app's limiter does now."""
    fields = ("limit", "paused_at", "paused_until", "reason", "code", "apart")
    limit, paused_at, paused_until, reason, code, apart = redis.hmget(keys.rate, fields)
    quotas: Any = redis.zrange(keys.quotas, 0, -1)
    return RateState(
        limit=number(limit) or None,
        apart=number(apart) / 1e6,
        quotas=tuple(sorted(filter(None, map(number, quotas)))),
        paused_at=number(paused_at) / 1e6,
        paused_until=number(paused_until) / 1e6,
        reason=text(reason or b""),
        code=number(code) or None,
    )


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
