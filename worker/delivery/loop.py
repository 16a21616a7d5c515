"""The core loop: one ticket, one batch, one attempt at each of its users. Read this first.

The story of a batch:

1. **Permit first.** Reserve the next free slot of the fleet's shared clock. None within patience: hand
   the ticket back, somebody else has the slots.
2. **Then claim.** Shortly before the slot, take up to 100 users: as late as possible, so the batch is as
   full and its values as fresh as they can be; early enough that only the send remains for the slot.
3. **Send**, if the lease still covers the whole request. A worker that was frozen must not wake up and
   send an old batch.
4. **Read the answer** (`worker/delivery/policy.py`) and **settle** every user exactly once: ack, retry, snooze or
   dead letter.

Whose fault is a failure? The answer decides, and what happens to others at the same time:

* *the settings'*, the account's: the line stops (`worker/state/line.py`), nobody pays for it;
* *the service's*, as long as call after call fails: the line stops, too, and opens by itself;
* *the rate's*: everybody pauses, and the fleet sends more slowly;
* *a user's*: the request is halved under the same lease until the culprit is alone. Every half takes a
  permit of its own, a tenth of all at most while good work waits. Nobody is condemned before some call of
  the batch has succeeded: what is refused for all is not one user's fault, and stops the line.

Users that are suspected travel apart from the others. Attributes to be removed go out in a call of their own,
after those to be set; a user who has both is delivered after the second. Everything between claim and settle may fail or die
at any point: the lease then runs out and the users are reclaimed. A user is sent again rather than lost; a
set is idempotent, and what is sent is the newest.

Weakness: a worker frozen between the last look at its lease and the socket, for longer than the lease
lasts, can still land an old value late. The window is microseconds wide; reading the attributes back
(`im_get_attr`) after such a pause would close it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, assert_never

import structlog

from worker.clock import Clock
from worker.delivery.api import ChatApi, NoReply, Reply
from worker.delivery.policy import (
    Action,
    Again,
    Deliver,
    Pause,
    Policy,
    Retry,
    SignAgain,
    Split,
    Stop,
    dead_letter,
    decide,
    rule_for,
)
from worker.models import (
    Acked,
    Attributes,
    Batch,
    BatchId,
    ClaimedUser,
    DeadLettered,
    Outcome,
    Retried,
    Snoozed,
    UserId,
)
from worker.ratelimit import DWELL, Permit, RateLimiter
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer
from worker.state.connection import RedisError
from worker.state.line import DEAD_IN_A_ROW, OUTAGE_AFTER, Kind, Line

log = structlog.get_logger()

#: Seconds before the slot at which the batch is claimed and encoded (about 3 ms of work; the rest is for a busy machine).
LEAD = 0.1
#: Slots that may be missed in a row before the users are handed back.
MAX_MISSED = 20
#: Seconds between two tries to get a slot for the rest of a batch.
TRY_AGAIN = 0.1
#: Seconds for which suspects wait when there is no slot to isolate them.
SUSPECTS_WAIT = 3.0

Answer = Reply | NoReply

_ACKED = Acked()


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


class HandBack(Exception):
    """Raised when what is left of the batch must go back now, at no cost, for `delay` seconds."""

    def __init__(self, outcome: str, delay: float = 0.0) -> None:
        super().__init__(outcome)
        self.outcome, self.delay = outcome, delay


class _Part(NamedTuple):
    """What goes into one call: the values of some users, or the names of what is to be removed."""

    users: Sequence[ClaimedUser]
    removing: bool = False

    def entries(self) -> Iterator[tuple[UserId, Attributes | Sequence[str]]]:
        wanted = _to_remove if self.removing else _to_set
        return ((user.user, wanted(user)) for user in self.users)

    def finishes(self, user: ClaimedUser) -> bool:
        """Whether nothing of the user is left after this call."""
        return self.removing or not _to_remove(user)


@dataclass(slots=True)
class _Work:
    """A claimed batch on its way."""

    batch: Batch
    summary: Summary
    #: On this machine's monotonic clock.
    lease_ends: float
    #: The permit of the next call, then of the last one.
    permit: Permit
    #: Parts still to be sent, the last one first.
    parts: list[_Part]
    #: Whether the permit's slot is still to come.
    permit_fresh: bool = True
    #: Whether the parts are pieces of a request that was refused.
    isolating: bool = False
    #: Whether a call of this batch has succeeded.
    works: bool = False
    #: Users that are done with, where some have a second call to come.
    settled: set[UserId] = field(default_factory=set)
    #: Users refused alone while no call had succeeded.
    accused: dict[UserId, DeadLettered] = field(default_factory=dict)
    names_checked: bool = False


class Delivery:
    """Delivers batches: `deliver` is the body of one Celery task. Thread-safe."""

    def __init__(
        self,
        buffer: Buffer,
        limiter: RateLimiter,
        line: Line,
        names: AttributeNames,
        client: ChatApi,
        policy: Policy,
        clock: Clock,
        *,
        batch_size: int,
        lease: float,
        quota: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`lease` in seconds, as the buffer has it; `quota` in calls a second, as the limiter has it.

        `stopping` turns true when this worker shuts down.
        """
        self._buffer, self._limiter, self._line, self._names = buffer, limiter, line, names
        self._client, self._policy, self._clock = client, policy, clock
        self._batch_size, self._lease, self._quota, self._stopping = batch_size, lease, quota, stopping

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
        batch = self._buffer.claim(ticket, self._batch_size, epoch=permit.epoch)
        if batch is None or not batch.users:
            summary.outcome = "spent" if batch is None else "empty"
            return summary

        summary.users = len(batch.users)
        summary.attempt = 1 + max(user.attempts for user in batch.users)
        summary.waited = round((batch.claimed_ms - min(user.since_ms for user in batch.users)) / 1000, 3)
        work = _Work(batch, summary, claimed_at + self._lease, permit, self._parts(batch))
        with self._handing_back(work):
            self._send_parts(work)
            summary.outcome = summary.outcome or _outcome_of(summary)
        summary.took = round(self._clock.monotonic() - claimed_at, 3)
        # The canonical line: one a batch, with everything one asks about it.
        log.info("batch_settled", **{name: getattr(summary, name) for name in Summary.__slots__})
        return summary

    def _parts(self, batch: Batch) -> list[_Part]:
        """Who goes into one call, the last one first. Suspects are kept apart, except in a probe."""
        suspects = [] if batch.probe else [user for user in batch.users if self._policy.suspects(user)]
        others = [user for user in batch.users if user not in suspects] if suspects else batch.users
        return [*_calls(suspects), *_calls(others)]

    @contextlib.contextmanager
    def _handing_back(self, work: _Work) -> Iterator[None]:
        """Whatever stops the work early, the users left go back; if even that fails, the lease ends."""
        try:
            yield
        except Fenced:
            work.summary.outcome = "fenced"
            log.warning("batch_fenced", batch=work.batch.id)
        except HandBack as reason:
            work.summary.outcome = reason.outcome
            rest = Snoozed(reason.delay, suspect=work.isolating)
            work.summary.snoozed += self._buffer.settle(work.batch.id, {}, rest=rest) or 0
        except RedisError:
            raise
        except Exception:
            # A defect of ours. It may have struck after a send, so the users are held.
            held = self._policy.hold
            users = {
                user.user: Retried(held + self._policy.backoff(user.attempts)) for user in work.batch.users
            }
            with contextlib.suppress(RedisError):
                self._buffer.settle(work.batch.id, users)
            raise

    # Sending: a permit, a look at the lease, the call.

    def _send_parts(self, work: _Work) -> None:
        # Somebody may have found the key changed, or be about to: a probe is signed anew.
        if work.batch.probe:
            self._client.sign_again()
        self._client.adopt_signature(work.batch.signed_at)
        while work.parts:
            part = work.parts.pop()
            if work.settled or work.accused:
                done = work.settled | work.accused.keys()
                part = part._replace(users=[user for user in part.users if user.user not in done])
            if not part.users:
                continue
            answer = self._send(work, part)
            self._act(work, part, decide(answer), answer)
            if work.parts and self._stopping():
                raise HandBack("handed_back")
        self._condemn(work, work.accused)

    def _send(self, work: _Work, part: _Part) -> Answer:
        """Send one part in a slot of its own."""
        if not work.permit_fresh and (work.isolating or self._policy.suspects(part.users[0])):
            self._renew_permit(work, isolating=True)
        call = self._client.remove if part.removing else self._client.send
        body = self._client.encode(part.entries())
        return call(body, self._gate(work))

    def _renew_permit(self, work: _Work, *, isolating: bool = False) -> None:
        """Reserve another slot, and look shortly before it whether the batch may still be sent."""
        permit = self._limiter.reserve_isolating() if isolating else self._reserve_more(work)
        if permit is None:
            raise HandBack("handed_back", SUSPECTS_WAIT if isolating else 0.0)
        self._clock.sleep(permit.due - LEAD - self._clock.monotonic())
        self._extend(work, permit)
        work.permit, work.permit_fresh = permit, True

    def _reserve_more(self, work: _Work) -> Permit | None:
        """Another slot, however long the line for it is: handed back, the users would begin with the first call again.

        None when the lease does not allow to wait, or this worker shuts down.
        """
        while not (permit := self._limiter.reserve()):
            if self._stopping() or not self._covered(work):
                return None
            self._clock.sleep(TRY_AGAIN)
        return permit

    @contextlib.contextmanager
    def _gate(self, work: _Work) -> Iterator[None]:
        self._pass_gate(work)
        try:
            yield
        finally:
            self._limiter.sent(work.permit)

    def _pass_gate(self, work: _Work) -> None:
        """Wait for the slot, or for another one when it is missed. Returning means: send, now."""
        for _ in range(MAX_MISSED):
            if not work.permit_fresh:
                self._renew_permit(work)
            work.permit_fresh = False
            if self._limiter.redeem(work.permit) and self._covered(work):
                work.summary.calls += 1
                return
        raise HandBack("handed_back")

    def _covered(self, work: _Work) -> bool:
        """Whether a call that starts now ends before the lease."""
        return self._clock.monotonic() + self._client.longest_call < work.lease_ends

    def _extend(self, work: _Work, permit: Permit | None = None) -> None:
        """Renew the lease; raises when the batch is lost, or may not be sent in the permit's slot.

        Without a permit nothing is to be sent yet, and a line that others stopped is no matter.
        """
        renewed_at = self._clock.monotonic()
        match self._buffer.extend(work.batch.id, epoch=permit.epoch if permit else None):
            case "lost":
                raise Fenced
            case "must wait" if permit:
                raise HandBack("handed_back")
            case _:
                work.lease_ends = renewed_at + self._lease

    # Acting on the answer.

    def _act(self, work: _Work, part: _Part, action: Action, answer: Answer) -> None:
        """Carry out the action for one part, and settle or split it."""
        summary = work.summary
        if isinstance(answer, NoReply):
            summary.failure = answer.failure.value
            letter = DeadLettered(0, f"{answer.failure.value} {answer.http_status or ''}".strip())
        else:
            letter = dead_letter(answer.code, answer.info)
            # Of several calls, the code of the first that failed.
            summary.code = summary.code or answer.code
        # A code about the rate or about users shows that the API has let us in.
        if work.batch.probe in ("error", "outage") and isinstance(action, Deliver | Pause | Split):
            self._reopen(work, answer)
        match action:
            case Deliver():
                self._deliver_part(work, part, answer)
            case Again():
                self._again(work, part, action, letter)
            case Retry(most):
                self._retry(work, part, most, letter)
            case Pause(seconds):
                self._pause(work, seconds, letter.code)
            case SignAgain():
                self._sign_again(work, answer, letter.code)
            case Stop(seconds):
                self._stop(work, "error", letter.code, first_wait=seconds)
            case Split():
                self._split(work, part, action, letter)
            case _:
                assert_never(action)

    def _reopen(self, work: _Work, answer: Answer) -> None:
        signed_at = answer.signed_at if isinstance(answer, Reply) else 0
        if self._line.reopen(work.batch.id, quota=self._quota, dwell=DWELL, signed_at=signed_at):
            log.info("line_reopened", batch=work.batch.id)

    def _deliver_part(self, work: _Work, part: _Part, answer: Answer) -> None:
        errors = answer.errors if isinstance(answer, Reply) else {}
        refused: dict[UserId, Outcome] = {
            user.user: self._policy.decide_user(errors[user.user].code, errors[user.user].info, user.attempts)
            for user in part.users
            if user.user in errors
        }
        if strangers := errors.keys() - {user.user for user in part.users}:
            log.warning("error_list_names_strangers", batch=work.batch.id, users=len(strangers))
        condemned = {user: end for user, end in refused.items() if isinstance(end, DeadLettered)}
        if len(refused) < len(part.users):
            work.works = True
            if work.batch.probe == "data" and not condemned:
                self._reopen(work, answer)
        spared = {user: end for user, end in refused.items() if user not in condemned}
        acked: dict[UserId, Outcome] = {
            user.user: _ACKED for user in part.users if user.user not in refused and part.finishes(user)
        }
        self._settle(work, acked | spared)
        self._accuse(work, condemned)

    def _again(self, work: _Work, part: _Part, action: Again, letter: DeadLettered) -> None:
        """The service failed, or somebody in the part makes it fail."""
        # Pieces of one batch fail for one reason: only its first call tells something about the service.
        in_a_row = self._line.record_failure() if work.summary.calls <= 1 else self._line.failures()
        if work.batch.probe or in_a_row >= OUTAGE_AFTER:
            self._stop(work, "outage", letter.code, letter.message, hold=action.hold)
        users = part.users
        spent = all(self._policy.spent(user.attempts) for user in users)
        if not self._policy.suspects(users[0]) or in_a_row > 1 or (action.hold and not spent):
            self._settle(work, {user.user: self._policy.again(action, user.attempts) for user in users})
            return
        if action.hold:
            # Neither these values again nor newer ones may go out while the old call can still land.
            self._extend(work)
            self._clock.sleep(self._policy.hold)
        if len(users) > 1:
            self._halve(work, part)
        elif spent:
            self._accuse(work, {users[0].user: letter})
        else:
            self._settle(work, {users[0].user: self._policy.again(action, users[0].attempts)})

    def _retry(self, work: _Work, part: _Part, most: int, letter: DeadLettered) -> None:
        """Retry those with attempts left; isolate the others, and give up on one that is alone."""
        if work.batch.probe:
            self._stop(work, work.batch.probe, letter.code)
        spent = [user for user in part.users if self._policy.exhausted(user.attempts, most)]
        retried = {user.user: self._policy.retry(user.attempts) for user in part.users if user not in spent}
        if retried:
            self._settle(work, retried)
            if spent:
                work.parts.append(part._replace(users=spent))
                work.isolating = True
        elif len(part.users) > 1:
            self._halve(work, part)
        else:
            self._accuse(work, {part.users[0].user: letter})

    def _pause(self, work: _Work, seconds: float, code: int) -> NoReturn:
        meaning = rule_for(code).meaning
        if self._limiter.pause(seconds, meaning, code, refused=work.permit):
            log.warning("rate_refused", code=code, reason=meaning, limit=work.permit.limit)
        raise HandBack("rate_limited", seconds)

    def _sign_again(self, work: _Work, answer: Answer, code: int) -> None:
        refused_at = answer.signed_at if isinstance(answer, Reply) else 0
        if not work.batch.probe and (issued := self._line.renew_signature(refused_at)) is not None:
            self._client.adopt_signature(issued)
            log.warning("signed_again", code=code, reason=rule_for(code).meaning)
            raise HandBack("signed_again")
        self._stop(work, "error", code)

    def _stop(
        self,
        work: _Work,
        kind: Kind,
        code: int,
        reason: str | None = None,
        *,
        first_wait: float = 0.0,
        hold: bool = False,
    ) -> None:
        """Stop the line and hand the users back; returns only when a person has let the reason pass.

        The reason is the code's meaning unless given; an empty one leaves that of the stop before.
        """
        reason = rule_for(code).meaning if reason is None else reason
        wait = self._line.stop(work.batch.id, kind, code, reason, first_wait=first_wait)
        if wait is None:
            return
        if wait:
            log.error("line_stopped", kind=kind, code=code or None, reason=reason, next_probe_s=wait)
        # After an outage's probe others shall try: it may be these users who make the service fail.
        delay = wait + 1.0 if work.batch.probe == "outage" else 0.0
        raise HandBack("stopped", max(delay, self._policy.hold if hold else 0.0))

    # Finding the culprit.

    def _split(self, work: _Work, part: _Part, action: Split, letter: DeadLettered) -> None:
        if action.names and not work.names_checked:
            work.names_checked = True
            if unset := self._unset_names(work, part):
                self._name_unset(work, part, unset, letter.code)
                return
        if work.batch.probe == "data":
            self._stop(work, "data", letter.code, "")
        if len(part.users) > 1:
            self._halve(work, part)
        else:
            self._accuse(work, {part.users[0].user: letter})

    def _halve(self, work: _Work, part: _Part) -> None:
        middle = len(part.users) // 2
        first, second = part.users[:middle], part.users[middle:]
        work.parts += [part._replace(users=second), part._replace(users=first)]
        work.isolating = True

    def _unset_names(self, work: _Work, part: _Part) -> set[str]:
        """The attribute names in the part that the app does not have, as the API itself says."""
        known = None if work.batch.probe else self._names.known_lately()
        if known is None:
            reply = self._client.attribute_names(self._gate(work))
            if not isinstance(reply, Reply) or reply.code:
                return set()
            known = reply.names
            self._names.set(known)
        return {name for user in part.users for name in user.attrs} - known

    def _name_unset(self, work: _Work, part: _Part, unset: set[str], code: int) -> None:
        """Stop the line, since nobody with these attributes can be delivered; or condemn those who have them."""
        words = ", ".join(repr(name) for name in sorted(unset))
        reason = f"the app has no attribute {words}: see imattr names set, or the console"
        self._stop(work, "data", code, reason)
        having = {user.user: DeadLettered(code, reason) for user in part.users if unset & user.attrs.keys()}
        self._condemn(work, having)
        if others := [user for user in part.users if user.user not in having]:
            work.parts.append(part._replace(users=others))

    def _accuse(self, work: _Work, users: Mapping[UserId, DeadLettered]) -> None:
        """Condemn users refused for good, unless everybody is: then it is not their fault."""
        work.accused |= users
        if work.works:
            self._condemn(work, work.accused)
        elif len(work.accused) >= DEAD_IN_A_ROW:
            code = next(iter(work.accused.values())).code
            self._stop(work, "data", code, f"every user is refused: {rule_for(code).meaning}")
            self._condemn(work, work.accused)

    def _condemn(self, work: _Work, users: Mapping[UserId, DeadLettered]) -> None:
        """Make dead letters, unless that would be one of many with the same code."""
        letters, work.accused = dict(users), {}
        if not letters:
            return
        code = next(iter(letters.values())).code
        if work.batch.probe == "data":
            self._stop(work, "data", code, "")
        self._settle(work, letters)
        if self._line.record_dead_letters(code, len(letters)):
            masses = f"dead letters in masses, a bad deployment? {rule_for(code).meaning}"
            self._stop(work, "data", code, masses)

    def _settle(self, work: _Work, outcomes: Mapping[UserId, Outcome]) -> None:
        """Settle the users named, each exactly once."""
        if not outcomes:
            return
        # The usual end, all delivered, needs no list of names.
        all_acked = len(outcomes) == len(work.batch.users) and set(outcomes.values()) == {_ACKED}
        named, rest = ({}, _ACKED) if all_acked else (outcomes, None)
        claimed_ms = work.batch.claimed_ms
        if self._buffer.settle(work.batch.id, named, rest=rest, claimed_ms=claimed_ms) is None:
            raise Fenced
        if work.parts:
            work.settled.update(outcomes)
        summary, ends = work.summary, outcomes.values()
        summary.acked += sum(isinstance(end, Acked) for end in ends)
        summary.retried += sum(isinstance(end, Retried) for end in ends)
        summary.snoozed += sum(isinstance(end, Snoozed) for end in ends)
        summary.dead_lettered += sum(isinstance(end, DeadLettered) for end in ends)


def _outcome_of(summary: Summary) -> str:
    """One word for a batch that nothing interrupted."""
    if summary.acked:
        return "delivered" if summary.acked == summary.users else "partly_delivered"
    return "retried" if summary.retried else "dead_lettered" if summary.dead_lettered else "snoozed"


def _to_set(user: ClaimedUser) -> Attributes:
    return user.attrs if not _to_remove(user) else {n: v for n, v in user.attrs.items() if v is not None}


def _to_remove(user: ClaimedUser) -> Sequence[str]:
    return [name for name, value in user.attrs.items() if value is None]


def _calls(users: Sequence[ClaimedUser]) -> list[_Part]:
    """The calls that deliver the users, the last one first: what is to be removed goes after what is to be set."""
    removing = [user for user in users if _to_remove(user)]
    setting = [user for user in users if len(_to_remove(user)) < len(user.attrs)] if removing else users
    return [part for part in (_Part(removing, True), _Part(setting)) if part.users]
