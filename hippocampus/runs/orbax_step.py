"""Orbax behind one file: how one step is written and read, and what its errors mean."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import options as orbax_options
from orbax.checkpoint import v1 as ocp

from hippocampus.errors import CheckpointError


class OtherTrees(CheckpointError):
    """A step of another model, optimizer or version: whole, but not what was asked for."""


class OrbaxStep:
    """Writes and reads the named trees of one step folder."""

    def __init__(self) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what it reports is said in one line
        self._context = ocp.Context()
        # The folder is a step once commit_success.txt is in it; a rename is not atomic everywhere.
        self._context.atomicity.mode = orbax_options.AtomicityMode.COMMIT_FILE

    def write(self, folder: Path, trees: dict[str, Any], record: dict[str, Any] | None) -> Any:
        """Starts to write; `result()` of what it returns waits, or raises what went wrong.

        Args:
          folder: must not exist.
          trees: name -> tree of arrays, which may be donated as soon as this returns.
          record: JSON to keep with them.

        Raises:
          Exception: of any kind; see `reason`.
        """
        with self._context:
            return ocp.save_checkpointables_async(folder, trees, custom_metadata=record)

    def read(self, folder: Path, like: dict[str, Any], what: str) -> dict[str, Any]:
        """Loads trees onto the shardings of `like`, never cast to another type.

        Raises:
          OtherTrees: a tree or leaf is not there, or of another shape or type.
          CheckpointError: damaged; begins with `what`.
        """
        with explained(what), self._context:
            if other := _difference(ocp.checkpointables_metadata(folder).metadata, like):
                raise OtherTrees(f"{what}: {other}",
                                 "it is of another config or version; --workdir chooses a run")
            return ocp.load_checkpointables(folder, like)


def reason(error: BaseException) -> str:
    """One line of an error; the useful message is often in its cause."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
    code = re.search(r"[Ww]rit.*os_error_code='(\d+)'", str(cause), re.DOTALL)
    if code:
        return os.strerror(int(code[1]))
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns Orbax's errors, of any kind, into one line; not those of a device or of memory."""
    try:
        yield
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {reason(error)}",
                              "--debug shows the whole error") from error


def _difference(saved: dict[str, Any], like: dict[str, Any]) -> str | None:
    """The first leaf that is not saved as it is asked for; Orbax would cast the type silently."""
    for name, tree in like.items():
        if name not in saved:
            return f"it has no {name}"
        there, asked = _leaves(saved[name]), _leaves(tree)
        if not there:
            continue  # damaged; to load it says more
        for path in [*asked, *there]:
            leaf = "/".join((name, *path))
            if path not in there:
                return f"it has no {leaf}"
            if path not in asked:
                return f"{leaf} is in it, but not asked for"
            if jnp.issubdtype(asked[path].dtype, jax.dtypes.extended):
                continue  # a random key, saved as its words
            for kind in ("shape", "dtype"):
                then, now = getattr(there[path], kind), getattr(asked[path], kind)
                if then != now:
                    return f"{leaf} has {kind} {_short(then)}, not {_short(now)}"
    return None


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """By names alone: a saved named tuple comes back as a dict."""
    return {tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                  for key in path): leaf
            for path, leaf in jax.tree.leaves_with_path(tree) if hasattr(leaf, "shape")}


def _short(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list | tuple) else str(value)
