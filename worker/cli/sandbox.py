"""`imattr up`, `demo` and `simulate`: everything on one machine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from worker.cli.faults import read_faults
from worker.cli.terminal import (
    FAILED,
    NO_SANDBOX,
    SANDBOX,
    SETTINGS_FILE,
    explained,
    fail,
    out,
    progress,
    until_stopped,
)
from worker.config import PREFIX, Settings
from worker.sandbox import simulator
from worker.sandbox.faults import Fault, Faults
from worker.sandbox.network import check_network
from worker.sandbox.processes import Plan, Sandbox


def _checked_network(network: str) -> str:
    try:
        return check_network(network)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.option("--port", default=9000, show_default=True, help="Port on the loopback interface.")
@click.option("--name", "names", multiple=True, help="An attribute name of the app. [default: any]")
@click.option("--latency", default=0.05, show_default=True, help="Seconds before each reply.")
@click.option("--quota", default=100, show_default=True, help="Calls a second allowed; 0 = no limit.")
@click.option(
    "--network",
    default="",
    metavar="KIND:SECONDS",
    callback=lambda _context, _option, value: _checked_network(value),
    help="Delay calls on their way in: uniform, normal, bursts or reordered.",
)
@click.option(
    "--fail",
    "faults",
    multiple=True,
    metavar="WHAT:SHARE",
    callback=lambda _context, _option, values: read_faults(values),
    help="Fail this share of the calls: an ErrorCode, an HTTP status, timeout, reset, truncated or lost.",
)
@click.option(
    "--record/--no-record", default=True, show_default=True, help="Record every write that is applied."
)
@explained
def simulate(
    port: int,
    names: tuple[str, ...],
    latency: float,
    quota: int,
    network: str,
    faults: list[Fault],
    record: bool,
) -> None:
    """Run the API simulator alone.

    Serves the app in IMATTR_SDKAPPID, with the key in IMATTR_SECRET_KEY. With --fail 91000:0.1 --fail timeout:0.05, one call
    in ten is refused with ErrorCode 91000, and one in twenty gets no answer in time; `imattr faults` changes that while it runs.

    Beside the API: GET /simulator/state, users, record; POST /simulator/quirks, faults, users.
    """
    environ = {f"{PREFIX}REDIS_URL": "redis://unused", f"{PREFIX}API_URL": "http://unused"} | dict(os.environ)
    environ.pop(f"{PREFIX}REGION", None)
    settings = Settings.from_env(environ)
    quirks = simulator.Quirks(quota=quota, latency=latency, network=network, record=record)
    administrators = [settings.admin]
    key = settings.secret_key.reveal()
    api = simulator.Api(settings.sdkappid, key, administrators=administrators, names=names, quirks=quirks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    url = f"http://127.0.0.1:{port}"
    try:
        simulator.serve(
            api,
            Faults(faults),
            port=port,
            ready=lambda: out.print(f"simulating app {settings.sdkappid} at {url}"),
        )
    except OSError as error:
        fail(NO_SANDBOX, f"port {port}: {error.strerror}")


@click.command()
@click.option("--workers", default=2, show_default=True, help="Worker processes.")
@click.option("--concurrency", default=16, show_default=True, help="Threads or processes for each worker.")
@click.option(
    "--pool",
    type=click.Choice(["threads", "prefork"]),
    default="threads",
    show_default=True,
    help="Celery's pool.",
)
@click.option("--flower/--no-flower", default=True, show_default=True, help="Start Flower.")
@click.option(
    "--login/--no-login",
    default=True,
    show_default=True,
    help="Make Flower ask for a password: FLOWER_BASIC_AUTH (user:password), or a new one, which is shown.",
)
@click.option("--console/--no-console", default=True, show_default=True, help="Start the console.")
@click.option(
    "--metrics/--no-metrics",
    default=True,
    show_default=True,
    help="Serve metrics: an exporter for the fleet, and a port for each worker.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=SANDBOX,
    show_default=True,
    help="Directory for data and logs.",
)
@explained
def up(
    workers: int,
    concurrency: int,
    pool: str,
    flower: bool,
    login: bool,
    console: bool,
    metrics: bool,
    directory: Path,
) -> None:
    """Run everything on this machine.

    Uses what is configured (IMATTR_REDIS_URL; IMATTR_API_URL or IMATTR_REGION). An embedded Redis, whose data stays in the
    directory, and an API simulator stand in for the rest. Other commands find the sandbox by themselves from the same working
    directory, and from elsewhere with --directory.

    A part that ends is restarted, after a longer wait each time; when one has ended six times in a row, everything stops and
    the exit code is 6. Ctrl-C stops everything in order, a second Ctrl-C at once.
    """
    environ = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    # Commands may use them from another working directory.
    files = {
        name: str(Path(value).resolve())
        for name, value in environ.items()
        if name.endswith("_FILE") and value
    }
    environ |= files
    plan = Plan(
        workers=workers,
        concurrency=concurrency,
        pool=pool,
        flower=flower,
        login=login,
        metrics=metrics,
        console=console,
    )
    with until_stopped() as stopped:
        out.print("starting ...")
        with Sandbox(
            directory, environ, plan, tell=_tell, stopping=stopped, impatient=stopped.twice
        ) as sandbox:
            path = directory / SETTINGS_FILE
            _write_private(path, "".join(f"{name}={value}\n" for name, value in sorted(environ.items())))
            try:
                _announce(sandbox, directory)
                while not stopped():
                    sandbox.check()
                    time.sleep(0.5)
            finally:
                path.unlink(missing_ok=True)
    out.print("stopped")


def _tell(text: str) -> None:
    """Print what happens while there is a terminal: its closing must not keep anything from being stopped."""
    now = time.strftime("%H:%M:%S")
    # A closed pipe makes the console end the program.
    with contextlib.suppress(OSError, SystemExit):
        out.print(Text.assemble((now, "dim"), " ", text))


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _announce(sandbox: Sandbox, directory: Path) -> None:
    plan = sandbox.plan
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for stand_in in sandbox.stand_ins:
        table.add_row(Text("sandboxed", style="yellow"), stand_in)
    table.add_row("workers", f"{plan.workers} x {plan.concurrency} {plan.pool}")
    if sandbox.simulates:
        table.add_row("simulator", f"{sandbox.api_url}/simulator/state")
    if plan.console:
        table.add_row("console", sandbox.console_url)
    if plan.flower:
        table.add_row("flower", sandbox.flower_url)
        table.add_row("", sandbox.login)
    if plan.metrics:
        table.add_row("metrics", f"{sandbox.exporter_url}/metrics  the fleet")
    for name, url in sandbox.health_urls.items():
        table.add_row("", f"{url}/metrics  {name}; also /livez, /readyz")
    table.add_row("logs", str(directory))
    table.add_row("settings", f"{directory / SETTINGS_FILE}  for producers and Celery clients of your own")
    out.print(table)
    out.print()
    here = "" if directory == SANDBOX else f" --directory {directory}"
    out.print("try, in another terminal:")
    for command in ("put u1 city=Paris level=Gold", "status --watch"):
        out.print(f"  imattr {command}{here}")
    if sandbox.simulates:
        out.print(f"  imattr faults set 502:0.5{here}")
    out.print("Ctrl-C stops everything.")


@click.command()
@click.option("--workers", default=2, show_default=True, help="Worker processes.")
@click.option("--flower/--no-flower", default=True, show_default=True, help="Start Flower.")
@click.option("--seed", default=2026, show_default=True, help="Different seeds make different events.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=SANDBOX / "demo",
    show_default=True,
    help="Directory for data and logs; emptied first if it is a sandbox's.",
)
@explained
def demo(workers: int, flower: bool, seed: int, directory: Path) -> None:
    """Run the end-to-end demo in a sandbox.

    Delivers 60,000 events, with some calls failing on purpose, and checks the result. Of your settings, only
    IMATTR_REDIS_URL is used. Exits with 0 if every check holds, else with 1.
    """
    try:
        from worker.sandbox import demo as job
        from worker.sandbox import demo_events
    except ModuleNotFoundError as error:
        fail(NO_SANDBOX, f"the demo needs the package {error.name}: pip install 'imattr-worker[sandbox]'")
    out.print("generating events ...")
    lines = list(demo_events.events(seed))
    # A flag, because an exception could come while parts are being stopped, and leave others running.
    with until_stopped() as stopped, progress() as show:
        report = job.run(
            directory,
            os.environ.get(f"{PREFIX}REDIS_URL", ""),
            lines=lines,
            say=lambda text: out.print(Text(text)),
            show=lambda progress: show(_progress_line(progress)),
            workers=workers,
            flower=flower,
            stopping=stopped,
            impatient=stopped.twice,
        )
    table = Table.grid(padding=(0, 2))
    for name, text in report.rows:
        table.add_row(Text(name, style="dim"), Text(text))
    out.print(table)
    style = "bold green" if report.passed else "bold red"
    for name, good, text in report.checks:
        mark = ("✓ ", "green") if good else ("✗ FAILED: ", "bold red")
        out.print(Text.assemble(mark, name, (f"  ({text})", "dim" if good else "bold red")), soft_wrap=True)
    out.print("\nevery check holds" if report.passed else "\nNOT every check holds", style=style)
    sys.exit(0 if report.passed else FAILED)


def _progress_line(progress: Any) -> Text:
    snapshot = progress.snapshot
    done = progress.lines / progress.total
    bar = "━" * round(20 * done)
    return Text.assemble(
        (f"{bar:<20}", "green"),
        f" {progress.lines:>6,} events",
        f"  pending {snapshot.pending:>6,}",
        f"  in flight {snapshot.in_flight:>4}",
        f"  delivered {snapshot.ledger['delivered']:>6,}",
        f"  calls {progress.calls:>4}",
        f"  worst second {progress.worst:>3}",
    )
