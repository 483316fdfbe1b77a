"""What the solver of an equilibrium model did on a batch, as numbers to log and to draw."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hippocampus.layers.equilibrium_cell import Drive, EquilibriumCell
from hippocampus.layers.equilibrium_solver import Solved, apply, rate

_SOLVER = ("iterations", "residual", "converged", "rate")
_ENERGY = ("retrieval", "anchor", "total")
_LARGEST = 1e6
"""Of a residual in a mean: a token that never gave a number would make it infinite."""


def of_solver(solved: Solved, cell: EquilibriumCell, args: tuple[Any, Drive],
              ) -> dict[str, Array]:
    """What a solve is told by, under the names of the model's `out`.

    Args:
      solved: with iterates there is also "solver.energy_trace", which costs nothing unread.
      cell: unbound.
      args: parameters and drive of the cell.
    """
    out = {"solver.converged": solved.converged_BT, "solver.iterations": solved.iterations_BT,
           "solver.residual": solved.residual_BT, "solver.evaluations": solved.evaluations,
           "solver.residual_trace": solved.residual_trace_KBT, "solver.state": solved.s_BTS,
           "solver.rate": rate(solved.residual_trace_KBT, solved.iterations_BT)}
    if solved.iterates_KBTS is not None:
        out["solver.energy_trace"] = jax.lax.map(
            lambda s: apply(cell, args, "energies", s)["total"], solved.iterates_KBTS)
    return out


def token_sums(out: dict[str, Array],
               weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """Weighted sums over tokens of sweeps, residuals, convergence, and the memory's energy.

    Args:
      out: a forward pass's intermediates; those of a solver are not there without one.
      weight_BT: weight per token.
    """
    sums = {name: (weight_BT * values).sum() for name, values in distributions(out).items()}
    if "solver.evaluations" in out:
        sums["solver/evaluations"] = weight_BT.sum() * out["solver.evaluations"]
    return jax.lax.stop_gradient(sums)


def distributions(out: dict[str, Array]) -> dict[str, Array]:
    """Series name -> values of every token."""
    values = {}
    for group, names in (("solver", _SOLVER), ("energy", _ENERGY)):
        for name in names:
            if f"{group}.{name}" in out:
                array = out[f"{group}.{name}"].astype(jnp.float32)
                values[f"{group}/{name}"] = jnp.minimum(array, _LARGEST)
    return values
