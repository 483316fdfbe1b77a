"""How the C library hands out memory to XLA: `keep_freed_memory`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h: one arena, no maps, no trimming.
_SETTINGS = ((-8, 1), (-4, 0), (-1, 2**31 - 1))


def expects_accelerator() -> bool:
    """Whether JAX will look for an accelerator; JAX is not imported to know it."""
    installed = (importlib.util.find_spec("libtpu")
                 or importlib.metadata.entry_points(group="jax_plugins"))
    return os.environ.get("JAX_PLATFORMS", "" if installed else "cpu") != "cpu"


def keep_freed_memory() -> bool:
    """Lets the C library keep what XLA frees, on a machine without an accelerator.

    XLA takes the intermediate arrays of a step at its start and frees them at its end. By default
    glibc gives such blocks back to the system, which clears every page of them again for the next
    step: 80 MB a step and a fifth of the time of `configs/shakespeare_laptop.py`. One arena that
    is never trimmed keeps them. Threads that already run are not concerned, so it has to be called
    before JAX is imported. MALLOC_ARENA_MAX in the environment turns it off.

    Returns:
      Whether it did anything; without glibc it cannot.
    """
    if expects_accelerator():
        return False
    if not sys.platform.startswith("linux") or "MALLOC_ARENA_MAX" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in _SETTINGS)
