"""Imports that a person has paused: the importer looks here between its chunks, and waits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from redis import Redis

from . import scripts
from .keys import Keys
from .line import SOMEBODY
from .scripts import text


@dataclass(frozen=True, slots=True)
class Pause:
    """Who paused an import, why, and when: seconds since 1970 on Redis' clock."""

    by: str
    reason: str
    at: float


class ImportPauses:
    """The paused imports of one app, by name. Thread-safe."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis, self._keys = redis, keys
        self._pause = scripts.load(redis, "pause_import")
        self._resume = scripts.load(redis, "resume_import")

    def pause(self, name: str, reason: str, *, by: str = SOMEBODY) -> bool:
        """Make an import wait until `resume`; False if it waits already, or is not unfinished."""
        seconds, micros = self._redis.time()
        about = json.dumps(asdict(Pause(by, reason, seconds + micros / 1e6)))
        keys = [self._keys.imports, self._keys.import_pauses, self._keys.history]
        return bool(self._pause(keys, [name, about, by, reason]))

    def resume(self, name: str, *, by: str = SOMEBODY) -> bool:
        """Let it continue; False if it was not paused."""
        return bool(self._resume([self._keys.import_pauses, self._keys.history], [name, by]))

    def find(self, name: str) -> Pause | None:
        """Who paused this import, if anybody."""
        return _pause(self._redis.hget(self._keys.import_pauses, name))

    def everyone(self) -> dict[str, Pause]:
        """All that are paused, by name."""
        found = self._redis.hgetall(self._keys.import_pauses)
        return {text(name): pause for name, packed in found.items() if (pause := _pause(packed))}


def _pause(packed: bytes | str | None) -> Pause | None:
    """Read what is stored; a pause that cannot be read is still a pause."""
    if packed is None:
        return None
    try:
        about = json.loads(packed)
        return Pause(str(about["by"]), str(about["reason"]), float(about["at"]))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return Pause(SOMEBODY, "", 0.0)
