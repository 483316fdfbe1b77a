"""Where arrays lie: the mesh, and rules (regular expression -> axes) as data.

The step is one `jax.jit` over an Auto mesh (what pjit and pmap are called today): the model has
no word of sharding in it, and XLA inserts the collectives.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hippocampus.config import MESH_AXES, MeshConfig
from hippocampus.errors import ConfigError
from hippocampus.training.optimizer import path_name

BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    return jax.make_mesh(mesh_sizes(config, len(devices)), MESH_AXES, devices=devices,
                         axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """The size of every axis of `MESH_AXES` over a number of devices.

    Raises:
      ConfigError: they do not multiply to that number.
    """
    fixed = config.fsdp * config.tensor * config.sequence
    data = n_devices // fixed if config.data == -1 else config.data
    sizes = (data, config.fsdp, config.tensor, config.sequence)
    if data < 1 or int(np.prod(sizes)) != n_devices:
        asked = " * ".join(f"mesh.{axis}={size}"
                           for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError(f"{asked} is not the number of devices, {n_devices}",
                          "set mesh.data=-1 and axes that divide the number of devices")
    return sizes


def check_batch(mesh: Mesh, batch_size: int, name: str, micro_batches: int = 1) -> None:
    """Refuses a batch that does not divide over the mesh.

    Raises:
      ConfigError: with both numbers.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * micro_batches):
        parts = f"{ways} devices" + (f" * {micro_batches} micro-batches" if micro_batches > 1
                                     else "")
        unit = ways * micro_batches
        raise ConfigError(f"{name} = {batch_size} does not divide over {parts}",
                          f"the nearest multiple is {max(unit, batch_size // unit * unit)}")


def tree_shardings(mesh: Mesh, tree: Any, rules: tuple[tuple[str, str], ...]) -> Any:
    """A NamedSharding for every array of a tree.

    Args:
      mesh: from `make_mesh`.
      tree: parameters, or a whole train state: optimizer moments have the parameter's path at
        the end of theirs, so the same rules place them.
      rules: (pattern, "axis,axis"); the axes belong to the last dimensions. A dimension that its
        axis does not divide stays whole.
    """
    compiled = [(re.compile(pattern), axes.split(",")) for pattern, axes in rules]

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for pattern, axes in compiled:
            if len(leaf.shape) >= len(axes) and pattern.search(path_name(path)):
                return NamedSharding(mesh, _partition(mesh, leaf.shape, axes))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(place, tree)


def _partition(mesh: Mesh, shape: tuple[int, ...], axes: list[str]) -> PartitionSpec:
    whole = [None] * (len(shape) - len(axes))
    parts = []
    for size, axis in zip(shape[len(whole):], axes, strict=True):
        axis = axis.strip()
        parts.append(axis if axis != "-" and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*whole, *parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def to_devices(batch: Any, sharding: NamedSharding) -> Any:
    """A batch of global numpy arrays as sharded device arrays."""
    return jax.tree.map(lambda array: jax.device_put(array, sharding), batch)
