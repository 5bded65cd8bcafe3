"""The last one to leave: a small process that ends whatever a local cluster left behind.

It waits on a pipe that only `tandem serve` holds open. When the pipe closes, in good order or
because serve was killed, every process that carries the cluster's mark in its environment or writes
its logs there is killed, and the cluster's directory removed. It touches no other process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MARK = "TANDEM_CLUSTER_MARK"
SWEEP_TIMEOUT = 20.0
SWEEP_INTERVAL = 0.1


class Reaper:
    """The pipe's other end, held by `tandem serve`."""

    def __init__(self) -> None:
        mark = secrets.token_hex(8)
        os.environ[MARK] = mark  # inherited by every process of the cluster from here on
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tandem.commands.reaper", mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def own_directory(self, directory: Path) -> None:
        """Have a directory removed at the end."""
        self._tell(str(directory))

    def disown_directories(self) -> None:
        """Keep every directory after all, because something went wrong and its logs say what."""
        self._tell("keep")

    def finish(self) -> None:
        """Let it sweep, and return when nothing is left."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=SWEEP_TIMEOUT + 5.0)

    def _tell(self, line: str) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()


def sweep(mark: str, directories: Sequence[Path], spare: set[int]) -> None:
    """Kill every process of the cluster, until a look around finds none."""
    deadline = time.monotonic() + SWEEP_TIMEOUT
    while time.monotonic() < deadline:
        found = [
            pid
            for pid in _process_ids()
            if pid not in spare and (_is_marked(pid, mark) or _writes_into(pid, directories))
        ]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(SWEEP_INTERVAL)


def _process_ids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _is_marked(pid: int, mark: str) -> bool:
    """Whether the environment that the process was started with has the mark."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone meanwhile, or not ours
        return False
    return f"{MARK}={mark}".encode() in block.split(b"\0")


def _writes_into(pid: int, directories: Sequence[Path]) -> bool:
    """Whether it writes its logs there. Some of Ray's processes wipe their environment block when
    they give themselves a title, but each keeps its logs open. Whoever only reads them is spared.
    """
    try:
        return any(
            target.is_relative_to(directory) and _is_writable(pid, entry.name)
            for entry in Path(f"/proc/{pid}/fd").iterdir()
            for target in [Path(os.readlink(entry))]
            for directory in directories
        )
    except OSError:
        return False


def _is_writable(pid: int, descriptor: str) -> bool:
    info = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text(encoding="ascii")
    flags = next(line for line in info.splitlines() if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def session_directory(path: str) -> Path:
    """Return the directory; refuse what is not plainly that of a Ray session."""
    directory = Path(path)
    if not directory.is_absolute() or not directory.name.startswith("session_"):
        raise ValueError(f"{path!r} is not the directory of a Ray session")
    return directory


def remove_directory(directory: Path) -> None:
    """Remove a Ray session's directory and the link to it that would be left dangling."""
    shutil.rmtree(directory, ignore_errors=True)
    latest = directory.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)


def main() -> None:
    """Wait for the end of standard input, then sweep."""
    mark, parent = sys.argv[1], int(sys.argv[2])
    directories: list[Path] = []
    keep = False
    for line in sys.stdin:
        if line.strip() == "keep":
            keep = True
        else:
            directories.append(session_directory(line.strip()))
    sweep(mark, directories, spare={os.getpid(), parent})
    for directory in () if keep else directories:
        remove_directory(directory)


if __name__ == "__main__":
    main()
