"""The comparison with others: what is worked out from the figures. The measuring itself is `make bench`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.bench.rivals.contestants import CONTESTANTS
from tests.bench.rivals.measure import Job, rate
from tests.bench.rivals.page import PAGE, RESULTS, page
from tests.bench.rivals.results import LINES, OURS, Figures, Report, cell, judge
from worker.sandbox import demo_events

OUR_FIGURES = Figures(
    events=50_000,
    done=1.0,
    enqueue_seconds=1.0,
    seconds=1.5,
    calls=120,
    refused=0,
    worst=100,
    worker_cpu=0.8,
    redis_cpu=1.0,
    older=0,
    wrong=0,
    users_per_second=9800.0,
    lost=0,
    twice=300,
)
SLOW = dataclasses.replace(OUR_FIGURES, done=0.1, calls=5000, seconds=60.0, worst=98, wrong=None, twice=4)


def report(**rivals: Figures) -> Report:
    setup: dict[str, float] = {"events": 50_000, "users": 12_000, "cap": 60.0, "quota": 100, "latency": 0.05}
    setup |= {"different": 60_000, "different_single": 2_000}
    limits: dict[str, float] = {"hset_pipelined": 100_000, "evalsha": 10_000}
    return Report({"cores": "2"}, setup, limits, {OURS: OUR_FIGURES, **rivals}, {"bullmq": "node not found"})


def behind(given: Report) -> dict[str, tuple[str, ...]]:
    return {judgement.line.title: judgement.better for judgement in judge(given) if judgement.better}


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(each=SLOW)
    written.write(tmp_path / "report.json")

    assert Report.read(tmp_path / "report.json") == written


def test_what_was_cut_short_is_worked_out_for_the_whole_job_and_marked() -> None:
    cells = {line.title: cell(line, SLOW) for line in LINES}

    assert cells["calls made"] == "~50,000"
    assert cells["all events delivered after, s"] == "~600.0"
    assert cells["events delivered a second"] == "83"
    assert cells["attributes wrong at the end"] == "–"


def test_nobody_is_ahead_by_staying_further_below_the_quota() -> None:
    assert "worst rolling second, calls" not in behind(report(each=SLOW))


def test_above_the_quota_is_behind() -> None:
    given = report(each=SLOW)
    given.figures[OURS] = dataclasses.replace(OUR_FIGURES, worst=101)

    assert behind(given)["worst rolling second, calls"] == ("each",)
    assert not all(judgement.holds for judgement in judge(given))


def test_behind_holds_only_where_and_for_whom_there_is_a_reason() -> None:
    given = report(each=SLOW)
    assert behind(given) == {"users sent twice after one kill -9": ("each",)}
    assert all(judgement.holds for judgement in judge(given))

    # BullMQ with merged jobs may be faster at the door; plain Celery may not.
    faster = dataclasses.replace(SLOW, enqueue_seconds=0.5)
    assert all(judgement.holds for judgement in judge(report(bullmq_100=faster)))
    assert not all(judgement.holds for judgement in judge(report(each=faster)))


def test_alone_nobody_is_ahead_of_us() -> None:
    assert {judgement.rival for judgement in judge(report())} == {OURS}
    assert behind(report()) == {}


def test_excuses_name_contestants() -> None:
    names = {contestant.name for contestant in CONTESTANTS}

    assert all(line.excuses.keys() <= names for line in LINES)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # Two bursts in a little more than a second are one burst a second.
        ([0.0] * 100 + [1.01] * 100, 100),
        ([number / 100 for number in range(301)], 100),
        # A burst of less than a second counts as a second.
        ([0.0, 0.1, 0.2], 3),
    ],
)
def test_a_rate_is_measured_in_full_seconds(times: list[float], expected: float) -> None:
    assert rate(times) == expected


def test_the_job_has_the_valid_events_of_the_demo_in_the_order_of_arrival() -> None:
    job = Job.make(2000)

    assert len(job.events) == job.expected.valid == 2000
    assert not job.expected.invalid
    first = json.loads(next(demo_events.events()))
    assert job.events[0][:2] == (first["user"], first["attrs"])
    # Some come late.
    assert [at for *_, at in job.events] != sorted(at for *_, at in job.events)


def test_the_page_has_every_line_and_says_who_is_missing_and_where_we_are_behind() -> None:
    text = page(report(each=SLOW))

    assert all(f"| {line.title} |" in text for line in LINES)
    assert "| BullMQ, a job per event | Left out: node not found |" in text
    assert "* **users sent twice after one kill -9**: users in flight" in text


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(Report.read(RESULTS)), "run make docs"
