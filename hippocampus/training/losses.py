"""The training loss: cross-entropy of every supervised pass, and the regularisers asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hippocampus.config import Config, EquilibriumConfig, HybridConfig, SegmentsConfig
from hippocampus.data.batches import Batch
from hippocampus.ops.cross_entropy import cross_entropy
from hippocampus.training.equilibrium import Terms, equilibrium_terms
from hippocampus.training.rectified_flow import depth_straightness, segment_flow

Sums = dict[str, Float[Array, ""]]


def segment_weights(config: SegmentsConfig) -> tuple[float, ...]:
    """The loss weight of each training pass: `segments.weights` aligned with the last one."""
    missing = max(0, config.train - len(config.weights))
    return (0.0,) * missing + config.weights[len(config.weights) - (config.train - missing):]


def pass_weights(model: HybridConfig | EquilibriumConfig) -> tuple[float, ...]:
    """The loss weight of each training pass of a model; of a family without passes, (1,)."""
    return segment_weights(model.segments) if isinstance(model, HybridConfig) else (1.0,)


def training_loss(
    model: Any, params: Any, batch: Batch, key: Array, config: Config, carried: Any = None,
    progress: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], tuple[Sums, dict[str, Array], Any]]:
    """The loss of a batch as a *sum* over tokens, so that micro-batches add up exactly.

    Args:
      model: a language model of this project.
      params: its parameters.
      batch: B,T tokens.
      key: random key of dropout, of the flow's times and of the Jacobian's vectors.
      config: the whole config.
      carried: what the model carries from the batch before; None = nothing.
      progress: steps done / steps of the run, for a model with a curriculum; None = the end.

    Returns:
      The sum to differentiate, and (terms, out, carried): "nll" of the last pass,
      "nll_segment_<r>" of earlier ones, "z", "smoothing", those of the regularisers as unscaled
      sums over tokens and "weight", what to divide them by; the model's intermediates; and what it
      carries on.
    """
    key_dropout, key_terms = jax.random.split(key)
    last_BTD, out, carried = model.apply(
        {"params": params}, batch, carried, train=True, method="forward", progress=progress,
        rngs={"dropout": key_dropout})
    head, weight_BT, loss_config = model.head(params), batch.loss_weight_BT, config.loss
    weights = pass_weights(config.model)
    total, sums = jnp.zeros(()), {"weight": weight_BT.sum()}
    for r, segment_weight in enumerate(weights):
        if not segment_weight:
            continue
        # Through the stack of all passes zeros would run back through those that have no loss.
        hidden_BTD = last_BTD if r + 1 == len(weights) else out["segments.hidden"][r]
        with jax.named_scope("loss"):
            loss, terms = cross_entropy(
                hidden_BTD, head, batch.targets_BT, weight_BT,
                smoothing=loss_config.label_smoothing, z_weight=loss_config.z_weight,
                backend=loss_config.backend)
        total = total + segment_weight * loss
        if r + 1 < len(weights):
            sums[f"nll_segment_{r + 1}"] = terms["nll"]
        else:
            sums["nll"] = terms["nll"]
            sums.update({name: terms[name] for name, used in (
                ("z", loss_config.z_weight), ("smoothing", loss_config.label_smoothing)) if used})

    for name, (scale, value) in _REGULARISERS[config.model.family](
            model, params, batch, out, key_terms, config).items():
        sums[name] = value
        total = total + scale * value
    sums["total"] = total
    return total, (jax.lax.stop_gradient(sums), out, jax.lax.stop_gradient(carried))


def flow_terms(model: Any, params: Any, batch: Batch, out: dict[str, Array], key: Array,
               config: Config) -> Terms:
    """The straightness regularisers that `loss.rectified_flow` asks for.

    Args:
      model, params: of the forward pass.
      batch: B,T tokens.
      out: its intermediates.
      key: of the flow's times.
      config: the whole config.

    Returns:
      name -> (weight in the loss, sum over tokens).
    """
    flow, weight_BT, terms = config.loss.rectified_flow, batch.loss_weight_BT, {}
    if flow.segment_weight:
        tau_BT = jax.random.uniform(key, batch.tokens_BT.shape)
        loss_BT = segment_flow(
            lambda x, tau: model.apply({"params": params}, x, tau, method="velocity"),
            out["segments.0.hidden"], out[f"segments.{config.model.passes - 1}.hidden"], tau_BT)
        terms["flow_segment"] = flow.segment_weight, (weight_BT * loss_BT).sum()
    if flow.depth_weight:
        states = [out["embedding"], *(out[f"layers.{i}.residual"]
                                      for i in range(config.model.n_layers))]
        terms["flow_depth"] = flow.depth_weight, (weight_BT * depth_straightness(states)).sum()
    return terms


_REGULARISERS: dict[str, Callable[..., Terms]] = {
    "hybrid": flow_terms, "equilibrium": equilibrium_terms, "chopt": lambda *_: {},
    "buu": lambda *_: {}}
"""Of each model family: what is added to the cross-entropy."""
