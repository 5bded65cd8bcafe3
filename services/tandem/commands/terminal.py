"""What commands share towards people: consoles, addresses, commands to paste."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def reachable(host: str, port: int) -> str:
    """The address at which this machine reaches a server that listens on host:port."""
    return f"{WILDCARDS.get(host, host)}:{port}"


def print_error(message: str) -> None:
    """Print an error as people should see it: no stack, no markup interpreted."""
    errors.print("[bold red]error:[/] ", end="")
    errors.print(message, markup=False, soft_wrap=True)


def tandem_command() -> str:
    """How `tandem` is called in this environment, so that what we print can be pasted."""
    script = Path(sys.executable).parent / "tandem"
    found = shutil.which("tandem")
    if found and script.exists() and os.path.samefile(found, script):
        return "tandem"
    return _short(script) if script.exists() else f"{python_command()} -m tandem"


def python_command() -> str:
    """How this environment's Python is called."""
    found = shutil.which("python")
    executable = Path(sys.executable)
    return "python" if found and Path(found) == executable else _short(executable)


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
