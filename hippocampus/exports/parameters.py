"""Parameter trees to files and back, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from hippocampus.errors import CheckpointError
from hippocampus.exports.folder import ExportRecord
from hippocampus.exports.storage import decode, encode, stored_specs
from hippocampus.exports.weights_file import (
    check_tensors,
    open_tensors,
    read_header,
    write_weights,
)


def write_parameters(path: Path, params: Any, record: ExportRecord) -> None:
    """Writes a tree; a parameter's name is its path joined by dots, `layers_0.ssm.in.kernel`.

    Args:
      path: the file to make.
      params: float32, on devices or the host.
      record: of the folder; how matrices are stored, and what the file says of itself.

    Raises:
      CheckpointError: a weight is not a finite number.
      OSError: the file cannot be written.
    """
    tensors = {}
    for entries, leaf in jax.tree.leaves_with_path(params):
        name, weight = _name(entries), np.asarray(leaf)
        if not np.isfinite(weight).all():
            raise CheckpointError(f"step {record.step}: {name} has weights that are not finite",
                                  "the training diverged; export an earlier step with --step")
        tensors.update(encode(name, weight, record.storage))
    write_weights(path, tensors, record.metadata())


def read_parameters(path: Path, shapes: Any, record: ExportRecord,
                    sharding: jax.sharding.Sharding) -> Any:
    """Reads a tree; the host holds one parameter at a time besides what lies on its own devices.

    Args:
      path: the file, of whatever origin.
      shapes: tree of `jax.ShapeDtypeStruct`s that the model needs.
      record: of the folder.
      sharding: where every parameter goes.

    Raises:
      CheckpointError: damaged, not of this model, or with weights that are not finite.
    """
    header = read_header(path)
    if dict(header.metadata) != record.metadata():
        raise CheckpointError(f"{path} is not the file that config.json beside it describes",
                              "both must come from the same export")
    named = {_name(entries): leaf for entries, leaf in jax.tree.leaves_with_path(shapes)}
    specs = stored_specs({name: leaf.shape for name, leaf in named.items()}, record.storage)
    check_tensors(path, header, specs)
    with open_tensors(path) as read:
        def load(entries: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = _name(entries)
            with np.errstate(over="ignore", invalid="ignore"):  # reported below, by name
                weight = decode(name, specs[name], read)
            if not np.isfinite(weight).all():
                raise CheckpointError(f"{path}: {name} has weights that are not finite",
                                      "this model cannot be used; ask for another export")
            return jax.make_array_from_callback(
                leaf.shape, sharding, lambda index: weight[index].astype(leaf.dtype, copy=False))

        return jax.tree_util.tree_map_with_path(load, shapes)


def _name(entries: Any) -> str:
    return jax.tree_util.keystr(entries, simple=True, separator=".")
