"""What a seed decides before its schedule begins: how large, what is done, and which faults may strike."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tests.fleet import Limits
from worker.delivery.policy import TABLE, Verdict

#: Seconds after its arrival at which the API may still apply a call whose outcome nobody knows: its own
#: time-out. `HOLD`, `READ_TIMEOUT` and the lease are longer.
APPLIED_WITHIN = 3.0

#: Where a fault may strike, the faults there, and how often compared with each other.
FAULTS: dict[str, dict[str, float]] = {
    "before a script": {
        "refused": 4,
        "error reply": 4,
        "ran later": 1,
        "slow": 8,
        "others first": 16,
        "kill": 2,
        "freeze": 1,
    },
    "after a script": {"reply lost": 4, "slow": 8, "others first": 16, "kill": 2, "freeze": 1},
    "before a request": {
        "unreachable": 2,
        "slow to connect": 4,
        "kill": 2,
        "freeze": 2,
        "kill at the socket": 1,
        "never arrived": 2,
    },
    "a request": {
        "applied, reply lost": 3,
        "applied, reply too late": 1,
        "timeout": 1,
        "applied late, reset": 4,
        "applied late, timeout": 2,
        "applied late, 502": 2,
        "truncated": 2,
        "502": 2,
        "code": 8,
        "code for some": 8,
        "429": 2,
        "odd answer": 4,
        "slow": 2,
    },
    "after a request": {"kill": 3, "freeze": 2},
    "a ticket": {"lost": 3, "twice": 3, "late": 3, "broker down": 3},
}
#: Faults that need more virtual time to mend than others are as rare as this.
_COSTLY = {"kill": 0.4, "freeze": 0.4, "ran later": 0.5, "kill at the socket": 0.4}

Kind = Literal[
    "outage",
    "quota lowered",
    "signatures expired",
    "key rotated",
    "no administrator",
    "bad users",
    "clock jump",
    "script flush",
    "damage",
    "promotion",
    "emptied",
    "terminate",
    "freeze",
    "look",
]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens at a time of its own, seconds from the start; lasting events end at `until`."""

    at: float
    kind: Kind
    until: float = 0.0
    #: How much of it, as the kind has it.
    size: float = 0.0
    code: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One schedule, as far as it can be told in advance."""

    processes: int
    threads: int
    users: int
    writers: int
    #: Updates offered by each writer, users an update call, and seconds between the calls.
    updates: int
    users_a_call: int
    gap: float
    #: Seconds in which faults strike and writers write.
    trouble: float
    limits: Limits
    latency: float
    quirks: Mapping[str, Any]
    #: The quota and the patience that each process was given, the first of them the right quota.
    settings: tuple[tuple[int, float], ...]
    #: Shortest time between two turns of a dispatcher, seconds.
    turn: float
    #: Most users that may be pending; 0 = no limit.
    max_pending: int
    #: Part of all updates that have an event time, and that are from the past.
    timed: float
    out_of_order: float
    #: Whether the clock of Redis jumps. A forward jump lets holds and leases end early, which is told in
    #: the documents: then a call that the API applies late may land on a newer one. So in such a schedule
    #: the API applies calls when they arrive or never; every promise, and the quota first, must be kept.
    jumps: bool
    #: Where -> fault -> chance at each step there.
    faults: Mapping[str, Mapping[str, float]]
    events: tuple[Event, ...]


def draw(rng: random.Random) -> Plan:
    """A plan from the seed's numbers."""
    # Some are short and dense, so that newer values come while calls are on their way and users on hold.
    dense = rng.random() < 0.25
    trouble = rng.uniform(4, 10) if dense else rng.uniform(5, 30)
    jumps = rng.random() < 0.15
    connect, read = rng.choice([(1.0, 3.5), (3.05, 10.0)])
    remembers = rng.random() < 0.8
    processes, threads, quota = rng.randint(1, 4), rng.randint(1, 4), rng.choice([5, 10, 20, 40])
    limits = Limits(
        quota=quota,
        batch_size=rng.choice([1, 3, 5, 10, 25]),
        linger=rng.choice([0.0, 0.25, 1.0]),
        patience=rng.choice([0.5, 2.0, 4.0]),
        lease=2 * (connect + read) + rng.choice([0.1, 5.0, 30.0]),
        hold=rng.choice([3.1, 5.0]),
        connect_timeout=connect,
        read_timeout=read,
        max_attempts=rng.choice([1, 3, 8]),
        backoff_base=rng.choice([0.1, 1.0]),
        backoff_max=rng.choice([2.0, 10.0]),
        shadow_ttl=10**6 if remembers else rng.choice([0.0, 5.0]),
    )
    quirks = {
        "quota": limits.quota,
        "bad_user": rng.choice(["batch", "list", "list", "silent"]),
        "window": rng.choice(["rolling", "fixed"]),
        "refused_count": rng.random() < 0.5,
    }
    writers = rng.randint(1, 3)
    updates = rng.randint(10, 25) if dense else rng.randint(3, 12)
    return Plan(
        processes=processes,
        threads=threads,
        users=round(400 ** rng.random()),
        writers=writers,
        updates=updates,
        users_a_call=rng.choice([1, 3, 10, 30]),
        gap=trouble / updates,
        trouble=trouble,
        limits=limits,
        latency=rng.choice([0.01, 0.05, 0.3]),
        settings=_draw_settings(rng, processes, limits),
        quirks=quirks,
        turn=rng.choice([0.1, 0.3, 0.6]),
        max_pending=rng.choice([0, 0, 0, 5]),
        # What is forgotten cannot be compared: with a short memory, no event comes late.
        timed=rng.random() if remembers else 0.0,
        out_of_order=rng.choice([0.0, 0.3]),
        jumps=jumps,
        faults=_draw_faults(rng, jumps),
        events=_draw_events(rng, trouble, jumps),
    )


def _draw_settings(rng: random.Random, processes: int, limits: Limits) -> tuple[tuple[int, float], ...]:
    """In one schedule of three the processes do not agree."""
    if rng.random() < 0.67:
        return ((limits.quota, limits.patience),) * processes
    others = [
        (limits.quota * rng.choice([1, 1, 2, 10]), rng.choice([2 / limits.quota, 0.5, 2.0, 100.0]))
        for _ in range(processes - 1)
    ]
    return ((limits.quota, limits.patience), *others)


def _draw_faults(rng: random.Random, jumps: bool) -> dict[str, dict[str, float]]:
    """Some kinds only, each at some chance, so that schedules differ: together all would hide each other."""
    level = rng.choice([0.0, 0.002, 0.006, 0.02])
    found: dict[str, dict[str, float]] = {}
    for where, kinds in FAULTS.items():
        # There are far fewer requests and tickets than scripts.
        share = 1.0 if "script" in where else 3.0
        found[where] = {
            kind: level * share * weight * _COSTLY.get(kind, 1.0) * rng.random()
            for kind, weight in kinds.items()
            if rng.random() < 0.5 and not (jumps and "applied late" in kind)
        }
    return found


def _draw_events(rng: random.Random, trouble: float, jumps: bool) -> tuple[Event, ...]:
    chances: dict[Kind, float] = {
        "outage": 0.2,
        "quota lowered": 0.15,
        "signatures expired": 0.15,
        "key rotated": 0.1,
        "no administrator": 0.15,
        "bad users": 0.4,
        "script flush": 0.1,
        "damage": 0.3,
        "promotion": 0.2,
        "terminate": 0.25,
        "freeze": 0.25,
    }
    kinds = [kind for kind, chance in chances.items() if rng.random() < chance]
    kinds += ["clock jump"] * (rng.randint(1, 3) if jumps else 0)
    kinds += ["emptied"] * (rng.random() < 0.05)
    kinds += ["look"] * rng.randint(1, 4)
    events = []
    for kind in kinds:
        at = rng.uniform(0, trouble)
        size = rng.random()
        if kind == "clock jump":
            size = rng.choice([-1, 1]) * rng.choice([0.005, 0.5, 2, 2, 20, 20, 120, 120, 3600])
        elif kind == "promotion":
            size = rng.choice([0.0, 0.01, 0.3, 2.0, 10.0]) * rng.random()
        events.append(Event(at, kind, at + rng.uniform(1, trouble), size, any_code(rng)))
    return tuple(sorted(events, key=lambda event: (event.at, event.kind)))


_CODES = {verdict: [code for code, rule in TABLE.items() if rule.verdict is verdict] for verdict in Verdict}


def any_code(rng: random.Random) -> int:
    """A code of any class; those about users most often, those that stop the line less."""
    weights = {Verdict.USER: 6, Verdict.TRANSIENT: 3, Verdict.SHAPE: 2, Verdict.RATE: 1, Verdict.UNKNOWN: 2}
    (verdict,) = rng.choices(list(Verdict), [weights.get(verdict, 1) for verdict in Verdict])
    return rng.choice(_CODES[verdict])
