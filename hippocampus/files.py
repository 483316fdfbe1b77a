"""Writing files so that a crash loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from hippocampus.errors import ConfigError, DataError

_LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Bytes of the name of a file or folder, and of a path with its end."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that every reader sees the old content or the new one, never a part.

    Args:
      path: the file to make or to replace; its folder is made where missing. Who may read and write
        a file that is replaced stays as it is.
      content: all of it; text is written as UTF-8.

    Raises:
      OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Next to its target, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            _keep_permissions(path, file.fileno())
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _keep_permissions(path: Path, descriptor: int) -> None:
    """Gives a new file those of the one that it replaces, before anything is in it."""
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != stat.S_IMODE(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, mode)


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
      path: the file.
      hint: what to do where it does not.

    Raises:
      DataError: missing, not JSON in UTF-8, or JSON of another kind.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}", hint) from None
    if not isinstance(content, dict):
        raise DataError(f"cannot read {path}: it is not a JSON object", hint)
    return content


def check_nameable(place: str | Path, what: str = "the folder") -> None:
    """Refuses a path that no file system can have, before anything asks for it.

    Args:
      place: a path.
      what: it is of, for the message.

    Raises:
      ConfigError: it is too long, or holds NUL or what is no text.
    """
    try:
        path = os.fsencode(place)
        good = (len(path) < _LONGEST_PATH and b"\0" not in path
                and all(len(part) <= _LONGEST_NAME for part in path.split(b"/")))
    except UnicodeEncodeError:
        good = False
    if not good:
        shown = ascii(str(place))
        raise ConfigError(f"{what} {shown[:60]}{'…' if len(shown) > 60 else ''} cannot be a path",
                          f"its parts have at most {_LONGEST_NAME} bytes, and no NUL")


def expand(path: str | Path) -> Path:
    """The path with ~ replaced by the home folder.

    Raises:
      DataError: of somebody whom this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"there is no home folder for {path}", "write the path out") from None


def check_writable(folder: Path, hint: str = "choose another --out") -> None:
    """Refuses a folder that nothing can be written into, before there is anything to write.

    Args:
      folder: need not exist; then the nearest one above it that does must take it.
      hint: what to do then.

    Raises:
      ConfigError: a file stands in its place, or there is no permission.
    """
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to {nearest}", hint)
