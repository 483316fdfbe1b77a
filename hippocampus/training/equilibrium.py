"""What training adds for an equilibrium model: terms of the loss, and a rule for its solver.

With s* the state that the solver ended with, G one sweep of the cell and J = dG/ds there, per token

    energy        E(xi*, q*) of the memory
    convergence   |G(s*) - s*|^2 / |G(s*)|^2,                      s* held fixed
    jacobian      |J^T v|^2 / D for one normal v, in `jacobian_chance` of the steps
    contraction   max(0, c - contraction_target)^2, c = |J^T v| / |v| of the row after a few power
                  iterations

s* is a constant of the last three: they change what the cell does there, not where the fixed point
lies, which only the prediction (and the energy) should.

Source: Bai et al. 2021 (arXiv:2106.14342), section 4, for the Jacobian's term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hippocampus.config import Config, EquilibriumConfig, EquilibriumLossConfig, HybridConfig
from hippocampus.data.batches import Batch
from hippocampus.ops.jacobian import contraction, jacobian_norm

Terms = dict[str, tuple[float, Float[Array, ""]]]
"""Name -> (weight in the loss, sum over tokens)."""

_LEAST = 1e-12
"""Least squared length of a state that a residual is relative to."""


def equilibrium_terms(model: Any, params: Any, batch: Batch, out: Mapping[str, Array], key: Array,
                      config: Config) -> Terms:
    """The terms that `loss.equilibrium` asks for, and the contraction as "solver/contraction".

    Args:
      model, params: of the forward pass.
      batch: B,T tokens.
      out: the intermediates of the forward pass.
      key: of the random vectors, and of whether this step has the Jacobian's term.
      config: the whole config.

    Returns:
      name -> (weight in the loss, sum over tokens); what is only logged has weight 0.
    """
    loss: EquilibriumLossConfig = config.loss.equilibrium
    weight_BT, terms = batch.loss_weight_BT, {}
    if loss.energy_weight:
        terms["energy"] = loss.energy_weight, (weight_BT * out["energy.total"]).sum()
    if not (loss.convergence_weight or loss.jacobian_weight or loss.contraction_weight):
        return terms
    state_BTS = jax.lax.stop_gradient(out["solver.state"])
    args = params, out["injection"]

    def sweep(state_BTS: Array, args: Any) -> Array:
        params, u_BTD = args
        swept: Array = model.apply({"params": params}, state_BTS, u_BTD, batch.document_ids_BT,
                                   batch.positions_BT, method="sweep")
        return swept

    key_chance, key_jacobian, key_power = jax.random.split(key, 3)
    if loss.convergence_weight:
        after_BTS = sweep(state_BTS, args).astype(jnp.float32)
        residual_BT = ((after_BTS - state_BTS) ** 2).sum(-1) / (
            (after_BTS**2).sum(-1) + _LEAST)
        terms["convergence"] = loss.convergence_weight, (weight_BT * residual_BT).sum()
    if loss.jacobian_weight:
        def estimate(args: Any) -> Array:
            return (weight_BT * jacobian_norm(sweep, state_BTS, args, key_jacobian)).sum()

        drawn = jax.random.uniform(key_chance) < loss.jacobian_chance
        terms["jacobian"] = loss.jacobian_weight, jax.lax.cond(
            drawn, estimate, lambda args: jnp.zeros(()), args)
    if loss.contraction_weight:
        found_B = contraction(sweep, state_BTS, args, key_power, iterations=loss.power_iterations)
        over_B = jnp.maximum(0, found_B - loss.contraction_target)
        weight_B = weight_BT.sum(1)
        terms["contraction"] = loss.contraction_weight, (weight_B * over_B**2).sum()
        terms["solver/contraction"] = 0.0, (weight_B * found_B).sum()
    return terms


# ---------------------------------------------------------------- a cell that does not contract

def has_curriculum(model: HybridConfig | EquilibriumConfig) -> bool:
    """Whether what a model does depends on how much of the training is over."""
    return isinstance(model, EquilibriumConfig) and bool(
        model.solver.warmup_fraction or model.solver.ramp_fraction)


def skips_expansion(model: HybridConfig | EquilibriumConfig) -> bool:
    """Whether a step is left out where too few tokens converge."""
    return isinstance(model, EquilibriumConfig) and model.solver.on_expansion == "skip"


def stops_at_expansion(model: HybridConfig | EquilibriumConfig) -> bool:
    """Whether the run ends there."""
    return isinstance(model, EquilibriumConfig) and model.solver.on_expansion == "stop"


def too_few_converge(
    model: HybridConfig | EquilibriumConfig, share: Float[Array, ""] | float,
    progress: Float[Array, ""] | float,
) -> Bool[Array, ""] | bool:
    """Whether the rule `solver.on_expansion` applies; never while the curriculum still holds back.

    Args:
      model: of any family.
      share: of the tokens that have converged.
      progress: share of the training that is over.
    """
    if not isinstance(model, EquilibriumConfig) or model.is_explicit:
        return False
    solver = model.solver
    if not solver.tol_fixedpoint:
        return False
    return (share < solver.least_converged) & (
        progress >= solver.warmup_fraction + solver.ramp_fraction)


def expansion(model: HybridConfig | EquilibriumConfig, step: int, values: Mapping[str, float],
              progress: float) -> str:
    """One line on a solver that does not converge: estimate and step; "" where all is well.

    Args:
      model: of any family.
      step: that the values are of.
      values: of its metrics.
      progress: share of the training that was over.
    """
    share = values.get("solver/converged")
    if not isinstance(model, EquilibriumConfig) or share is None or not too_few_converge(
            model, share, progress):
        return ""
    rate = values["solver/rate"]
    what = "the cell does not contract" if not rate < 1 else "they would need more sweeps"
    return (f"at step {step}, {share:.1%} of the tokens reached their fixed point (wanted: "
            f"{model.solver.least_converged:.0%}); residuals go with a factor of {rate:.3g} a "
            f"sweep: {what}")


HINT = ("lower optimizer.learning_rate, raise loss.equilibrium.jacobian_weight or "
        "contraction_weight, or allow more model.solver.max_iterations")
"""What helps against it."""
