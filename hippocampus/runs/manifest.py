"""The digests of a saved step, so that a flipped bit is found before it is trained on.

Orbax knows when a save was whole, but reads changed bytes of an array as other numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

import xxhash

from hippocampus.files import write_atomically

MANIFEST = "manifest.json"
"""In the folder of a step; a step without one was killed before it, or is of an older version."""

_ALGORITHM = "xxh3_128"
_CHUNK = 1 << 22

_Files = dict[str, dict[str, int | str]]


def write_manifest(step_folder: Path) -> None:
    """Writes down size and digest of every file of a committed step, once they are on disk.

    Older steps go after this one: a power failure must not find this one still in memory.

    Args:
      step_folder: `steps/<n>`.

    Raises:
      OSError: a file cannot be read, or the disk is full.
    """
    files = {}
    for path in sorted(step_folder.rglob("*")):
        name = path.relative_to(step_folder).as_posix()
        if path.is_file() and name != MANIFEST and not name.endswith(".partial"):
            files[name] = _entry(path)
        elif path.is_dir():
            _sync(path)
    _sync(step_folder)
    write_atomically(step_folder / MANIFEST, _text(files))


def extend_manifest(step_folder: Path, name: str) -> None:
    """Adds a file that came later; the digests of the others stay what they were.

    Args:
      step_folder: `steps/<n>`; nothing is done where it has no manifest.
      name: a file in it.

    Raises:
      OSError: it cannot be written.
      ValueError: the manifest is damaged.
    """
    if has_manifest(step_folder):
        files = _read(step_folder / MANIFEST)
        files[name] = _entry(step_folder / name)
        write_atomically(step_folder / MANIFEST, _text(files))


def has_manifest(step_folder: Path) -> bool:
    """Whether a step can be checked."""
    return (step_folder / MANIFEST).is_file()


def check_manifest(step_folder: Path, trees: Collection[str] | None = None) -> str | None:
    """Compares the files of a step with its manifest.

    Args:
      step_folder: `steps/<n>`.
      trees: folders of the step to look into, besides the files beside them; None = all.

    Returns:
      What is wrong first ("params/d/…: digest differs"); None where nothing is, or where there is
      no manifest.
    """
    try:
        files = _read(step_folder / MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except ValueError as error:
        return f"{MANIFEST} {error}"
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:  # a changed name must not lead elsewhere
            return f"{MANIFEST} is damaged"
        if trees is not None and len(parts) > 1 and parts[0] not in trees:
            continue
        if problem := _check_file(step_folder / name, entry):
            return f"{name}{problem}"
    return None


def _text(files: _Files) -> str:
    """With a digest of its own, so that a changed manifest does not accuse a file."""
    return json.dumps({"algorithm": _ALGORITHM, "digest": _own_digest(files), "files": files},
                      indent=1)


def _read(path: Path) -> _Files:
    try:
        content = json.loads(path.read_bytes())
        files: _Files = {str(name): {"bytes": int(file["bytes"]), "digest": str(file["digest"])}
                         for name, file in content["files"].items()}
        if content["algorithm"] == _ALGORITHM and content["digest"] == _own_digest(files):
            return files
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError("is damaged")


def _own_digest(files: _Files) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _entry(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "digest": _digest(path, sync=True)}


def _check_file(path: Path, entry: Mapping[str, int | str]) -> str | None:
    size, digest = entry["bytes"], entry["digest"]
    try:
        if not path.is_file():
            return " is missing"
        if path.stat().st_size != size:
            return f" is {path.stat().st_size} bytes, not {size}"
        return None if _digest(path) == digest else ": digest differs"
    except (OSError, ValueError) as error:
        return f" cannot be read ({getattr(error, 'strerror', None) or error})"


def _digest(path: Path, sync: bool = False) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """The names in a folder; not every file system can, and then has no need to."""
    file = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(file)
    os.close(file)
