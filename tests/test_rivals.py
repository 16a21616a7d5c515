"""The comparison with others: what is worked out from the figures. The measuring itself is `make bench`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.rivals import celery_app, measure
from tests.bench.rivals.contestants import CONTESTANTS
from tests.bench.rivals.measure import Scale, rate
from tests.bench.rivals.page import PAGE, RESULTS, UNEXCUSED, page
from tests.bench.rivals.results import (
    DOUBLED,
    FAILOVER,
    JOB,
    LINES,
    OURS,
    TABLES,
    Clients,
    Failover,
    Figures,
    Job,
    Kill,
    Line,
    Quota,
    Report,
    cell,
    judge,
)
from worker.sandbox import demo_events

OUR_JOB = Job(
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
)
SLOW_JOB = dataclasses.replace(OUR_JOB, done=0.1, calls=5000, seconds=60.0, worst=98, wrong=None)
OUR_FAILOVER = Failover(events=50_000, promoted=2.0, pause=5.0, left=0, lost=0, older=0, wrong=0, worst=99)
OUR_FIGURES = Figures(
    job=OUR_JOB,
    kill=Kill(users_per_second=9800.0, lost=0, twice=300),
    clients=Clients(sent=3000.0, drained=6000.0, meanwhile=1200.0),
    quota=Quota(users_per_second=18_000.0, calls=600, refused=0, worst=198),
    failover=OUR_FAILOVER,
)
SLOW = Figures(
    job=SLOW_JOB,
    kill=Kill(users_per_second=40.0, lost=0, twice=4),
    clients=Clients(sent=3000.0, drained=40.0, meanwhile=40.0),
    quota=Quota(users_per_second=80.0, calls=800, refused=8, worst=90),
    failover=dataclasses.replace(OUR_FAILOVER, pause=None, lost=500),
)


def report(**rivals: Figures) -> Report:
    setup: dict[str, float] = {"events": 50_000, "users": 12_000, "cap": 60.0, "quota": 100, "latency": 0.05}
    setup |= {"different": 60_000, "different_batches": 20_000, "different_single": 2_000, "messages": 24_000}
    limits: dict[str, float] = {"hset_pipelined": 100_000, "evalsha": 10_000}
    return Report({"cores": "2"}, setup, limits, {OURS: OUR_FIGURES, **rivals}, {"bullmq": "node not found"})


def with_job(figures: Figures, **changed: Any) -> Figures:
    assert figures.job
    return dataclasses.replace(figures, job=dataclasses.replace(figures.job, **changed))


def behind(given: Report) -> dict[tuple[str, str], tuple[str, ...]]:
    return {(it.table, it.line.title): it.better for it in judge(given) if it.better}


def line(lines: tuple[Line, ...], title: str) -> Line:
    [found] = [it for it in lines if it.title == title]
    return found


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(each=SLOW)
    written.write(tmp_path / "report.json")

    assert Report.read(tmp_path / "report.json") == written


def test_what_was_cut_short_is_worked_out_for_the_whole_job_and_marked() -> None:
    cells = {it.title: cell(it, SLOW) for it in JOB}

    assert cells["calls made"] == "~50,000"
    assert cells["all events delivered after, s"] == "~600.0"
    assert cells["events delivered a second"] == "83"
    assert cells["attributes wrong at the end"] == "–"


def test_what_failed_is_shown_as_failed_and_beaten_by_everybody() -> None:
    failed = dataclasses.replace(OUR_FIGURES, quota=None, failed={"quota": "it ended"})
    refused = line(DOUBLED, "calls refused, %")

    assert cell(refused, failed) == "failed"
    given = report(each=SLOW)
    given.figures[OURS] = failed
    assert behind(given)[_quota(), "calls refused, %"] == ("each",)
    assert f"* {CONTESTANTS[0].title}, quota: it ended" in page(given)


def test_who_never_goes_on_after_a_failover_is_behind_who_does() -> None:
    pause = line(FAILOVER, "calls go on after, s")

    assert cell(pause, SLOW) == "never"
    assert ("A failover of Redis", pause.title) not in behind(report(each=SLOW))
    # Only in the table is nothing measured told from nothing reached.
    assert cell(pause, Figures()) == "–"


def _quota() -> str:
    return next(title for title, lines in TABLES.items() if lines is DOUBLED)


def test_nobody_is_ahead_by_staying_further_below_the_quota() -> None:
    assert not any(title == "worst rolling second, calls" for _, title in behind(report(each=SLOW)))


def test_above_the_quota_is_behind() -> None:
    given = report(each=SLOW)
    given.figures[OURS] = with_job(OUR_FIGURES, worst=101)

    assert behind(given)["The job", "worst rolling second, calls"] == ("each",)
    assert not all(judgement.holds for judgement in judge(given))


def test_behind_holds_only_where_and_for_whom_there_is_a_reason() -> None:
    given = report(each=SLOW)
    assert behind(given) == {("A worker killed (`kill -9`)", "users sent twice"): ("each",)}
    assert all(judgement.holds for judgement in judge(given))
    assert UNEXCUSED not in page(given)

    # BullMQ with merged jobs may be faster at the door; plain Celery may not.
    faster = with_job(SLOW, enqueue_seconds=0.5)
    assert all(judgement.holds for judgement in judge(report(bullmq_100=faster)))
    assert not all(judgement.holds for judgement in judge(report(each=faster)))
    assert f"* **events enqueued a second**: {UNEXCUSED}" in page(report(each=faster))


def test_alone_nobody_is_ahead_of_us() -> None:
    assert {judgement.rival for judgement in judge(report())} == {OURS}
    assert behind(report()) == {}


def test_excuses_name_contestants() -> None:
    names = {contestant.name for contestant in CONTESTANTS}

    assert all(it.excuses.keys() <= names for it in LINES)


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
    job = measure.Job.make(2000)

    assert len(job.events) == job.expected.valid == 2000
    assert not job.expected.invalid
    first = json.loads(next(demo_events.events()))
    assert job.events[0][:2] == (first["user"], first["attrs"])
    # Some come late.
    assert [at for *_, at in job.events] != sorted(at for *_, at in job.events)


def test_the_page_has_every_line_and_says_who_is_missing_and_where_we_are_behind() -> None:
    text = page(report(each=SLOW))

    assert all(f"| {it.title} |" in text for it in LINES)
    assert "| BullMQ, a job per event | Left out: node not found |" in text
    assert "* **users sent twice**: users in flight" in text


def test_a_page_can_be_made_of_a_run_that_measured_only_a_part() -> None:
    text = page(report(each=Figures(kill=SLOW.kill)))

    assert "| events delivered a second | **33,333** | – |" in text


def test_one_that_fails_stops_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(contestant: object, scale: Scale) -> Kill:
        if contestant is not CONTESTANTS[0]:
            raise RuntimeError("it makes\nno call")
        return Kill(1.0, 0, 0)

    monkeypatch.setitem(measure.MEASURES, "kill", kill)
    monkeypatch.setattr(measure, "absent", lambda: {"bullmq": "node not found"})
    monkeypatch.setattr(measure, "machine", lambda: {"cores": "2"})
    monkeypatch.setattr(measure, "bare", lambda events: {"hset_pipelined": 1, "evalsha": 1})
    said = list[str]()

    found = measure.measure(
        Scale(events=100), said.append, ["each", "bullmq"], ["kill"], file=tmp_path / "found.json"
    )

    assert found.figures[OURS] == Figures(kill=Kill(1.0, 0, 0))
    assert found.figures["each"] == Figures(failed={"kill": "RuntimeError: it makes no call"})
    assert "bullmq" not in found.figures
    assert Report.read(tmp_path / "found.json") == found
    assert any("it makes no call" in text for text in said)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:1/0", ("redis://127.0.0.1:1/0", {})),
        (
            "redis+sentinel://127.0.0.1:1,127.0.0.1:2/imattr",
            ("sentinel://127.0.0.1:1;sentinel://127.0.0.1:2", {"master_name": "imattr"}),
        ),
    ],
)
def test_celery_gets_its_own_way_to_write_sentinels(url: str, expected: tuple[str, dict[str, str]]) -> None:
    assert celery_app.broker(url) == expected


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(Report.read(RESULTS)), "run make docs"
