"""Parts that end are started again, later each time, and given up in the end; no process is needed to see it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ManualClock
from worker.errors import SandboxError
from worker.sandbox.supervisor import LASTING, MOST_FAILURES, PATIENCE, Supervisor, end_of


class Fake:
    """A part that ends, or is ready, when the test says so."""

    name = "worker-1"
    log = Path("worker-1.log")

    def __init__(self) -> None:
        self.starts, self.kills = 0, 0
        self.ended: int | None = None
        self.ready = False
        self.cannot_start = False

    def start(self) -> None:
        if self.cannot_start:
            raise OSError("no memory left")
        self.starts += 1
        self.ended, self.ready = None, False

    def status(self) -> int | None:
        return self.ended

    def is_ready(self) -> bool:
        return self.ready

    def said(self) -> str:
        return "one\ntwo\nthree\nfour\n"

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture
def part() -> Fake:
    return Fake()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def supervisor(part: Fake, told: list[str], clock: ManualClock) -> Supervisor:
    supervisor = Supervisor(told.append, clock)
    supervisor.watch(part)
    return supervisor


def test_the_end_of_a_part_is_told_with_its_last_words_and_mended(
    supervisor: Supervisor, part: Fake, told: list[str], clock: ManualClock
) -> None:
    part.ready = True
    supervisor.turn()
    part.ended = -9

    assert not supervisor.turn()
    assert told == [
        "worker-1 was ended by SIGKILL, and is started again in 1 s, see worker-1.log:\n  two\n  three\n  four"
    ]
    assert (part.starts, part.kills) == (0, 1), "what it has left behind is gone before the next start"
    assert not supervisor.is_ready(part)

    clock.sleep(1)
    assert supervisor.turn()
    part.ready = True
    supervisor.turn()

    assert (part.starts, told[1:]) == (1, ["worker-1 is ready again"])
    assert supervisor.is_ready(part)


def test_each_start_in_vain_waits_longer_until_the_part_is_given_up(
    supervisor: Supervisor, part: Fake, clock: ManualClock
) -> None:
    delays = []
    for _ in range(MOST_FAILURES):
        part.ended = 1
        supervisor.turn()
        began = clock.now
        while not supervisor.turn():
            clock.sleep(0.5)
        delays.append(clock.now - began)
    part.ended = 1

    with pytest.raises(
        SandboxError, match=r"worker-1 is given up, 6 ends in a row: it ended with status 1, see"
    ):
        supervisor.turn()
    assert delays == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(("seconds", "delay"), [(LASTING, 1), (LASTING - 1, 2)])
def test_a_part_that_lasted_has_not_failed(
    supervisor: Supervisor, part: Fake, told: list[str], clock: ManualClock, seconds: float, delay: int
) -> None:
    for _ in range(2):
        part.ready = True
        supervisor.turn()
        clock.sleep(seconds)
        supervisor.turn()
        part.ended = -9
        supervisor.turn()
        clock.sleep(1)
        supervisor.turn()

    assert f"is started again in {delay} s" in told[-1]


def test_a_part_that_hangs_at_the_start_is_ended_and_started_again(
    supervisor: Supervisor, part: Fake, told: list[str], clock: ManualClock
) -> None:
    clock.sleep(PATIENCE - 1)
    supervisor.turn()
    assert (part.kills, told) == (0, [])

    clock.sleep(1)
    supervisor.turn()
    clock.sleep(1)
    supervisor.turn()

    assert (part.kills, part.starts) == (1, 1)
    assert told[0].startswith("worker-1 was not ready after 60 s and was ended, and is started again in 1 s")


def test_wrong_settings_are_not_tried_again(supervisor: Supervisor, part: Fake, told: list[str]) -> None:
    part.ended = 2

    with pytest.raises(SandboxError, match=r"^worker-1 ended with status 2, see worker-1.log:"):
        supervisor.turn()
    assert told == []


def test_a_part_that_was_ready_had_good_settings(supervisor: Supervisor, part: Fake, told: list[str]) -> None:
    part.ready = True
    supervisor.turn()
    part.ended = 2
    supervisor.turn()

    assert "ended with status 2, and is started again" in told[0]


def test_a_machine_that_cannot_start_a_part_is_asked_again(
    supervisor: Supervisor, part: Fake, told: list[str], clock: ManualClock
) -> None:
    part.ended, part.cannot_start = 1, True
    supervisor.turn()
    clock.sleep(1)
    supervisor.turn()
    part.cannot_start = False
    clock.sleep(2)

    assert supervisor.turn()
    assert "could not be started (no memory left), and is started again in 2 s" in told[1]


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n" + "x" * 100_000 + "\nlast words")

    assert end_of(log, 7).endswith("x\nlast words")
    assert len(end_of(log, 7)) == 65_536
    assert end_of(tmp_path / "none", 0) == ""
    log.write_text("before\nafter")
    assert end_of(log, 7) == "after"
