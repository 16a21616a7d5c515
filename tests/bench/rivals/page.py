"""The table on the terminal, and the page of `docs/`, both from the same results."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from tests.bench import Results, console
from tests.bench.rivals.contestants import CONTESTANTS, ROOT, Contestant
from tests.bench.rivals.measure import Scale, measure
from tests.bench.rivals.results import CEILING, LINES, OURS, Line, Report, cell, judge, score

RESULTS, PAGE = ROOT / "docs" / "comparison.json", ROOT / "docs" / "comparison.md"


def rivals(results: Results) -> None:
    """The same job side by side with what a user would pick instead (about fifteen minutes)."""
    report = measure(Scale(), lambda text: console.print(f"  {text}"))
    console.print(show(report))
    for judgement in judge(report):
        line, rival, better = judgement
        ours, best = (cell(line, report.figures[name]) for name in (OURS, rival))
        wanted = "ahead or equal" + (", but for a reason" if better and judgement.holds else "")
        results.add(line.title, f"{ours}; best other {best}, {rival}", wanted, judgement.holds)


def _present(report: Report) -> list[Contestant]:
    return [it for it in CONTESTANTS if it.name in report.figures]


def _best(report: Report, line: Line) -> float:
    return min(score(line, figures) for figures in report.figures.values())


def show(report: Report) -> Table:
    """One line a figure, one column a contestant; the best of each line is green."""
    present = _present(report)
    table = Table(caption=_ceilings(report))
    table.add_column("", no_wrap=True)
    for contestant in present:
        table.add_column(contestant.title, justify="right")
    for line in LINES:
        best = _best(report, line)
        cells = [
            f"[green]{cell(line, figures)}[/]" if score(line, figures) == best else cell(line, figures)
            for figures in (report.figures[it.name] for it in present)
        ]
        table.add_row(line.title, *cells)
    return table


def _ceilings(report: Report) -> str:
    piped, single = report.limits["hset_pipelined"], report.limits["evalsha"]
    return (
        f"The limits: the quota lets {CEILING:,} users a second pass; Redis alone takes {piped:,.0f} events a second "
        f"from one client in pipelines (HSET), and runs {single:,.0f} of the barest scripts a second, one by one."
    )


def page(report: Report) -> str:
    """The page on this benchmark."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    setup, present = report.setup, _present(report)
    yield "# imattr beside what you would pick instead"
    yield ""
    yield "![Users delivered a second, and calls in the worst rolling second](comparison.svg)"
    yield ""
    yield (
        f"The same job for all: {setup['events']:,} events about {setup['users']:,} users, those of `make run`, are "
        "enqueued, then two worker processes with 16 threads (or jobs at a time) each deliver them to the same "
        f"simulator of the API: it answers after {setup['latency'] * 1000:.0f} ms and refuses what is above "
        f"{setup['quota']:.0f} calls in any rolling second. The same embedded Redis for each, with an append-only file, "
        "`appendfsync everysec`."
    )
    yield ""
    yield f"| | {' | '.join(it.title for it in present)} |"
    yield "|---|" + "---:|" * len(present)
    for line in LINES:
        best = _best(report, line)
        cells = [
            (cell(line, it), score(line, it) == best) for it in (report.figures[c.name] for c in present)
        ]
        yield f"| {line.title} | {' | '.join(f'**{text}**' if good else text for text, good in cells)} |"
    yield ""
    yield (
        f"Bold: the best, and what is as good. ~: worked out for the whole job from {setup['cap']:.0f} seconds of it. "
        "–: it never came to the end, so there is no end to judge."
    )
    yield ""
    yield _ceilings(report)
    yield ""
    yield "## How to read it"
    yield ""
    yield (
        f"* **users delivered a second** is measured with users that are all different, {setup['different']:,.0f} of them "
        f"({setup['different_single']:,.0f} where a call has one user), in the full seconds until a worker is killed. The job has several events for each user, which imattr merges "
        "before it sends: so its events delivered a second may be more than the quota has users."
    )
    yield (
        "* **one kill -9**: half-way through those users one of the two workers is killed and another one started. "
        "Lost is who never arrived, when nothing was left in Redis or no call had come for 150 s. Sent twice is who was "
        "applied more than once. A message or batch of the dead worker is given to another one after 60 s "
        "(Celery's `visibility_timeout`, imattr's `LEASE`; BullMQ checks every 30 s)."
    )
    yield (
        "* **older over newer**: imattr gets the events as they arrive, some late, with their times. The others have "
        "no notion of event times, so they get them sorted, as if nothing ever came late; what goes wrong is their own."
    )
    yield (
        "* **processor**: from the first call on. It has the workers' start neither for imattr nor for the others."
    )
    behind = [judgement for judgement in judge(report) if judgement.better]
    if behind:
        yield ""
        yield "## Where imattr is not ahead"
        yield ""
    for line, _, better in behind:
        for why in dict.fromkeys(
            line.excuses.get(name, "no reason; this is to be mended.") for name in better
        ):
            yield f"* **{line.title}**: {why}"
    yield ""
    yield "## How each is set up"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for contestant in present:
        yield f"| {contestant.title} | {contestant.setting} |"
    for contestant in CONTESTANTS:
        if contestant.name in report.absent:
            yield f"| {contestant.title} | Left out: {report.absent[contestant.name]} |"
    yield ""
    yield (
        "Each is a file of few lines in [`tests/bench/rivals`](../tests/bench/rivals), written as its documentation "
        "says; the ones in Python make the call with the same client as imattr. Better settings are welcome."
    )
    yield ""
    yield "## Run it"
    yield ""
    yield "```"
    yield "make bench PARTS=rivals                       # measures and judges (about fifteen minutes)"
    yield "python -m tests.bench.rivals --write-docs     # the same, and makes this page and its picture"
    yield "```"
    yield ""
    yield "Measured on: " + ", ".join(f"{name} {value}" for name, value in report.machine.items()) + "."


def write() -> None:
    """Make the page anew from the stored results."""
    PAGE.write_text(page(Report.read(RESULTS)), encoding="utf-8")
