"""`imattr doctor`: what is wrong, and how to fix it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from worker.cli.console import FAILED, echo_json, environment, explained, out
from worker.operate import doctor
from worker.operate.doctor import Finding


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of {check, level, found, fix}.")
@explained
def show_findings(as_json: bool) -> None:
    """Check everything a worker needs.

    Settings, Redis, broker, workers, line and API: what is wrong, and how to fix it. Makes one call of the API, which
    changes nothing there, in a slot of the shared rate.

    Exits with 0 if there are no errors (warnings are fine), else with 1.
    """
    findings = []
    for finding in doctor.examine(environment()):
        findings.append(finding)
        if not as_json:
            out.print(_finding_row(finding))
    count = Counter(finding.level for finding in findings)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    else:
        out.print(f"\ngood: {count['ok']}, warnings: {count['warning']}, errors: {count['error']}")
    sys.exit(FAILED if count["error"] else 0)


_MARKS = {"ok": Text("✓", "green"), "warning": Text("!", "bold yellow"), "error": Text("✗", "bold red")}


def _finding_row(finding: Finding) -> Table:
    """One finding; all have columns of the same width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=17, style="bold")
    table.add_column(overflow="fold")
    table.add_row(_MARKS[finding.level], finding.check, Text(finding.found))
    if finding.fix:
        table.add_row("", "", Text(f"→ {finding.fix}", "dim"))
    return table
