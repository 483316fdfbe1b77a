"""Where arrays lie: the mesh, and rules (regular expression -> axes) as data.

The step is one `jax.jit` over an Auto mesh (what pjit and pmap are called today): the model has
no word of sharding in it, and XLA inserts the collectives. Ops that have to know the mesh find it
around them (hippocampus.ops.placement), where `on_mesh` puts it.

    data      rows of the batch
    fsdp      rows of the batch, and parameters with their optimizer state
    tensor    heads and widths, of parameters and activations
    sequence  tokens of every row
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hippocampus.config import MESH_AXES, MeshConfig
from hippocampus.errors import ConfigError

BATCH_AXES = ("data", "fsdp")

_GATHERED_WHOLE = 2**30
"""Bytes of parameters up to which `mesh.gather="small"` gathers them once a step."""

Function = TypeVar("Function", bound=Callable)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Raises:
      ConfigError: it is not the number of devices that `mesh.devices` expects, or the axes do not
        multiply to it.
    """
    devices = devices if devices is not None else jax.devices()
    if config.devices and config.devices != len(devices):
        raise ConfigError(
            f"{config.devices} devices are expected, but JAX sees {len(devices)} "
            f"({devices[0].device_kind}, {jax.process_count()} processes)",
            "start every process, and check the accelerator with python -m hippocampus.doctor; "
            "or set --expect_devices / mesh.devices to what is there")
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


def tree_shardings(mesh: Mesh | AbstractMesh, tree: Any, rules: tuple[tuple[str, str], ...]) -> Any:
    """A NamedSharding for every array of a tree.

    Args:
      mesh: from `make_mesh`, or the abstract form of one.
      tree: parameters, or a whole train state: optimizer moments have the parameter's path at
        the end of theirs, so the same rules place them.
      rules: (pattern, "axis,axis"); the axes belong to the last dimensions. A dimension that its
        axis does not divide stays whole; an axis named for two goes to the first that it divides.
    """
    compiled = [(re.compile(pattern), axes.split(",")) for pattern, axes in rules]

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for pattern, axes in compiled:
            if len(leaf.shape) >= len(axes) and pattern.search(path_name(path)):
                return NamedSharding(mesh, _partition(mesh, leaf.shape, axes))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(place, tree)


def _partition(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], axes: list[str]) -> PartitionSpec:
    whole = [None] * (len(shape) - len(axes))
    parts: list[tuple[str, ...] | str | None] = []
    used = {"-"}
    for size, names in zip(shape[len(whole):], axes, strict=True):
        taken: list[str] = []
        ways = 1
        for axis in (name.strip() for name in names.split("+")):
            if axis not in used and size % (ways * mesh.shape[axis]) == 0:
                taken.append(axis)
                ways *= mesh.shape[axis]
        used.update(taken)
        parts.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*whole, *parts)


def gathers_once(config: MeshConfig, params: Any) -> bool:
    """Whether a step gathers what `fsdp` spreads once, before all else.

    Then devices wait for each other a few times in a step, as with `data`, instead of at every
    matrix; each holds the whole parameters while the step runs, and its own part of their
    gradients, averages and optimizer state.

    Args:
      config: `gather`.
      params: arrays or their shapes.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1 or config.gather == "use":
        return False
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return config.gather == "step" or size <= _GATHERED_WHOLE


def constrain_parameters(tree: Any, config: MeshConfig, *, gathered: bool) -> Any:
    """Parameters or their gradients, inside a jitted function, laid out by the rules.

    They stay as they are where a step does not gather once (`gathers_once`).

    Args:
      tree: on the mesh that is around.
      config: `rules` and `gather`.
      gathered: whole over the fsdp axis.
    """
    if not gathers_once(config, tree):
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    layouts = []
    # From columns over tensor to rows over tensor and fsdp XLA finds its way only in two steps.
    if gathered or mesh.shape.get("tensor", 1) > 1:
        layouts.append(tuple((pattern, ",".join(_without_fsdp(part) for part in axes.split(",")))
                             for pattern, axes in config.rules))
    if not gathered:
        layouts.append(config.rules)
    for rules in layouts:
        tree = jax.tree.map(jax.lax.with_sharding_constraint, tree,
                            tree_shardings(mesh, tree, rules))
    return tree


def _without_fsdp(axes: str) -> str:
    return "+".join(axis for axis in axes.split("+") if axis.strip() != "fsdp") or "-"


def path_name(path: tuple) -> str:
    """A key path of a tree as "layers_0/ssm/in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh: Mesh, n_dimensions: int = 2) -> NamedSharding:
    """Rows over the data and fsdp axes, and tokens, where there are any, over the sequence axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *("sequence",)[:n_dimensions - 1]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices need: all that it has to read."""
    indices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    rows = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(first for first, _, _ in rows), max(stop for _, stop, _ in rows))


def to_devices(batch: Any, mesh: Mesh, rows: slice | None = None,
               batch_size: int | None = None) -> Any:
    """A batch of numpy arrays as global device arrays.

    Args:
      batch: global arrays, or only this process's rows of them.
      mesh: where to.
      rows: which rows `batch` holds (from `process_rows`); None: all.
      batch_size: rows of the global batch; needed with `rows`.
    """
    first = rows.start if rows else 0

    def place(array: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, array.ndim)
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        shape = (batch_size or len(array), *array.shape[1:])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(shape[0])
            return array[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def on_mesh(function: Function, mesh: Mesh) -> Function:
    """The function with the mesh around what it computes, for ops to see; to be jitted.

    On one device it is the function itself.
    """
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def placed(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return placed  # type: ignore[return-value]


def around(mesh: Mesh) -> contextlib.AbstractContextManager:
    """A context in which functions jitted elsewhere see the mesh, if it has several devices."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Whole numpy arrays of a tree that may lie on the devices of several processes.

    Every process has to call it. Arrays travel one by one, so that no device holds a second copy
    of the whole tree.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    gather = jax.jit(lambda array: array, out_shardings=replicated(mesh))
    return jax.tree.map(lambda array: np.asarray(gather(array).addressable_data(0)), tree)


def to_one_device(tree: Any, mesh: Mesh) -> Any:
    """A tree on this process's first device, for what is not spread; every process calls it."""
    if jax.process_count() > 1:
        tree = to_host(tree, mesh)
    return jax.device_put(tree, jax.local_devices()[0])
