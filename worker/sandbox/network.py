"""How long calls take to reach the simulator, for showing what a real network costs.

A network is text: a kind and its size in seconds, such as ``uniform:0.05``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

#: Seconds from one burst to the next.
BURST_EVERY = 10.0

#: The delay of a call, in seconds, from the network's size and the time at which it left (monotonic).
Delay = Callable[[float, float, random.Random], float]


def _uniform(size: float, _now: float, rng: random.Random) -> float:
    """Anything from 0 to the size."""
    return rng.uniform(0, size)


def _normal(size: float, _now: float, rng: random.Random) -> float:
    """Around the size, with a third of it as the deviation; one call in two hundred takes up to ten times as long."""
    if rng.random() < 0.005:
        return rng.uniform(size, 10 * size)
    return max(0.0, rng.gauss(size, size / 3))


def _bursts(size: float, now: float, _rng: random.Random) -> float:
    """Now and then nothing arrives for that long, then everything at once."""
    return max(0.0, size - now % BURST_EVERY)


def _reordered(size: float, _now: float, rng: random.Random) -> float:
    """One call in ten is overtaken by those up to the size behind it, as in a proxy with several routes."""
    return size if rng.random() < 0.1 else 0.0


KINDS: dict[str, Delay] = {"uniform": _uniform, "normal": _normal, "bursts": _bursts, "reordered": _reordered}


def check_network(network: str) -> str:
    """Return the network, or raise `ValueError`; empty text means none."""
    kind, _, size = network.partition(":")
    try:
        good = not network or (kind in KINDS and 0 <= float(size) < math.inf)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"must be KIND:SECONDS, with KIND one of {', '.join(KINDS)}")
    return network


def delay(network: str, now: float, rng: random.Random) -> float:
    """Seconds that a call leaving at `now` (monotonic) is on its way."""
    if not network:
        return 0.0
    kind, _, size = network.partition(":")
    return KINDS[kind](float(size), now, rng)
