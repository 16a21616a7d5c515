"""The table on the terminal, and the page of `docs/`, both from the same results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from tests.bench import Results, console
from tests.bench.rivals.contestants import CONTESTANTS, ROOT, Contestant
from tests.bench.rivals.measure import CLIENTS, CLIENTS_CAP, QUOTA_CAP, STALL, Scale, measure
from tests.bench.rivals.results import CEILING, OURS, TABLES, Line, Report, cell, judge, score

RESULTS, PAGE = ROOT / "docs" / "comparison.json", ROOT / "docs" / "comparison.md"
#: The figures of the last run, whole or not.
LATEST = ROOT / "build" / "comparison.json"


def rivals(results: Results) -> None:
    """The same job side by side with what a user would pick instead (about half an hour)."""
    report = measure(Scale(), lambda text: console.print(f"  {text}"), file=LATEST)
    for table in show(report):
        console.print(table)
    for judgement in judge(report):
        _, line, rival, better = judgement
        ours, best = (cell(line, report.figures[name]) for name in (OURS, rival))
        wanted = "ahead or equal" + (", but for a reason" if better and judgement.holds else "")
        title = f"{judgement.table}: {line.title}"
        results.add(title, f"{ours}; best other {best}, {rival}", wanted, judgement.holds)
    where = LATEST.relative_to(ROOT)
    console.print(
        f"  figures: {where}; for the page: python -m tests.bench.rivals --read {where} --write-docs"
    )


def _present(report: Report) -> list[Contestant]:
    return [it for it in CONTESTANTS if it.name in report.figures]


def _cells(report: Report, line: Line) -> list[tuple[str, bool]]:
    """The line's cells, and whether each is the best, or as good."""
    scores = {name: score(line, figures) for name, figures in report.figures.items()}
    best = min(scores.values())
    return [
        (cell(line, report.figures[it.name]), scores[it.name] == best < float("inf"))
        for it in _present(report)
    ]


def show(report: Report) -> Iterator[Table]:
    """One line a figure, one column a contestant; the best of each line is green."""
    for title, lines in TABLES.items():
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for contestant in _present(report):
            table.add_column(contestant.title, justify="right")
        for line in lines:
            cells = _cells(report, line)
            table.add_row(line.title, *(f"[green]{text}[/]" if best else text for text, best in cells))
        yield table


def page(report: Report) -> str:
    """The page on this benchmark."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    setup = report.setup
    yield "# imattr compared with what you would use instead"
    yield ""
    yield (
        "This page is for somebody who could also write a Celery task, use celery-batches with a limiter, or take BullMQ. "
        "All of them do the same work on the same machine, in one run that you can repeat: `make bench PARTS=rivals`."
    )
    yield ""
    yield "![Users delivered a second, and calls in the worst rolling second](comparison.svg)"
    yield ""
    yield (
        "Two worker processes with 16 threads (or jobs at a time) each deliver to the same simulator of the API, which takes "
        f"up to 100 users a call, answers after {setup['latency'] * 1000:.0f} ms, and refuses more than "
        f"{setup['quota']:.0f} calls in any rolling second. Redis keeps an append-only file with `appendfsync everysec`."
    )
    yield ""
    yield (
        "In every table, bold is the best and what is as good. ~: extrapolated to the whole job from "
        f"{setup['cap']:.0f} seconds of it. –: does not apply, or was not reached."
    )
    if not any(figures.clients for figures in report.figures.values()):
        yield ""
        yield (
            "**These figures are of an earlier run**, before there were the other parts. In it, BullMQ was limited to 100 jobs a "
            "second, and Celery's workers for a task per event had threads; both are set up better now, as written below."
        )
    explained = dict(zip(TABLES, _explanations(report), strict=True))
    for title, lines in TABLES.items():
        # A run of some parts only has nothing to say of the others.
        if not any(line.value(figures) is not None for line in lines for figures in report.figures.values()):
            continue
        yield ""
        yield f"## {title}"
        yield ""
        yield explained[title]
        yield ""
        yield from _table(report, lines)
        behind = [it for it in judge(report) if it.table == title and it.better]
        if behind:
            yield ""
            yield "Where imattr is behind:"
            yield ""
        for judgement in behind:
            names = judgement.better
            for why in dict.fromkeys(judgement.line.excuses.get(name, UNEXCUSED) for name in names):
                yield f"* **{judgement.line.title}**: {why}"
    failures = [
        f"* {it.title}, {part}: {why}"
        for it in _present(report)
        for part, why in report.figures[it.name].failed.items()
    ]
    if failures:
        yield ""
        yield "## What failed"
        yield ""
        yield from failures
    yield ""
    yield "## How each is set up"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for contestant in _present(report):
        yield f"| {contestant.title} | {contestant.setting} |"
    for contestant in CONTESTANTS:
        if contestant.name in report.absent:
            yield f"| {contestant.title} | Left out: {report.absent[contestant.name]} |"
    yield ""
    yield (
        "Each is a short file in [`tests/bench/rivals`](../tests/bench/rivals), written as its documentation "
        "recommends; those in Python call the API with the same client as imattr. Better settings are welcome."
    )
    yield ""
    yield "## Run it"
    yield ""
    yield "```"
    yield "make bench PARTS=rivals                                     # measures and compares: half an hour"
    yield "python -m tests.bench.rivals --only each --parts failover   # one contestant and imattr, one part"
    yield "python -m tests.bench.rivals --write-docs                   # everything, and writes this page and its picture"
    yield "```"
    yield ""
    yield (
        "It needs a Redis server for the sentinels (`redis-server` or `valkey-server`), and `node` and `npm` for BullMQ, which is "
        "left out without them. What fails is noted and the rest goes on; the figures are in `build/comparison.json`."
    )
    yield ""
    yield "Measured on: " + ", ".join(f"{name} {value}" for name, value in report.machine.items()) + "."


#: What is said where imattr is behind without a reason.
UNEXCUSED = "no reason; this must be fixed."


def _table(report: Report, lines: Sequence[Line]) -> Iterator[str]:
    present = _present(report)
    yield f"| | {' | '.join(it.title for it in present)} |"
    yield "|---|" + "---:|" * len(present)
    for line in lines:
        cells = (f"**{text}**" if best else text for text, best in _cells(report, line))
        yield f"| {line.title} | {' | '.join(cells)} |"


def _explanations(report: Report) -> Iterator[str]:
    """What each table shows, and how to read it."""
    setup, limits = report.setup, report.limits
    sizes = (
        f"{setup['different']:,.0f} ({setup['different_batches']:,.0f} with celery-batches, "
        f"{setup['different_single']:,.0f} where a call has one user)"
    )
    yield (
        f"{setup['events']:,} events about {setup['users']:,} users, those of `make run`, are enqueued by one process. Then the "
        f"workers start. Calls are counted from the first one on, and so is the processor time of the workers. The first line is "
        f"measured with different users, {sizes}, in the full seconds before a worker is killed. The job has several events for "
        "each user, which imattr coalesces before it sends, so it may deliver more events a second than the quota allows users. "
        "imattr gets the events as they arrive, some late, with their times. The others have no notion of event times, so they "
        "get them sorted, as if nothing ever came late; what still goes wrong is theirs. "
        f"The limits: the quota allows {CEILING:,} users a second; Redis alone takes {limits['hset_pipelined']:,.0f} events a "
        f"second from one client in pipelines (HSET), and runs {limits['evalsha']:,.0f} minimal scripts a second, one by one."
    )
    sent = [figures.clients.sent for figures in report.figures.values() if figures.clients]
    alone = f" ({min(sent):,.0f} to {max(sent):,.0f} messages a second here)" if sent else ""
    yield (
        f"{CLIENTS} client processes send {setup.get('messages', 0):,.0f} messages, each about another user, one by one with "
        f"`send_task`{alone}. The first line has all of them sent before the workers start, and counts from the first call on: "
        "what the workers do. The second has the workers running meanwhile, and counts from the first message until all users "
        f"are at the API, for {CLIENTS_CAP:.0f} s at most: on two cores the clients take most of the processor, and what is "
        "left for the workers decides. BullMQ does not take Celery's messages."
    )
    yield (
        f"Different users: {sizes}. Halfway, one of the two workers is killed and another one started. A user is lost if it had "
        f"not arrived when nothing was left in Redis, or no call had come for {STALL:.0f} s; it was sent twice if it was applied "
        "more than once. What the dead worker had goes to another one after 60 s with imattr (`LEASE`) and Celery "
        "(`visibility_timeout`, which a worker with processes looks at every 100 s); BullMQ checks every 30 s. "
        "Celery on Redis takes a message and notes that it is taken in two steps: one that is between them when the worker dies "
        "is lost."
    )
    promoted = [figures.failover.promoted for figures in report.figures.values() if figures.failover]
    took = f" ({min(promoted):.1f} to {max(promoted):.1f} s here)" if promoted else ""
    yield (
        f"A primary with two replicas, and three sentinels that give up on a server after 1 s. The first events of the job: {sizes}. "
        f"Halfway, the primary is killed (`kill -9`) and stays away. The seconds count from then until the first call after "
        f"the sentinels have a new primary{took}. At the end, nothing is left in Redis, or no call has come for {STALL:.0f} s. "
        "Users that did not arrive are lost, or still in Redis as messages, jobs or pending users that nobody sends: the line below "
        "says which. An attribute is wrong if it is not there or not the newest. Everybody connects through the sentinels as its "
        "documents say. celery-batches 0.11 loses the timer that sends a batch less than full when Celery reconnects ([its issue "
        "107](https://github.com/clokep/celery-batches/issues/107), fixed in its repository): fewer than 100 messages for each "
        "worker then wait until others come."
    )
    yield (
        "The API allows twice as much, and everybody's limiter is set to it. Different users, twice as many as in the first "
        f"table, for {QUOTA_CAP:.0f} s at most. "
        "It helps those whom the limiter held up."
    )


def write() -> None:
    """Write the page from the stored results."""
    PAGE.write_text(page(Report.read(RESULTS)), encoding="utf-8")
