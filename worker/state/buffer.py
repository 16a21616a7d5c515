"""The coalescing buffer: the state machine of every user, with one atomic script for each step.

::

             add                  claim                   settle
    update ───────▶ PENDING ────────────────▶ IN FLIGHT ──────────▶ ack          (delivered)
                    live      up to a batch,             ├────────▶ retry, snooze (pending again)
                    backfill  under a lease              └────────▶ dead_letter  (kept for a person)
                    delayed ◀──────────────────────────────────────

A user is in at most one lane, or in flight. Updates for a user in flight wait in its pending record and become due when the
batch is settled. `keys.py` says what is stored where; `lua/` has one file for each step. Every method takes `now_ms` so that
tests can hold time still; None means Redis' clock.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from redis import Redis

from ..models import (
    LATEST_MS,
    LONGEST_CALL,
    LONGEST_DELAY,
    MAX_AHEAD,
    Acked,
    Batch,
    BatchId,
    ClaimedUser,
    DeadLettered,
    Outcome,
    Quarantined,
    Retried,
    Snoozed,
    Update,
    UserId,
)
from . import scripts
from .confirmation import Confirmation
from .history import History
from .keys import LEDGER, Keys

#: Most updates per `add`; bounds how long one script keeps Redis busy (2 to 6 ms). More are no faster, and at a full rate of
#: updates, deliveries would wait for Redis so long that they miss their slots.
MAX_UPDATES_PER_ADD = 200

#: Users whose old deliveries are forgotten at a time.
MOST_FORGOTTEN = 2500

#: More attempts than any policy allows.
MOST_ATTEMPTS = 1_000_000

#: Records looked at in one step of a repair.
PAGE = 500

#: As `max_pending` of `add`: only users who are pending or in flight.
NOBODY_NEW = -1

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


#: Why the script `add` refuses an otherwise valid update.
RULES = {
    "ahead": "occurred_at is further ahead of Redis' clock than IMATTR_MAX_AHEAD allows",
    "forgotten": "a value that was delivered after the file's time (--as-of) may be newer: it has been forgotten",
}


class Added(NamedTuple):
    """What became of the updates of one `add`.

    `full` has the indexes of those refused for want of room; `refused` of those refused for good, with the rule.
    """

    accepted: int
    coalesced: int
    unchanged: int
    stale: int
    full: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


NOTHING_ADDED = Added(0, 0, 0, 0)


class LostLead(Exception):
    """Nothing was added: another worker has since taken the lead, and these updates."""


class Known(NamedTuple):
    """What a client knows of the server it last added to: its number, and how many updates it had accepted by then."""

    server: int = 0
    accepted: int = 0


NOTHING_KNOWN = Known()


class Lead(NamedTuple):
    """What a worker must hold while it adds: the key of the election, and its own name there."""

    key: str
    worker: str


#: The ways in.
Way = Literal["producer", "import", "celery", "stream"]


class Guard(NamedTuple):
    """The conditions under which updates are added.

    `max_ahead` in seconds: how far ahead of Redis' clock an event time may be. `as_of_ms`: the time as of which an import
    is true, 0 if it is none. `lead`: who must lead. `makes_room`: whether adding frees memory elsewhere, so that even a full
    server must accept it. `way`: how the updates arrived, for the counters. `again`: whether to send values that are
    remembered as delivered.
    """

    max_ahead: float = MAX_AHEAD
    as_of_ms: int = 0
    lead: Lead | None = None
    makes_room: bool = False
    way: Way = "producer"
    again: bool = False


class Settled(NamedTuple):
    """How many users were settled, and whether the ticket for the next batch was issued."""

    users: int
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A dispatcher's turn: the tickets issued, and the seconds until something may become due, if known."""

    tickets: tuple[BatchId, ...]
    next_due: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole buffer at one instant. `waiting` users are in flight, with newer values pending."""

    live: int
    backfill: int
    delayed: int
    waiting: int
    in_flight: int
    dead: int
    #: Records that could not be read and were set aside, until somebody drops them.
    quarantine: int
    #: Seconds since the oldest first update in a lane, None if it is empty.
    oldest: Mapping[str, float | None]
    ledger: Mapping[str, int]
    #: Calls made for batches that were settled.
    calls: int = 0
    #: Updates known to have been accepted and lost with a server, and the number of servers so far.
    lost_with_servers: int = 0
    servers: int = 1

    @property
    def pending(self) -> int:
        return self.live + self.backfill + self.delayed + self.waiting

    @property
    def oldest_age(self) -> float | None:
        return max((age for age in self.oldest.values() if age is not None), default=None)

    @property
    def imbalance(self) -> int:
        """By how many updates the ledger does not balance; 0 unless something is badly wrong.

        accepted + redriven = coalesced + unchanged + stale + delivered + dead + quarantined + lost + pending + in flight
        """
        accepted, redriven, *settled = (self.ledger[counter] for counter in LEDGER)
        return accepted + redriven - sum(settled) - self.pending - self.in_flight

    @property
    def balanced(self) -> bool:
        """Whether the ledger accounts for every update."""
        return self.imbalance == 0


#: For updates from anywhere but an import.
PLAIN = Guard()


# `add` without its I/O, for clients of asyncio, too.


def add_keys(keys: Keys, guard: Guard = PLAIN) -> list[str]:
    """The keys of the script `add`."""
    k = keys
    found = [k.pending, k.live, k.backfill, k.flight, k.shadow, k.shadow_at, k.ledger, k.dead, k.dead_at]
    found += [k.delayed, k.quarantine, k.forgotten_at, guard.lead.key if guard.lead else k.consumer]
    return [*found, k.server, k.rate, k.tickets, k.intake]


def add_arguments(
    updates: Sequence[Update],
    lane: str,
    max_pending: int,
    guard: Guard = PLAIN,
    known: Known = NOTHING_KNOWN,
    now_ms: int | None = None,
) -> tuple[scripts.Argument, ...]:
    """The arguments of the script `add`; see `Buffer.add`."""
    packed = _encode([(update.user, update.attrs, update.occurred_ms) for update in updates])
    leader = guard.lead.worker if guard.lead else ""
    guards = (round(guard.max_ahead * 1000), guard.as_of_ms, leader)
    return (
        _argument(now_ms),
        lane,
        max_pending,
        packed,
        *guards,
        *known,
        int(guard.makes_room),
        f"by_{guard.way}",
        int(guard.again),
    )


def read_added(reply: Sequence[Any]) -> tuple[Added, Known]:
    """Read the answer of the script `add`; raises `LostLead`."""
    if not reply:
        raise LostLead
    known = Known(*reply[:2])
    accepted, coalesced, unchanged, stale, *others = reply[2:]
    reasons = [(index, scripts.text(reason)) for index, reason in zip(others[::2], others[1::2], strict=True)]
    full = tuple(index for index, reason in reasons if reason == "full")
    refused = tuple((index, RULES[reason]) for index, reason in reasons if reason != "full")
    return Added(accepted, coalesced, unchanged, stale, full, refused), known


def _without_users(about: bytes | str | None) -> str:
    """What an import last reported, for the history, without the users it refused."""
    try:
        found = json.loads(about or b"")
        return _encode({name: value for name, value in found.items() if name != "refusals"})
    except (ValueError, AttributeError, RecursionError):
        return ""


def new_batch_id() -> BatchId:
    """Return a new id for a ticket, its Celery task and its batch."""
    return BatchId(str(uuid.uuid4()))


def _argument(now_ms: int | None) -> str | int:
    return "" if now_ms is None else now_ms


def _outcome(outcome: Outcome) -> list[str | int]:
    match outcome:
        case Acked():
            return ["ack"]
        case Retried(delay, proven, unknown):
            return ["retry", round(delay * 1000), int(proven), int(unknown)]
        case Snoozed(delay, suspect):
            return ["snooze", round(delay * 1000), int(suspect)]
        case DeadLettered(code, message):
            return ["dead_letter", code, message]
        case Quarantined():
            return ["quarantine"]


class Buffer:
    """The state machine of one app's users. Safe to share between threads."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        lease: float = 60.0,
        shadow_ttl: float = 900.0,
        shadow_max_users: int = 1_000_000,
        longest_delay: float = LONGEST_DELAY,
        longest_call: float = LONGEST_CALL,
        confirmation: Confirmation | None = None,
    ) -> None:
        """`redis` must return bytes (`decode_responses=False`); times in seconds.

        `longest_call` is how long after it was sent a call may still take effect. With a `confirmation`, `redis` must have a
        single connection.
        """
        self._redis = redis
        self._keys = keys
        self._lease_ms = round(lease * 1000)
        self._shadow_ttl_ms, self._shadow_max = round(shadow_ttl * 1000), shadow_max_users
        self._longest_delay_ms = round(longest_delay * 1000)
        self._longest_call_ms = round(longest_call * 1000)
        self._confirmation, self._known = confirmation, NOTHING_KNOWN
        self._history = History(redis, keys)
        k = keys
        lanes = [k.pending, k.live, k.backfill]
        self._add = scripts.load(redis, "add")
        self._claim = scripts.load(redis, "claim")
        self._claim_keys = [*lanes, k.delayed, k.flight, k.batches, k.leases, k.tickets, k.line]
        self._claim_keys += [k.rate, k.health, k.quarantine, k.ledger, k.server]
        self._settle = scripts.load(redis, "settle")
        self._settle_keys = [*lanes, k.delayed, k.flight, k.batches, k.leases]
        self._settle_keys += [k.dead, k.dead_at, k.shadow, k.shadow_at, k.ledger, k.health, k.tickets]
        self._settle_keys += [k.quarantine, k.imports, k.forgotten_at, k.server, k.rate]
        self._extend = scripts.load(redis, "extend")
        self._reclaim = scripts.load(redis, "reclaim")
        self._reassert = scripts.load(redis, "reassert")
        self._forget = scripts.load(redis, "forget")
        self._snapshot = scripts.load(redis, "snapshot")
        self._repair = scripts.load(redis, "repair")
        self._dispatch = scripts.load(redis, "dispatch")
        self._dispatch_keys = [k.tickets, k.live, k.backfill, k.delayed, k.rate, k.line, k.partial_at]
        self._dispatch_keys += [k.server, k.ledger, k.history]

    def add(
        self,
        updates: Sequence[Update],
        *,
        lane: str = "live",
        max_pending: int = 0,
        guard: Guard = PLAIN,
        now_ms: int | None = None,
    ) -> Added:
        """Merge up to `MAX_UPDATES_PER_ADD` updates into what is pending, in order.

        `max_pending` is how many users may be pending: 0 = no limit, or `NOBODY_NEW`. Raises `LostLead` if the guard's
        worker no longer leads, and `NotConfirmed` if too few replicas have the updates in time.
        """
        if not updates:
            return NOTHING_ADDED
        arguments = add_arguments(updates, lane, max_pending, guard, self._known, now_ms)
        keys = add_keys(self._keys, guard)
        if self._confirmation is None:
            added, self._known = read_added(self._add(keys, arguments))
            return added
        reply, have = self._confirmation.add(self._redis, keys, arguments)
        added, self._known = read_added(reply)
        self._confirmation.check(have)
        return added

    def has_room(self, max_pending: int, share: float = 0.0) -> bool:
        """Whether fewer than `max_pending` users are pending; with a `share`, whether that share is free. 0 = no limit."""
        return not max_pending or self._redis.hlen(self._keys.pending) < max_pending * (1 - share)

    def claim(
        self, ticket: BatchId, size: int, *, epoch: int | None = None, now_ms: int | None = None
    ) -> Batch | None:
        """Claim up to `size` users in exchange for the ticket.

        Returns None if the ticket is spent, lost or unknown; if the line is stopped, unless the ticket is its probe's; or if
        the permit, given by its `epoch`, has lapsed.
        """
        args = (_argument(now_ms), ticket, size, self._lease_ms, _argument(epoch))
        reply = self._claim(self._claim_keys, args)
        if not reply:
            return None
        now, probe, signed_at, ok_at, outage_ended_at, number, *pairs = reply
        users, unreadable = _read_records(pairs[::2], pairs[1::2], outage_ended_at, ok_at)
        if unreadable:
            self.settle(ticket, dict.fromkeys(unreadable, Quarantined()), now_ms=now_ms)
        kind: Any = scripts.text(probe)
        return Batch(ticket, users, claimed_ms=now, probe=kind, signed_at=signed_at, number=number)

    def settle(
        self,
        batch: BatchId,
        outcomes: Mapping[UserId, Outcome],
        *,
        rest: Outcome | None = None,
        claimed_ms: int = 0,
        successor: BatchId | None = None,
        size: int = 0,
        number: int = 0,
        calls: int = 0,
        call_seconds: float = 0.0,
        now_ms: int | None = None,
    ) -> Settled | None:
        """End the claim on the users named and, with `rest`, on all others of the batch.

        Delivered users prove that the service works, as of `claimed_ms`, when their batch was claimed. `successor` is a
        ticket to issue if another batch of `size` users is ready for it. Returns None if the batch is no longer held (its
        lease was reclaimed): then nothing has changed. `number` is the claim's. If a failover has lost that claim, nothing is
        sent until its call can no longer take effect. `calls` are those made for these users, and `call_seconds` what they
        took together.
        """
        packed = _encode({user: _outcome(outcome) for user, outcome in outcomes.items()})
        packed_rest = _encode(_outcome(rest) if rest else None)
        args = (
            _argument(now_ms),
            batch,
            packed,
            packed_rest,
            self._shadow_ttl_ms,
            claimed_ms,
            successor or "",
            size,
            number,
            self._longest_call_ms,
            calls,
            round(call_seconds * 1000),
        )
        users, issued = self._settle(self._settle_keys, args)
        return None if users < 0 else Settled(users, bool(issued))

    def extend(
        self, batch: BatchId, *, epoch: int | None = None, number: int = 0, now_ms: int | None = None
    ) -> Literal["held", "must wait", "lost"]:
        """Renew the lease, if the batch is still held.

        It must wait if the line was stopped, or the permit, given by its `epoch`, has lapsed.
        """
        k = self._keys
        keys = [k.batches, k.leases, k.rate, k.line, k.server, k.tickets, k.ledger]
        args = (_argument(now_ms), batch, self._lease_ms, _argument(epoch), number, self._longest_call_ms)
        held = self._extend(keys, args)
        return "held" if held > 0 else "must wait" if held else "lost"

    def reclaim(self, *, now_ms: int | None = None) -> BatchId | None:
        """Return the users of one expired lease to pending; returns the batch id, or None if no lease has expired.

        Costs no attempt: the worker failed, not the users. If the reclaimer dies between the two steps, it leaves a lease of
        its own, which expires like any other.
        """
        k = self._keys
        keys = [k.batches, k.leases, k.flight, k.quarantine, k.history]
        successor = new_batch_id()
        expired = self._reclaim(keys, (_argument(now_ms), successor, self._lease_ms))
        if not expired:
            return None
        self.settle(successor, {}, rest=Snoozed(), now_ms=now_ms)
        return BatchId(expired.decode())

    def reassert(self, users: Iterable[ClaimedUser], *, now_ms: int | None = None) -> int:
        """Send users' newest values again, since a call with these older ones may have been applied after them.

        Returns how many users have newer values, which will be sent. The late call must have landed.
        """
        k = self._keys
        keys = [k.pending, k.live, k.flight, k.shadow, k.shadow_at, k.server, k.ledger]
        late = [[user.user, {name: value or False for name, value in user.attrs.items()}] for user in users]
        return int(self._reassert(keys, (_argument(now_ms), _encode(late))))

    def forget(self, *, make_room: bool = False, now_ms: int | None = None) -> int:
        """Forget what was delivered long ago, up to `MOST_FORGOTTEN` users; returns how many that were.

        To `make_room` on a nearly full server, also forgets what was delivered lately, oldest first.
        """
        keys = [self._keys.shadow, self._keys.shadow_at, self._keys.imports, self._keys.forgotten_at]
        most = 0 if make_room else self._shadow_max
        args = (_argument(now_ms), self._shadow_ttl_ms, most, MOST_FORGOTTEN)
        return int(self._forget(keys, args))

    def begin_import(self, name: str, as_of_ms: int) -> None:
        """Until `end_import`, forget nothing that is delivered from `as_of_ms` on; beginning again changes nothing."""
        if self._redis.zadd(self._keys.imports, {name: as_of_ms}, nx=True):
            self._history.note("import_began", "import", name=name)

    def show_import(self, name: str, about: Mapping[str, object]) -> None:
        """Show people how far an import has come."""
        self._redis.hset(self._keys.import_progress, name, _encode(about))

    def end_import(self, name: str) -> None:
        """End an import that is finished, or never will be."""
        about = self._redis.hget(self._keys.import_progress, name)
        self._redis.hdel(self._keys.import_progress, name)
        self._redis.hdel(self._keys.import_pauses, name)
        if self._redis.zrem(self._keys.imports, name):
            self._history.note("import_ended", "import", name=name, last_seen=_without_users(about))

    def tick(
        self,
        *,
        size: int,
        linger: float,
        ticket_ttl: float,
        quota: int,
        horizon: float,
        now_ms: int | None = None,
    ) -> Tick:
        """Issue the tickets that are due, for batches of `size` users and `quota` calls a second.

        `linger`, `ticket_ttl` and `horizon` in seconds: how long users wait for company, a ticket to be claimed, and how far
        ahead slots are filled.
        """
        prefix = new_batch_id()[:-4]
        times = (round(linger * 1000), round(ticket_ttl * 1000))
        args = (_argument(now_ms), size, *times, quota, round(horizon * 1000), self._longest_delay_ms, prefix)
        issued, next_due = self._dispatch(self._dispatch_keys, args)
        ids = tuple(BatchId(f"{prefix}{number:04x}") for number in range(1, issued + 1))
        return Tick(ids, None if next_due < 0 else next_due / 1000)

    def release_tickets(self, tickets: Iterable[BatchId]) -> None:
        """Give back tickets that will not be used, so that the dispatcher issues others at once."""
        self._redis.zrem(self._keys.tickets, *tickets)

    def snapshot(self) -> Snapshot:
        """Count everything at one instant."""
        k = self._keys
        keys = [k.pending, k.live, k.backfill, k.delayed, k.flight, k.dead, k.quarantine, k.ledger, k.server]
        now, pending, live, backfill, delayed, in_flight, dead, quarantine, *rest = self._snapshot(keys, [""])
        *scores, ledger, (servers, lost, lost_before) = rest
        ages = (max(0.0, (now - float(score)) / 1000) if score else None for score in scores)
        counters = dict(zip(ledger[::2], ledger[1::2], strict=True))
        return Snapshot(
            live=live,
            backfill=backfill,
            delayed=delayed,
            waiting=pending - live - backfill - delayed,
            in_flight=in_flight,
            dead=dead,
            quarantine=quarantine,
            oldest=dict(zip(("live", "backfill"), ages, strict=True)),
            ledger={counter: scripts.number(counters.get(counter.encode())) for counter in LEDGER},
            calls=scripts.number(counters.get(b"calls")),
            lost_with_servers=scripts.number(lost) + scripts.number(lost_before),
            servers=scripts.number(servers) or 1,
        )

    def repair(self) -> tuple[int, int]:
        """Bring lanes and ledger back into agreement with the records, after keys were deleted or evicted.

        Returns how many updates are lost (negative if more were found than the ledger knew of), and how many users had been
        in no lane. While all is well, this costs one snapshot.
        """
        seen = self.snapshot()
        k = self._keys
        keys = [k.pending, k.live, k.backfill, k.delayed, k.flight, k.ledger, k.server]
        lost = joined = 0
        # Only users in flight may wait outside the lanes.
        if not 0 <= seen.waiting <= seen.in_flight:
            lanes = (self._redis.zscan_iter(lane, count=PAGE) for lane in (k.live, k.backfill, k.delayed))
            records = self._redis.hscan_iter(k.pending, count=PAGE)
            for page in scripts.pages(chain(records, *lanes), PAGE):
                users = json.dumps([scripts.text(user) for user, _ in page])
                off, found = self._repair(keys, [users])
                lost, joined = lost + off, joined + found
        if not seen.balanced:
            lost += self._repair(keys, ["[]"])[0]
        return lost, joined


def _read_records(
    users: Sequence[bytes], packed: Sequence[bytes], outage_ended_at: int, ok_at: int
) -> tuple[tuple[ClaimedUser, ...], list[UserId]]:
    """Read what a claim returned: the users, and those whose record cannot be read."""
    try:
        # One call of the decoder for all of them takes a third of the time of a hundred calls.
        records = json.loads(b"[%b]" % b",".join(packed))
        pairs = zip(users, records, strict=True)
        return tuple(_claimed(user, record, outage_ended_at, ok_at) for user, record in pairs), []
    except _UNREADABLE:
        good, unreadable = list[ClaimedUser](), list[UserId]()
    for user, one in zip(users, packed, strict=True):
        try:
            good.append(_claimed(user, json.loads(one), outage_ended_at, ok_at))
        except _UNREADABLE:
            unreadable.append(user.decode())
    return tuple(good), unreadable


#: What reading a damaged record may raise.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


def _claimed(user: bytes, record: dict[str, Any], outage_ended_at: int, ok_at: int) -> ClaimedUser:
    """Read one user of a claim; raises one of `_UNREADABLE` if its record cannot be read."""
    attrs = {}
    for name, (value, version) in record["a"].items():
        if not (type(value) is str or value is False) or not 0 <= version <= LATEST_MS:
            raise ValueError
        if value and not (name.isascii() and value.isascii()):
            (name + value).encode()
        attrs[name] = value or None
    since, failed_at = record["t"] + 0, record.get("f", 0)
    # A failure counts if others succeeded after it, unless it belongs to an outage that has ended.
    attempts = record.get("n", 0) + (outage_ended_at < failed_at < ok_at)
    if not attrs or not math.isfinite(since + failed_at) or not 0 <= attempts <= MOST_ATTEMPTS:
        raise ValueError
    return ClaimedUser(
        user.decode(), attrs, int(attempts), since, "s" in record, "b" in record, "u" in record
    )
