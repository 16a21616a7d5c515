"""What a person writes is what the simulator does: the share of all calls, and what happens to them."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.conftest import drawn
from tests.simulation import simulation
from worker.errors import SandboxError
from worker.sandbox.faults import Fault, Faults, read_faults, set_at, set_to, shown
from worker.sandbox.redis_server import free_port


def test_every_kind_that_has_a_name() -> None:
    assert [(fault.kind, fault.code) for fault in read_faults(["91000:0.1", "502:0.1", "reset:.1"])] == [
        ("code", 91000),
        ("status", 502),
        ("reset", 0),
    ]
    assert [fault.kind for fault in read_faults(["timeout:0.1", "truncated:0.1"])] == ["slow", "truncated"]
    (fault,) = read_faults(["60020"])
    assert (fault.chance, fault.times) == (1.0, None)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("91", "must be WHAT or WHAT:SHARE"),
        ("200", "an HTTP status from 400 to 599"),
        ("012345", "an ErrorCode of five digits"),
        ("¹²³", "one of timeout, reset, truncated, lost"),
        ("Timeout", "one of timeout, reset, truncated, lost"),
        ("", "must be WHAT"),
        ("502:", "the share of the calls must be a number above 0, and at most 1"),
        ("502:0", "above 0"),
        ("502:10", "at most 1"),
        ("502:nan", "must be a number"),
        ("502:10%", "must be a number"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_rule(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        read_faults([text])
    assert str(caught.value).startswith(f"{text}: ")


def test_shares_are_of_all_calls() -> None:
    faults, calls = Faults(read_faults(["91000:0.5", "502:0.3", "timeout:0.2"])), drawn(20_000)

    struck = Counter(fault.kind for _ in range(calls) if (fault := faults.strike(b"")))

    assert struck.total() == calls
    assert {kind: round(count / calls, 1) for kind, count in struck.items()} == {
        "code": 0.5,
        "status": 0.3,
        "slow": 0.2,
    }
    with pytest.raises(ValueError, match="must not add up to more than 1"):
        read_faults(["91000:0.5", "502:0.5", "timeout:0.01"])


def test_what_is_set_is_shown_as_it_was_written() -> None:
    texts = ["91000:0.1", "429:0.25", "timeout:0.05", "reset:0.5"]
    faults = read_faults(texts)
    faults[0].struck = 7

    seen = shown([*faults, Fault("code", code=60007, times=0)])

    assert [f"{each.what}:{each.share:.4g}" for each in seen] == texts
    assert (seen[0].struck, seen[0].meaning) == (7, "internal error of the service")
    assert seen[1].meaning == "HTTP status, Too Many Requests"
    assert [each.what for each in shown([Fault("status"), Fault("late_write")])] == ["502", "late_write"]


def test_a_running_simulator_is_told_and_asked() -> None:
    with simulation() as running:
        assert set_at(running.url) == []
        set_to(running.url, read_faults(["91000:0.1", "timeout:0.05"]))
        assert [each.what for each in shown(set_at(running.url))] == ["91000", "timeout"]
        set_to(running.url, [])
        assert set_at(running.url) == []


@pytest.mark.parametrize("place", ["/v4", "/simulator/state?"])
def test_what_is_no_simulator_is_left_alone(place: str) -> None:
    with simulation() as running, pytest.raises(SandboxError, match="is not a simulator"):
        set_to(f"{running.url}{place}", [Fault("reset")])


def test_a_simulator_that_is_gone_is_told() -> None:
    with pytest.raises(SandboxError, match=r"does not answer: .*refused"):
        set_at(f"http://127.0.0.1:{free_port()}")


def test_one_user_is_refused_by_name_and_takes_no_share_from_others() -> None:
    faults = read_faults(["70107@u:9", "91000:0.5"])

    assert (faults[0].kind, faults[0].code, faults[0].user) == ("user_code", 70107, "u:9")
    assert faults[1].chance == 0.5
    assert [(each.what, each.share) for each in shown(faults)] == [("70107@u:9", 1.0), ("91000", 0.5)]
    calls = Faults(read_faults(["70107@u9"]))
    assert calls.strike(b'{"UserAttrs": [{"To_Account": "u9"}]}')
    assert not calls.strike(b'{"UserAttrs": [{"To_Account": "u91"}]}')


@pytest.mark.parametrize("text", ["70107@", "@u9", "7010@u9", "timeout@u9", "502@u9"])
def test_a_user_is_refused_with_an_error_code(text: str) -> None:
    with pytest.raises(ValueError, match="must be CODE@USER"):
        read_faults([text])
