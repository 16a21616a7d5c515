"""Which workers there are, and how fast they are: for people and autoscalers; nothing is decided by it.

Every few seconds, each worker reports that it is alive and how many of its threads are busy, and the leading dispatcher
samples the fleet's counters. A rate is the difference of two samples, so it says what was done, not what is allowed.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from redis import Redis

from . import scripts
from .keys import Keys
from .scripts import number, text

#: Seconds between two samples, and between two reports of a worker.
EVERY = 5.0
#: Samples that are kept, a little more than an hour's; and one a minute, a little more than a day's.
SAMPLES, MINUTES = 800, 1500
#: Seconds after which a silent worker counts as gone, and after which it is forgotten.
ALIVE, FORGOTTEN = 15.0, 3600.0

NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at one instant: what it has done so far, and what is left."""

    at: float
    calls: int
    #: Seconds that all calls took together.
    call_seconds: float
    delivered: int
    accepted: int
    pending: int
    in_flight: int
    #: Seconds for which the oldest pending user had waited; None from a worker of the previous version.
    oldest: float | None = None

    @classmethod
    def _of(cls, entry: Any) -> Self:
        id, fields = entry
        found = {text(name): number(value) for name, value in fields.items()}
        delivered, accepted, pending, in_flight = (
            found.get(name, 0) for name in ("delivered", "accepted", "pending", "in_flight")
        )
        return cls(
            int(id.partition(b"-")[0]) / 1000,
            found.get("calls", 0),
            found.get("call_ms", 0) / 1000,
            delivered,
            accepted,
            pending,
            in_flight,
            found["oldest_ms"] / 1000 if "oldest_ms" in found else None,
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """What was done a second, over some period. `call` is the mean time of a call in seconds, None if there was none."""

    calls: float
    users: float
    call: float | None


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is alive."""

    name: str
    threads: int
    busy: int
    version: str
    #: The settings that are not the defaults, without secrets; None if it does not say.
    settings: Mapping[str, str] | None = None


def pace(samples: Sequence[Sample], seconds: float) -> Pace | None:
    """The pace over the last `seconds` before the newest sample; None if they have fewer than two samples.

    After a failover the counters may be lower than before: then earlier samples do not count.
    """
    if len(samples) < 2:
        return None
    last = samples[-1]
    first = samples[
        min(bisect_left(samples, last.at - seconds, key=lambda sample: sample.at), len(samples) - 2)
    ]
    took = last.at - first.at
    calls, users = last.calls - first.calls, last.delivered - first.delivered
    if took <= 0 or calls < 0 or users < 0:
        return None
    call = (last.call_seconds - first.call_seconds) / calls if calls else None
    return Pace(calls / took, users / took, call)


class Fleet:
    """The workers of one app, and their pace. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys
        self._sample = scripts.load(redis, "sample")

    def sample(self) -> None:
        """Take a sample, and forget workers that are long gone."""
        k = self._keys
        keys = [k.samples, k.history, k.pending, k.flight, k.ledger, k.server, k.rate]
        self._sample([*keys, k.samples_by_minute, k.live, k.backfill], [SAMPLES, MINUTES])
        gone = [name for name, (at, _) in self._reports().items() if self._now() - at > FORGOTTEN]
        if gone:
            self._redis.hdel(k.workers, *gone)

    def report(
        self, name: str, *, threads: int, busy: int, version: str, settings: Mapping[str, str] = NO_SETTINGS
    ) -> None:
        """Report that a worker is alive, and which of its settings are not the defaults."""
        about = {"at": self._now(), "threads": threads, "busy": busy, "version": version}
        self._redis.hset(self._keys.workers, name, json.dumps(about | {"settings": dict(settings)}))

    def leave(self, name: str) -> None:
        """Report that a worker has ended."""
        self._redis.hdel(self._keys.workers, name)

    def samples(self, most: int = SAMPLES) -> list[Sample]:
        """The newest samples, oldest first."""
        found: Any = self._redis.xrevrange(self._keys.samples, count=most)
        return [Sample._of(entry) for entry in reversed(found)]

    def samples_since(self, at: float) -> list[Sample]:
        """The samples taken after this time, oldest first."""
        return self._since(self._keys.samples, at)

    def minutes_since(self, at: float) -> list[Sample]:
        """The samples kept one a minute, likewise."""
        return self._since(self._keys.samples_by_minute, at)

    def _since(self, key: str, at: float) -> list[Sample]:
        found: Any = self._redis.xrange(key, round(at * 1000) + 1)
        return [Sample._of(entry) for entry in found]

    def workers(self) -> list[Worker]:
        """The workers that are alive, by name."""
        now = self._now()
        alive = [
            worker for at, worker in self._reports().values() if abs(now - at) < ALIVE and worker is not None
        ]
        return sorted(alive, key=lambda worker: worker.name)

    def _now(self) -> float:
        seconds, micros = self._redis.time()
        return int(seconds) + int(micros) / 1e6

    def _reports(self) -> dict[str, tuple[float, Worker | None]]:
        """Each worker's last report, by name, with its time; one that cannot be read counts as long gone."""
        found: dict[str, tuple[float, Worker | None]] = {}
        for name, packed in self._redis.hgetall(self._keys.workers).items():
            try:
                about = json.loads(packed)
                settings = about.get("settings")
                worker = Worker(
                    text(name),
                    int(about["threads"]),
                    int(about["busy"]),
                    str(about["version"]),
                    {str(key): str(value) for key, value in settings.items()}
                    if settings is not None
                    else None,
                )
                found[text(name)] = (float(about["at"]), worker)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                found[text(name)] = (0.0, None)
        return found
