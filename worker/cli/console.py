"""`imattr console`: the website for operators, and the lines of its accounts file."""

from __future__ import annotations

import dataclasses
import sys
from typing import get_args

import click

from worker import logs
from worker.cli.terminal import FAILED, environment, err, explained, fail, out
from worker.config import Settings
from worker.console import accounts, serve
from worker.console.accounts import Role


@click.group(invoke_without_command=True)
@click.option("--host", help="Address to listen on.  [default: IMATTR_CONSOLE_HOST, else 127.0.0.1]")
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="Port to listen on.  [default: IMATTR_CONSOLE_PORT, else 8300]",
)
@click.pass_context
@explained
def console(context: click.Context, host: str | None, port: int | None) -> None:
    """Serve the website for operators.

    Shows the line, backlog, dead letters, users, imports and history; operators can act on them. On 127.0.0.1 nobody has to
    log in; anywhere else, it needs accounts (IMATTR_CONSOLE_ACCOUNTS_FILE) or an authenticating proxy.
    """
    if context.invoked_subcommand is not None:
        return
    settings = Settings.from_env(environment(), "producer")
    host = settings.console_host if host is None else host
    port = settings.console_port if port is None else port
    logs.configure(settings.log_level, settings.log_format)
    shown = f"[{host}]" if ":" in host else host or "127.0.0.1"
    err.print(f"the console of app {settings.sdkappid} is at http://{shown}:{port}{settings.console_prefix}/")
    try:
        serve.serve(dataclasses.replace(settings, console_host=host, console_port=port))
    except OSError as error:
        fail(FAILED, f"{host or 'every address'}, port {port}: {error.strerror}")


def _name(_context: click.Context, _option: click.Parameter, name: str) -> str:
    try:
        return accounts.read_name(name)
    except ValueError as rule:
        raise click.BadParameter(str(rule)) from None


_role = click.option("--role", type=click.Choice(get_args(Role)), default="viewer", show_default=True)


@console.command("hash")
@click.argument("name", callback=_name)
@_role
@explained
def hash_password(name: str, role: str) -> None:
    """Print the line of the accounts file for NAME.

    Asks for the password, or reads it from a pipe.
    """
    if sys.stdin.isatty():
        password = click.prompt("password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    try:
        click.echo(f"{name}:{role}:{accounts.hash_password(password)}")
    except ValueError as rule:
        fail(FAILED, f"the password {rule}")


@console.command("token")
@click.argument("name", callback=_name)
@_role
@explained
def new_token(name: str, role: str) -> None:
    """Print a new token for the program NAME.

    It is shown only once, with the line of the accounts file for it.
    """
    token, hash = accounts.new_token()
    err.print("the token, which is not shown again:", style="dim")
    out.print(token)
    err.print("the line of the file:", style="dim")
    out.print(f"{name}:{role}:{hash}")
