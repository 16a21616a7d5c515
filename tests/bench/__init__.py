"""Measures what the README claims: `make bench`. Each ratio has both of its sides in this one run.

The numbers depend on the machine and its neighbours; the ratios and the counts do not, much. Ends with 1
when a claim does not hold here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table

from worker.sandbox.processes import SDKAPPID, Sandbox
from worker.sandbox.redis_server import EmbeddedServer

APP = int(SDKAPPID)
ATTRS = {"city": "Shenzhen", "level": "Platinum"}

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


class Results:
    """The table, filled as the figures come."""

    def __init__(self) -> None:
        self.table = Table("figure", "measured", "must be", "")
        self.held = True

    def add(self, figure: str, measured: str, wanted: str, good: bool) -> None:
        self.held = self.held and good
        self.table.add_row(figure, measured, wanted, "[green]✓[/]" if good else "[bold red]✗[/]")
        console.print(f"  {figure}: {measured} (must be {wanted})")


def users(count: int, start: int = 0) -> Iterator[tuple[str, dict[str, str]]]:
    return ((f"user{number:07d}", ATTRS) for number in range(start, start + count))


@contextlib.contextmanager
def server(*, persistent: bool = True) -> Iterator[EmbeddedServer]:
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedServer(Path(directory), persistent=persistent) as running,
    ):
        yield running


def state_of(sandbox: Sandbox) -> Any:
    """What the simulator has counted."""
    return requests.get(f"{sandbox.api_url}/simulator/state", timeout=10).json()


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]
