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
        f"The limits: the quota allows {CEILING:,} users a second; Redis alone takes {piped:,.0f} events a second "
        f"from one client in pipelines (HSET), and runs {single:,.0f} minimal scripts a second, one by one."
    )


def page(report: Report) -> str:
    """The page on this benchmark."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    setup, present = report.setup, _present(report)
    yield "# imattr compared with what you would use instead"
    yield ""
    yield "![Users delivered a second, and calls in the worst rolling second](comparison.svg)"
    yield ""
    yield (
        f"Everyone does the same job: {setup['events']:,} events about {setup['users']:,} users, those of `make run`, are "
        "enqueued, then two worker processes with 16 threads (or jobs at a time) each deliver them to the same "
        f"simulator of the API, which answers after {setup['latency'] * 1000:.0f} ms and refuses more than "
        f"{setup['quota']:.0f} calls in any rolling second. Each uses the same embedded Redis, with an append-only file and "
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
        f"Bold: the best, and what is as good. ~: extrapolated to the whole job from {setup['cap']:.0f} seconds of it. "
        "–: it never finished, so there is no final state to check."
    )
    yield ""
    yield _ceilings(report)
    yield ""
    yield "## How to read it"
    yield ""
    yield (
        f"* **users delivered a second** is measured with {setup['different']:,.0f} different users "
        f"({setup['different_single']:,.0f} where a call has one user), in the full seconds until a worker is killed. The job has several events for each user, which imattr coalesces "
        "before it sends, so it may deliver more events a second than the quota allows users."
    )
    yield (
        "* **one kill -9**: halfway through, one of the two workers is killed and another one started. A user is lost if it had "
        "not arrived when nothing was left in Redis, or no call had come for 150 s; it was sent twice if it was applied "
        "more than once. A message or batch of the dead worker goes to another one after 60 s "
        "(Celery's `visibility_timeout`, imattr's `LEASE`; BullMQ checks every 30 s)."
    )
    yield (
        "* **older over newer**: imattr gets the events as they arrive, some late, with their times. The others have "
        "no notion of event times, so they get them sorted, as if nothing ever came late; what still goes wrong is theirs."
    )
    yield (
        "* **processor**: from the first call on, without the start of the workers, for imattr and for the others."
    )
    behind = [judgement for judgement in judge(report) if judgement.better]
    if behind:
        yield ""
        yield "## Where imattr is behind"
        yield ""
    for line, _, better in behind:
        for why in dict.fromkeys(line.excuses.get(name, "no reason; this must be fixed.") for name in better):
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
        "Each is a short file in [`tests/bench/rivals`](../tests/bench/rivals), written as its documentation "
        "recommends; those in Python call the API with the same client as imattr. Better settings are welcome."
    )
    yield ""
    yield "## Run it"
    yield ""
    yield "```"
    yield "make bench PARTS=rivals                       # measures and compares (about fifteen minutes)"
    yield "python -m tests.bench.rivals --write-docs     # the same, and writes this page and its picture"
    yield "```"
    yield ""
    yield "Measured on: " + ", ".join(f"{name} {value}" for name, value in report.machine.items()) + "."


def write() -> None:
    """Make the page anew from the stored results."""
    PAGE.write_text(page(Report.read(RESULTS)), encoding="utf-8")
