"""The deterministic simulation: schedules pass, replay exactly, and fail when there is something to find."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import FAST, drawn, planted
from tests.planted import SCHEDULES, of, plant_in_scripts
from tests.schedules.plan import FAULTS
from tests.schedules.pool import wire
from tests.schedules.run import run
from tests.schedules.wire import Wire
from worker.delivery.loop import Delivery
from worker.delivery.plan import StopLine
from worker.delivery.policy import Policy, RetryUncounted
from worker.models import Retried


@pytest.fixture(scope="module")
def connected() -> Iterator[Wire]:
    with wire() as found:
        yield found


def test_every_promise_is_kept_whatever_strikes(connected: Wire) -> None:
    struck = Counter[str]()
    for seed in range(1, drawn(100) + 1):
        result = run(seed, connected)
        struck += result.faults
        assert not result.violations, f"python -m tests.schedules --seed {seed}\n{result.violations[0]}"

    missing = {f"{where}: {kind}" for where, kinds in FAULTS.items() for kind in kinds} - struck.keys()
    assert FAST or len(missing) < 8, missing


def test_a_seed_replays_step_by_step_also_in_another_process_on_another_server(connected: Wire) -> None:
    code = (
        "from tests.schedules.pool import wire\n"
        "from tests.schedules.run import run\n"
        "with wire() as connected:\n"
        "    print(*(run(seed, connected).digest for seed in range(1, 9)))\n"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    digests = [run(seed, connected).digest for seed in range(1, 9)]

    assert len(set(digests)) == 8
    assert other.stdout.split() == digests
    told = run(1, connected, telling=True)
    assert told.digest == digests[0]
    assert len(told.trace) > told.scripts


#: Schedules in which each of the bugs below must be found.
SEEDS = 600

BUGS = of(SCHEDULES)


def found(connected: Wire, first: int = 1) -> set[str]:
    """The rules that the first broken schedule breaks."""
    for seed in range(first, first + SEEDS):
        if violations := run(seed, connected).violations:
            return {violation.rule for violation in violations}
    return set()


@pytest.mark.parametrize("bug", planted(BUGS))
def test_a_bug_in_a_script_is_found(bug: str, connected: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_scripts(BUGS[bug], monkeypatch)

    assert found(connected, BUGS[bug].seed)


def test_users_sent_again_while_the_old_call_can_still_land_are_found(
    connected: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_hold(self: Policy, action: RetryUncounted, attempts: int, jitter: float) -> Retried:
        return Retried(self.backoff(attempts, jitter), proven=False)

    monkeypatch.setattr(Policy, "retry_uncounted", without_hold)

    assert "stale" in found(connected)


def test_a_stop_of_the_line_that_forgets_the_hold_is_found(
    connected: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_line: Any = Delivery._stop_line

    def without_hold(self: Delivery, claim: Any, stop: StopLine) -> Any:
        return stop_line(self, claim, dataclasses.replace(stop, hold=0.0))

    monkeypatch.setattr(Delivery, "_stop_line", without_hold)

    assert "stale" in found(connected, 1870)


def test_a_slot_that_was_missed_and_used_all_the_same_is_found(
    connected: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the one alone the other makes up for it.
    monkeypatch.setattr("worker.ratelimit.GRACE", 1.0)
    monkeypatch.setattr("worker.ratelimit.LATE", 1.0)

    assert "quota" in found(connected)
