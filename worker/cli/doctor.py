"""`imattr doctor`: what is wrong, and how to fix it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from worker.cli.terminal import FAILED, echo_json, environment, err, explained, out
from worker.config import Settings
from worker.operate import access, doctor
from worker.operate.doctor import Finding


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of {check, level, found, fix}.")
@click.option("--acl", is_flag=True, help="Print the Redis users that the fleet needs, instead of checking.")
@explained
def show_findings(as_json: bool, acl: bool) -> None:
    """Check everything a worker needs.

    Settings, Redis, broker, workers, line and API: what is wrong, and how to fix it. Makes one API call, which changes
    nothing there, in a slot of the shared rate.

    Exits with 0 if there are no errors (warnings are fine), else with 1.

    With --acl, asks no server, but prints the command that creates the Redis user for workers, producers and this command
    line, one for each server; replace "ACL SETUSER" by "user" for a line of an ACL file. With --json, prints an array of
    {server, user, rules}.
    """
    if acl:
        _show_access(as_json)
        return
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


def _show_access(as_json: bool) -> None:
    found = access.accesses(Settings.from_env(environment(), "producer"))
    if as_json:
        echo_json([asdict(each) for each in found])
        return
    for each in found:
        # Only the lines themselves go to standard output, for a file or a pipe.
        err.print(f"for {each.server}:", style="dim")
        click.echo(each.line)


_MARKS = {"ok": Text("✓", "green"), "warning": Text("!", "bold yellow"), "error": Text("✗", "bold red")}


def _finding_row(finding: Finding) -> Table:
    """The row of a finding; all rows have columns of the same width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=17, style="bold")
    table.add_column(overflow="fold")
    table.add_row(_MARKS[finding.level], finding.check, Text(finding.found))
    if finding.fix:
        table.add_row("", "", Text(f"→ {finding.fix}", "dim"))
    return table
