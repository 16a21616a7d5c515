"""`imattr plan` and `imattr apply`: how the API differs from a file, and how to correct that."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from worker import runtime
from worker.cli.imports import with_source
from worker.cli.terminal import (
    REFUSED,
    STOPPED,
    USAGE,
    actor,
    as_duration,
    echo_json,
    environment,
    err,
    explained,
    fail,
    out,
    print_rows,
    progress,
    until_stopped,
)
from worker.config import Settings
from worker.errors import CallFailed, NotConfirmed, UnusablePlan
from worker.operate import status
from worker.operate.words import counted
from worker.readback.applier import Applier, ApplyStatus, OpenPlan
from worker.readback.crew import Crew
from worker.readback.difference import Kind, Tally
from worker.readback.plan_file import Difference, Mark
from worker.readback.planner import (
    SAMPLES,
    Plan,
    Planner,
    PlanOptions,
    PlanStatus,
    cost_of_applying,
    cost_of_reading,
)
from worker.state.connection import Redis, RedisError
from worker.state.history import History
from worker.state.import_pauses import ImportPauses
from worker.state.keys import Keys
from worker.state.shadow import Shadow

#: Sign and colour of each kind of change.
_SIGNS: dict[Kind, tuple[str, str]] = {
    "set": ("+", "green"),
    "change": ("~", "yellow"),
    "remove": ("-", "red"),
}


_GOES_ON = "the same command continues there"


@click.command("plan")
@with_source("when the plan was begun")
@click.option(
    "--out",
    "plan_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the plan; an older plan is replaced. [default: FILE.plan]",
)
@click.option("--restart", is_flag=True, help="Start over instead of continuing an interrupted plan.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@explained
def make_plan(
    file: Path,
    plan_file: Path | None,
    format: Any,
    user_column: str,
    null: str | None,
    as_of: int | None,
    restart: bool,
    as_json: bool,
) -> None:
    """Compare FILE, or - for stdin, with what the API has. Changes nothing.

    FILE is as for imattr import. Asks the API for up to 100 users a call, in slots that deliveries leave free, and writes the
    differences into a plan, which imattr apply corrects.

    \b
    + u1 city = "Paris"              the API has no value
    ~ u2 level = "3" -> "4"          it has a different one
    - u3 tier = "gold"               the file says null

    Users with an update under way are counted, not judged. A plan never overwrites anything delivered after the time of the
    file. After an interruption, the same command continues where it was.

    The plan contains users and values; only you can read it. Exits with 3 if lines were refused, with 130 if stopped.
    """
    options = PlanOptions(
        path=None if str(file) == "-" else file,
        out=plan_file,
        format=format,
        user_column=user_column,
        null=null,
        as_of_ms=as_of,
        restart=restart,
    )
    settings = Settings.from_env(environment())
    with _reading(settings) as (redis, crew), progress(_screen(as_json), every=5) as line:
        shadow, show = Shadow(redis, Keys(settings.sdkappid)), _PlanScreen(settings, _screen(as_json), line)
        with _how_far(show):
            plan = Planner(settings, options, shadow, crew, by=actor(), show=show).run()
    if as_json:
        echo_json(_plan_facts(plan, options, settings))
    else:
        _print_plan(plan, options, settings)
    if plan.state == "stopped":
        done = f"{plan.mark.users:,} of {counted(plan.header.users, 'user')} compared"
        err.print(
            f"stopped: {done if plan.header.digest else 'the file was not read to its end'}; {_GOES_ON}"
        )
        sys.exit(STOPPED)
    sys.exit(REFUSED if plan.header.refused else 0)


@click.command("apply")
@click.argument("plan", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--partial", is_flag=True, help="Apply what an incomplete plan has so far.")
@click.option("--abandon", is_flag=True, help="Abandon applying an interrupted plan; queue nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@explained
def apply_plan(plan: Path, yes: bool, partial: bool, abandon: bool, as_json: bool) -> None:
    """Queue exactly what PLAN says.

    Asks first. The changes fill the seats that live updates leave free. Each user is read again before that: users that have
    changed since the plan, or have an update under way, are counted and left alone. Values count as of the time of the file,
    so nothing newer is ever overwritten.

    While the buffer is full, it waits. After an interruption, the same command continues where it was; --abandon gives up.

    Exits with 3 if values were refused, with 130 if stopped.
    """
    settings = Settings.from_env(environment())
    with OpenPlan(plan, settings, partial=partial or abandon, samples=SAMPLES) as opened:
        if not abandon:
            if not as_json:
                _print_plan_head(opened)
            # Ask before Ctrl-C becomes a flag, which nothing checks while a question is open.
            done = opened.progress.applied.users if opened.progress else 0
            _confirm(opened.found.differences - done, yes)
        with _reading(settings) as (redis, crew), progress(_screen(as_json), every=5) as line:
            keys, show = Keys(settings.sdkappid), _ApplyScreen(line)
            parts = (Shadow(redis, keys), History(redis, keys), ImportPauses(redis, keys))
            run = Applier(settings, opened, *parts, crew, by=actor(), show=show)
            if abandon:
                out.print(
                    "abandoned; what was queued stays"
                    if run.abandon()
                    else "no run of this plan was interrupted"
                )
                return
            with _how_far(show):
                result = run.run()
    _print_applied(result, as_json)
    if result.state == "stopped":
        err.print(f"stopped: {result.applied.users:,} of {counted(result.users, 'user')}; {_GOES_ON}")
        sys.exit(STOPPED)
    sys.exit(REFUSED if result.applied.refused else 0)


def _confirm(users: int, yes: bool) -> None:
    if not users or yes:
        return
    if not sys.stdin.isatty():
        fail(USAGE, f"nobody can confirm the changes of {counted(users, 'user')} here: use --yes")
    click.confirm(f"Queue the changes of {counted(users, 'user')}?", abort=True)


@contextmanager
def _reading(settings: Settings) -> Iterator[tuple[Redis, Crew]]:
    """Redis, and readers that stop when this command is asked to."""
    with until_stopped() as stopped, runtime.connect(settings) as redis:
        shadow = Shadow(redis, Keys(settings.sdkappid))
        yield redis, Crew(shadow, lambda is_over: runtime.build_reader(settings, redis, is_over), stopped)


@contextmanager
def _how_far(screen: _PlanScreen | _ApplyScreen) -> Iterator[None]:
    """If the work in here fails, say how far it got."""
    try:
        yield
    except (RedisError, NotConfirmed, CallFailed, UnusablePlan):
        if screen.done:
            err.print(f"{screen.done}; {_GOES_ON}")
        raise


def _screen(as_json: bool) -> Console:
    return err if as_json else out


class _Now:
    """Says when to update a line of progress: ten times a second."""

    def __init__(self) -> None:
        self._at = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._at:
            return False
        self._at = now + 0.1
        return True


class _PlanScreen:
    """Shows the progress of a plan."""

    def __init__(self, settings: Settings, console: Console, line: Callable[[Text], None]) -> None:
        self._settings, self._console, self._line = settings, console, line
        self._told, self._is_due = False, _Now()
        #: How far it is, in words; empty before the first user.
        self.done = ""

    def __call__(self, view: PlanStatus) -> None:
        if view.state == "comparing" and not self._told:
            self._told = True
            self._console.print(self._beginning(view))
        if view.state == "comparing":
            self.done = f"{view.mark.users:,} of {counted(view.users, 'user')} compared"
        if not self._is_due():
            return
        bar = "" if view.share is None else f"{'━' * round(20 * view.share):<20} "
        refused = f"  refused {view.refused:,}" if view.refused else ""
        if view.state == "reading the file":
            self._line(Text.assemble((bar, "green"), f"{view.lines:,} lines read", (refused, "yellow")))
            return
        tally = view.mark.tally
        found = "  ".join(f"{sign} {tally.total(kind):,}" for kind, (sign, _) in _SIGNS.items())
        eta = "" if view.eta is None else f"  done in {as_duration(view.eta)}"
        self._line(
            Text.assemble((bar, "green"), f"{view.mark.users:,} users  {found}", (refused, "yellow"), eta)
        )

    def _beginning(self, view: PlanStatus) -> str:
        left = view.users - view.resumed_after
        cost = cost_of_reading(left, self._settings)
        after = f"continuing after {counted(view.resumed_after, 'user')}: " if view.resumed_after else ""
        return (
            f"{after}{counted(left, 'user')} to compare, in {counted(cost.calls, 'call')}: "
            f"{as_duration(math.ceil(cost.seconds))} at the full rate, longer while deliveries need the slots"
        )


class _ApplyScreen:
    """Shows how far a plan is applied."""

    def __init__(self, line: Callable[[Text], None]) -> None:
        self._line, self._is_due = line, _Now()
        #: How far it is, in words; empty before the first user.
        self.done = ""

    def __call__(self, view: ApplyStatus) -> None:
        self.done = (
            f"{view.applied.users:,} of {counted(view.users, 'user')} checked, {view.applied.queued:,} queued"
        )
        if not self._is_due():
            return
        share = view.applied.users / max(1, view.users)
        left = view.applied.users - view.applied.queued
        skipped = f"  left alone {left:,}" if left else ""
        waiting = f"  {view.waiting}" if view.waiting else ""
        eta = "" if view.eta is None else f"  done in {as_duration(view.eta)}"
        self._line(
            Text.assemble(
                (f"{'━' * round(20 * share):<20} ", "green"),
                f"{view.applied.queued:,} users queued",
                (skipped + waiting, "yellow"),
                eta,
            )
        )


# The summaries.


def _sample(difference: Difference) -> Iterator[Text]:
    for name, change in difference.changes.items():
        sign, colour = _SIGNS[change.kind]
        old, new = (json.dumps(value, ensure_ascii=False) for value in (change.old, change.new))
        values = {"set": new, "change": f"{old} -> {new}", "remove": old}[change.kind]
        yield Text.assemble((f"{sign} ", f"bold {colour}"), f"{difference.user} {name} = {values}")


def _summary(mark: Mark) -> Text:
    tally, users = mark.tally, mark.tally.users
    parts = [
        *((f"{sign} {tally.total(kind):,}", colour, f"to {kind}") for kind, (sign, colour) in _SIGNS.items()),
        (f"= {tally.total('same'):,}", "", "same"),
    ]
    if users["unknown"]:
        parts.append(
            (f"? {users['unknown']:,}", "yellow", "unknown user" + ("s" if users["unknown"] > 1 else ""))
        )
    if users["in_motion"]:
        parts.append((f"{users['in_motion']:,}", "yellow", "in motion (not judged)"))
    if newer := tally.total("newer"):
        parts.append((f"{newer:,}", "yellow", "newer than the file (they stay)"))
    if users["forgotten"]:
        parts.append((f"{users['forgotten']:,}", "yellow", "perhaps newer than the file (not judged)"))
    line = Text("Plan: ", style="bold")
    for place, (count, colour, words) in enumerate(parts):
        line.append(", " if place else "").append(count, f"bold {colour}").append(f" {words}")
    return line


def _print_plan(plan: Plan, options: PlanOptions, settings: Settings) -> None:
    header, mark, tally = plan.header, plan.mark, plan.mark.tally
    _print_samples(plan.samples, mark, options.plan_path)
    out.print(_summary(mark), soft_wrap=False)
    again, deliveries = cost_of_applying(mark, settings)
    differ = tally.users["differs"]
    print_rows(
        ("users", f"{header.users:,} in {counted(header.lines, 'line')}; of them, {differ:,} differ"),
        *(("read as", note) for note in plan.notes),
        *_by_attribute(tally),
        *((("refused", counted(header.refused, "line")),) if header.refused else ()),
        *(("", f"line {line:,}: user {user}: {rule}") for line, user, rule in plan.refusals),
        ("as of", f"{status.iso(header.as_of / 1000)}, for lines without a time"),
        ("cost", f"{counted(mark.calls, 'call')} in {as_duration(mark.seconds)}"),
    )
    if plan.state == "complete" and differ:
        out.print()
        out.print(
            f"Applying it takes {counted(again.calls, 'call')} to read again ({as_duration(math.ceil(again.seconds))}) and "
            f"{counted(deliveries.calls, 'call')} to deliver ({as_duration(math.ceil(deliveries.seconds))}):"
        )
        out.print(f"  imattr apply {options.plan_path}")
    elif plan.state == "complete":
        out.print("Nothing to apply.")


def _print_samples(samples: Sequence[Difference], mark: Mark, path: Path) -> None:
    lines = [line for difference in samples for line in _sample(difference)][:SAMPLES]
    for line in lines:
        out.print(line)
    changes = sum(mark.tally.total(kind) for kind in _SIGNS)
    if changes > len(lines):
        out.print(f"... {counted(changes - len(lines), 'more change')} in {path}", style="dim")
    if lines:
        out.print()


def _by_attribute(tally: Tally) -> Iterator[tuple[str, str]]:
    for name, counts in sorted(tally.values.items()):
        found = ", ".join(
            f"{_SIGNS[kind][0] if kind in _SIGNS else '='} {counts[kind]:,}"
            for kind in ("set", "change", "remove", "same")
        )
        newer = f", {counts['newer']:,} newer" if counts["newer"] else ""
        yield name, found + newer


def _print_plan_head(opened: OpenPlan) -> None:
    header, mark = opened.found.header, opened.found.mark
    made = f"made {status.iso(header.made)} by {header.made_by} from {header.source}"
    out.print(f"{opened.path}, {made}", style="dim")
    _print_samples(opened.found.samples, mark, opened.path)
    out.print(_summary(mark), soft_wrap=False)
    if not mark.final:
        out.print(f"not complete: {mark.users:,} of {header.users:,} users were compared", style="yellow")
    if opened.progress:
        out.print(
            f"continuing after {counted(opened.progress.applied.users, 'user')}, where an earlier run ended"
        )


def _print_applied(done: ApplyStatus, as_json: bool) -> None:
    applied = done.applied
    if as_json:
        echo_json(
            {
                "state": done.state,
                "users": done.users,
                "queued": applied.queued,
                "done": applied.done,
                "changed": applied.changed,
                "in_motion": applied.in_motion,
                "unknown": applied.unknown,
                "refused": applied.refused,
                "refusals": [one._asdict() for one in done.refusals],
                "resumed_after": done.resumed_after,
                "calls": done.calls,
                "seconds": round(done.seconds, 3),
            }
        )
        return
    left = (
        (applied.done, "as planned already"),
        (applied.changed, "changed since the plan"),
        (applied.in_motion, "in motion"),
        (applied.unknown, "unknown to the API"),
        (applied.refused, "refused"),
    )
    words = ", ".join(f"{count:,} {what}" for count, what in left if count)
    print_rows(
        ("queued", counted(applied.queued, "user")),
        ("left alone", words or "nobody"),
        *(("", f"user {user}: {rule}") for user, rule in done.refusals),
        ("cost", f"{counted(done.calls, 'call')} in {as_duration(done.seconds)}"),
    )


def _plan_facts(plan: Plan, options: PlanOptions, settings: Settings) -> dict[str, Any]:
    header, mark, tally = plan.header, plan.mark, plan.mark.tally
    again, deliveries = cost_of_applying(mark, settings)
    return {
        "state": plan.state,
        "plan": str(options.plan_path),
        "lines": header.lines,
        "refused": header.refused,
        "refusals": [refusal._asdict() for refusal in plan.refusals],
        "users": header.users,
        "users_by_fate": tally.users,
        **{kind: tally.total(kind) for kind in ("set", "change", "remove", "same", "newer")},
        "attributes": tally.values,
        "as_of": status.iso(header.as_of / 1000),
        "notes": plan.notes,
        "calls": mark.calls,
        "seconds": round(mark.seconds, 3),
        "to_apply": {"read": again._asdict(), "deliver": deliveries._asdict()},
    }
