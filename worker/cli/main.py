"""The command line. It has no logic of its own: it reads arguments, calls functions, and shows results.

Each group of commands has a module; this one puts them together.
"""

from __future__ import annotations

from typing import Any

import click

from worker.cli import (
    audit,
    console,
    dead_letters,
    doctor,
    exporter,
    faults,
    history,
    imports,
    line,
    names,
    plans,
    put,
    quarantine,
    refused,
    sandbox,
    status,
    users,
)
from worker.cli.terminal import replace_what_cannot_be_encoded, with_directory
from worker.version import VERSION

EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 update refused,
4 Redis not reachable, 5 buffer full, 6 a sandbox part does not run,
7 no permit came in time, 8 the API lacks what was delivered,
130 stopped by Ctrl-C.

\b
Examples:
  imattr up                                    everything, on this machine
  imattr put u1 city=Paris --remove level      one update
  imattr import users.csv                      a whole file
  imattr plan users.csv                        what the API lacks of it
  imattr status --watch                        what is happening
  imattr faults set 502                        simulate an outage, in the sandbox
"""


class _Commands(click.Group):
    """Prepares the output before anything is printed, including help and usage errors."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        replace_what_cannot_be_encoded()
        return super().main(*args, **kwargs)


@click.group(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="imattr")
def main() -> None:
    """Deliver user attributes to Tencent Cloud Chat: coalesced, rate limited, nothing lost."""


for command in (
    put.put,
    imports.import_file,
    plans.make_plan,
    plans.apply_plan,
    status.show_status,
    audit.audit,
    dead_letters.dead,
    refused.refused_updates,
    quarantine.quarantine,
    line.pause,
    line.resume,
    line.permit,
    doctor.show_findings,
    names.names,
    history.history,
    users.why,
    users.users,
    exporter.exporter,
    console.console,
    faults.faults,
):
    main.add_command(with_directory(command))
for command in (sandbox.simulate, sandbox.up, sandbox.demo):
    main.add_command(command)
