"""Reading back: an API that answers what a test wants, a real limiter, and time held still."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import redis

from tests.conftest import ManualClock, new_keys
from tests.virtual import EPOCH_US, scripts_on
from worker.delivery.answers import Answer, Failure, NoReply, Reply, UserError, read_reply
from worker.delivery.api import Call, ChatApi
from worker.errors import CallFailed
from worker.ratelimit import DELIVERS, RateLimiter, read_rate
from worker.readback.reader import MOST_FAILURES, Reader, ReadingStopped

STORE = {"ann": {"city": "Paris"}, "bob": {}}
Answers = Callable[[Sequence[str]], Answer]


def stored(users: Sequence[str]) -> Reply:
    return Reply(0, values={user: STORE[user] for user in reversed(users) if user in STORE})


class _Call:
    def __init__(self, answer: Callable[[], Answer]) -> None:
        self.answer = answer

    def send(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class ReadApi(ChatApi):
    def __init__(self, answers: Answers) -> None:
        self._answers, self.asked, self.renewals = answers, list[list[str]](), 0

    def prepare_get(self, users: Sequence[str]) -> Call | NoReply:
        def answer() -> Answer:
            self.asked.append(list(users))
            return self._answers(users)

        return _Call(answer)

    def renew_signature(self) -> None:
        self.renewals += 1


class House:
    """A reader of an API that answers by a function."""

    def __init__(self, client: redis.Redis, answers: Answers) -> None:
        self.clock, self.keys, self.redis = ManualClock(), new_keys(), client
        self.api, self.stopped = ReadApi(answers), False
        with scripts_on(lambda: EPOCH_US + round(self.clock.now * 1e6)):
            limiter = RateLimiter(client, self.keys, quota=100, patience=2.0, clock=self.clock, kind=DELIVERS)
        self.reader = Reader(self.api, limiter, self.clock, stopping=lambda: self.stopped)


def in_turn(*answers: Answer | Answers) -> Answers:
    """The answers one after the other; then what is stored."""
    left = list(answers)

    def answer(users: Sequence[str]) -> Answer:
        found = left.pop(0) if left else stored
        return found(users) if callable(found) else found

    return answer


def test_users_are_read_in_any_order_and_unknown_ones_are_none(client: redis.Redis) -> None:
    house = House(client, stored)

    assert house.reader.read(["ann", "bob", "cem"]) == {"ann": {"city": "Paris"}, "bob": {}, "cem": None}
    assert house.reader.read([]) == {}
    assert house.reader.calls == 1


def test_an_id_may_come_back_in_another_case(client: redis.Redis) -> None:
    assert House(client, lambda users: stored(["ann"])).reader.read(["Ann"]) == {"Ann": {"city": "Paris"}}


@pytest.mark.parametrize(
    "failure",
    [
        NoReply(Failure.TIMEOUT),
        NoReply(Failure.UNREACHABLE, sent=False),
        Reply(91000),
        Reply(12345),
        Reply(60007),
    ],
    ids=str,
)
def test_what_passes_is_asked_again(client: redis.Redis, failure: Answer) -> None:
    house = House(client, in_turn(failure, failure))

    assert house.reader.read(["ann"]) == {"ann": {"city": "Paris"}}
    assert house.api.asked == [["ann"]] * 3


@pytest.mark.parametrize("failure", [NoReply(Failure.TIMEOUT), Reply(91000), Reply(60007)], ids=str)
def test_an_api_that_stays_away_is_given_up(client: redis.Redis, failure: Answer) -> None:
    house = House(client, lambda users: failure)

    with pytest.raises(CallFailed):
        house.reader.read(["ann"])
    assert len(house.api.asked) == MOST_FAILURES


def test_a_refusal_for_frequency_pauses_the_fleet(client: redis.Redis) -> None:
    house = House(client, in_turn(*[Reply(60007, retry_after=5.0)] * 2))
    house.reader.read(["ann"])

    assert read_rate(client, house.keys).code == 60007
    assert house.clock.now >= 5


def test_a_user_refused_by_name_is_not_read(client: redis.Redis) -> None:
    def answer(users: Sequence[str]) -> Reply:
        found = stored([user for user in users if user != "bob"])
        return Reply(0, values=found.values, errors={"bob": UserError(70107, "no account")})

    assert House(client, answer).reader.read(["ann", "bob"]) == {"ann": {"city": "Paris"}, "bob": None}


def test_a_user_who_cannot_be_read_now_is_read_again(client: redis.Redis) -> None:
    def busy(users: Sequence[str]) -> Reply:
        return Reply(0, values={"ann": STORE["ann"]}, errors={"bob": UserError(91000, "busy")})

    house = House(client, in_turn(busy))
    assert house.reader.read(["ann", "bob"]) == {"ann": {"city": "Paris"}, "bob": {}}
    assert house.api.asked == [["ann", "bob"], ["bob"]]


def test_one_whom_the_api_refuses_takes_nobody_along(client: redis.Redis) -> None:
    users = [f"user{number}" for number in range(100)]

    def answer(asked: Sequence[str]) -> Answer:
        return Reply(70402) if "user42" in asked else Reply(0, values={user: {} for user in asked})

    house = House(client, answer)
    assert house.reader.read(users) == {user: None if user == "user42" else {} for user in users}
    assert house.reader.calls <= 15


def test_a_signature_is_renewed_once(client: redis.Redis) -> None:
    house = House(client, in_turn(Reply(70001)))
    assert house.reader.read(["ann"])
    assert house.api.renewals == 1

    house = House(client, lambda users: Reply(70001))
    with pytest.raises(CallFailed, match="70001"):
        house.reader.read(["ann"])
    assert house.api.renewals == 1


def test_an_error_that_stops_the_line_is_explained_at_once(client: redis.Redis) -> None:
    house = House(client, lambda users: Reply(60020))
    with pytest.raises(CallFailed, match="60020"):
        house.reader.read(["ann"])
    assert house.reader.calls == 1


def test_a_reader_that_must_stop_does(client: redis.Redis) -> None:
    def answer(users: Sequence[str]) -> Answer:
        house.stopped = True
        return Reply(91000)

    house = House(client, answer)
    with pytest.raises(ReadingStopped):
        house.reader.read(["ann"])
    with pytest.raises(ReadingStopped):
        house.reader.read(["ann"])
    assert house.reader.calls == 1


@pytest.mark.parametrize(
    "broken",
    [
        b'{"UserAttrs": {}, "ErrorCode": 0}',
        b'{"UserAttrs": {"a": 1}, "ErrorCode": 0}',
        b'{"UserAttrs": [1], "ErrorCode": 0}',
        b'{"UserAttrs": [{"To_Account": 1, "Attrs": {}}], "ErrorCode": 0}',
        b'{"UserAttrs": [{"To_Account": "a", "Attrs": {"city": 1}}], "ErrorCode": 0}',
        b'{"UserAttrs": [{"To_Account": "a", "Attrs": [1]}], "ErrorCode": 0}',
        b'{"UserAttrs": "a", "ErrorCode": 0}',
    ],
)
def test_half_an_answer_is_none(broken: bytes) -> None:
    answer = read_reply(broken.replace(b'"ErrorCode"', b'"ActionStatus": "OK", "ErrorCode"'))

    # An empty object is as good as an empty list.
    assert isinstance(answer, Reply if b"{}, " in broken[:20] else NoReply)


def test_null_attributes_are_none() -> None:
    answer = read_reply(b'{"ActionStatus":"OK","ErrorCode":0,"UserAttrs":[{"To_Account":"a","Attrs":null}]}')
    assert isinstance(answer, Reply)
    assert answer.values == {"a": {}}
