"""A stack of blocks over per-layer parameter trees: unrolled, or scanned over equal layers.

Parameters always lie as `layers_0 … layers_n`, on disk, in sharding rules and in edits. Scanning
stacks the trees of a run of equal layers at this one border and unstacks what comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Params = Any
ApplyLayer = Callable[..., tuple[Array, dict[str, Array]]]
"""(spec, params, x_BTD, per_layer) -> (x_BTD, out)."""

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def layer_parameters(
    module: nn.Module, names: Sequence[str], specs: Sequence[Any],
    init: Callable[[Array, Any], Params],
) -> list[Params]:
    """The parameter tree of every layer of a module; to be called in its `setup`.

    `Module.param` for each would trace again how it is made, to compare shapes. Where they are
    made, layers with equal specs are made by one loop: unrolled, every layer's random numbers are
    code of their own, and twelve layers compile three times as long. The numbers are those that
    `Module.param` would give.

    Args:
      module: that has the layers.
      names: theirs.
      specs: hashable settings of each.
      init: (key, spec) -> parameters.
    """
    missing = [i for i, name in enumerate(names) if not module.has_variable("params", name)]
    if missing and module.is_initializing():
        keys = {i: module.make_rng("params") for i in missing}
        for spec in dict.fromkeys(specs[i] for i in missing):
            alike = [i for i in missing if specs[i] == spec]
            trees = jax.lax.map(lambda key, spec=spec: init(key, spec),
                                jnp.stack([keys[i] for i in alike]))
            for n, i in enumerate(alike):
                tree = jax.tree.map(lambda array, n=n: array[n], trees)
                module.put_variable("params", names[i], tree)
    return [module.get_variable("params", name) if module.has_variable("params", name)
            else module.param(name, init, spec) for name, spec in zip(names, specs, strict=True)]


def run_layers(
    apply_layer: ApplyLayer, specs: Sequence[Any], params: Sequence[Params],
    x_BTD: Float[Array, "B T D"], per_layer: Any, *, scan: bool, remat: str, first: int = 0,
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """Runs every layer in order.

    Args:
      apply_layer: one layer as a pure function of its parameters.
      specs: static settings of each layer; neighbours with equal ones can be scanned.
      params: parameter tree of each layer. Equal specs have equal shapes; where one of them has
        leaves that its neighbour has not, such as an adapter, they are compiled apart.
      x_BTD: residual stream; any pytree that a layer takes and gives.
      per_layer: pytree of arrays with a leading L axis; a layer gets its slice.
      scan: compile runs of equal layers once.
      remat: "none", "dots" or "full": what of a layer the backward pass computes again; "mlp" is
        the layer's own matter.
      first: number of the first of these layers in its model, for the names.

    Returns:
      x_BTD, and the layers' `out` under "layers.<i>.<name>".
    """
    out: dict[str, Array] = {}

    @functools.cache  # layers that are alike share one trace, which takes seconds for them all
    def body_of(spec: Any) -> Any:
        def body(x: Array, layer: tuple[Params, Any]) -> tuple[Array, dict]:
            return apply_layer(spec, layer[0], x, layer[1])

        return jax.jit(body, inline=True)

    alike = [(spec, jax.tree.structure(tree)) for spec, tree in zip(specs, params, strict=True)]
    for start, stop in _runs(alike, scan):
        body = body_of(specs[start])
        if remat not in ("none", "mlp"):
            body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat],
                                  prevent_cse=stop - start == 1)
        own = jax.tree.map(lambda array, a=start, b=stop: array[a:b], per_layer)
        if stop - start == 1:
            x_BTD, part = body(x_BTD, (params[start], jax.tree.map(lambda array: array[0], own)))
            out.update({f"layers.{first + start}.{name}": value for name, value in part.items()})
        else:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[start:stop])
            x_BTD, parts = jax.lax.scan(body, x_BTD, (stacked, own))
            out.update({f"layers.{first + start + i}.{name}": values[i]
                        for name, values in parts.items() for i in range(stop - start)})
    return x_BTD, out


def _runs(kinds: Sequence[Any], scan: bool) -> Iterator[tuple[int, int]]:
    """[start, stop) of every run of layers that is compiled together."""
    start = 0
    for _, group in groupby(kinds):
        length = len(list(group))
        if scan:
            yield start, start + length
        else:
            yield from ((i, i + 1) for i in range(start, start + length))
        start += length
