"""Bounds how often somebody may try to log in, by name and by address, in bounded memory."""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict

from worker.clock import Clock

#: Attempts in a row, and seconds until another one: for an account, and for an address.
NAME, ADDRESS = (10, 30.0), (30, 10.0)
#: Names and addresses that are remembered; those not seen for longest are forgotten first.
MOST = 10_000


class Attempts:
    """The attempts that each name and each address has left. Thread-safe.

    Every console counts for itself, so three of them allow three times as many.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._lock = clock, threading.Lock()
        #: What each had left, and when.
        self._left: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()

    def take(self, name: str | None, address: str) -> float:
        """Count an attempt; returns 0.0 if it is allowed, else the seconds until one is."""
        wanted = [("address", network(address), *ADDRESS)]
        if name is not None:
            wanted.append(("name", name[:64], *NAME))
        with self._lock:
            waits = [self._wait(kind, who, most, every) for kind, who, most, every in wanted]
            if max(waits) > 0:
                return max(waits)
            for kind, who, _, _ in wanted:
                left, at = self._left[kind, who]
                self._left[kind, who] = left - 1, at
            while len(self._left) > MOST:
                self._left.popitem(last=False)
            return 0.0

    def give_back(self, name: str | None, address: str) -> None:
        """Do not count an attempt that succeeded."""
        with self._lock:
            for key in [("address", network(address))] + ([] if name is None else [("name", name[:64])]):
                if key in self._left:
                    left, at = self._left[key]
                    self._left[key] = left + 1, at

    def _wait(self, kind: str, who: str, most: int, every: float) -> float:
        now = self._clock.monotonic()
        left, at = self._left.pop((kind, who), (float(most), now))
        left = min(float(most), left + (now - at) / every)
        self._left[kind, who] = left, now
        return 0.0 if left >= 1 else (1 - left) * every


def network(address: str) -> str:
    """Return what counts as one address: for IPv6, the network of one customer."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "?"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((int(found), 64), strict=False))
    return str(found)
