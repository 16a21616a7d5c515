"""Judges a delivery system by what was seen from outside: what writers were told, and what the API got.

Knows nothing of the product: no module of `worker` is imported here. Given is a `History`: every update as
its writer saw it, every call as it arrived, every value in the order in which it was applied. `check`
decides whether it is one that a correct system could have made, and tells the shortest story of each rule
that is broken:

* **lost**: at the end, each attribute has the value that was accepted last, or a later one in doubt;
* **stale**: no value was applied after a newer one of the same user and attribute;
* **invented**: what was applied had been offered, before, and was not refused;
* **quota**: no rolling second has more calls than allowed;
* **batch**: no call has more users than allowed, or a user twice;
* **ledger**: what came in is what went out, what waits, and what was given up.

Order. Of two updates of one attribute the newer is the one with the later event time; without event times,
the one whose writer began after the other one's writer was told. Two at the same time have no order, and
either may win. An update in doubt (its writer got an error) may take effect at any later time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, pairwise
from typing import NamedTuple


class Answer(StrEnum):
    """What the writer was told."""

    ACCEPTED = "accepted"
    #: An error under the call: accepted or not.
    DOUBT = "in doubt"
    #: Accepted, but the server may lose it: it was killed before this was on its disk.
    LOSABLE = "accepted, on no disk"
    #: Accepted, and its record was found unreadable: it is kept as bytes, and may have been delivered before.
    SET_ASIDE = "accepted, set aside"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Offer:
    """One attribute of one update, as its writer saw it. Times in seconds, on one clock with `Applied`."""

    user: str
    name: str
    #: None removes the attribute.
    value: str | None
    began: float
    #: When the writer was told; infinite when it never was.
    ended: float
    answer: Answer
    #: The event time that the writer gave, ms.
    event_ms: int | None = None

    def newer_than(self, other: Offer) -> bool:
        """Whether it certainly is. (Mixing updates with and without event times is not judged.)"""
        if self.event_ms is not None and other.event_ms is not None and self.event_ms != other.event_ms:
            return self.event_ms > other.event_ms
        if (self.event_ms is None) is not (other.event_ms is None):
            return False
        return self.began > (math.inf if other.answer is Answer.DOUBT else other.ended)

    def __str__(self) -> str:
        event = "" if self.event_ms is None else f", event time {self.event_ms}"
        return (
            f"{self.began:12.6f} to {self.ended:.6f}  offered {self.user} {self.name}={self.value}"
            f"{event}: {self.answer}"
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """One attribute of one user's write, as applied. `at` is when its request arrived, seconds."""

    at: float
    request: int
    user: str
    name: str
    value: str | None

    def __str__(self) -> str:
        return f"{self.at:12.6f}  applied {self.user} {self.name}={self.value} by request {self.request}"


class Call(NamedTuple):
    """One request as it arrived: when (seconds), and for whom (empty when that is not known)."""

    at: float
    users: tuple[str, ...] = ()
    #: Whether it counts against the quota that reads have for themselves.
    apart: bool = False


@dataclass(slots=True)
class History:
    """Everything that was seen. `applied` is in the order of application."""

    offers: list[Offer] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    #: Counters read at one instant each: LEDGER_IN and LEDGER_OUT.
    ledgers: list[Mapping[str, int]] = field(default_factory=list)
    #: What still waits, or was given up and kept, at the end: user, attribute, value.
    kept: set[tuple[str, str, str | None]] = field(default_factory=set)
    quota: int = 100
    batch_size: int = 100


LEDGER_IN = ("accepted", "redriven")
LEDGER_OUT = (
    *("coalesced", "unchanged", "stale", "delivered", "dead_lettered", "quarantined", "lost"),
    *("pending", "in_flight"),
)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule, and the shortest history that breaks it, a line an event."""

    rule: str
    summary: str
    story: tuple[str, ...]
    #: How many other histories break the same rule.
    others: int = 0

    def __str__(self) -> str:
        others = f" (and {self.others} more like it)" if self.others else ""
        return "\n".join([f"{self.rule}: {self.summary}{others}", *(f"  {line}" for line in self.story)])


def check(history: History) -> list[Violation]:
    """One violation for each rule that is broken: the one with the shortest story. Empty when all hold."""
    found: dict[str, list[Violation]] = defaultdict(list)
    for rule in (_values, _quota, _batches, _ledgers):
        for violation in rule(history):
            found[violation.rule].append(violation)
    return [_shortest(violations) for violations in found.values()]


def _shortest(violations: Sequence[Violation]) -> Violation:
    best = min(violations, key=lambda violation: (len(violation.story), violation.story))
    return Violation(best.rule, best.summary, best.story, others=len(violations) - 1)


# Values, attribute by attribute.


def _values(history: History) -> Iterator[Violation]:
    offers: dict[tuple[str, str], list[Offer]] = defaultdict(list)
    applied: dict[tuple[str, str], list[Applied]] = defaultdict(list)
    kept: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    for offer in history.offers:
        offers[offer.user, offer.name].append(offer)
    for write in history.applied:
        applied[write.user, write.name].append(write)
    for user, name, value in history.kept:
        kept[user, name].add(value)
    for attribute in sorted(offers.keys() | applied.keys()):
        yield from _order(offers[attribute], applied[attribute])
        yield from _end(offers[attribute], applied[attribute], kept[attribute])


def _order(offers: Sequence[Offer], applied: Iterable[Applied]) -> Iterator[Violation]:
    """Whether each value was offered, and none is older than one applied before it."""
    #: The newest offers applied so far, none of them newer than another, and by which write.
    reached: list[tuple[Offer, Applied]] = []
    for write in applied:
        possible = _offers_of(write, offers)
        if not possible:
            yield _invented(write, offers)
            continue
        fitting = [offer for offer in possible if not any(seen.newer_than(offer) for seen, _ in reached)]
        if not fitting:
            seen, by = next((seen, by) for seen, by in reached if seen.newer_than(possible[-1]))
            summary = f"an older value of {write.user} {write.name} was applied after a newer one"
            yield Violation("stale", summary, _story(possible[-1], seen, by, write))
            continue
        # The same value may have been offered several times: the oldest that fits is the kindest reading.
        offer = fitting[0]
        # What the server may lose, it may also deliver and then forget.
        if offer.answer not in (Answer.LOSABLE, Answer.SET_ASIDE):
            reached = [(seen, by) for seen, by in reached if not offer.newer_than(seen)]
            reached.append((offer, write))


def _offers_of(write: Applied, offers: Iterable[Offer]) -> list[Offer]:
    """The offers that the value may come from, the oldest first."""
    possible = [
        offer
        for offer in offers
        if offer.value == write.value and offer.answer is not Answer.REFUSED and offer.began <= write.at
    ]
    return sorted(possible, key=lambda offer: (offer.event_ms or 0, offer.began))


def _invented(write: Applied, offers: Iterable[Offer]) -> Violation:
    summary = f"{write.user} {write.name} got a value that nobody had offered, or that was refused"
    same = [offer for offer in offers if offer.value == write.value]
    return Violation("invented", summary, _story(*same, write))


def _end(offers: Sequence[Offer], applied: Sequence[Applied], kept: set[str | None]) -> Iterator[Violation]:
    """Whether the last value applied, or one that is kept, is as new as everything accepted."""
    # A value offered again when it is there already needs no second write, and the removal of one that never was none at all:
    # whoever reads the API before sending again finds that out.
    there = {applied[-1].value if applied else None} | kept
    ends = [offer for offer in offers if offer.value in there and offer.answer is not Answer.REFUSED]
    for offer in offers:
        if offer.answer is Answer.ACCEPTED and not any(not offer.newer_than(end) for end in ends):
            summary = f"{offer.user} {offer.name}={offer.value} was accepted, and did not arrive"
            yield Violation("lost", summary, _story(offer, *applied[-1:]))
            return


def _story(*events: Offer | Applied) -> tuple[str, ...]:
    """In the order in which they began."""
    return tuple(
        str(event)
        for event in sorted(events, key=lambda event: event.at if isinstance(event, Applied) else event.began)
    )


# Calls.


def _seconds(calls: Iterable[Call]) -> Iterator[list[float]]:
    """For each call, those of the second that ends with it, its beginning not included; oldest first."""
    times = sorted(call.at for call in calls)
    first = 0
    for last, at in enumerate(times):
        while times[first] <= at - 1:
            first += 1
        yield times[first : last + 1]


def worst_second(calls: Iterable[Call]) -> int:
    """Most calls in any rolling second."""
    return max(map(len, _seconds(calls)), default=0)


def _quota(history: History) -> Iterator[Violation]:
    apart = [call for call in history.calls if call.apart]
    together = [call for call in history.calls if not call.apart]
    for times in chain(_seconds(together), _seconds(apart)):
        if len(times) > history.quota:
            gaps = [later - earlier for earlier, later in pairwise(times)]
            story = (
                f"{times[0]:12.6f}  the first of {len(times)} calls",
                f"{times[-1]:12.6f}  the last, {times[-1] - times[0]:.6f} s later; "
                f"the shortest gap is {min(gaps):.6f} s",
            )
            yield Violation("quota", f"more than {history.quota} calls in one second", story)


def _batches(history: History) -> Iterator[Violation]:
    for call in history.calls:
        users = call.users
        if len(users) > history.batch_size:
            story = (f"{call.at:12.6f}  a call for {len(users)} users",)
            yield Violation("batch", f"more than {history.batch_size} users in one call", story)
        elif len(set(users)) < len(users):
            twice = min(user for user in set(users) if users.count(user) > 1)
            yield Violation(
                "batch", "a user twice in one call", (f"{call.at:12.6f}  a call with {twice} twice",)
            )


def _ledgers(history: History) -> Iterator[Violation]:
    for number, ledger in enumerate(history.ledgers, 1):
        came, went = sum(ledger[name] for name in LEDGER_IN), sum(ledger[name] for name in LEDGER_OUT)
        if came != went:
            story = tuple(f"{name:>14} {ledger[name]}" for name in LEDGER_IN + LEDGER_OUT)
            yield Violation("ledger", f"at look {number}, {came} came in and {went} are accounted for", story)
