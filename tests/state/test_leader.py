"""Leaders: one at a time, for as long as its term lasts."""

from __future__ import annotations

import pytest
import redis

from tests.conftest import ManualClock
from worker.state.keys import Keys
from worker.state.leader import RETRY_AFTER, Leader, LeaderLoop, current_leader

TERM = 2.0


def candidate(client: redis.Redis, keys: Keys, clock: ManualClock, worker: str) -> Leader:
    return Leader(client, keys.dispatcher, worker, clock, term=TERM)


def test_one_worker_leads_until_it_steps_down(client: redis.Redis, keys: Keys, clock: ManualClock) -> None:
    first, second = (candidate(client, keys, clock, worker) for worker in ("w1", "w2"))

    assert first.campaign() == 0.0
    assert 0 < second.campaign() <= TERM
    assert (first.leads, second.leads) == (True, False)
    assert current_leader(client, keys.dispatcher) == "w1"

    second.step_down()
    assert second.campaign() > 0, "only the leader can step down"
    first.step_down()
    assert second.campaign() == 0.0
    assert not first.leads


def test_a_leader_renews_its_term_well_before_its_end(
    client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    leader = candidate(client, keys, clock, "w1")
    for _ in range(4):
        leader.campaign()
        client.pexpire(keys.dispatcher, 300)
        clock.now += TERM / 2
        leader.campaign()
        assert client.pttl(keys.dispatcher) > 300


def test_a_leader_asks_once_in_a_third_of_its_term(
    client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    leader = candidate(client, keys, clock, "w1")
    leader.campaign()
    client.delete(keys.dispatcher)

    clock.now += TERM / 4
    assert leader.campaign() == 0.0
    assert current_leader(client, keys.dispatcher) is None


def test_a_machine_that_slept_beyond_its_term_leads_no_longer(
    client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    leader, successor = (candidate(client, keys, clock, worker) for worker in ("w1", "w2"))
    leader.campaign()
    client.delete(keys.dispatcher)
    successor.campaign()

    clock.now += TERM

    assert not leader.leads
    assert leader.campaign() > 0


class Turns(LeaderLoop):
    """Counts turns, and fails in some of them."""

    interrupted = "counting_interrupted"

    def __init__(self, leader: Leader, failures: list[Exception | None]) -> None:
        super().__init__(leader)
        self.failures, self.signs, self.followed = failures, 0, 0

    def sign_of_life(self) -> None:
        self.signs += 1

    def follow(self) -> None:
        self.followed += 1

    def lead(self) -> float:
        failure = self.failures.pop(0)
        if not self.failures:
            self.stop()
        if failure:
            raise failure
        return 0.0


def test_turns_outlive_any_failure_and_the_log_has_each_reason_once(
    client: redis.Redis,
    keys: Keys,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waits: list[float] = []
    turns = Turns(
        candidate(client, keys, clock, "w1"),
        [OSError(), ValueError(), OSError(), None, OSError("secret"), None],
    )
    monkeypatch.setattr(turns._stopped, "wait", waits.append)

    turns.run()

    said = capsys.readouterr().out
    assert waits == [*[RETRY_AFTER] * 3, 0.0, RETRY_AFTER, 0.0]
    assert (said.count("OSError"), said.count("ValueError")) == (2, 1)
    assert said.count("counting_interrupted") == 3
    assert "secret" not in said
    assert (turns.signs, turns.followed) == (6, 4)
    assert client.get(keys.dispatcher) is None, "one that ends steps down"


def test_a_follower_takes_no_turn_and_waits_for_the_term_to_end(
    client: redis.Redis, keys: Keys, clock: ManualClock
) -> None:
    candidate(client, keys, clock, "w1").campaign()
    turns = Turns(candidate(client, keys, clock, "w2"), [])

    assert 0.01 <= turns.turn() <= TERM + 0.1
    assert turns.followed == 1
