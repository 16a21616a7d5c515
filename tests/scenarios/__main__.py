"""Play the stories named on the command line, or all, and print what each cost."""

from __future__ import annotations

import contextlib
import importlib
import logging
import pkgutil
import sys
import tempfile
from pathlib import Path

import redis
import structlog
from rich.console import Console
from rich.table import Table

from tests import scenarios
from tests.fleet import fleet
from tests.schedules.wire import Wire
from worker.sandbox.redis_server import EmbeddedServer

STORIES = sorted(found.name for found in pkgutil.iter_modules(scenarios.__path__) if found.name != "__main__")


def play(client: redis.Redis, name: str, seed: int) -> scenarios.Figures:
    """Let a fleet live through the story; raises when something that must hold does not."""
    story = importlib.import_module(f"tests.scenarios.{name}")
    with fleet(client, seed=seed, limits=getattr(story, "LIMITS", None)) as running:
        found: scenarios.Figures = story.run(running)
    return found


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    names = sys.argv[1:] or STORIES
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for heading in ("story", "calls in trouble", "all calls", "attempts used", "dead", "recovery", "at best"):
        table.add_column(heading, justify="left" if heading == "story" else "right")
    table.add_column("remark", overflow="fold")
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedServer(Path(directory), persistent=False) as server,
        contextlib.closing(Wire(server.port)) as client,
    ):
        for name in names:
            f = play(client, name, seed=1)
            times = (f"{f.recovery:.1f} s", f"{f.at_best:.1f} s")
            counts = map(str, (f.calls_in_trouble, f.calls, f.attempts_used, f.dead))
            table.add_row(name.replace("_", " "), *counts, *times, f.remark)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(
        "\nin every story: ledger balanced, no rolling second above 100 calls, no user twice in a call"
    )


if __name__ == "__main__":
    main()
