"""Installs the engines that Tandem is compared with, each in a virtual environment of its own.

Pinned, and done once: a stamp says what was installed, and a changed recipe installs again.
Everything lies under `benchmarks/.cache/peers` (TANDEM_BENCH_CACHE moves it) next to a log per
environment. What cannot be installed raises `UnavailableError`, whose message goes into the table.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import CACHE

PEERS = CACHE / "peers"
TORCH = "torch==2.13.0"
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


class UnavailableError(Exception):
    """A peer cannot be installed, prepared or started; the message says why in one line."""


@dataclass(frozen=True)
class Environment:
    """What is installed for one peer."""

    name: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    """Dependencies that do not fit the CPU build of torch and are not needed."""
    finish: Callable[[Path], None] | None = None
    """What is left to do in the environment's directory after the packages are in."""
    revision: int = 1
    """Raised when `finish` does something else."""

    @property
    def directory(self) -> Path:
        """Where the environment is."""
        return PEERS / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.directory / "bin" / "python"

    @property
    def recipe(self) -> str:
        """Changes when the environment has to be installed again."""
        parts = (sys.version, *self.packages, *self.unwanted, str(self.revision))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def ensure(environment: Environment) -> Path:
    """Install the environment unless it is there; returns its directory.

    Raises `UnavailableError`.
    """
    directory, stamp = environment.directory, environment.directory / ".installed"
    if stamp.is_file() and stamp.read_text() == environment.recipe:
        return directory
    PEERS.mkdir(parents=True, exist_ok=True)
    print(f"installing {environment.name} in {directory} (minutes)", flush=True)
    python = str(environment.python)
    if not environment.python.exists():
        command([sys.executable, "-m", "venv", str(directory)], environment.name)
    command([python, *PIP, "install", *environment.packages], environment.name)
    if environment.unwanted:
        command([python, *PIP, "uninstall", "-y", *environment.unwanted], environment.name)
    if environment.finish is not None:
        environment.finish(directory)
    stamp.write_text(environment.recipe)
    return directory


def command(
    arguments: Sequence[str],
    name: str,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """Run one step of an installation, with its output in the log of `name`.

    Raises `UnavailableError` with the last line that it printed.
    """
    log = PEERS / f"{name}.log"
    with log.open("ab") as output:
        try:
            code = subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **(env or {})},
            ).returncode
        except FileNotFoundError as error:
            raise UnavailableError(f"{name}: {error.filename} is not there") from error
    if code:
        raise UnavailableError(f"{name}: {Path(arguments[0]).name} failed: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
