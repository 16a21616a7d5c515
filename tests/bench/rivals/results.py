"""What was measured, as it is stored, and what is judged: imattr must be ahead or equal on every line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.bench.rivals.api import BATCH, QUOTA

OURS = "imattr"

#: Users a second that the API takes.
CEILING = QUOTA * BATCH


@dataclass(frozen=True, slots=True)
class Figures:
    """One contestant's. Times in seconds; what belongs to the whole job is as measured, for the part `done`."""

    #: The job: events enqueued first, then delivered by two workers.
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
    #: The run of different users in which a worker was killed: users a second before, and what became of them.
    users_per_second: float
    lost: int
    twice: int
    #: Different users a second at the API, enqueued meanwhile by eight clients of Celery (None: it has none).
    from_clients: float | None = None

    def whole(self, value: float) -> float:
        """What it would be for the whole job."""
        return value / self.done


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
        figures = {name: Figures(**measured) for name, measured in stored.pop("figures").items()}
        return cls(figures=figures, **stored)

    def write(self, file: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


class Line(NamedTuple):
    """One line of the table."""

    title: str
    value: Callable[[Figures], float | None]
    show: str = "{:,.0f}"
    #: Whether more is better; otherwise less is.
    more: bool = False
    #: Whether it is worked out for the whole job when only a part was done.
    whole: bool = False
    #: A value as good as this is as good as any.
    enough: float | None = None
    #: Behind whom imattr may be here, and why.
    excuses: Mapping[str, str] = {}


_MERGED = {
    "bullmq_100": "with 100 events per job, Redis gets a hundredth of the entries. The producer must have the events "
    "at hand to merge them, and nobody merges, orders or checks what is in different jobs."
}
_OVER = {
    "bullmq_100": "its limiter lets the calls of a second pass at once, so a rolling second may hold nearly two "
    "seconds' worth, and the API refuses some. imattr leaves 2 % of the slots free, and no second exceeds the quota."
}
_IN_CALLS = (
    "users in flight when the worker died are sent again, since nobody knows whether they were applied. That "
)
_IN_CALLS += (
    "is one user a call, or a hundred, times the calls in flight: the faster and fuller the calls, the more."
)

LINES = (
    Line("users delivered a second, all different", lambda it: it.users_per_second, more=True, excuses=_OVER),
    Line(
        "users a second from 8 Celery clients, `delay()` until at the API",
        lambda it: it.from_clients,
        more=True,
    ),
    Line("all events delivered after, s", lambda it: it.whole(it.seconds), "{:,.1f}", whole=True),
    Line("events delivered a second", lambda it: it.done * it.events / it.seconds, more=True),
    Line("calls made", lambda it: it.whole(it.calls), whole=True),
    Line("calls refused (60007)", lambda it: it.whole(it.refused), whole=True),
    Line("worst rolling second, calls", lambda it: it.worst, enough=QUOTA),
    Line("processor of the workers, s", lambda it: it.whole(it.worker_cpu), "{:,.2f}", whole=True),
    Line("the same for 1,000 events, ms", lambda it: it.whole(it.worker_cpu) / it.events * 1e6, whole=True),
    Line("processor of Redis, s", lambda it: it.whole(it.redis_cpu), "{:,.2f}", whole=True, excuses=_MERGED),
    Line("events enqueued a second", lambda it: it.events / it.enqueue_seconds, more=True, excuses=_MERGED),
    Line("older values written over newer", lambda it: it.older),
    Line("attributes wrong at the end", lambda it: it.wrong),
    Line("users lost after one kill -9", lambda it: it.lost),
    Line(
        "users sent twice after one kill -9",
        lambda it: it.twice,
        excuses=dict.fromkeys(
            ("each", "bullmq", "bullmq_100", "batches_limits", "batches_throttled"), _IN_CALLS
        ),
    ),
)


def cell(line: Line, figures: Figures) -> str:
    """As the table shows it: ~ for what is worked out from a part of the job."""
    value = line.value(figures)
    if value is None:
        return "–"
    return ("~" if line.whole and figures.done < 1 else "") + line.show.format(value)


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

    line: Line
    rival: str
    better: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether imattr is ahead or equal, or there is a reason why not."""
        return self.line.excuses.keys() >= set(self.better)


def judge(report: Report) -> Iterator[Judgement]:
    """Compare imattr with the others, line by line."""
    for line in LINES:
        scores = {name: score(line, figures) for name, figures in report.figures.items()}
        ours = scores.pop(OURS)
        rival = min(scores, key=scores.__getitem__, default=OURS)
        yield Judgement(line, rival, tuple(name for name, value in scores.items() if value < ours))
