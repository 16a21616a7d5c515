"""How often somebody may try to log in."""

from __future__ import annotations

from tests.conftest import ManualClock
from worker.console import attempts
from worker.console.attempts import ADDRESS, NAME, Attempts, network


def test_a_name_has_so_many_attempts_from_wherever_and_then_one_now_and_then(clock: ManualClock) -> None:
    bounded = Attempts(clock)

    assert [bounded.take("ann", f"10.0.0.{n}") for n in range(NAME[0])] == [0.0] * NAME[0]
    assert bounded.take("ann", "10.0.1.1") == NAME[1]
    assert bounded.take("bob", "10.0.1.1") == 0.0

    clock.sleep(NAME[1])
    assert bounded.take("ann", "10.0.1.1") == 0.0
    assert bounded.take("ann", "10.0.1.1") > 0


def test_an_address_has_so_many_attempts_for_whatever_names(clock: ManualClock) -> None:
    bounded = Attempts(clock)

    assert [bounded.take(f"name{n}", "10.0.0.1") for n in range(ADDRESS[0])] == [0.0] * ADDRESS[0]
    assert bounded.take("another", "10.0.0.1") > 0
    assert bounded.take(None, "10.0.0.1") > 0
    assert bounded.take("another", "10.0.0.2") == 0.0


def test_what_was_right_does_not_count(clock: ManualClock) -> None:
    bounded = Attempts(clock)

    for _ in range(100):
        assert bounded.take("ann", "10.0.0.1") == 0.0
        bounded.give_back("ann", "10.0.0.1")


def test_a_refused_attempt_costs_nothing(clock: ManualClock) -> None:
    bounded = Attempts(clock)
    for _ in range(NAME[0]):
        bounded.take("ann", "10.0.0.1")
    for _ in range(50):
        bounded.take("ann", "10.0.0.1")

    clock.sleep(NAME[1])

    assert bounded.take("ann", "10.0.0.1") == 0.0


def test_memory_is_bounded(clock: ManualClock) -> None:
    bounded = Attempts(clock)

    for n in range(attempts.MOST + 500):
        bounded.take(f"name{n}", f"10.{n // 65536}.{n // 256 % 256}.{n % 256}")

    assert len(bounded._left) <= attempts.MOST + 2


def test_addresses_of_one_network_are_one() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") != network("10.0.0.2")
    assert network("a name") == network("") == "?"
