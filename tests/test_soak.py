"""The judge of the long run: it must see what grows, and nothing in what only goes up and down."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from tests.bench import Results
from tests.soak import LENGTH, WARM_UP, Sample, Seen, drift, grown, judge, key_types, slope, unexpected

#: Half an hour, a sample every five seconds.
TIMES = [5.0 * number for number in range(1, 361)]


def noisy(level: float, spread: float, rise: float = 0.0, seed: int = 1) -> list[float]:
    """Values around `level`, with `rise` in all."""
    rng = random.Random(seed)
    return [level + rise * at / TIMES[-1] + rng.gauss(0, spread) for at in TIMES]


def test_the_slope_is_that_of_the_line_whatever_single_samples_say() -> None:
    values = [2 * at + 7 for at in TIMES]
    values[10], values[100], values[-1] = 1e9, -1e9, 1e9

    assert slope(TIMES, values) == pytest.approx(2)


@pytest.mark.parametrize("seed", range(5))
def test_memory_that_goes_up_and_down_is_flat_and_a_leak_is_not(seed: int) -> None:
    assert grown(TIMES, noisy(80, 1.0, seed=seed), 2.0).flat
    assert grown(TIMES, noisy(80, 1.0, rise=3.0, seed=seed), 2.0).flat, "3 % of 80 MB and 2 MB are allowed"
    assert not grown(TIMES, noisy(80, 1.0, rise=8.0, seed=seed), 2.0).flat


@pytest.mark.parametrize("seed", range(5))
def test_a_key_that_keeps_one_entry_of_each_failed_call_is_seen(seed: int) -> None:
    # One call in two hundred fails, at a hundred a second.
    assert not grown(TIMES, noisy(20, 10, rise=900, seed=seed), 100.0).flat


def test_a_saw_tooth_is_flat() -> None:
    assert grown(TIMES, [40 * (number % 6) for number in range(len(TIMES))], 100.0).flat


def test_what_shrinks_is_flat() -> None:
    assert grown(TIMES, noisy(80, 1.0, rise=-40), 2.0).flat


def test_a_constant_has_no_noise() -> None:
    found = grown(TIMES, [7.0] * len(TIMES), 3.0)

    assert (found.level, found.by) == (7.0, 0.0)
    assert found.allowed == pytest.approx(0.03 * 7 + 3)


def test_drift_is_that_of_the_medians_of_the_first_and_the_last_third() -> None:
    assert drift([98, 98, 1, 98, 98, 98, 97, 97, 97]) == pytest.approx(1 / 98)
    assert drift([97.5]) == 0.0


def test_only_what_nothing_provoked_is_found_in_a_log() -> None:
    def line(level: str, event: str) -> str:
        return json.dumps({"timestamp": "2026-11-24T03:10:07Z", "level": level, "event": event})

    log = [
        " -------------- celery@imattr v5.6",
        line("info", "batch_settled"),
        line("warning", "update_refused"),
        line("error", "line_stopped"),
        line("error", "line_stopped"),
        "Traceback (most recent call last):",
    ]

    assert unexpected(log) == {"line_stopped": 2, "Traceback": 1}


def test_every_key_of_the_catalogue_can_be_counted() -> None:
    assert {"pending", "shadow_at", "updates", "refused"} <= key_types().keys()
    assert set(key_types().values()) <= LENGTH.keys()


def run(**changed: object) -> Seen:
    """A run with nothing to complain about, but for what is `changed`."""
    figures = {("memory of redis", "MB"): 40.0} | dict.fromkeys(
        ((name, "entries") for name in key_types()), 5.0
    )
    usual: dict[str, object] = {
        "samples": [Sample(at, figures, balanced=True) for at in TIMES],
        "rates": [(at, 97.6) for at in TIMES[::6]],
        "worst": 100,
        "refused_for_rate": 0,
        "unexpected": Counter(),
    }
    return Seen(**usual | changed)  # type: ignore[arg-type]


def holds(seen: Seen) -> bool:
    results = Results()
    judge(seen, results)
    return results.held


def test_a_good_run_holds() -> None:
    assert holds(run())


@pytest.mark.parametrize(
    "changed",
    [
        {"worst": 101},
        {"refused_for_rate": 1},
        {"unexpected": Counter({"line_stopped": 1})},
        {"rates": [(at, 96.9) for at in TIMES]},
        {"rates": [(at, 98.5 if at < 1200 else 97.2) for at in TIMES]},
        {"samples": [*run().samples[:-1], Sample(TIMES[-1], run().samples[-1].figures, balanced=False)]},
        {"samples": [Sample(at, {("shadow", "entries"): at}, balanced=True) for at in TIMES]},
    ],
    ids=["worst", "refused", "log", "slow", "drift", "ledger", "grows"],
)
def test_a_run_with_a_flaw_does_not(changed: dict[str, object]) -> None:
    assert not holds(run(**changed))


def test_what_happens_while_warming_up_is_not_judged() -> None:
    def figures(at: float) -> dict[tuple[str, str], float]:
        climbing = min(at, WARM_UP * TIMES[-1])
        return run().samples[0].figures | {("memory of redis", "MB"): climbing}

    slow_at_first = [(at, 50.0 if at < WARM_UP * TIMES[-1] else 97.6) for at in TIMES]

    assert holds(run(samples=[Sample(at, figures(at), balanced=True) for at in TIMES], rates=slow_at_first))


def test_a_key_that_was_never_used_is_told() -> None:
    figures = {
        name: 0.0 if name[0] == "refused" else value for name, value in run().samples[0].figures.items()
    }

    assert not holds(run(samples=[Sample(at, figures, balanced=True) for at in TIMES]))
