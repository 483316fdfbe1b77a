"""The training loss: cross-entropy of every supervised pass, and the regularisers asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hippocampus.config import Config, SegmentsConfig
from hippocampus.data.batches import Batch
from hippocampus.ops.cross_entropy import cross_entropy
from hippocampus.training.rectified_flow import depth_straightness, segment_flow

Sums = dict[str, Float[Array, ""]]


def segment_weights(config: SegmentsConfig) -> tuple[float, ...]:
    """The loss weight of each training pass: `segments.weights` aligned with the last one."""
    missing = max(0, config.train - len(config.weights))
    return (0.0,) * missing + config.weights[len(config.weights) - (config.train - missing):]


def training_loss(model: Any, params: Any, batch: Batch, key: Array,
                  config: Config) -> tuple[Float[Array, ""], tuple[Sums, dict[str, Array]]]:
    """The loss of a batch as a *sum* over tokens, so that micro-batches add up exactly.

    Args:
      model: a language model of this project.
      params: its parameters.
      batch: B,T tokens.
      key: random key of dropout and of the flow's times.
      config: the whole config.

    Returns:
      The sum to differentiate, and (terms, out): "nll" of the last pass, "nll_segment_<r>" of
      earlier ones, "z", "smoothing", "flow_segment", "flow_depth" as unscaled sums over tokens
      and "weight", what to divide them by; and the model's intermediates.
    """
    key_dropout, key_tau = jax.random.split(key)
    _, out, _ = model.apply({"params": params}, batch, train=True, method="forward",
                            rngs={"dropout": key_dropout})
    head, weight_BT, loss_config = model.head(params), batch.loss_weight_BT, config.loss
    weights = segment_weights(config.model.segments)
    total, sums = jnp.zeros(()), {"weight": weight_BT.sum()}
    for r, segment_weight in enumerate(weights):
        if not segment_weight:
            continue
        with jax.named_scope("loss"):
            loss, terms = cross_entropy(
                out["segments.hidden"][r], head, batch.targets_BT, weight_BT,
                smoothing=loss_config.label_smoothing, z_weight=loss_config.z_weight,
                backend=loss_config.backend)
        total = total + segment_weight * loss
        if r + 1 < len(weights):
            sums[f"nll_segment_{r + 1}"] = terms["nll"]
        else:
            sums["nll"] = terms["nll"]
            sums.update({name: terms[name] for name, used in (
                ("z", loss_config.z_weight), ("smoothing", loss_config.label_smoothing)) if used})

    flow = loss_config.rectified_flow
    if flow.segment_weight:
        tau_BT = jax.random.uniform(key_tau, batch.tokens_BT.shape)
        loss_BT = segment_flow(
            lambda x, tau: model.apply({"params": params}, x, tau, method="velocity"),
            out["segments.0.hidden"], out[f"segments.{len(weights) - 1}.hidden"], tau_BT)
        sums["flow_segment"] = (weight_BT * loss_BT).sum()
        total = total + flow.segment_weight * sums["flow_segment"]
    if flow.depth_weight:
        states = [out["embedding"], *(out[f"layers.{i}.residual"]
                                      for i in range(config.model.n_layers))]
        sums["flow_depth"] = (weight_BT * depth_straightness(states)).sum()
        total = total + flow.depth_weight * sums["flow_depth"]
    sums["total"] = total
    return total, (jax.lax.stop_gradient(sums), out)
