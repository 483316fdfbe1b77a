"""How arrays lie on the mesh around a computation, as far as an op has to say so.

XLA places most arrays by itself. An op speaks where that would be wrong or slow: at a lookup,
and where work along a sharded time axis needs more than its own shard. It reads the mesh from
`jax.sharding.get_abstract_mesh()`; without one, or on one device, nothing here adds an operation.

Dimensions are named by what they are: "batch" (over the data and fsdp axes), "sequence", "tensor",
"rows" (of a table, over the tensor and fsdp axes), or None (whole on every device). One that does
not divide stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

SEQUENCE = "sequence"
AXES = {"batch": ("data", "fsdp"), SEQUENCE: (SEQUENCE,), "tensor": ("tensor",),
        "rows": ("tensor", "fsdp")}
"""Dimension -> the axes of the mesh that cut it, the slowest first."""

Dimensions = Sequence[str | None]


def shards(dimension: str, size: int) -> int:
    """Over how many devices a dimension of this size is cut; 1 = whole."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes.get(axis, 1) for axis in AXES[dimension])
    return ways if size % ways == 0 else 1


def constrain(x: Array, *dimensions: str | None) -> Array:
    """The same array, laid out as asked; as it is where there is no mesh of several devices."""
    if not _on_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, _partition(x.shape, dimensions))


def map_shards(function: Callable[..., Any], arrays: Sequence[Any],
               dimensions: Sequence[Dimensions], *results: Dimensions) -> Any:
    """Runs a function on every device's shards of its arrays (`jax.shard_map`).

    Args:
      function: of the shards; it may speak of the axis `SEQUENCE`.
      arrays: an entry may be None and is passed as it is.
      dimensions: of each array. "tensor" counts only if it divides in all arrays that have it, so
        that the shards of one device belong together.
      results: dimensions of what the function returns: one entry for all arrays, or one for each.
    """
    here = [(a, d) for a, d in zip(arrays, dimensions, strict=True) if a is not None]
    whole = {name for a, d in here for name, size in zip(d, a.shape, strict=True)
             if name and shards(name, size) == 1}

    def spec(wanted: Dimensions) -> PartitionSpec:
        return PartitionSpec(*(AXES[name] if name and name not in whole else None
                               for name in wanted))

    def with_absent(*parts: Array) -> Array:
        queue = list(parts)
        return function(*(None if a is None else queue.pop(0) for a in arrays))

    # No check of what varies over which axis: it refuses a scan that starts from plain zeros.
    out_specs = spec(results[0]) if len(results) == 1 else tuple(map(spec, results))
    return jax.shard_map(with_absent, in_specs=tuple(spec(d) for _, d in here),
                         out_specs=out_specs, check_vma=False)(*(a for a, _ in here))


def map_local(function: Callable[..., Any], arrays: Sequence[Any],
              dimensions: Sequence[Dimensions], *results: Dimensions) -> Any:
    """Runs a kernel, which sees whole arrays only, on the shards of every device.

    Args:
      function: of the shards.
      arrays: as for `map_shards`.
      dimensions: as for `map_shards`.
      results: as for `map_shards`.
    """
    if not _on_mesh() or jax.sharding.get_abstract_mesh().manual_axes:
        return function(*arrays)  # also where a caller has cut the arrays already
    return map_shards(function, arrays, dimensions, *results)


def _on_mesh() -> bool:
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1


def _partition(shape: tuple[int, ...], dimensions: Dimensions) -> PartitionSpec:
    return PartitionSpec(*(
        AXES[name] if name and shards(name, size) > 1 else None
        for name, size in zip(dimensions, shape, strict=True)))
