"""The delivery loop: a ticket carries a worker through one batch, or several, with one attempt at each user.

1. **Permit first.** Reserve the next free slot of the fleet's shared clock. If there is none within patience, hand the
   ticket back: other workers have the slots.
2. **Then claim.** Shortly before the slot, take up to 100 users: as late as possible, so that the batch is as full and
   its values as fresh as they can be; early enough that only the write remains for the slot.
3. **Prepare, wait, send.** Sign, encode and connect, wait for the slot, and write, if the lease still covers the whole
   call. A worker that was frozen must not wake up and send an old batch.
4. **Settle.** `plan.py` decides what the answer means; carry that out, until nothing is left of the plan.
5. **Repeat.** If there is another full batch that no ticket is out for, settling issues one, and the worker starts again
   with it: most of a batch's cost is Celery's message, which is paid once.

Between claim and settle everything may fail or die at any point: the lease then runs out, and the users are reclaimed. A
user is sent again rather than lost; setting a value twice is harmless, and what is sent is the newest.

A worker frozen between its last look at the lease and the socket, for longer than the lease lasts, still delivers an old
value late. That window is microseconds wide. When the worker resumes, it finds its batch gone; once its call has landed, it
has the newest values sent again (`reassert`). Reading first what the API has would cost a call to save one.

Weakness: a worker that is frozen in that window, sends, and is then killed before it has looked at its batch; and newer
values than the late ones, if they are no longer remembered (`IMATTR_SHADOW_TTL`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import structlog

from worker.clock import Clock
from worker.delivery.answers import UNREACHABLE, Answer, Failure, NoReply, Reply
from worker.delivery.api import Call, ChatApi
from worker.delivery.meter import Meter, Operation, Summary
from worker.delivery.plan import (
    ACKED,
    AskNames,
    AskValues,
    End,
    HandBack,
    Part,
    PauseRate,
    Plan,
    RenewForFleet,
    Step,
    StopLine,
    advance,
    begin,
    blames_service,
)
from worker.delivery.policy import Pause, Policy, decide, rule_for
from worker.models import Acked, Batch, BatchId, DeadLettered, Outcome, Retried, Snoozed, UserId
from worker.ratelimit import DWELL, Permit, RateLimiter
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer, Settled, new_batch_id
from worker.state.connection import ConnectionError, RedisError, TimeoutError
from worker.state.line import Line

log = structlog.get_logger()

#: Batches, and seconds, after which a worker returns to Celery for its next ticket: Flower shows a task only once it has
#: ended, and a shutdown waits for it.
MOST_BATCHES, LONGEST_CARRY = 20, 10.0
#: Seconds of a round trip to Redis above which both grow with it, and the largest factor: Celery needs half a dozen round
#: trips for a task, one after the other, and each worker's main process handles one task at a time.
NEAR, MOST_TIMES_LONGER = 0.02, 5.0
#: Seconds before the slot at which the batch is claimed: preparing it takes about 3 ms, the rest allows for a busy machine.
LEAD = 0.1
#: Seconds between two attempts to settle while Redis is away.
SETTLE_AGAIN = 0.2
#: Slots that may be missed in a row before the users are handed back.
MAX_MISSED = 20
#: Seconds between two attempts to get a slot for the rest of a batch.
TRY_AGAIN = 0.1
#: Seconds that suspects wait when there is no slot for them.
SUSPECTS_WAIT = 3.0
#: Seconds after the next probe until the users of an outage's probe are sent again: they may be what makes the service fail.
BEHIND_NEXT_PROBE = 1.0

#: The batch is no longer ours: its lease ran out, and it was reclaimed.
Fenced = Literal["fenced"]


@dataclass(slots=True)
class _Claim:
    """What a worker holds while it delivers a batch."""

    batch: Batch
    summary: Summary
    #: On this machine's monotonic clock.
    claimed_at: float
    lease_ends: float
    #: The permit of the next call or, once used, of the last one.
    permit: Permit
    #: A ticket for the next batch, to be issued if there is one.
    successor: BatchId | None = None
    permit_used: bool = False
    goes_on: bool = False
    #: Calls made since users were last settled, and the seconds until their answers.
    calls: int = 0
    call_seconds: float = 0.0
    #: Whether anything was written, and whether the last call may still take effect.
    wrote: bool = False
    landing: bool = False


class Delivery:
    """Delivers batches: `carry` is the body of one Celery task. Thread-safe."""

    def __init__(
        self,
        buffer: Buffer,
        limiter: RateLimiter,
        line: Line,
        names: AttributeNames,
        api: ChatApi,
        policy: Policy,
        clock: Clock,
        *,
        batch_size: int,
        lease: float,
        quota: int,
        rng: random.Random,
        stopping: Callable[[], bool] = lambda: False,
        meter: Meter | None = None,
        reads: RateLimiter | None = None,
    ) -> None:
        """`lease` in seconds, the same as the buffer's; `quota` in calls a second, the same as the limiter's.

        `rng` spreads retries out; `stopping` turns true when this worker shuts down; `meter` counts what happens; `reads`
        limits reads, if they have slots of their own.
        """
        self._reads = reads
        self._meter = meter or Meter()
        self._buffer, self._limiter, self._line, self._names = buffer, limiter, line, names
        self._api, self._policy, self._clock, self._rng = api, policy, clock, rng
        self._batch_size, self._lease, self._quota, self._stopping = batch_size, lease, quota, stopping

    def carry(self, ticket: BatchId) -> list[Summary]:
        """Deliver the ticket's batch, and more while full ones are waiting. Raises only what Redis raises."""
        summaries: list[Summary] = []
        times = min(max(self._limiter.round_trip / NEAR, 1.0), MOST_TIMES_LONGER)
        ends_at = self._clock.monotonic() + times * LONGEST_CARRY
        while True:
            last = len(summaries) + 1 >= times * MOST_BATCHES or self._clock.monotonic() > ends_at
            successor = None if last else new_batch_id()
            summary, goes_on = self._attempt(ticket, successor)
            summaries.append(summary)
            if not goes_on or successor is None:
                return summaries
            ticket = successor

    def _attempt(self, ticket: BatchId, successor: BatchId | None) -> tuple[Summary, bool]:
        """Deliver one batch; returns also whether the successor was issued."""
        summary = Summary(ticket)
        permit = None if self._stopping() else self._reserve()
        if permit is None:
            self._buffer.release_tickets([ticket])
            summary.outcome = "no_permit"
            return summary, False
        self._sleep_until_shortly_before(permit)
        claimed_at = self._clock.monotonic()
        batch = self._buffer.claim(ticket, self._batch_size, epoch=permit.epoch)
        if batch is None or not batch.users:
            summary.outcome = "spent" if batch is None else "empty"
            self._meter.permit("empty")
            return summary, False

        summary.number, summary.users = batch.number, len(batch.users)
        summary.attempt = 1 + max(user.attempts for user in batch.users)
        summary.waited = round((batch.claimed_ms - min(user.since_ms for user in batch.users)) / 1000, 3)
        claim = _Claim(batch, summary, claimed_at, claimed_at + self._lease, permit, successor)
        try:
            summary.outcome = self._deliver(claim)
        except RedisError:
            # The lease runs out by itself.
            raise
        except Exception:
            # A defect of ours.
            self._hold(batch)
            summary.outcome = "failed"
            self._meter.ended(summary)
            raise
        summary.took = round(self._clock.monotonic() - claimed_at, 3)
        self._meter.ended(summary)
        # The canonical log line: one a batch, with everything that anyone asks about it.
        log.info("batch_settled", **{name: getattr(summary, name) for name in Summary.__slots__})
        return summary, claim.goes_on

    def _deliver(self, claim: _Claim) -> str:
        """Carry out the batch's plan to its end; returns the outcome in one word."""
        # Another worker may have found the key changed, or may be about to: a probe renews its signature.
        if claim.batch.probe:
            self._api.renew_signature()
        self._api.adopt_signature(claim.batch.signed_at)
        seed, apart = self._rng.getrandbits(32), self._reads is not None
        plan = begin(claim.batch, self._policy, seed, reads_apart=apart)
        while plan.todo:
            answer = self._ask(claim, plan)
            if isinstance(answer, Reply | NoReply):
                self._note(claim, plan, answer)
                step = advance(plan, answer, self._failures(plan, answer))
                plan, end = self._carry_out(claim, step)
            else:
                end = answer
            if end is None and plan.todo and self._stopping():
                end = HandBack("handed_back")
            if end == "fenced":
                again = self._send_newest_again(claim)
                log.warning("batch_fenced", batch=claim.batch.id, sent_again=again)
                return end
            if end:
                rest = Snoozed(end.delay, suspect=plan.bisecting)
                settled = self._end_claim(claim, {}, rest=rest)
                claim.summary.snoozed += settled.users if settled else 0
                return end.outcome
        return _outcome_of(claim.summary)

    def _send_newest_again(self, claim: _Claim) -> int:
        """Have values newer than ours sent again, if ours may have been applied after them."""
        if not claim.wrote:
            return 0
        if claim.landing:
            self._clock.sleep(self._policy.hold)
        return self._buffer.reassert(claim.batch.users)

    def _hold(self, batch: Batch) -> None:
        """Send the users again after a hold, since we may have failed after a send. Our defect is not their fault."""
        hold, spread = self._policy.hold, self._rng.random()
        users = {
            user.user: Snoozed(hold + self._policy.backoff(user.attempts, spread)) for user in batch.users
        }
        with contextlib.suppress(RedisError):
            self._buffer.settle(batch.id, users)

    # Sending: prepare, wait for the slot, write.

    def _ask(self, claim: _Claim, plan: Plan) -> Answer | HandBack | Fenced:
        """Get the answer to the next call of the plan."""
        call = plan.todo[0]
        if isinstance(call, AskNames):
            known = None if claim.batch.probe else self._names.known_lately()
            if known is not None:
                return Reply(0, names=known)
            answer = self._send(claim, "names", self._api.prepare_get_names)
            if isinstance(answer, Reply) and not answer.code:
                try:
                    self._names.set(answer.names)
                except ValueError:
                    # More names, or other ones, than an app can have.
                    return NoReply(Failure.UNREADABLE)
            return answer
        if isinstance(call, AskValues):
            return self._read(claim, [user.user for user in call.users])
        if claim.permit_used and (plan.bisecting or self._policy.suspects(call.users[0])):
            end = self._renew_permit(claim, self._limiter.reserve_isolating(), SUSPECTS_WAIT)
            if end:
                return end
        if call.removing:
            return self._send(claim, "remove", lambda: self._api.prepare_remove(call.entries()))
        return self._send(claim, "set", lambda: self._api.prepare_set(call.entries()))

    def _read(self, claim: _Claim, users: list[UserId]) -> Answer | HandBack | Fenced:
        """Ask what users have: in the batch's slot, or in one of the reads' own, without waiting long for it."""
        if self._reads is None:
            return self._send(claim, "get", lambda: self._api.prepare_get(users))
        call = self._api.prepare_get(users)
        if isinstance(call, NoReply):
            return call
        permit = self._reads.take()
        if permit is None:
            call.abandon()
            return UNREACHABLE
        call.send()
        self._reads.sent(permit)
        sent_at = self._clock.monotonic()
        answer = call.answer()
        self._meter.call("get", answer, self._clock.monotonic() - sent_at)
        action = decide(answer)
        if isinstance(action, Pause) and isinstance(answer, Reply):
            reason = rule_for(answer.code).meaning
            self._reads.pause(action.seconds, reason, answer.code, refused=permit)
        return answer

    def _send(
        self, claim: _Claim, operation: Operation, prepare: Callable[[], Call | NoReply]
    ) -> Answer | HandBack | Fenced:
        """Make one call in a slot of its own."""
        call = prepare()
        # Nothing was sent, and the permit can still be used.
        if isinstance(call, NoReply):
            return call
        end = self._wait_for_slot(claim)
        if end:
            call.abandon()
            return end
        call.send()
        self._limiter.sent(claim.permit)
        sent_at = self._clock.monotonic()
        claim.wrote = claim.wrote or operation in ("set", "remove")
        answer = call.answer()
        claim.landing = isinstance(answer, NoReply)
        seconds = self._clock.monotonic() - sent_at
        # Refusals come sooner than successes.
        if isinstance(answer, Reply) and not answer.code:
            self._limiter.answered(seconds)
        self._meter.call(operation, answer, seconds)
        claim.calls, claim.call_seconds = claim.calls + 1, claim.call_seconds + seconds
        return answer

    def _wait_for_slot(self, claim: _Claim) -> HandBack | Fenced | None:
        """Wait for the slot, or for another one if it is missed. None means: send now."""
        for _ in range(MAX_MISSED):
            if claim.permit_used and (end := self._renew_permit(claim, self._reserve_more(claim))):
                return end
            claim.permit_used = True
            if self._limiter.redeem(claim.permit) and self._is_covered(claim):
                claim.summary.calls += 1
                self._meter.permit("used")
                return None
            self._meter.permit("late")
        return HandBack("handed_back")

    def _renew_permit(
        self, claim: _Claim, permit: Permit | None, delay: float = 0.0
    ) -> HandBack | Fenced | None:
        """Take another permit and, shortly before its slot, check that the batch may still be sent."""
        if permit is None:
            return HandBack("handed_back", delay)
        self._sleep_until_shortly_before(permit)
        match self._extend(claim, permit):
            case "lost":
                return "fenced"
            case "must wait":
                return HandBack("handed_back")
            case "held":
                claim.permit, claim.permit_used = permit, False
                return None

    def _sleep_until_shortly_before(self, permit: Permit) -> None:
        self._clock.sleep(permit.due - LEAD - self._limiter.round_trip - self._clock.monotonic())

    def _extend(self, claim: _Claim, permit: Permit | None = None) -> Literal["held", "must wait", "lost"]:
        """Renew the lease, if the batch is still held."""
        renewed_at = self._clock.monotonic()
        epoch = permit.epoch if permit else None
        held = self._buffer.extend(claim.batch.id, epoch=epoch, number=claim.batch.number)
        if held != "lost":
            claim.lease_ends = renewed_at + self._lease
        return held

    def _reserve_more(self, claim: _Claim) -> Permit | None:
        """Reserve another slot, however many others wait: users handed back would start over with the first call.

        None if the lease leaves no time to wait, or this worker shuts down.
        """
        while not (permit := self._reserve()):
            if self._stopping() or not self._is_covered(claim):
                return None
            self._clock.sleep(TRY_AGAIN)
        return permit

    def _reserve(self) -> Permit | None:
        asked = self._clock.monotonic()
        permit = self._limiter.reserve()
        if permit is None:
            self._meter.permit("none")
        else:
            self._meter.waited(max(0.0, permit.due - asked))
        return permit

    def _is_covered(self, claim: _Claim) -> bool:
        """Whether a call that starts now ends before the lease."""
        return self._clock.monotonic() + self._api.longest_call < claim.lease_ends

    # Carrying out what the plan says.

    def _note(self, claim: _Claim, plan: Plan, answer: Answer) -> None:
        """Report an answer; decides nothing."""
        call, summary = plan.todo[0], claim.summary
        if isinstance(call, AskValues):
            return
        if isinstance(answer, NoReply):
            summary.failure = answer.failure.value
            return
        if isinstance(call, Part):
            # Of several calls, the code of the first that failed.
            summary.code = summary.code or answer.code
            if strangers := answer.errors.keys() - {user.user for user in call.users}:
                log.warning("unknown_users_in_error_list", batch=claim.batch.id, users=len(strangers))

    def _failures(self, plan: Plan, answer: Answer) -> int:
        """How many calls of the fleet have failed in a row; 0 if this one did not fail through the service's fault."""
        if not isinstance(plan.todo[0], Part) or not blames_service(answer):
            return 0
        # Pieces of one batch fail for the same reason: only its first call says something about the service.
        return self._line.failures() if plan.answers else self._line.record_failure()

    def _carry_out(self, claim: _Claim, step: Step) -> tuple[Plan, HandBack | Fenced | None]:
        """Do what the step says, in its order; returns the plan to continue with, or why the batch ends."""
        if step.reopen is not None:
            self._reopen(claim, signed_at=step.reopen)
        if step.hold:
            # Nothing is sent meanwhile, so it does not matter if others stop the line.
            if self._extend(claim) == "lost":
                return step.plan, "fenced"
            self._clock.sleep(step.hold)
        if step.outcomes and not self._settle(claim, step.outcomes, by_reading=step.by_reading):
            return step.plan, "fenced"
        end: End | None = step.end
        if step.if_too_many and self._are_too_many(step):
            end = step.if_too_many
        if end is None:
            return step.plan, None
        handed_back = self._end(claim, end)
        if handed_back is None and step.otherwise:
            return self._carry_out(claim, step.otherwise)
        return step.plan, handed_back

    def _are_too_many(self, step: Step) -> bool:
        letters = [end for end in step.outcomes.values() if isinstance(end, DeadLettered)]
        return self._line.record_dead_letters(letters[0].code, len(letters))

    def _settle(self, claim: _Claim, outcomes: Mapping[UserId, Outcome], *, by_reading: bool = False) -> bool:
        """Settle users; False if the batch is no longer ours."""
        # The usual end, everyone delivered, needs no list of names.
        all_acked = len(outcomes) == len(claim.batch.users) and set(outcomes.values()) == {ACKED}
        named, rest = ({}, ACKED) if all_acked else (outcomes, None)
        claimed_ms = 0 if by_reading else claim.batch.claimed_ms
        # Only a batch that was delivered whole proves that another one can be.
        settled = self._end_claim(
            claim,
            named,
            rest=rest,
            claimed_ms=claimed_ms,
            successor=claim.successor if all_acked and not by_reading else None,
            size=self._batch_size,
        )
        if settled is None:
            return False
        claim.goes_on = settled.goes_on
        self._meter.settled(claim.batch, outcomes, self._clock.monotonic() - claim.claimed_at)
        summary, ends = claim.summary, outcomes.values()
        summary.acked += sum(isinstance(end, Acked) for end in ends)
        summary.found += len(outcomes) if by_reading else 0
        summary.retried += sum(isinstance(end, Retried) for end in ends)
        summary.snoozed += sum(isinstance(end, Snoozed) for end in ends)
        summary.dead_lettered += sum(isinstance(end, DeadLettered) for end in ends)
        return True

    def _end_claim(self, claim: _Claim, outcomes: Mapping[UserId, Outcome], **how: Any) -> Settled | None:
        """Settle users, trying as often as needed: while Redis fails over, only this worker knows what became of them.

        None if the batch is no longer ours. Trying again is safe: what was settled the first time is no longer held.
        """
        number = claim.batch.number
        calls, call_seconds = claim.calls, claim.call_seconds
        claim.calls, claim.call_seconds = 0, 0.0
        asked_again = False
        while True:
            try:
                settled = self._buffer.settle(
                    claim.batch.id, outcomes, number=number, calls=calls, call_seconds=call_seconds, **how
                )
                return settled or (Settled(0) if asked_again else None)
            except (ConnectionError, TimeoutError):
                if self._stopping() or self._clock.monotonic() + SETTLE_AGAIN > claim.lease_ends:
                    raise
                self._clock.sleep(SETTLE_AGAIN)
                asked_again = True

    def _end(self, claim: _Claim, end: End) -> HandBack | None:
        """Do what ends the batch; None if that had no effect, and the batch continues."""
        match end:
            case HandBack():
                return end
            case StopLine():
                return self._stop_line(claim, end)
            case PauseRate(seconds, code):
                reason, permit = rule_for(code).meaning, claim.permit
                if self._limiter.pause(seconds, reason, code, refused=permit):
                    log.warning("rate_refused", code=code, reason=reason, limit=permit.limit)
                return HandBack("rate_limited", seconds)
            case RenewForFleet(refused_at, code):
                issued = self._line.renew_signature(refused_at)
                if issued is None:
                    return None
                self._api.adopt_signature(issued)
                log.warning("signature_renewed", code=code, reason=rule_for(code).meaning)
                return HandBack("signature_renewed")
            case _:
                assert_never(end)

    def _stop_line(self, claim: _Claim, stop: StopLine) -> HandBack | None:
        """Stop the line for the whole fleet; None if a person has allowed the reason."""
        wait = self._line.stop(claim.batch.id, stop.kind, stop.code, stop.reason, first_wait=stop.first_wait)
        if wait is None:
            return None
        if wait:
            self._meter.stopped(stop.kind, stop.code)
            log.error(
                "line_stopped", kind=stop.kind, code=stop.code or None, reason=stop.reason, next_probe_s=wait
            )
        delay = wait + BEHIND_NEXT_PROBE if claim.batch.probe == "outage" else 0.0
        return HandBack("stopped", max(delay, stop.hold))

    def _reopen(self, claim: _Claim, *, signed_at: int) -> None:
        """Open the line, because its probe has passed."""
        if self._line.reopen(claim.batch.id, quota=self._quota, dwell=DWELL, signed_at=signed_at):
            log.info("line_reopened", batch=claim.batch.id)


def _outcome_of(summary: Summary) -> str:
    """The outcome, in one word, of a batch that nothing interrupted."""
    if summary.acked:
        return "delivered" if summary.acked == summary.users else "partly_delivered"
    return "retried" if summary.retried else "dead_lettered" if summary.dead_lettered else "snoozed"
