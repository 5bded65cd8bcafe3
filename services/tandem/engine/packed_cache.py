"""Packed weights kept on disk between starts, and mapped so that all workers of a machine share
the pages.

An entry is one file: a header that says what it holds and for whom, then the tensors, each on a
page of its own. It is written beside its place and renamed into it, so it is whole or absent; one
process at a time writes it and the others wait for it. Every byte is checked against the header's
checksums before it is used. Knows nested dataclasses of tensors; not what they mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from tandem.engine.memory import readable
from tandem.engine.packed_format import Build, FormatError, Parts, read_entry, write_entry

log = structlog.get_logger(__name__)

SMALLEST_BYTES = 256 * 2**20
"""Weights below this are packed again at each start: it takes less than half a second."""


def default_directory() -> Path:
    """The user's cache directory, by the XDG specification."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tandem" / "packed"


class PackedCache:
    """The entries of one directory, bounded in bytes: the longest unused go first."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    def load(
        self, name: str, identity: Mapping[str, object], nbytes: int, build: Build, threads: int
    ) -> Parts | None:
        """Return the parts under `name`, built first unless an entry for this very identity is
        there. None: they cannot be kept here, and the log says why.

        nbytes: about how large the parts are together. Raises what `build` raises.
        """
        path = self._directory / f"{_file_name(name)}.packed"
        try:
            self._make_room(nbytes, path)
            with _locked(path):
                parts = self._read(path, identity, threads)
                if parts is None:
                    self._write(path, identity, build)
                    parts = self._read(path, identity, threads)
        except OSError as error:
            log.warning("packed weights are not kept", path=str(path), reason=str(error))
            return None
        return parts

    def _read(self, path: Path, identity: Mapping[str, object], threads: int) -> Parts | None:
        if not path.exists():
            return None
        started = time.monotonic()
        try:
            parts = read_entry(path, identity, threads)
        except (FormatError, ValueError, KeyError) as error:
            log.warning("packed weights are made again", path=str(path), reason=str(error))
            return None
        os.utime(path)  # used now: the last to be evicted
        seconds = time.monotonic() - started
        log.info("packed weights mapped", path=str(path), seconds=round(seconds, 2))
        return parts

    def _write(self, path: Path, identity: Mapping[str, object], build: Build) -> None:
        partial = path.with_suffix(".partial")
        try:
            write_entry(partial, identity, build)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, nbytes: int, keep: Path) -> None:
        """Evict what is over the bound. Raises `OSError` if there is no room even so."""
        if nbytes > self._max_bytes:
            raise OSError(
                f"{readable(nbytes)} are more than model.packed_cache_bytes, "
                f"{readable(self._max_bytes)}"
            )
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        others = [path for path in self._directory.glob("*.packed") if path != keep]
        used = {path: path.stat() for path in others}
        total = nbytes + sum(stat.st_size for stat in used.values())
        for path in sorted(others, key=lambda path: used[path].st_mtime):
            if total <= self._max_bytes:
                break
            log.info("packed weights evicted", path=str(path))
            path.unlink(missing_ok=True)
            total -= used[path].st_size
        missing = 0 if keep.exists() else nbytes
        if shutil.disk_usage(self._directory).free < missing:
            raise OSError(f"{self._directory} has no room for {readable(nbytes)}")


def build_all(build: Build) -> Parts:
    """Return the parts without keeping them anywhere."""
    parts: dict[str, Any] = {}
    build(parts.__setitem__)
    return parts


def in_parallel(
    threads: int, jobs: Mapping[str, Callable[[], Any]], done: Callable[[str, Any], None]
) -> None:
    """Run `jobs` on threads and hand each result over in the calling thread, in the jobs' order.

    No more than two results per thread exist at once. Raises what the first failing job raises.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        waiting: list[tuple[str, Any]] = []
        try:
            for name, job in jobs.items():
                waiting.append((name, pool.submit(job)))
                if len(waiting) >= 2 * threads:
                    first, future = waiting.pop(0)
                    done(first, future.result())
            while waiting:
                first, future = waiting.pop(0)
                done(first, future.result())
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only process at this entry. The lock of one that dies is free again."""
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another worker to pack the weights", path=str(path))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file_name(name: str) -> str:
    shown = "".join(c if c.isalnum() or c in "-._" else "-" for c in Path(name).name)
    return f"{shown[:80]}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
