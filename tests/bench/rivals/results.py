"""What was measured, as it is stored, and what is judged: imattr must be ahead or equal on every line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.rivals.api import BATCH, QUOTA

OURS = "imattr"

#: Users a second that the API takes.
CEILING = QUOTA * BATCH


@dataclass(frozen=True, slots=True)
class Job:
    """Events enqueued first, then delivered by two workers. Seconds; counts as measured, for the part that was `done`."""

    events: int
    done: float
    enqueue_seconds: float
    seconds: float
    calls: int
    refused: int
    worst: int
    worker_cpu: float
    redis_cpu: float
    #: Values written over newer ones, and attributes that are wrong at the end (None: it never came to the end).
    older: int
    wrong: int | None

    def whole(self, value: float) -> float:
        """What it would be for the whole job."""
        return value / self.done


@dataclass(frozen=True, slots=True)
class Kill:
    """Different users, and a worker killed: users a second before, and what became of them."""

    users_per_second: float
    lost: int
    twice: int


@dataclass(frozen=True, slots=True)
class Clients:
    """Different users, a second: sent by eight Celery clients to nobody, delivered afterwards, and delivered meanwhile."""

    sent: float
    drained: float
    meanwhile: float


@dataclass(frozen=True, slots=True)
class Quota:
    """Another quota, of the API and in everybody's settings."""

    users_per_second: float
    calls: int
    refused: int
    worst: int


@dataclass(frozen=True, slots=True)
class Failover:
    """The job, with the primary of Redis killed half-way."""

    events: int
    #: Seconds until the sentinels had a new primary, and until it made its first call after that (None: it never did).
    promoted: float
    pause: float | None
    #: What was still in Redis when it had stopped calling, in its own units.
    left: int
    lost: int
    older: int
    wrong: int
    worst: int


#: What is measured of each, by its field in `Figures`.
PARTS: Mapping[str, type[Any]] = {
    "job": Job,
    "kill": Kill,
    "clients": Clients,
    "quota": Quota,
    "failover": Failover,
}


@dataclass(frozen=True, slots=True)
class Figures:
    """One contestant's. None: it has no such thing, or it `failed`, for a reason."""

    job: Job | None = None
    kill: Kill | None = None
    clients: Clients | None = None
    quota: Quota | None = None
    failover: Failover | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Figures:
        parts = {name: PARTS[name](**stored[name]) for name in PARTS if stored.get(name)}
        return cls(failed=stored.get("failed", {}), **parts)


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run. `limits` are what the hardware gives; `absent` says who could not take part, and why."""

    machine: dict[str, str]
    setup: dict[str, float]
    limits: dict[str, float]
    figures: dict[str, Figures]
    absent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Report:
        stored = json.loads(file.read_text(encoding="utf-8"))
        figures = {name: Figures.read(measured) for name, measured in stored.pop("figures").items()}
        return cls(figures=figures, **stored)

    def write(self, file: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")


class Line(NamedTuple):
    """One line of a table."""

    title: str
    #: Which part of the figures, and what of it.
    part: str
    of: Callable[[Any], float | None]
    show: str = "{:,.0f}"
    #: Whether more is better; otherwise less is.
    more: bool = False
    #: Whether it is worked out for the whole job when only a part was done.
    whole: bool = False
    #: A value as good as this is as good as any.
    enough: float | None = None
    #: Behind whom imattr may be here, and why.
    excuses: Mapping[str, str] = {}
    #: What stands there when it was never reached.
    never: str = "–"

    def value(self, figures: Figures) -> float | None:
        part = getattr(figures, self.part)
        return None if part is None else self.of(part)


_BATCHES = ("batches_limits", "batches_throttled")
_SINGLE = ("each", "bullmq")

_MERGED = {
    "bullmq_100": "with 100 events per job, Redis gets a hundredth of the entries. The producer must have the events "
    "at hand to merge them, and nobody merges, orders or checks what is in different jobs."
}
_TWICE = (
    "users in flight when the worker died are sent again, since nobody knows whether they were applied. That is one user "
    "a call, or a hundred, times the calls in flight: the faster and fuller the calls, the more."
)
_WAITS = (
    "imattr notices the new primary and sends nothing for 3 s on purpose, or 15 s if the new primary was behind: calls of "
    "before may still land, and would land over newer values. The others go on as soon as they are connected."
)


def _everybody(why: str) -> Mapping[str, str]:
    return dict.fromkeys((*_SINGLE, *_BATCHES, "bullmq_100"), why)


JOB = (
    Line("users delivered a second, all different", "kill", lambda it: it.users_per_second, more=True),
    Line("all events delivered after, s", "job", lambda it: it.whole(it.seconds), "{:,.1f}", whole=True),
    Line("events delivered a second", "job", lambda it: it.done * it.events / it.seconds, more=True),
    Line("calls made", "job", lambda it: it.whole(it.calls), whole=True),
    Line("calls refused (60007)", "job", lambda it: it.whole(it.refused), whole=True),
    Line("worst rolling second, calls", "job", lambda it: it.worst, enough=QUOTA),
    Line("processor of the workers, s", "job", lambda it: it.whole(it.worker_cpu), "{:,.2f}", whole=True),
    Line(
        "the same for 1,000 events, ms",
        "job",
        lambda it: it.whole(it.worker_cpu) / it.events * 1e6,
        whole=True,
    ),
    Line(
        "processor of Redis, s",
        "job",
        lambda it: it.whole(it.redis_cpu),
        "{:,.2f}",
        whole=True,
        excuses=_MERGED,
    ),
    Line(
        "events enqueued a second",
        "job",
        lambda it: it.events / it.enqueue_seconds,
        more=True,
        excuses=_MERGED,
    ),
    Line("older values written over newer", "job", lambda it: it.older),
    Line("attributes wrong at the end", "job", lambda it: it.wrong),
)
CLIENTS = (
    Line("users a second, sent before the workers start", "clients", lambda it: it.drained, more=True),
    Line("users a second, workers running meanwhile", "clients", lambda it: it.meanwhile, more=True),
)
KILL = (
    Line("users lost", "kill", lambda it: it.lost),
    Line("users sent twice", "kill", lambda it: it.twice, excuses=_everybody(_TWICE)),
)
FAILOVER = (
    Line(
        "calls go on after, s",
        "failover",
        lambda it: it.pause,
        "{:,.1f}",
        excuses=_everybody(_WAITS),
        never="never",
    ),
    Line("users that did not arrive", "failover", lambda it: it.lost),
    Line("entries left in Redis", "failover", lambda it: it.left),
    Line("older values written over newer", "failover", lambda it: it.older),
    Line("attributes wrong at the end", "failover", lambda it: it.wrong),
    Line("worst rolling second, calls", "failover", lambda it: it.worst, enough=QUOTA),
)
#: Calls a second of the run with another quota.
OTHER_QUOTA = 2 * QUOTA
DOUBLED = (
    Line("users delivered a second, all different", "quota", lambda it: it.users_per_second, more=True),
    Line("calls refused, %", "quota", lambda it: 100 * it.refused / it.calls, "{:,.1f}"),
    Line("worst rolling second, calls", "quota", lambda it: it.worst, enough=OTHER_QUOTA),
)

#: The tables, by heading.
TABLES: Mapping[str, tuple[Line, ...]] = {
    "The job": JOB,
    "Updates from eight Celery clients": CLIENTS,
    "A worker killed (`kill -9`)": KILL,
    "A failover of Redis": FAILOVER,
    f"A quota of {OTHER_QUOTA} calls a second": DOUBLED,
}
LINES = tuple(line for lines in TABLES.values() for line in lines)


def cell(line: Line, figures: Figures) -> str:
    """As the table shows it: ~ for what is worked out from a part of the job."""
    if line.part in figures.failed:
        return "failed"
    value = line.value(figures)
    if value is None:
        return "–" if getattr(figures, line.part) is None else line.never
    estimated = line.whole and figures.job is not None and figures.job.done < 1
    return ("~" if estimated else "") + line.show.format(value)


def score(line: Line, figures: Figures) -> float:
    """Less is better; infinite for what was not reached."""
    value = line.value(figures)
    if value is None:
        return float("inf")
    if line.more:
        return -value
    return value if line.enough is None else max(value, line.enough)


class Judgement(NamedTuple):
    """One line: the best of the others (imattr itself without any), and who is better than imattr."""

    table: str
    line: Line
    rival: str
    better: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether imattr is ahead or equal, or there is a reason why not."""
        return self.line.excuses.keys() >= set(self.better)


def judge(report: Report) -> Iterator[Judgement]:
    """Compare imattr with the others, line by line."""
    for table, lines in TABLES.items():
        for line in lines:
            scores = {name: score(line, figures) for name, figures in report.figures.items()}
            ours = scores.pop(OURS)
            rival = min(scores, key=scores.__getitem__, default=OURS)
            yield Judgement(table, line, rival, tuple(name for name, value in scores.items() if value < ours))
