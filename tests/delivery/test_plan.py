"""The plan of a batch: a row for every branch, and one property for all. No Redis, no HTTP, no clock."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import drawn
from worker.delivery.answers import Answer, Failure, NoReply, Reply, UserError
from worker.delivery.plan import (
    ACKED,
    AskNames,
    End,
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
from worker.delivery.policy import TABLE, Policy, dead_letter, rule_for
from worker.models import Batch, BatchId, ClaimedUser, DeadLettered, Outcome, Retried, Snoozed
from worker.state.line import DEAD_IN_A_ROW, OUTAGE_AFTER

Probe = Literal["", "error", "outage", "data"]

#: Outcomes that are not certain to the last digit: when a user is sent again.
AGAIN, LATER, NEVER = "retried, uncounted", "retried", "dead letter"

HOLD = 5.0
POLICY = Policy(max_attempts=4, backoff_base=1.0, backoff_max=300.0, hold=HOLD)
OK = Reply(0)
TIMEOUT = NoReply(Failure.TIMEOUT)
BAD_NAME, NO_ACCOUNT, INTERNAL, NOT_ADMIN, TOO_OFTEN, EXPIRED, UNLISTED = (
    *(90033, 70107, 91000, 90009, 60007, 70001),
    12345,
)


def user(name: str, *, attempts: int = 0, suspect: bool = False, **attrs: str | None) -> ClaimedUser:
    return ClaimedUser(name, attrs or {"city": "Paris"}, attempts, 0, suspect)


def plan_of(*users: ClaimedUser, probe: Probe = "", **changes: Any) -> Plan:
    """The plan of a batch, with what has happened to it already."""
    return replace(begin(Batch(BatchId("b"), users, 0, probe), POLICY, seed=7), **changes)


def many(count: int) -> tuple[ClaimedUser, ...]:
    return tuple(user(f"u{number:03}") for number in range(count))


def told(outcomes: Mapping[str, Outcome]) -> dict[str, object]:
    """Outcomes without the digits of their delays."""

    def words(outcome: Outcome) -> object:
        match outcome:
            case Retried():
                return LATER if outcome.proven else AGAIN
            case DeadLettered():
                return NEVER
        return outcome

    return {name: words(outcome) for name, outcome in outcomes.items()}


def calls(plan: Plan) -> list[list[str]]:
    """The users of each call still to be made; of a question about names, none."""
    return [[] if isinstance(call, AskNames) else [u.user for u in call.users] for call in plan.todo]


@dataclass(frozen=True)
class Row:
    """A plan, an answer, and all that must follow from it."""

    story: str
    plan: Plan
    answer: Answer
    outcomes: Mapping[str, object]
    todo: Sequence[Sequence[str]] = ()
    failures: int = 1
    end: End | None = None
    reopen: int | None = None
    hold: float = 0.0
    works: bool = False
    bisecting: bool = False
    refused: Sequence[str] = ()
    #: What follows when the end does not take: outcomes, calls, and its own end.
    otherwise: tuple[Mapping[str, object], Sequence[Sequence[str]], End | None] | None = None
    if_too_many: bool = False


def errors(*codes: tuple[str, int]) -> Reply:
    return Reply(0, errors={name: UserError(code, "") for name, code in codes}, signed_at=77)


def stop(kind: Any, code: int, reason: str | None = None, **options: float) -> StopLine:
    return StopLine(kind, code, rule_for(code).meaning if reason is None else reason, **options)


ANN, BOB = user("ann"), user("bob")
REMOVING = user("eve", city=None)
BOTH = user("cid", city="Paris", level=None)
TIRED = user("tom", attempts=3)
SPENT = user("sam", attempts=4)
UNSET = "the app has no attribute 'level': add with imattr names set, or in the console"
EVERYBODY = f"every user is refused: {rule_for(NO_ACCOUNT).meaning}"
ASKED = plan_of(ANN, user("bob", level="Gold"))
ASKED = replace(
    ASKED,
    asked_names=True,
    todo=(AskNames(ASKED.todo[0], dead_letter(BAD_NAME, "")),),  # type: ignore[arg-type]
)
ALMOST = {f"r{number}": dead_letter(NO_ACCOUNT, "") for number in range(DEAD_IN_A_ROW - 1)}

ROWS = [
    # Success.
    Row("all delivered", plan_of(ANN, BOB), OK, {"ann": ACKED, "bob": ACKED}, works=True),
    Row("a user with a second call is not delivered yet", plan_of(BOTH), OK, {}, [["cid"]], works=True),
    Row("after the second call it is", advance(plan_of(BOTH), OK).plan, OK, {"cid": ACKED}, works=True),
    Row("a removal alone is one call", plan_of(REMOVING), OK, {"eve": ACKED}, works=True),
    Row(
        "named in ErrorList for good",
        plan_of(ANN, BOB),
        errors(("bob", NO_ACCOUNT)),
        {"ann": ACKED, "bob": NEVER},
        works=True,
        if_too_many=True,
    ),
    Row(
        "named in ErrorList for now",
        plan_of(ANN, BOB),
        errors(("bob", INTERNAL)),
        {"ann": ACKED, "bob": LATER},
        works=True,
    ),
    Row(
        "named in ErrorList for the rate",
        plan_of(ANN, BOB),
        errors(("bob", TOO_OFTEN)),
        {"ann": ACKED, "bob": Snoozed(1.0)},
        works=True,
    ),
    Row(
        "named in the first of two calls, it is not in the second",
        plan_of(ANN, BOTH),
        errors(("cid", INTERNAL)),
        {"ann": ACKED, "cid": LATER},
        works=True,
    ),
    Row(
        "a name that is not in the call changes nothing",
        plan_of(ANN),
        errors(("x", NO_ACCOUNT)),
        {"ann": ACKED},
        works=True,
    ),
    Row(
        "everyone named: nobody is given up before a call has succeeded",
        plan_of(ANN, BOB, REMOVING),
        errors(("ann", NO_ACCOUNT), ("bob", NO_ACCOUNT)),
        {},
        [["eve"]],
        refused=["ann", "bob"],
    ),
    Row(
        "once one has, they are",
        advance(plan_of(ANN, REMOVING), errors(("ann", NO_ACCOUNT))).plan,
        OK,
        {"eve": ACKED, "ann": NEVER},
        works=True,
        if_too_many=True,
    ),
    Row(
        "with nothing left to be sent, they are, too",
        plan_of(ANN),
        errors(("ann", NO_ACCOUNT)),
        {"ann": NEVER},
        if_too_many=True,
    ),
    Row(
        "twenty users refused and nobody delivered stop the line",
        plan_of(ANN, REMOVING, refused=ALMOST),
        errors(("ann", NO_ACCOUNT)),
        {},
        [["eve"]],
        refused=[*ALMOST, "ann"],
        end=stop("data", NO_ACCOUNT, EVERYBODY),
        otherwise=({**dict.fromkeys(ALMOST, NEVER), "ann": NEVER}, [["eve"]], None),
    ),
    # The service.
    Row("the service failed", plan_of(ANN, BOB), Reply(INTERNAL), {"ann": AGAIN, "bob": AGAIN}),
    Row("no answer", plan_of(ANN), TIMEOUT, {"ann": AGAIN}),
    Row(
        "call after call fails",
        plan_of(ANN),
        Reply(INTERNAL),
        {},
        failures=OUTAGE_AFTER,
        end=stop("outage", INTERNAL),
    ),
    Row(
        "an outage with an unknown outcome",
        plan_of(ANN),
        TIMEOUT,
        {},
        failures=OUTAGE_AFTER,
        end=StopLine("outage", 0, "timeout", hold=HOLD),
    ),
    Row(
        "a probe of any kind", plan_of(ANN, probe="error"), Reply(INTERNAL), {}, end=stop("outage", INTERNAL)
    ),
    Row("suspects while others fail, too", plan_of(TIRED, BOB), Reply(INTERNAL), {"bob": AGAIN}, [["tom"]]),
    Row(
        "suspects are bisected",
        plan_of(TIRED, SPENT),
        Reply(INTERNAL),
        {},
        [["tom"], ["sam"]],
        bisecting=True,
    ),
    Row(
        "but not while other calls fail",
        plan_of(TIRED, SPENT),
        Reply(INTERNAL),
        {"tom": AGAIN, "sam": AGAIN},
        failures=2,
    ),
    Row(
        "nor while the old call may land, with attempts left",
        plan_of(TIRED, SPENT),
        TIMEOUT,
        {"tom": AGAIN, "sam": AGAIN},
    ),
    Row(
        "with no attempts left, they are bisected after a hold",
        plan_of(SPENT, user("tim", attempts=5)),
        TIMEOUT,
        {},
        [["sam"], ["tim"]],
        hold=HOLD,
        bisecting=True,
    ),
    Row("a suspect alone, with attempts left", plan_of(TIRED), Reply(INTERNAL), {"tom": AGAIN}),
    Row("a suspect alone, with none left", plan_of(SPENT), Reply(INTERNAL), {"sam": NEVER}, if_too_many=True),
    Row("the same after a hold", plan_of(SPENT), TIMEOUT, {"sam": NEVER}, hold=HOLD, if_too_many=True),
    # Nobody knows.
    Row("an unlisted code", plan_of(ANN, BOB), Reply(UNLISTED), {"ann": LATER, "bob": LATER}),
    Row(
        "those with no attempts left are isolated",
        plan_of(ANN, user("tom", attempts=2), todo=(Part((ANN, user("tom", attempts=2))),)),
        Reply(UNLISTED),
        {"ann": LATER},
        [["tom"]],
        bisecting=True,
    ),
    Row(
        "all of them: bisected",
        plan_of(TIRED, SPENT),
        Reply(UNLISTED),
        {},
        [["tom"], ["sam"]],
        bisecting=True,
    ),
    Row("one alone", plan_of(TIRED), Reply(UNLISTED), {"tom": NEVER}, if_too_many=True),
    Row(
        "a probe stays one",
        plan_of(ANN, probe="data"),
        Reply(UNLISTED),
        {},
        end=stop("data", UNLISTED),
        otherwise=({"ann": LATER}, [], None),
    ),
    # The rate, the signature, the settings.
    Row("too often", plan_of(ANN), Reply(TOO_OFTEN), {}, end=PauseRate(1.0, TOO_OFTEN)),
    Row(
        "a bad signature",
        plan_of(ANN),
        Reply(EXPIRED, signed_at=77),
        {},
        end=RenewForFleet(77, EXPIRED),
        otherwise=({}, [], stop("error", EXPIRED)),
    ),
    Row(
        "a probe's bad signature", plan_of(ANN, probe="error"), Reply(EXPIRED), {}, end=stop("error", EXPIRED)
    ),
    Row("bad settings", plan_of(ANN), Reply(NOT_ADMIN), {}, end=stop("error", NOT_ADMIN)),
    Row(
        "a code that wants to be left alone",
        plan_of(ANN),
        Reply(70050),
        {},
        end=stop("error", 70050, first_wait=60.0),
    ),
    # A poison user.
    Row(
        "refused as a whole",
        plan_of(*many(4)),
        Reply(NO_ACCOUNT),
        {},
        [["u000", "u001"], ["u002", "u003"]],
        bisecting=True,
    ),
    Row(
        "an odd number",
        plan_of(*many(3)),
        Reply(NO_ACCOUNT),
        {},
        [["u000"], ["u001", "u002"]],
        bisecting=True,
    ),
    Row("alone", plan_of(ANN), Reply(NO_ACCOUNT), {"ann": NEVER}, if_too_many=True),
    Row(
        "alone, after a call that succeeded",
        plan_of(ANN, REMOVING, works=True),
        Reply(NO_ACCOUNT),
        {"ann": NEVER},
        [["eve"]],
        works=True,
        if_too_many=True,
    ),
    Row("names may be the reason", plan_of(ANN), Reply(BAD_NAME), {}, [[]]),
    Row("asked before", plan_of(ANN, asked_names=True), Reply(BAD_NAME), {"ann": NEVER}, if_too_many=True),
    Row(
        "the app has all names",
        ASKED,
        Reply(0, names=frozenset({"city", "level"})),
        {},
        [["ann"], ["bob"]],
        bisecting=True,
    ),
    Row("nobody can say which names it has", ASKED, TIMEOUT, {}, [["ann"], ["bob"]], bisecting=True),
    Row("nor does the API", ASKED, Reply(INTERNAL), {}, [["ann"], ["bob"]], bisecting=True),
    Row(
        "the app has not all names",
        ASKED,
        Reply(0, names=frozenset({"city"})),
        {},
        end=StopLine("data", BAD_NAME, UNSET),
        otherwise=({"bob": NEVER}, [["ann"]], None),
    ),
    # Probes that pass.
    Row(
        "an error's probe is delivered",
        plan_of(ANN, probe="error"),
        errors(),
        {"ann": ACKED},
        reopen=77,
        works=True,
    ),
    Row(
        "an outage's probe is let in",
        plan_of(ANN, probe="outage"),
        Reply(TOO_OFTEN, signed_at=7),
        {},
        end=PauseRate(1.0, TOO_OFTEN),
        reopen=7,
    ),
    Row(
        "or refused for its data",
        plan_of(ANN, probe="error"),
        Reply(NO_ACCOUNT),
        {"ann": NEVER},
        reopen=0,
        if_too_many=True,
    ),
    Row(
        "the data's probe is delivered",
        plan_of(ANN, probe="data"),
        errors(),
        {"ann": ACKED},
        reopen=77,
        works=True,
    ),
    Row(
        "the data's probe names a user",
        plan_of(ANN, BOB, probe="data"),
        errors(("bob", NO_ACCOUNT)),
        {"ann": ACKED},
        works=True,
        refused=["bob"],
        end=stop("data", NO_ACCOUNT, ""),
        otherwise=({"bob": NEVER}, [], None),
    ),
    Row(
        "the data's probe is refused as a whole",
        plan_of(*many(2), probe="data"),
        Reply(NO_ACCOUNT),
        {},
        end=stop("data", NO_ACCOUNT, ""),
        otherwise=({}, [["u000"], ["u001"]], None),
    ),
    Row(
        "the data's probe of one user is refused",
        plan_of(ANN, probe="data"),
        Reply(NO_ACCOUNT),
        {},
        end=stop("data", NO_ACCOUNT, ""),
        otherwise=({}, [], stop("data", NO_ACCOUNT, "")),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.story)
def test_what_follows_from_an_answer(row: Row) -> None:
    step = advance(row.plan, row.answer, row.failures)

    assert told(step.outcomes) == row.outcomes
    assert (step.end, step.reopen, step.hold) == (row.end, row.reopen, row.hold)
    assert bool(step.if_too_many) is row.if_too_many
    assert step.plan.answers == row.plan.answers + 1
    if row.end is None or row.todo:
        assert calls(step.plan) == [list(users) for users in row.todo]
    assert (step.plan.works, step.plan.bisecting) == (row.works, row.bisecting)
    assert list(step.plan.refused) == list(row.refused)
    if row.otherwise is None:
        assert step.otherwise is None
    else:
        outcomes, todo, end = row.otherwise
        assert step.otherwise
        assert told(step.otherwise.outcomes) == outcomes
        assert calls(step.otherwise.plan) == [list(users) for users in todo]
        assert step.otherwise.end == end


def test_suspects_are_sent_apart_and_removals_after_what_is_set() -> None:
    suspect = user("tom", suspect=True, city="Rome", level=None)

    parts = begin(Batch(BatchId("b"), (ANN, suspect, BOTH), 0), POLICY, seed=1).todo

    assert [(part.removing, [u.user for u in part.users]) for part in parts if isinstance(part, Part)] == [
        (False, ["ann", "cid"]),
        (True, ["cid"]),
        (False, ["tom"]),
        (True, ["tom"]),
    ]
    assert [list(part.entries()) for part in parts if isinstance(part, Part)][0:2] == [
        [("ann", {"city": "Paris"}), ("cid", {"city": "Paris"})],
        [("cid", ["level"])],
    ]


def test_a_probe_is_sent_as_one_call() -> None:
    assert calls(plan_of(TIRED, ANN, probe="outage")) == [["tom", "ann"]]


def test_a_retry_is_spread_by_the_seed_and_the_user_alone() -> None:
    def delays(seed: int) -> list[Outcome]:
        return list(advance(plan_of(*many(50), seed=seed), Reply(INTERNAL)).outcomes.values())

    assert delays(1) == delays(1)
    assert delays(1) != delays(2)
    assert all(isinstance(end, Retried) and 0 <= end.delay <= 1.0 for end in delays(3))
    assert len(set(delays(4))) == 50


@pytest.mark.parametrize(
    ("answer", "blamed"),
    [
        (OK, False),
        (TIMEOUT, True),
        (Reply(INTERNAL), True),
        (Reply(UNLISTED), False),
        (Reply(TOO_OFTEN), False),
    ],
)
def test_only_some_answers_blame_the_service(answer: Answer, blamed: bool) -> None:
    assert blames_service(answer) is blamed


# The property: whatever the answers, and whatever ends take, every user is settled exactly once.

NAMES = [f"u{number}" for number in range(12)]
CODES = st.one_of(st.sampled_from([0, 0, UNLISTED, *TABLE]), st.integers(-5, 100_000))
ANSWERS = st.one_of(
    st.builds(Reply, code=CODES),
    st.builds(
        Reply,
        code=st.just(0),
        errors=st.dictionaries(
            st.sampled_from(NAMES), st.builds(UserError, CODES.filter(bool), st.just("")), max_size=6
        ),
    ),
    st.builds(Reply, code=st.just(0), names=st.frozensets(st.sampled_from(["city", "level"]))),
    st.builds(NoReply, st.sampled_from(Failure), st.booleans()),
)
USERS = st.builds(
    ClaimedUser,
    st.sampled_from(NAMES),
    st.dictionaries(
        st.sampled_from(["city", "level"]), st.sampled_from(["Paris", None]), min_size=1, max_size=2
    ),
    st.integers(0, 5),
    st.just(0),
    st.booleans(),
)
BATCHES = st.builds(
    Batch,
    st.just(BatchId("b")),
    st.lists(USERS, min_size=1, max_size=12, unique_by=lambda user: user.user).map(tuple),
    st.just(0),
    st.sampled_from(["", "", "", "error", "outage", "data"]),
)
SCRIPT = st.lists(st.tuples(ANSWERS, st.integers(1, 6), st.booleans(), st.booleans()), max_size=20)


def play(plan: Plan, script: Iterable[tuple[Answer, int, bool, bool]]) -> dict[str, list[Outcome]]:
    """Carry a plan out as the loop does; returns the outcomes of each user. After the script all goes well."""
    settled: dict[str, list[Outcome]] = {user.user: [] for user in plan.batch.users}
    remaining = iter(script)
    sent = 0
    while plan.todo:
        answer, failures, takes, too_many = next(remaining, (OK, 0, True, False))
        sent += 1
        assert sent <= 20 + 60, "it goes round in circles"
        done = {name for name, outcomes in settled.items() if outcomes}
        call = plan.todo[0]
        if isinstance(call, Part):
            assert call.users
            assert not done & {user.user for user in call.users}, "settled users are not sent again"
        step: Step | None = advance(plan, answer, failures if blames_service(answer) else 0)
        while step:
            for name, outcome in step.outcomes.items():
                settled[name].append(outcome)
            plan, end = step.plan, step.end
            if step.if_too_many:
                assert any(isinstance(outcome, DeadLettered) for outcome in step.outcomes.values())
                end = step.if_too_many if too_many else end
            # Only these ends can fail to take, the first only for the data.
            may_fail = isinstance(end, RenewForFleet) or (isinstance(end, StopLine) and end.kind == "data")
            if end and (takes or not may_fail):
                for outcomes in settled.values():
                    outcomes += [] if outcomes else [Snoozed()]
                return settled
            assert end is None or step.otherwise or end is step.if_too_many, "something must follow"
            step = step.otherwise if end is step.end else None
    return settled


@settings(max_examples=drawn(200))
@given(batch=BATCHES, script=SCRIPT, seed=st.integers(0, 2**32 - 1))
def test_every_user_is_settled_exactly_once_whatever_the_answers_are(
    batch: Batch, script: list[tuple[Answer, int, bool, bool]], seed: int
) -> None:
    settled = play(begin(batch, POLICY, seed), script)

    assert {name: len(outcomes) for name, outcomes in settled.items()} == dict.fromkeys(settled, 1)


def case(rng: random.Random) -> tuple[Batch, list[tuple[Answer, int, bool, bool]]]:
    """The same kind of case, drawn a hundred times as fast as for a failure that must be shrunk."""

    def code() -> int:
        return rng.choice([0, 0, UNLISTED, *TABLE])

    def answer() -> Answer:
        match rng.randrange(4):
            case 0:
                return NoReply(rng.choice(list(Failure)), rng.random() < 0.5)
            case 1:
                named = rng.sample(NAMES, rng.randrange(6))
                return Reply(0, errors={name: UserError(code() or INTERNAL, "") for name in named})
            case 2:
                return Reply(0, names=frozenset(rng.sample(["city", "level"], rng.randrange(3))))
        return Reply(code())

    def claimed(name: str) -> ClaimedUser:
        names = rng.sample(["city", "level"], rng.randint(1, 2))
        attrs = {name: rng.choice(["Paris", None]) for name in names}
        return ClaimedUser(name, attrs, rng.randrange(6), 0, rng.random() < 0.3)

    users = tuple(claimed(name) for name in rng.sample(NAMES, rng.randint(1, 12)))
    probe: Probe = rng.choice(["", "", "", "error", "outage", "data"])
    flips = [
        (answer(), rng.randint(1, 6), rng.random() < 0.5, rng.random() < 0.3)
        for _ in range(rng.randrange(20))
    ]
    return Batch(BatchId("b"), users, 0, probe), flips


def test_every_user_is_settled_exactly_once_in_thousands_of_batches() -> None:
    for seed in range(drawn(10_000)):
        batch, script = case(random.Random(seed))

        settled = play(begin(batch, POLICY, seed), script)

        assert all(len(outcomes) == 1 for outcomes in settled.values()), seed


def test_who_was_refused_before_the_names_were_asked_for_is_given_up_too() -> None:
    users = (
        ClaimedUser("u0", {"city": "Paris"}, 2, 0, False),
        ClaimedUser("u1", {"city": None}, 0, 0, False),
    )
    refused = Reply(0, errors={"u0": UserError(UNLISTED, "")})
    # The API knows no name at all, and a person has allowed that.
    answers = [refused, Reply(BAD_NAME), Reply(0)]

    batch = Batch(BatchId("b"), users, 0, "error")
    settled = play(begin(batch, POLICY, 0), [(answer, 0, False, False) for answer in answers])

    assert {user: [type(end) for end in ends] for user, ends in settled.items()} == {
        "u0": [DeadLettered],
        "u1": [DeadLettered],
    }
