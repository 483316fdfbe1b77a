"""What the gates of a hybrid did on a batch, as numbers to log and distributions to draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hippocampus.config import PATHS
from hippocampus.models.hybrid_block import BlockSpec

Out = dict[str, Array]


def token_sums(specs: tuple[BlockSpec, ...], out: Out,
               weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """Weighted sums over tokens of the layers' mean gate per path, its entropy (nats), and depth.

    Args:
      specs: of every layer.
      out: a forward pass's intermediates.
      weight_BT: weight per token.
    """
    sums: dict[str, Array] = {}
    for path in PATHS:
        layers = [(i, spec.paths.index(path)) for i, spec in enumerate(specs) if path in spec.paths]
        if layers:
            sums[f"mixer/gate/{path}"] = _mean(
                [(weight_BT * out[f"layers.{i}.mixer.gates"][..., p]).sum() for i, p in layers])
    sums["mixer/entropy"] = _mean(
        [(weight_BT * out[f"layers.{i}.mixer.entropy"]).sum() for i in range(len(specs))])
    depths = [(weight_BT * _mean_depth(out, i, spec)).sum() for i, spec in enumerate(specs)
              if "hopfield" in spec.paths]
    if depths:
        sums["hopfield/depth"] = _mean(depths)
    return jax.lax.stop_gradient(sums)


def distributions(specs: tuple[BlockSpec, ...], out: Out) -> dict[str, Array]:
    """Series name -> values of every token: each layer's gate per path, and retrieval depth."""
    values: dict[str, Array] = {}
    for i, spec in enumerate(specs):
        for p, path in enumerate(spec.paths):
            values[f"mixer/gate/{path}/layer_{i}"] = out[f"layers.{i}.mixer.gates"][..., p]
        if "hopfield" in spec.paths:
            values[f"hopfield/depth/layer_{i}"] = _mean_depth(out, i, spec)
    return values


def _mean_depth(out: Out, layer: int, spec: BlockSpec) -> Float[Array, "B T"]:
    gates = out[f"layers.{layer}.hopfield.depth_gates"]
    return (gates * jnp.arange(1, spec.depth + 1)).sum(-1)


def _mean(values: list[Array]) -> Array:
    return jnp.stack(values).mean()
