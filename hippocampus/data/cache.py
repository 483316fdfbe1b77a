"""Where downloads, tokenizers and shards are kept, and the lock that lets one process make them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rich.console import Console

from hippocampus.errors import DataError


def cache_path() -> Path:
    """Return `$HIPPOCAMPUS_CACHE` (default `~/.cache/hippocampus`)."""
    return Path(os.environ.get("HIPPOCAMPUS_CACHE") or "~/.cache/hippocampus").expanduser()


def cache_folder() -> Path:
    """Return `cache_path()`, made where missing.

    Where it cannot be written, a temporary folder takes its place until the process ends.
    """
    return _usable(cache_path())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the right to make a file or folder of the cache; a second process waits for it.

    The lock is the kernel's: it goes with the process that holds it, however that ends. On a file
    system that hosts share it holds among them too where the system passes `flock` on (NFS from
    version 3 on, Lustre with `-o flock`).

    Args:
        path: what is going to be made; its folder is made where missing.

    Raises:
        DataError: the folder cannot be written.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise cannot_write(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"waiting for another process that is making {path}", markup=False)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cannot_write(path: Path, error: OSError) -> DataError:
    """Return the error of a full disk or a folder without permission."""
    return DataError(
        f"cannot write {path}: {error.strerror}",
        "free some space there, or set HIPPOCAMPUS_CACHE to another folder; what is done is kept",
    )


@cache
def _usable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        kept = tempfile.TemporaryDirectory(prefix="hippocampus_")
        _KEPT.append(kept)
        warnings.warn(f"cannot write to {folder} ({error.strerror}): using {kept.name} until the "
                      "end of this process; set HIPPOCAMPUS_CACHE to another folder", stacklevel=3)
        return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # each is deleted with its last reference
