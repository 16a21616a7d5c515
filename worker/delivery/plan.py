"""What becomes of a batch, as a pure function from a plan and an answer to the next plan. Read this before `loop.py`.

    plan = begin(batch, policy, seed)
    while plan.todo:
        answer = (send plan.todo[0])
        step = advance(plan, answer, failures)
        (settle step.outcomes; stop if step.end says so)
        plan = step.plan

Everything here is a frozen value: no Redis, no HTTP, no clock, no randomness. `loop.py` carries out what a step says.

Who is to blame for a failure is decided by the answer, and by whether other calls fail at the same time:

* *the settings or the account*: the line stops, and no user pays for it;
* *the service*, as long as call after call fails: the line stops, too, but opens by itself;
* *the rate*: the whole fleet pauses, and then sends more slowly;
* *a user*: the request is bisected until the poison user is alone. Nobody becomes a dead letter before some call of the
  batch has succeeded: an error that hits everyone is no single user's fault, and stops the line.

Suspects are sent apart from the others. Attributes to be removed go out in a call of their own, after those to be set; a
user who has both is delivered after the second call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never
from zlib import crc32

from worker.delivery.answers import Answer, NoReply, Reply
from worker.delivery.policy import (
    Bisect,
    Deliver,
    Pause,
    Policy,
    RenewSignature,
    RetryCounted,
    RetryUncounted,
    Stop,
    dead_letter,
    decide,
    rule_for,
)
from worker.models import Acked, Attributes, Batch, ClaimedUser, DeadLettered, Outcome, UserId
from worker.state.line import DEAD_IN_A_ROW, OUTAGE_AFTER, Kind

ACKED = Acked()


@dataclass(frozen=True, slots=True)
class Part:
    """The content of one call: the values of some users, or the names of attributes to remove."""

    users: tuple[ClaimedUser, ...]
    removing: bool = False

    def entries(self) -> Iterator[tuple[UserId, Any]]:
        """What the call says about each user: values by name, or a list of names."""
        wanted: Any = _to_remove if self.removing else _to_set
        return ((user.user, wanted(user)) for user in self.users)

    def finishes(self, user: ClaimedUser) -> bool:
        """Whether nothing is left to send for the user after this call."""
        return self.removing or not _to_remove(user)


@dataclass(frozen=True, slots=True)
class AskNames:
    """Ask for the app's attribute names: they may be why `part` was refused, with `letter`."""

    part: Part
    letter: DeadLettered


@dataclass(frozen=True, slots=True)
class AskValues:
    """Ask what these users have: a call whose outcome is unknown may have been applied."""

    users: tuple[ClaimedUser, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do with a batch, and what is known about it."""

    batch: Batch
    policy: Policy
    #: Any number; it makes the back-offs of two batches differ.
    seed: int
    #: The calls to be made, the next one first. None of their users is settled or refused.
    todo: tuple[Part | AskNames | AskValues, ...]
    #: How many answers there have been.
    answers: int = 0
    #: Whether these calls are pieces of a request that was refused.
    bisecting: bool = False
    #: Whether a call of this batch has succeeded.
    works: bool = False
    asked_names: bool = False
    #: Users refused for good before any call had succeeded.
    refused: Mapping[UserId, DeadLettered] = field(default_factory=dict)

    def without(self, users: Mapping[UserId, object]) -> Plan:
        """The plan without these users, who are done."""
        if not self.todo or not users:
            return self
        left = (_without(call, users) for call in self.todo)
        return replace(self, todo=tuple(call for call in left if call is not None))

    def next(self, *parts: Part) -> Plan:
        """The plan with these parts to be sent next."""
        return replace(self, todo=(*parts, *self.todo))

    def jitter(self, user: ClaimedUser) -> float:
        """A number from 0 to 1 that is the user's own in this batch."""
        return crc32(user.user.encode(), self.seed) / 0xFFFFFFFF


# How a batch can end before everyone is settled: the rest go back.


@dataclass(frozen=True, slots=True)
class HandBack:
    """Hand back the remaining users, to be sent again after `delay` seconds, at no cost."""

    outcome: str
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class StopLine:
    """Stop the line. Has no effect if a person has allowed this reason (only with kind `data`).

    An empty `reason` keeps that of the stop before. `first_wait` and `hold` in seconds: until the first probe at the
    earliest, and until the users may be sent again.
    """

    kind: Kind
    code: int
    reason: str
    first_wait: float = 0.0
    hold: float = 0.0


@dataclass(frozen=True, slots=True)
class PauseRate:
    """Pause the fleet: the API refused this call for its frequency."""

    seconds: float
    code: int


@dataclass(frozen=True, slots=True)
class RenewForFleet:
    """Have the fleet renew its signature; has no effect if that was tried already."""

    refused_at: int
    code: int


End = HandBack | StopLine | PauseRate | RenewForFleet


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from an answer, in the order in which it is carried out."""

    plan: Plan
    #: Open the line, because its probe has passed: when the probe was signed, in seconds since 1970.
    reopen: int | None = None
    #: Keep the batch for this many seconds first, in which the call may still be applied.
    hold: float = 0.0
    #: How users are settled, each exactly once in the life of the plan.
    outcomes: Mapping[UserId, Outcome] = field(default_factory=dict)
    #: Whether users are settled because of a read, which says nothing about writing.
    by_reading: bool = False
    #: Stop the line, if the outcomes make too many dead letters in the fleet.
    if_too_many: StopLine | None = None
    #: End the batch here,
    end: End | None = None
    #: or do this instead, if the end has no effect.
    otherwise: Step | None = None


def begin(batch: Batch, policy: Policy, seed: int, *, reads_apart: bool = False) -> Plan:
    """Return the plan of a batch that was just claimed. Suspects are kept apart, except in a probe.

    Users whose last call may have been applied are read first, where that costs less than sending them again. `reads_apart`:
    reads have a quota of their own.
    """
    suspects = () if batch.probe else tuple(user for user in batch.users if policy.suspects(user))
    others = tuple(user for user in batch.users if user not in suspects) if suspects else batch.users
    parts = (*_parts(others), *_parts(suspects))
    # Held-back users are claimed once their old call can no longer land, so what is read stays as it is.
    unknown = tuple(user for user in batch.users if user.unknown)
    if not unknown or batch.probe:
        return Plan(batch, policy, seed, parts)
    # Reading takes one call; sending takes one for each part, and more for suspects that must be isolated.
    spared = {user.user for user in unknown}
    calls = sum(spared.issuperset(user.user for user in part.users) for part in parts)
    pays = (
        reads_apart
        or calls > 1
        or (calls > 0 and spared.issuperset(user.user for user in suspects) and suspects)
    )
    return Plan(batch, policy, seed, (AskValues(unknown), *parts) if pays else parts)


def blames_service(answer: Answer) -> bool:
    """Whether an answer says that the service failed, as far as a single answer can say so."""
    return isinstance(decide(answer), RetryUncounted)


def advance(plan: Plan, answer: Answer, failures: int = 0) -> Step:
    """Decide what follows from the answer to the next call of the plan.

    `failures` is how many calls of the fleet have failed in a row through the service's fault, this one included.
    """
    call = plan.todo[0]
    plan = replace(plan, todo=plan.todo[1:], answers=plan.answers + 1)
    if isinstance(call, AskNames):
        step = _names_known(plan, call, answer)
    elif isinstance(call, AskValues):
        step = _values_known(plan, call, answer)
    else:
        step = _answered(plan, call, answer, failures)
    return _finished(step)


def _answered(plan: Plan, part: Part, answer: Answer, failures: int) -> Step:
    action, letter = decide(answer), letter_of(answer)
    signed_at = answer.signed_at if isinstance(answer, Reply) else 0
    match action:
        case Deliver():
            step = _delivered(plan, part, answer, signed_at)
        case RetryUncounted():
            return _service_failed(plan, part, action, letter, failures)
        case RetryCounted(most):
            return _retried(plan, part, most, letter)
        case Pause(seconds):
            step = Step(plan, end=PauseRate(seconds, letter.code))
        case RenewSignature():
            return _signature_refused(plan, signed_at, letter.code)
        case Stop(seconds):
            return Step(plan, end=_stop("error", letter.code, first_wait=seconds))
        case Bisect():
            step = _refused(plan, part, action, letter)
        case _:
            assert_never(action)
    # A code about the rate or about users shows that the API accepts our signature.
    return replace(step, reopen=signed_at) if plan.batch.probe in ("error", "outage") else step


def _values_known(plan: Plan, call: AskValues, answer: Answer) -> Step:
    """Settle users that have what was to be sent already. Anything else the answer says, the next calls will find out."""
    if not isinstance(answer, Reply) or answer.code:
        return Step(plan)
    outcomes = {user.user: ACKED for user in call.users if _has_all(answer.values.get(user.user), user)}
    return Step(plan.without(outcomes), outcomes=outcomes, by_reading=True)


def _has_all(values: Mapping[str, str] | None, user: ClaimedUser) -> bool:
    return values is not None and all(values.get(name) == value for name, value in user.attrs.items())


def letter_of(answer: Answer) -> DeadLettered:
    """The dead letter of a user that is given up because of this answer."""
    if isinstance(answer, NoReply):
        return DeadLettered(0, f"{answer.failure.value} {answer.http_status or ''}".strip())
    return dead_letter(answer.code, answer.info)


def _delivered(plan: Plan, part: Part, answer: Answer, signed_at: int) -> Step:
    errors = answer.errors if isinstance(answer, Reply) else {}
    outcomes: dict[UserId, Outcome] = {}
    letters: dict[UserId, DeadLettered] = {}
    for user in part.users:
        if (error := errors.get(user.user)) is None:
            if part.finishes(user):
                outcomes[user.user] = ACKED
            continue
        outcome = plan.policy.decide_user(error.code, error.info, user.attempts, plan.jitter(user))
        if isinstance(outcome, DeadLettered):
            letters[user.user] = outcome
        else:
            outcomes[user.user] = outcome
    works = any(user.user not in errors for user in part.users)
    passed = plan.batch.probe == "data" and works and not letters
    plan = replace(plan, works=plan.works or works).without(outcomes)
    return _give_up(Step(plan, reopen=signed_at if passed else None, outcomes=outcomes), letters)


def _service_failed(
    plan: Plan, part: Part, action: RetryUncounted, letter: DeadLettered, failures: int
) -> Step:
    """The service failed, or a user in the part makes it fail."""
    policy, users = plan.policy, part.users
    if plan.batch.probe or failures >= OUTAGE_AFTER:
        hold = policy.hold if action.hold else 0.0
        return Step(plan, end=StopLine("outage", letter.code, letter.message, hold=hold))
    spent = all(policy.spent(user.attempts) for user in users)
    if policy.suspects(users[0]) and failures <= 1 and (spent or not action.hold):
        # Neither these values nor newer ones may be sent while the old call can still land.
        hold = policy.hold if action.hold else 0.0
        if len(users) > 1:
            return Step(_bisected(plan, part), hold=hold)
        if spent:
            return _give_up(Step(plan, hold=hold), {users[0].user: letter})
    outcomes = {user.user: policy.retry_uncounted(action, user.attempts, plan.jitter(user)) for user in users}
    return Step(plan.without(outcomes), outcomes=outcomes)


def _retried(plan: Plan, part: Part, most: int, letter: DeadLettered) -> Step:
    """Retry users with attempts left; isolate the others, and give up a user that is alone."""
    policy = plan.policy
    spent = tuple(user for user in part.users if policy.exhausted(user.attempts, most))
    outcomes = {
        user.user: policy.retry(user.attempts, plan.jitter(user)) for user in part.users if user not in spent
    }
    if outcomes:
        after = plan.without(outcomes)
        if spent:
            after = replace(after.next(replace(part, users=spent)), bisecting=True)
        step = Step(after, outcomes=outcomes)
    else:
        step = _isolate(plan, part, letter)
    if plan.batch.probe:
        return Step(plan, end=_stop(plan.batch.probe, letter.code), otherwise=step)
    return step


def _signature_refused(plan: Plan, signed_at: int, code: int) -> Step:
    stop = Step(plan, end=_stop("error", code))
    if plan.batch.probe:
        # It was made for this very call.
        return stop
    return Step(plan, end=RenewForFleet(signed_at, code), otherwise=stop)


# Finding the poison user.


def _refused(plan: Plan, part: Part, action: Bisect, letter: DeadLettered) -> Step:
    if action.names and not plan.asked_names:
        return Step(replace(plan, asked_names=True, todo=(AskNames(part, letter), *plan.todo)))
    return _poisoned(plan, part, letter)


def _names_known(plan: Plan, call: AskNames, answer: Answer) -> Step:
    """Stop the line if the app lacks some of the names; if a person has allowed that, give up the users with those."""
    part = call.part
    if not isinstance(answer, Reply) or answer.code:
        return _poisoned(plan, part, call.letter)
    unset = {name for user in part.users for name in user.attrs} - answer.names
    if not unset:
        return _poisoned(plan, part, call.letter)
    words = ", ".join(repr(name) for name in sorted(unset))
    plural = "s" if len(unset) > 1 else ""
    reason = f"the app has no attribute{plural} {words}: add with imattr names set, or in the console"
    letters = {
        user.user: DeadLettered(call.letter.code, reason) for user in part.users if unset & user.attrs.keys()
    }
    others = tuple(user for user in part.users if user.user not in letters)
    after = plan.without(letters)
    if others:
        after = after.next(replace(part, users=others))
    return Step(
        plan, end=StopLine("data", call.letter.code, reason), otherwise=_dead_lettered(Step(after), letters)
    )


def _poisoned(plan: Plan, part: Part, letter: DeadLettered) -> Step:
    step = _isolate(plan, part, letter)
    if plan.batch.probe == "data":
        return Step(plan, end=StopLine("data", letter.code, ""), otherwise=step)
    return step


def _isolate(plan: Plan, part: Part, letter: DeadLettered) -> Step:
    if len(part.users) > 1:
        return Step(_bisected(plan, part))
    return _give_up(Step(plan), {part.users[0].user: letter})


def _bisected(plan: Plan, part: Part) -> Plan:
    middle = len(part.users) // 2
    halves = (replace(part, users=part.users[:middle]), replace(part, users=part.users[middle:]))
    return replace(plan.next(*halves), bisecting=True)


def _give_up(step: Step, letters: Mapping[UserId, DeadLettered]) -> Step:
    """Dead-letter users that are refused for good, unless everyone is: then they are not to blame."""
    refused = {**step.plan.refused, **letters}
    if not refused:
        return step
    step = replace(step, plan=replace(step.plan.without(letters), refused=refused))
    if step.plan.works:
        return _dead_lettered(step, refused)
    if len(refused) >= DEAD_IN_A_ROW:
        code = next(iter(refused.values())).code
        stop = StopLine("data", code, f"every user is refused: {rule_for(code).meaning}")
        return replace(step, end=stop, otherwise=_dead_lettered(Step(step.plan), refused))
    return step


def _dead_lettered(step: Step, letters: Mapping[UserId, DeadLettered]) -> Step:
    """Make dead letters, unless they are of the kind that the line was stopped for."""
    code = next(iter(letters.values())).code
    reason = f"too many dead letters, maybe a bad deployment: {rule_for(code).meaning}"
    too_many = StopLine("data", code, reason)
    refused = {user: letter for user, letter in step.plan.refused.items() if user not in letters}
    plan = replace(step.plan.without(letters), refused=refused)
    if step.plan.batch.probe == "data":
        instead = Step(plan, outcomes=letters, if_too_many=too_many)
        return replace(step, end=StopLine("data", code, ""), otherwise=instead)
    return replace(step, plan=plan, outcomes={**step.outcomes, **letters}, if_too_many=too_many)


def _finished(step: Step) -> Step:
    """Give up the refused users if nothing is left to send."""
    if step.otherwise:
        return replace(step, otherwise=_finished(step.otherwise))
    if step.end is None and not step.plan.todo and step.plan.refused:
        return _dead_lettered(step, step.plan.refused)
    return step


def _stop(kind: Kind, code: int, *, first_wait: float = 0.0) -> StopLine:
    return StopLine(kind, code, rule_for(code).meaning, first_wait)


def _parts(users: Sequence[ClaimedUser]) -> Iterator[Part]:
    """The calls that deliver the users: removals go after values to set."""
    removing = tuple(user for user in users if _to_remove(user))
    setting = tuple(u for u in users if len(_to_remove(u)) < len(u.attrs)) if removing else tuple(users)
    return (part for part in (Part(setting), Part(removing, removing=True)) if part.users)


def _without(
    call: Part | AskNames | AskValues, users: Mapping[UserId, object]
) -> Part | AskNames | AskValues | None:
    if not isinstance(call, Part):
        return call
    left = tuple(user for user in call.users if user.user not in users)
    return replace(call, users=left) if left else None


def _to_set(user: ClaimedUser) -> Attributes:
    return user.attrs if not _to_remove(user) else {n: v for n, v in user.attrs.items() if v is not None}


def _to_remove(user: ClaimedUser) -> list[str]:
    return [name for name, value in user.attrs.items() if value is None]
