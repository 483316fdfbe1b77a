"""What XLA has compiled is kept: the second start of a config finds its programs on the disk.

The folder is `$JAX_COMPILATION_CACHE_DIR` where that is set (JAX reads it itself; gs:// works),
else `$HIPPOCAMPUS_COMPILATION_CACHE`, else ~/.cache/hippocampus/xla; "off" keeps nothing. What lies
in it is run, so it must belong to this user alone. In it is a folder for each kind of processor,
because homes are shared by machines, and code for one may not run on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

FOLDER = "HIPPOCAMPUS_COMPILATION_CACHE"
MAX_BYTES = 4 * 2**30
"""What was used last is kept."""

_MIN_SECONDS = 0.2
"""Faster compilations are not worth a file."""


def use_compilation_cache() -> Path | None:
    """Makes JAX keep what it compiles, GPU kernels it has timed included.

    Returns:
      The folder; None where nothing is kept, or JAX was told of a folder before.
    """
    import jax

    wanted = os.environ.get(FOLDER, "")
    if getattr(jax.config, "jax_compilation_cache_dir", None) or wanted == "off":
        return None
    folder = Path(wanted or "~/.cache/hippocampus/xla").expanduser() / _processor()
    if problem := _make_private(folder):
        warnings.warn(f"compiled programs are not kept in {folder.parent}: {problem}; set {FOLDER} "
                      "to a folder of yours, or to off", stacklevel=2)
        return None
    _drop_unfinished(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return folder


def private_folder() -> Path | None:
    """The folder in use, if it is a local one that nobody else can write to; else None."""
    import jax

    used = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not used or "://" in used:
        return None
    folder = Path(used)
    return None if _make_private(folder) else folder


def _make_private(folder: Path) -> str:
    """Makes the folder, and says why it must not be used; "" if it may."""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
            found = place.stat()
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return "others can write there"
    except OSError as error:
        return error.strerror or str(error)
    return "" if os.access(folder, os.W_OK) else "it cannot be written"


def _drop_unfinished(folder: Path) -> None:
    """Removes what a killed process left half written: JAX would read it again and again.

    An entry is whole when its time of use stands beside it, which JAX writes last.
    """
    for entry in folder.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            with contextlib.suppress(OSError):
                entry.unlink()


def _processor() -> str:
    """A name that differs between machines with different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
