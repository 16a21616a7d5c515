"""`imattr pause`, `resume` and `permit`: whether anything is sent, and the shared rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from worker.cli.terminal import FAILED, NO_PERMIT, actor, environment, explained, fail, out, state
from worker.config import Settings
from worker.operate import status
from worker.ratelimit import RateLimiter
from worker.state.import_pauses import ImportPauses
from worker.state.keys import Keys
from worker.state.line import Line


@click.command()
@click.option("--reason", required=True, help="Reason, shown in the status.")
@click.option(
    "--import", "name", metavar="NAME", help="Pause this import instead, named as in imattr status."
)
@explained
def pause(reason: str, name: str | None) -> None:
    """Stop sending until `imattr resume`.

    Updates are still accepted and coalesced.
    """
    if name is not None:
        _pause_import(name, reason)
        return
    with _line() as line:
        if line.pause(reason, by=actor()):
            out.print("paused; batches in flight will finish")
        else:
            now = line.read()
            by = f" by {now.by}" if now.by else ""
            out.print(f"already paused{by}, since {status.iso(now.since)}: {now.reason}")


def _pause_import(name: str, reason: str) -> None:
    with state() as (redis, settings):
        pauses = ImportPauses(redis, Keys(settings.sdkappid))
        if pauses.pause(name, reason, by=actor()):
            out.print("paused; lines on their way are still accepted")
        elif now := pauses.find(name):
            out.print(f"already paused by {now.by}, since {status.iso(now.at)}: {now.reason}")
        else:
            fail(FAILED, f"no import under way is called {name}; imattr status lists the names")


@click.command()
@click.option("--import", "name", metavar="NAME", help="Resume this import instead.")
@explained
def resume(name: str | None) -> None:
    """Send again after a pause or a stop."""
    if name is not None:
        with state() as (redis, settings):
            resumed = ImportPauses(redis, Keys(settings.sdkappid)).resume(name, by=actor())
        out.print("resumed" if resumed else "that import was not paused")
        return
    with _line() as line:
        out.print("resumed" if line.resume(by=actor()) else "the line was already open")


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--wait", default=2.0, show_default=True, help="Wait at most this many seconds for a slot.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@explained
def permit(wait: float, command: tuple[str, ...]) -> None:
    """Take a slot of the shared rate, then run COMMAND.

    For scripts that call the API themselves: one permit, one call. Without COMMAND, exits when the slot comes. Exits with
    7 if no slot is free in time.
    """
    settings = Settings.from_env(environment(), "producer")
    limiter = RateLimiter.connect(
        settings.redis,
        settings.sdkappid,
        quota=settings.quota,
        patience=wait,
        needs_replica=settings.needs_replica,
    )
    if not limiter.acquire():
        fail(NO_PERMIT, f"no slot was free within {wait:g} s")
    if command:
        try:
            os.execvp(command[0], command)
        except OSError as error:
            fail(FAILED, f"{command[0]}: {error.strerror}")


@contextmanager
def _line() -> Iterator[Line]:
    with state() as (redis, settings):
        yield Line(redis, Keys(settings.sdkappid))
