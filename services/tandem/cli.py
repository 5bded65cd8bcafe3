"""`tandem`: the command line. Puts the commands together and turns errors into exit codes.

Exit code 0: done, or stopped by request; 1: it did not work; 2: the configuration is wrong.
"""

from __future__ import annotations

import platform
import sys

import typer

from tandem import __version__
from tandem.commands.call import call
from tandem.commands.chat import chat
from tandem.commands.cluster import down, gateway, serve, up
from tandem.commands.plan import plan
from tandem.commands.profile import profile
from tandem.commands.show_config import config
from tandem.commands.simulate import simulate
from tandem.commands.status import status
from tandem.commands.terminal import print_error
from tandem.commands.trace import trace
from tandem.core.errors import ConfigError, TandemError

app = typer.Typer(
    name="tandem",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version() -> None:
    """Print the version of Tandem, and of what it stands on."""
    from importlib.metadata import version as installed

    typer.echo(f"tandem {__version__}")
    for name in ("torch", "ray", "grpcio"):
        typer.echo(f"{name} {installed(name)}")
    typer.echo(f"python {platform.python_version()}")


for command in (
    serve,
    up,
    down,
    gateway,
    status,
    chat,
    call,
    config,
    profile,
    simulate,
    plan,
    trace,
    version,
):
    app.command()(command)


def main() -> None:
    """Entry point of `tandem` and `python -m tandem`."""
    try:
        app()
    except TandemError as error:
        print_error(error.message)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
