"""What needs a person now, in the doctor's words: from the state alone, without an API call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from worker.config import Settings
from worker.operate import doctor
from worker.operate.doctor import Finding
from worker.operate.settings_in_force import in_force
from worker.operate.words import counted
from worker.state.connection import Redis
from worker.state.fleet import Worker


def problems(redis: Redis, settings: Settings, state: Mapping[str, Any]) -> list[Finding]:
    """Everything that is wrong, errors first. `state` is what `status.read` returns."""
    found = [*_of_state(state), *doctor.fleet(redis, settings)]
    return sorted((one for one in found if one.level != "ok"), key=lambda one: one.level)


def _of_state(state: Mapping[str, Any]) -> Iterator[Finding]:
    ledger = state["ledger"]
    if not ledger["balanced"]:
        found = f"the ledger does not balance, by {ledger['imbalance']:,}"
        yield Finding(
            "ledger", "error", found, "this is a bug, or somebody has changed keys directly: please report it"
        )
    if dead := state["dead"]:
        found = f"{counted(dead, 'user')} given up: dead letters"
        yield Finding("dead letters", "warning", found, "fix the cause by their codes, then redrive them")
    for one in state["imports"]:
        if pause := one["paused"]:
            found = f"the import {one['name']} is paused by {pause['by']}: {pause['reason']}"
            yield Finding("import", "warning", found, "resume it once the reason is gone")
    workers = [Worker(**worker) for worker in state["workers"]]
    different = [one.name.upper() for one in in_force(workers) if one.disagree]
    if different:
        found = f"workers have different settings: {', '.join(different)}"
        yield Finding(
            "settings",
            "warning",
            found,
            "give all workers the same settings, and restart those that are behind",
        )
    versions = sorted({worker.version for worker in workers})
    if len(versions) > 1:
        yield Finding(
            "version", "warning", f"workers of several versions: {', '.join(versions)}", "finish the rollout"
        )
