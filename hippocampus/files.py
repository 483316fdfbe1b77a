"""Writing files so that a crash loses nothing."""

from __future__ import annotations

import os
from pathlib import Path

from hippocampus.errors import ConfigError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that every reader sees the old content or the new one, never a part.

    Args:
      path: the file to make or to replace; its folder is made where missing.
      content: all of it; text is written as UTF-8.

    Raises:
      OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Next to its target, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuses a folder that nothing can be written into, before there is anything to write.

    Args:
      folder: need not exist; then the nearest one above it that does must take it.

    Raises:
      ConfigError: a file stands in its place, or there is no permission.
    """
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to {nearest}", "choose another --out")
