"""The end-to-end demo in a sandbox, judged by the simulator's own record.

Streams events into the product while workers deliver, makes some calls fail on purpose, and then compares what the simulator
applied with what should be there. The expected result is computed from the lines of the file alone, without the buffer's code
or rules.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import requests

from worker.clock import SystemClock
from worker.producer import Producer
from worker.sandbox import demo_events
from worker.sandbox.directory import empty
from worker.sandbox.processes import Plan, Sandbox
from worker.state.attribute_names import AttributeNames
from worker.state.buffer import Buffer, Snapshot
from worker.state.connection import connect
from worker.state.keys import LEDGER, Keys
from worker.state.scripts import text

#: Events a second: more than 100 calls of 100 users can carry, so that the buffer has work.
RATE = 12_000
#: Lines that the producer sends at a time.
CHUNK = 400
#: Seconds in which everything must be delivered after the last event.
PATIENCE = 120.0

#: What goes wrong on purpose, now and then: internal errors, bad gateways, resets before and after the write was applied, a
#: garbled reply, a call refused for its frequency.
FAULTS: list[dict[str, Any]] = [
    {"chance": 0.15, **fault}
    for fault in (
        {"kind": "code", "code": 91000, "times": 3},
        {"kind": "status", "code": 502, "times": 2},
        {"kind": "reset", "times": 1},
        {"kind": "reset", "applied": True, "times": 1},
        {"kind": "truncated", "times": 1},
        {"kind": "code", "code": 60007, "times": 1},
    )
]


@dataclass(slots=True)
class Expected:
    """The result of the lines: the newest value of each attribute, and every version of it."""

    latest: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[tuple[str, str, str], list[int]] = field(default_factory=lambda: defaultdict(list))
    valid: int = 0
    invalid: int = 0


#: A condition, whether it holds, and the figure behind it.
Check = tuple[str, bool, str]


@dataclass(slots=True)
class Report:
    """What the run showed, and whether it is as it must be."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(good for _, good, _ in self.checks)


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of the running demo."""

    lines: int
    total: int
    snapshot: Snapshot
    calls: int
    worst: int
    elapsed: float


def expect(lines: Iterable[str], unreachable: frozenset[str]) -> Expected:
    """Work out the final state from the lines. Users that the API refuses for good keep nothing."""
    expected = Expected()
    newest: dict[tuple[str, str], int] = {}
    for line in lines:
        event = _parse(line)
        if event is None:
            expected.invalid += 1
            continue
        expected.valid += 1
        user, attrs, at = event
        if user in unreachable:
            continue
        for name, value in attrs.items():
            expected.versions[user, name, value].append(at)
            if at >= newest.get((user, name), 0):
                newest[user, name] = at
                expected.latest.setdefault(user, {})[name] = value
    return expected


def _parse(line: str) -> tuple[str, dict[str, str], int] | None:
    """A valid event, by the rules that the API's documents state; None for an invalid line."""
    try:
        event = json.loads(line)
        user, attrs, at = event["user"], event["attrs"], event["occurred_at"]
        moment = at if isinstance(at, int) else round(datetime.fromisoformat(at).timestamp() * 1000)
        good = (
            isinstance(user, str)
            and 1 <= len(user.encode()) <= 32
            and all(" " <= letter <= "~" for letter in user)
            and 1 <= len(attrs) <= 10
            and all(name in demo_events.NAMES for name in attrs)
            and all(isinstance(value, str) and 1 <= len(value.encode()) <= 50 for value in attrs.values())
        )
    except (ValueError, TypeError):
        return None
    return (user, attrs, moment) if good else None


def run(
    directory: Path,
    redis_url: str = "",
    *,
    lines: Sequence[str],
    say: Callable[[str], None],
    show: Callable[[Progress], None],
    workers: int = 2,
    flower: bool = True,
    stopping: Callable[[], bool] = lambda: False,
    impatient: Callable[[], bool] = lambda: False,
) -> Report:
    """Run the demo in `directory`, which is emptied first. Raises `SandboxError` if a part fails.

    With a `redis_url`, uses that server instead of an embedded one, under an app id of its own, and removes its keys
    afterwards. `stopping` asks it to stop, `impatient` to do so at once. Raises `KeyboardInterrupt` if it was stopped.
    """
    empty(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plan = Plan(workers=workers, flower=flower, names=demo_events.NAMES)
    sdkappid = 1_400_000_000 + secrets.randbelow(99_999_999)
    prefix = f"imattr-demo:{sdkappid}:"
    environ = {"IMATTR_SDKAPPID": str(sdkappid), "IMATTR_BROKER_PREFIX": prefix}
    environ |= {"IMATTR_REDIS_URL": redis_url} if redis_url else {}
    with (
        contextlib.ExitStack() as cleanup,
        Sandbox(directory, environ, plan, stopping=stopping, impatient=impatient) as sandbox,
    ):
        if redis_url:
            cleanup.callback(_remove_keys, redis_url, Keys(sdkappid).pattern, f"{prefix}*")
        for stand_in in sandbox.stand_ins:
            say(f"sandboxed  {stand_in}")
        say(f"redis      {_without_password(sandbox.redis_url)}")
        say(f"api        {sandbox.api_url}")
        if flower:
            say(f"flower     {sandbox.flower_url}, {sandbox.login}")
        say(f"logs       {directory}")
        return _Demo(sandbox, lines, show).run()


def _remove_keys(redis_url: str, *patterns: str) -> None:
    with connect(redis_url) as redis:
        for pattern in patterns:
            for key in redis.scan_iter(pattern, count=1000):
                redis.delete(key)


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


class _Demo:
    """One run in a running sandbox."""

    def __init__(self, sandbox: Sandbox, lines: Sequence[str], show: Callable[[Progress], None]) -> None:
        sdkappid = int(sandbox.environ["IMATTR_SDKAPPID"])
        self._sandbox, self._lines, self._show = sandbox, lines, show
        self._redis = connect(sandbox.redis_url)
        self._keys = Keys(sdkappid)
        self._buffer = Buffer(self._redis, self._keys)
        self._producer = Producer(sandbox.redis_url, sdkappid)
        self._refused = self._given = 0
        self._started = time.monotonic()
        self._shown = 0.0

    def run(self) -> Report:
        # Two accounts that the API does not know: they, and no others, must become dead letters.
        users = [event[0] for line in self._lines[:50] if (event := _parse(line))]
        self._strangers = frozenset(users[:2])
        accounts = {event[0] for line in self._lines if (event := _parse(line))} - self._strangers
        self._simulator("accounts", sorted(accounts))
        self._simulator("quirks", {"accounts_must_exist": True})
        self._simulator("faults", FAULTS)
        AttributeNames(self._redis, self._keys, SystemClock()).set(demo_events.NAMES)
        self._stream()
        drained = self._drain()
        return self._judge(drained)

    def _simulator(self, what: str, given: object = None) -> Any:
        url = f"{self._sandbox.api_url}/simulator/{what}"
        if given is not None:
            return requests.post(url, json=given, timeout=30).json()
        reply = requests.get(url, timeout=60)
        return [json.loads(line) for line in reply.text.splitlines()] if what == "record" else reply.json()

    def _retries(self) -> str:
        """Counted from the canonical line of each batch."""
        logs = [log.read_text(errors="replace") for log in self._sandbox.directory.glob("worker-*.log")]
        lines = [line for log in logs for line in log.splitlines() if '"batch_settled"' in line]
        batches = [batch for line in lines if (batch := json.loads(line))["retried"] or batch["snoozed"]]
        users = sum(batch["retried"] + batch["snoozed"] for batch in batches)
        return f"{users:,} users of {len(batches)} batches"

    def _look(self, *, always: bool = False) -> Snapshot:
        if self._sandbox.stopping():
            raise KeyboardInterrupt
        snapshot = self._buffer.snapshot()
        now = time.monotonic()
        if always or now - self._shown > 0.2:
            self._shown = now
            self._sandbox.check()
            state = self._simulator("state")
            elapsed = now - self._started
            total = len(self._lines)
            self._show(
                Progress(self._given, total, snapshot, state["calls"], state["worst_rolling_second"], elapsed)
            )
        return snapshot

    def _stream(self) -> None:
        start = time.monotonic()
        for first in range(0, len(self._lines), CHUNK):
            updates: list[tuple[Any, ...]] = []
            for line in self._lines[first : first + CHUNK]:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    updates.append((event["user"], event["attrs"], event["occurred_at"]))
                    continue
                self._refused += 1
            self._refused += len(self._producer.set_many(updates).refused)
            self._given = min(first + CHUNK, len(self._lines))
            self._look()
            time.sleep(max(0.0, start + self._given / RATE - time.monotonic()))

    def _drain(self) -> bool:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            snapshot = self._look()
            if not snapshot.pending and not snapshot.in_flight:
                self._look(always=True)
                return True
            time.sleep(0.05)
        return False

    def _judge(self, drained: bool) -> Report:
        elapsed = time.monotonic() - self._started
        expected = expect(self._lines, self._strangers)
        snapshot, state = self._buffer.snapshot(), self._simulator("state")
        dead = set(map(text, self._redis.hkeys(self._keys.dead)))
        return Report(
            self._rows(expected, snapshot, state, elapsed, len(dead)),
            [
                ("everything was delivered", drained, f"{snapshot.pending + snapshot.in_flight} left"),
                *self._checks_of_values(expected),
                *_checks_of_calls(state),
                ("only unknown accounts are dead letters", dead == self._strangers, f"{len(dead)}"),
                (
                    "exactly the invalid lines were refused",
                    self._refused == expected.invalid,
                    f"{self._refused:,} refused, {expected.invalid:,} invalid",
                ),
                ("the ledger balances", snapshot.balanced, _equation(snapshot)),
            ],
        )

    def _rows(
        self, expected: Expected, snapshot: Snapshot, state: dict[str, Any], elapsed: float, dead: int
    ) -> list[tuple[str, str]]:
        ledger = snapshot.ledger
        accepted, coalesced = ledger["accepted"], ledger["coalesced"]
        refused = ", ".join(f"{code} {count} times" for code, count in state["refused"].items())
        return [
            ("events", f"{len(self._lines):,} in {elapsed:.1f} s, {self._refused:,} refused by validation"),
            ("updates accepted", f"{accepted:,} about {len(expected.latest) + dead:,} users"),
            ("coalesced", f"{coalesced:,} ({coalesced / max(1, accepted):.0%})"),
            ("unchanged, stale", f"{ledger['unchanged']:,}, {ledger['stale']:,}"),
            ("users delivered", f"{ledger['delivered']:,}"),
            ("calls", f"{state['calls']:,}, instead of {expected.valid:,} at one an event"),
            ("worst rolling second", f"{state['worst_rolling_second']} calls"),
            ("fill", f"{state['users'] / max(1, state['applied_requests']):.1f} users per call"),
            ("faults on purpose", f"{sum(state['faults'].values())}; refused by code: {refused}"),
            ("retries", self._retries()),
            ("dead letters", f"{dead} users"),
        ]

    def _checks_of_values(self, expected: Expected) -> list[Check]:
        applied: dict[str, dict[str, str]] = self._simulator("users")
        overwritten = stale_writes(self._simulator("record"), expected)
        users = expected.latest.keys() | applied.keys()
        wrong = sum(expected.latest.get(user) != applied.get(user) for user in users)
        return [
            ("every final value is the expected one", not wrong, f"{wrong} users differ"),
            ("no older value was applied after a newer one", not overwritten, f"{overwritten} were"),
        ]


def _checks_of_calls(state: dict[str, Any]) -> list[Check]:
    worst, oversized, repeated = state["worst_rolling_second"], state["oversized"], state["repeated_users"]
    return [
        ("no rolling second above 100 calls", worst <= 100, f"the worst had {worst}"),
        ("no call above 100 users", not oversized, f"{oversized} were"),
        ("no user twice in a call", not repeated, f"{repeated} calls"),
    ]


def _equation(snapshot: Snapshot) -> str:
    ledger = snapshot.ledger
    settled = " + ".join(f"{ledger[name]:,} {name.replace('_', ' ')}" for name in LEDGER[2:])
    return f"{ledger['accepted']:,} accepted = {settled}"


def stale_writes(record: Iterable[Sequence[Any]], expected: Expected) -> int:
    """Count applied values that must be older than the one applied before."""
    reached: dict[tuple[str, str], int] = {}
    stale = 0
    for _, _, user, attrs in record:
        for name, value in attrs.items():
            floor = reached.get((user, name), 0)
            # The same value may have come several times: assume the earliest time that fits.
            fitting = [at for at in expected.versions.get((user, name, value), ()) if at >= floor]
            if fitting:
                reached[user, name] = min(fitting)
            else:
                stale += 1
    return stale
