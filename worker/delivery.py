"""The core loop: one ticket, one batch, one attempt at each of its users. Read this first.

The story of a batch:

1. **Permit first.** Reserve the next free slot of the fleet's shared clock. None within patience: hand
   the ticket back, somebody else has the slots.
2. **Then claim.** Shortly before the slot, take up to 100 users: as late as possible, so the batch is as
   full and its values as fresh as they can be; early enough that only the send remains for the slot.
3. **Send**, if the lease still covers the whole request. A worker that was frozen must not wake up and
   send an old batch.
4. **Read the answer** (`worker/policy.py`) and **settle** every user exactly once: ack, retry, snooze or
   dead letter. Where a request is refused as a whole, halve it under the same lease to find the poison;
   every half takes a permit of its own.

Everything between claim and settle may fail or die at any point: the lease then runs out and the users
are reclaimed. A user is sent again rather than lost; a set is idempotent, and what is sent is the newest.

Weakness: a worker frozen between the last look at its lease and the socket, for longer than the lease
lasts, can still land an old value late. The window is microseconds wide; reading the attributes back
(`im_get_attr`) after such a pause would close it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import redis
import structlog

from worker.buffer import Buffer
from worker.client import Client, NoReply, Reply
from worker.clock import Clock
from worker.line import Line
from worker.models import Acked, Batch, BatchId, Claimed, DeadLettered, Outcome, Retried, Snoozed, UserId
from worker.policy import Action, Again, Deliver, Pause, Policy, Split, Stop, bury, decide, rule_for
from worker.ratelimit import Permit, RateLimiter

log = structlog.get_logger()

#: Seconds before the slot at which the batch is claimed and encoded (about 3 ms of work; the rest is for a busy machine).
LEAD = 0.1
#: Slots that may be missed in a row before the users are handed back.
MAX_MISSED = 20


@dataclass(slots=True)
class Summary:
    """What became of one ticket; has no user data, so Flower and the log may show it."""

    batch: BatchId
    outcome: str = ""
    users: int = 0
    acked: int = 0
    retried: int = 0
    snoozed: int = 0
    dead_lettered: int = 0
    calls: int = 0
    code: int | None = None
    failure: str | None = None
    attempt: int = 0
    waited: float = 0.0
    took: float = 0.0


class Fenced(Exception):
    """Raised when the batch is not ours any more: its lease ran out and was reclaimed."""


class GiveBack(Exception):
    """Raised when what is left of the batch must go back now, at no cost: no slot in time, or a shutdown."""


@dataclass(slots=True)
class _Work:
    """A claimed batch on its way. `lease_ends` is on this machine's monotonic clock."""

    batch: Batch
    summary: Summary
    lease_ends: float
    #: Parts still to be sent; more than one only after a split.
    parts: list[Sequence[Claimed]] = field(default_factory=list)


class Delivery:
    """Delivers batches: `deliver` is the body of one Celery task. Thread-safe."""

    def __init__(
        self,
        buffer: Buffer,
        limiter: RateLimiter,
        line: Line,
        client: Client,
        policy: Policy,
        clock: Clock,
        *,
        batch_size: int,
        lease: float,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`lease` in seconds, as the buffer has it; `stopping` turns true when this worker shuts down."""
        self._buffer, self._limiter, self._line, self._client = buffer, limiter, line, client
        self._policy, self._clock = policy, clock
        self._batch_size, self._lease, self._stopping = batch_size, lease, stopping

    def deliver(self, ticket: BatchId) -> Summary:
        """Claim one batch with the ticket and settle all of it. Raises only what Redis raises."""
        summary = Summary(ticket)
        permit = None if self._stopping() else self._limiter.reserve()
        if permit is None:
            self._buffer.release_tickets([ticket])
            summary.outcome = "no_permit"
            return summary
        self._clock.sleep(permit.due - LEAD - self._clock.monotonic())
        claimed_at = self._clock.monotonic()
        batch = self._buffer.claim(ticket, self._batch_size)
        if batch is None or not batch.users:
            summary.outcome = "spent" if batch is None else "empty"
            return summary

        summary.users = len(batch.users)
        summary.attempt = 1 + max(user.attempts for user in batch.users)
        summary.waited = round((batch.claimed_ms - min(user.since_ms for user in batch.users)) / 1000, 3)
        work = _Work(batch, summary, claimed_at + self._lease, [batch.users])
        with self._handing_back(work):
            self._send_parts(work, permit)
            summary.outcome = summary.outcome or _outcome_of(summary)
        summary.took = round(self._clock.monotonic() - claimed_at, 3)
        # The canonical line: one a batch, with everything one asks about it.
        log.info("batch_settled", **{name: getattr(summary, name) for name in Summary.__slots__})
        return summary

    @contextlib.contextmanager
    def _handing_back(self, work: _Work) -> Iterator[None]:
        """Whatever stops the work early, the users left go back; if even that fails, the lease ends."""
        try:
            yield
        except Fenced:
            work.summary.outcome = "fenced"
            log.warning("batch_fenced", batch=work.batch.id)
        except GiveBack:
            work.summary.outcome = "handed_back"
            self._snooze_rest(work, 0.0)
        except redis.RedisError:
            raise
        except Exception:
            # A defect of ours. It may have struck after a send, so the users are held.
            again = Again(hold=True)
            users = {user.user: self._policy.again(again, user.attempts) for user in work.batch.users}
            with contextlib.suppress(redis.RedisError):
                self._buffer.settle(work.batch.id, users)
            raise

    def _snooze_rest(self, work: _Work, delay: float) -> None:
        """Put back all that is left, at no cost."""
        work.parts.clear()
        settled = self._buffer.settle(work.batch.id, {}, rest=Snoozed(delay))
        work.summary.snoozed += settled or 0

    def _send_parts(self, work: _Work, permit: Permit | None) -> None:
        while work.parts:
            part = work.parts.pop()
            answer = self._send(work, part, permit)
            permit = None
            self._act(work, part, decide(answer), answer)
            if work.parts and self._stopping():
                raise GiveBack

    def _send(self, work: _Work, part: Sequence[Claimed], permit: Permit | None) -> Reply | NoReply:
        """Send one part in a slot of its own."""
        body = self._client.encode((user.user, user.attrs) for user in part)
        return self._client.send(body, lambda: self._pass_gate(work, permit or self._limiter.reserve()))

    def _pass_gate(self, work: _Work, permit: Permit | None) -> None:
        """Wait for the slot, or for another one when it is missed. Returning means: send, now."""
        for _ in range(MAX_MISSED):
            if permit is None:
                break
            self._cover(work, permit)
            if self._limiter.redeem(permit) and self._covered(work, self._clock.monotonic()):
                work.summary.calls += 1
                return
            permit = self._limiter.reserve()
        raise GiveBack

    def _covered(self, work: _Work, start: float) -> bool:
        return start + self._client.longest_call < work.lease_ends

    def _cover(self, work: _Work, permit: Permit) -> None:
        """Renew the lease if a call that starts with the permit might outlast it."""
        if not self._covered(work, permit.due):
            self._extend(work)

    def _extend(self, work: _Work) -> None:
        renewed_at = self._clock.monotonic()
        if not self._buffer.extend(work.batch.id):
            raise Fenced
        work.lease_ends = renewed_at + self._lease

    def _act(self, work: _Work, part: Sequence[Claimed], action: Action, answer: Reply | NoReply) -> None:
        """Carry out the action for one part, and settle or split it."""
        summary = work.summary
        if isinstance(answer, NoReply):
            summary.failure = answer.failure.value
            code, info = 0, f"{answer.failure.value} {answer.http_status or ''}".strip()
        else:
            code, info = answer.code, answer.info
            # Of several calls, the code of the first that failed.
            summary.code = summary.code or answer.code
        # Whatever else it said, the API has let us in.
        let_in = isinstance(action, Deliver | Pause | Split)
        if work.batch.probe and let_in and self._line.reopen(work.batch.id):
            log.info("line_reopened", batch=work.batch.id)
        match action:
            case Deliver():
                self._deliver_part(work, part, answer)
            case Again():
                self._again(work, part, action, bury(code, info) if code else DeadLettered(0, info))
            case Pause(seconds):
                summary.outcome = "rate_limited"
                self._limiter.pause(seconds, rule_for(code).meaning, code)
                self._snooze_rest(work, seconds)
            case Stop(seconds, sign):
                summary.outcome = "stopped"
                if sign:
                    self._client.sign_again()
                reason = rule_for(code).meaning
                wait = self._line.stop(work.batch.id, code, reason, seconds)
                if wait is not None:
                    log.error("line_stopped", code=code, reason=reason, next_probe_s=wait)
                self._snooze_rest(work, 0.0)
            case Split():
                self._split(work, part, bury(code, info))
            case _:
                assert_never(action)

    def _deliver_part(self, work: _Work, part: Sequence[Claimed], answer: Reply | NoReply) -> None:
        errors = answer.errors if isinstance(answer, Reply) else {}
        refused: dict[UserId, Outcome] = {
            user.user: self._policy.decide_user(errors[user.user].code, errors[user.user].info, user.attempts)
            for user in part
            if user.user in errors
        }
        if strangers := errors.keys() - {user.user for user in part}:
            log.warning("error_list_names_strangers", batch=work.batch.id, users=len(strangers))
        self._settle(work, part, refused, Acked())

    def _again(self, work: _Work, part: Sequence[Claimed], action: Again, last: DeadLettered) -> None:
        """Retry those with attempts left; isolate the others, and give up on one that is alone."""
        spent = [user for user in part if self._policy.exhausted(user.attempts, action.most)]
        retried: dict[UserId, Outcome] = {
            user.user: self._policy.again(action, user.attempts) for user in part if user not in spent
        }
        if retried:
            self._settle(work, part, retried, None)
        if not spent:
            return
        if action.hold:
            # Neither these values again nor newer ones may go out while the old call can still land.
            self._extend(work)
            self._clock.sleep(self._policy.hold)
        if len(part) == 1:
            self._settle(work, part, {part[0].user: last}, None)
        else:
            work.parts += [spent] if retried else _halves(part)

    def _split(self, work: _Work, part: Sequence[Claimed], letter: DeadLettered) -> None:
        if len(part) == 1:
            self._settle(work, part, {part[0].user: letter}, None)
        else:
            work.parts += _halves(part)

    def _settle(
        self, work: _Work, part: Sequence[Claimed], outcomes: dict[UserId, Outcome], others: Outcome | None
    ) -> None:
        """Settle a part: those named in `outcomes`, and with `others` the rest of the part."""
        # The whole batch at once needs no list of names.
        whole = len(part) == len(work.batch.users)
        if others is not None and not whole:
            outcomes = {user.user: outcomes.get(user.user, others) for user in part}
        if self._buffer.settle(work.batch.id, outcomes, rest=others if whole else None) is None:
            raise Fenced
        summary = work.summary
        settled = list(outcomes.values())
        if others is not None and whole:
            settled += [others] * (len(part) - len(settled))
        summary.acked += sum(isinstance(outcome, Acked) for outcome in settled)
        summary.retried += sum(isinstance(outcome, Retried) for outcome in settled)
        summary.snoozed += sum(isinstance(outcome, Snoozed) for outcome in settled)
        summary.dead_lettered += sum(isinstance(outcome, DeadLettered) for outcome in settled)


def _outcome_of(summary: Summary) -> str:
    """One word for a batch that nothing interrupted."""
    if summary.acked:
        return "delivered" if summary.acked == summary.users else "partly_delivered"
    return "retried" if summary.retried else "dead_lettered" if summary.dead_lettered else "snoozed"


def _halves(part: Sequence[Claimed]) -> list[Sequence[Claimed]]:
    middle = len(part) // 2
    return [part[middle:], part[:middle]]
