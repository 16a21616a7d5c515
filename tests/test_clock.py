"""The machine's clock, as leases and permits need it."""

from __future__ import annotations

import time

import pytest

from worker.clock import SystemClock


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system's clock stands still in suspend")
def test_the_clock_runs_on_while_the_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease ends elsewhere meanwhile; what wakes up with an old batch must not send it."""
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 5.0 if clock == time.CLOCK_BOOTTIME else 0.0)

    assert SystemClock().monotonic() == 5.0
