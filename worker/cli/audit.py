"""`imattr audit`: whether the API has what was delivered."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker import runtime
from worker.cli.terminal import (
    FAILED,
    STOPPED,
    WRONG,
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
from worker.clock import SystemClock
from worker.config import Settings
from worker.errors import CallFailed
from worker.operate import status
from worker.operate.words import counted, plain
from worker.producer import Producer
from worker.readback import certainty
from worker.readback.audit import Audit, Examiner, Finding, Report
from worker.readback.judgement import VERDICTS, Verdict
from worker.readback.repair import Repair, Repaired
from worker.state.audit import COUNTED, AuditLog
from worker.state.connection import Redis, RedisError
from worker.state.history import History
from worker.state.keys import Keys
from worker.state.shadow import Shadow

#: Each bad verdict in words, in the order of the report.
MEANINGS = {
    "lost": "nothing of what was delivered is there",
    "changed": "by somebody else, as far as we can tell",
    "gone": "the API no longer knows them",
}
#: The verdicts that each kind of repair covers.
REPAIRS: dict[str, tuple[Verdict, ...]] = {"lost": ("lost",), "changed": ("lost", "changed")}


@click.command("audit")
@click.option(
    "--users",
    type=click.IntRange(1, 1_000_000),
    default=3000,
    show_default=True,
    help="How many users to draw, of those whose delivery is remembered.",
)
@click.option(
    "--repair",
    type=click.Choice(["lost", "changed"]),
    is_flag=False,
    flag_value="lost",
    help="Queue again what was lost; with changed, also what somebody else changed.",
)
@click.option("--yes", is_flag=True, help="Repair without asking.")
@click.option(
    "--show", type=click.IntRange(0), default=5, show_default=True, help="List this many wrong users."
)
@click.option("--show-values", is_flag=True, help="Show their values, which are personal data.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def audit(users: int, repair: str | None, yes: bool, show: int, show_values: bool, as_json: bool) -> None:
    """Read back random users, and count how many are as delivered.

    Users are drawn from those whose last delivery is remembered (IMATTR_SHADOW_TTL). Users with anything pending or in
    flight, before or after reading, are not judged; users that seem wrong are read twice. Reads take slots that deliveries
    leave free.

    \b
      lost      nothing of what was set together is there
      changed   some of it is, so the call did land: somebody else changed the rest
      gone      the API no longer knows the user

    For a single attribute, lost and changed look the same; it counts as lost.

    --repair queues what was lost into the backfill lane with the times it had, so nothing newer is replaced.

    Exits with 8 if anybody is wrong, repaired or not; with 130 if stopped.
    """
    settings = Settings.from_env(environment())
    verdicts = REPAIRS[repair or "lost"]
    with runtime.connect(settings) as redis:
        shadow, history = Shadow(redis, Keys(settings.sdkappid)), History(redis, Keys(settings.sdkappid))
        if not shadow.size() and not settings.shadow_ttl:
            fail(FAILED, "nothing is remembered to compare with: IMATTR_SHADOW_TTL is 0")
        report = _audit(settings, redis, err if as_json else out, users, show, keep_wrong=repair is not None)
        if not as_json:
            _print(report, settings, show_values=show_values)
        wanted = sum(report.counts[verdict] for verdict in verdicts)
        repaired: Repaired | None = None
        try:
            if repair and wanted and report.state == "done":
                question = f"Queue again what {counted(wanted, 'user')} should have?"
                if yes or click.confirm(question, abort=True, err=as_json):
                    repaired = _repair(settings, redis, report.wrong_users, verdicts, err if as_json else out)
        finally:
            if report.judged:
                found: dict[str, int] = {verdict: report.counts[verdict] for verdict in VERDICTS}
                if repaired:
                    found |= {
                        "queued": repaired.queued,
                        "spared": repaired.spared,
                        "refused": repaired.refused,
                    }
                history.note("audit", actor(), **found)
    if as_json:
        echo_json(_facts(report, repaired, show_values=show_values), indent=2)
    elif repaired:
        _print_repaired(repaired)
    elif report.counts["lost"]:
        out.print("imattr audit --repair sends again what was lost", style="dim")
    is_stopped = "stopped" in (report.state, repaired.state if repaired else "")
    sys.exit(STOPPED if is_stopped else WRONG if report.wrong else 0)


def _audit(
    settings: Settings, redis: Redis, console: Console, users: int, show: int, *, keep_wrong: bool
) -> Report:
    with until_stopped() as stopped, progress(console, every=5) as line:
        keys = Keys(settings.sdkappid)
        run = Audit(
            Shadow(redis, keys),
            runtime.build_reader(settings, redis, stopped),
            AuditLog(redis, keys),
            SystemClock(),
            users=users,
            keep_wrong=keep_wrong,
            most_shown=show,
            stopped=stopped,
            show=lambda report: line(_progress(report)),
        )
        try:
            return run.run()
        except (RedisError, CallFailed):
            if run.report.judged:
                err.print(f"so far: {_result(run.report)}")
            raise


def _repair(
    settings: Settings, redis: Redis, users: list[str], verdicts: Collection[Verdict], console: Console
) -> Repaired:
    with until_stopped() as stopped, progress(console, every=5) as line:
        shadow, clock = Shadow(redis, Keys(settings.sdkappid)), SystemClock()
        return Repair(
            Examiner(shadow, runtime.build_reader(settings, redis, stopped), clock),
            Producer.of(settings),
            clock,
            verdicts=verdicts,
            stopped=stopped,
            show=lambda done: line(Text(f"{done.queued:,} of {len(users):,} users queued")),
        ).run(users)


def _result(report: Report) -> str:
    everybody = report.is_everybody and report.state == "done"
    return certainty.in_words(report.wrong, report.judged, everybody=everybody)


def _progress(report: Report) -> Text:
    bar = f"{'━' * round(20 * report.share):<20} "
    pace = report.looked_at / report.seconds if report.seconds else 0.0
    seems = f"  {report.wrong + report.suspects:,} seem wrong" if report.wrong + report.suspects else ""
    end = "" if report.eta is None else f"  done in {as_duration(report.eta)}"
    return Text.assemble((bar, "green"), f"{report.looked_at:,} users  {pace:,.0f}/s", (seems, "yellow"), end)


def _print(report: Report, settings: Settings, *, show_values: bool) -> None:
    if not report.remembered:
        lately = status.span(settings.shadow_ttl)
        out.print(f"nobody to audit: nothing is remembered, so nothing was delivered in the last {lately}")
        return
    skipped = report.counts["skipped"]
    rows = [("result", _result(report)), ("users", _users(report))]
    rows += [
        (verdict, f"{report.counts[verdict]:,}: {meaning}")
        for verdict, meaning in MEANINGS.items()
        if report.counts[verdict]
    ]
    if skipped:
        rows.append(("skipped", f"{skipped:,}: in motion, or nothing certain is remembered about them"))
    rows.append(("reads", f"{counted(report.calls, 'call')} in {as_duration(report.seconds)}"))
    print_rows(*rows)
    if report.shown:
        table = Table("user", "verdict", "attributes", "batch", box=None, header_style="bold")
        for finding in report.shown:
            attributes = _attributes(finding, show_values=show_values)
            batch = f"{finding.claim}" if finding.claim else "-"
            table.add_row(*map(plain, (finding.user, finding.became, attributes, batch)))
        out.print(table)
        if (more := report.wrong - len(report.shown)) > 0:
            out.print(f"... and {more:,} more; see --show", style="dim")


def _users(report: Report) -> str:
    if report.is_everybody:
        asked = "" if report.remembered == report.wanted else f"; {report.wanted:,} were asked for"
        return f"all {report.remembered:,} that are remembered{asked}"
    ended = ", then stopped" if report.state == "stopped" else ""
    return f"{report.looked_at:,} at random of {report.remembered:,} that are remembered{ended}"


def _attributes(finding: Finding, *, show_values: bool) -> str:
    differences = sorted(finding.differences.items())
    if not show_values:
        return ", ".join(name for name, _ in differences)
    return "\n".join(
        f"{name}: {_value(one.delivered)}, the API has {_value(one.found)}" for name, one in differences
    )


def _value(value: str | None) -> str:
    return "none" if value is None else value


def _print_repaired(repaired: Repaired) -> None:
    rows = [("queued", f"{counted(repaired.queued, 'user')}, in the backfill lane")]
    if repaired.spared:
        rows.append(("spared", f"{repaired.spared:,}: no longer wrong, or in motion"))
    if repaired.refused:
        rows.append(("refused", f"{repaired.refused:,}: no room; the next audit finds them again"))
    print_rows(*rows)


def _facts(report: Report, repaired: Repaired | None, *, show_values: bool) -> dict[str, Any]:
    least, most = certainty.between(report.wrong, report.judged) if report.judged else (0.0, 1.0)
    return {
        "state": report.state,
        "result": _result(report),
        "asked_for": report.wanted,
        "remembered": report.remembered,
        "everybody": report.is_everybody,
        "checked": report.judged,
        **{name: report.counts[name] for name in COUNTED},
        "wrong": report.wrong,
        "wrong_at_least": least,
        "wrong_at_most": most if report.wrong else certainty.at_most(0, report.judged),
        "confidence": certainty.CONFIDENCE,
        "calls": report.calls,
        "seconds": round(report.seconds, 3),
        "users": [_user_facts(finding, show_values=show_values) for finding in report.shown],
        "repair": asdict(repaired) if repaired else None,
    }


def _user_facts(finding: Finding, *, show_values: bool) -> dict[str, Any]:
    return {
        "user": finding.user,
        "verdict": finding.became,
        "batch": finding.claim or None,
        "attributes": {
            name: {
                "verdict": one.verdict,
                "as_of": status.iso(one.version / 1000),
                **({"delivered": one.delivered, "found": one.found} if show_values else {}),
            }
            for name, one in sorted(finding.differences.items())
        },
    }
