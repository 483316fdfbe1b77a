"""How a decoder solves for the tokens that it reads.

`solver.cache="equilibrium"` keeps one cache of the cell's state-space layer, that of the states
that were found. New tokens are solved against it. `"iterations"` keeps one for every evaluation of
the solver, so that evaluation k of a new token meets what it would meet in a pass over the whole
row: the states of the tokens before it at their evaluation k. A token then also waits for the one
before it, as it would there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config_equilibrium import SolverConfig
from hippocampus.errors import ConfigError
from hippocampus.layers.equilibrium_cell import CellCache, Drive, EquilibriumCell
from hippocampus.layers.equilibrium_solver import (
    apply,
    call,
    energy_settled,
    full_effort,
    schedule_map,
)
from hippocampus.ops.fixed_point import fixed_point


class EquilibriumCache(struct.PyTreeNode):
    """What the model remembers of the rows read so far.

    Attributes:
      length_B: tokens that each row has read.
      layers: the cache of each Mamba layer.
      cells: of each cell; with `solver.cache="iterations"` its state-space part is B,K,…: one for
        each evaluation.
      frozen_B: with "iterations", the evaluations after which a row's last token froze.
    """

    length_B: Int[Array, " B"]
    layers: tuple[Any, ...]
    cells: tuple[CellCache, ...]
    frozen_B: Int[Array, " B"] | None = None


def init_cache(config: SolverConfig, layers: tuple[Any, ...], cells: tuple[CellCache, ...],
               batch: int) -> EquilibriumCache:
    """The cache before the first token.

    Args:
      config: of the solver.
      layers: fresh caches of the Mamba layers.
      cells: of the cells.
      batch: rows B.

    Raises:
      ConfigError: iterations kept of a cascade, whose inner solves have their own.
    """
    zero_B, frozen_B = jnp.zeros((batch,), jnp.int32), None
    if config.method != "explicit" and config.cache == "iterations":
        if config.schedule == "cascade":
            raise ConfigError("model.solver.cache is iterations, and the schedule cascade",
                              "take model.solver.cache=equilibrium")
        cells = tuple(cell.replace(ssm=jax.tree.map(
            lambda array: jnp.stack([array] * config.max_iterations, 1), cell.ssm))
            for cell in cells)
        frozen_B = zero_B
    return EquilibriumCache(zero_B, layers, cells, frozen_B)


def solve_on(
    cell: EquilibriumCell, params: list[Any], config: SolverConfig, u_BnD: Float[Array, "B n D"],
    positions_Bn: Int[Array, "B n"], valid_Bn: Bool[Array, "B n"], caches: tuple[CellCache, ...],
    frozen_B: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B n D"], tuple[CellCache, ...], Int[Array, " B"] | None]:
    """The states of further tokens.

    Args:
      cell: unbound.
      params: of each cell; one, where there is a fixed point.
      config: of the solver.
      u_BnD: what the tokens drive the cell with.
      positions_Bn, valid_Bn: as for the layers.
      caches: of each cell.
      frozen_B: the evaluations after which each row's last token froze (cache "iterations").

    Returns:
      z_BnD, the new caches, and the new `frozen_B`.
    """
    drives, new = [], []
    for own, cache in zip(params, caches, strict=True):
        drive, cache = call(cell, own, "drive_on", u_BnD, positions_Bn, cache, valid_Bn)
        drives.append(drive)
        new.append(cache)
    s_BnS = call(cell, params[0], "first_state", drives[0])
    if config.method == "explicit":
        for c, args in enumerate(zip(params, drives, strict=True)):
            before = s_BnS
            s_BnS = apply(cell, args, "sweep", s_BnS, schedule="alternating")
            new[c] = new[c].replace(ssm=_advance(cell, args, before))
    elif frozen_B is None:
        s_BnS, ssm = _against_equilibrium(cell, (params[0], drives[0]), s_BnS, config)
        new[0] = new[0].replace(ssm=ssm)
    else:
        s_BnS, ssm, frozen_B = _along_iterations(cell, (params[0], drives[0]), s_BnS, config,
                                                 frozen_B)
        new[0] = new[0].replace(ssm=ssm)
    return s_BnS[..., :cell.d_model], tuple(new), frozen_B


def _advance(cell: EquilibriumCell, args: tuple[Any, Drive], s_BnS: Array) -> Any:
    """The state-space layer's cache after tokens that were read in these states."""
    params, drive = args
    return call(cell, params, "advance", s_BnS[..., :cell.d_model], drive)


def _against_equilibrium(cell: EquilibriumCell, args: tuple[Any, Drive], s0_BnS: Array,
                         config: SolverConfig) -> tuple[Array, Any]:
    effort = full_effort(config, cell.dtype)
    found = fixed_point(
        schedule_map(cell, config, effort.tol), s0_BnS, args, method=config.method,
        max_iterations=config.max_iterations, tol=effort.tol, damping=config.damping,
        memory=config.memory, regularization=config.regularization, gradient="none",
        done=energy_settled(cell, args, effort.tol_energy))
    return found.value, _advance(cell, args, found.value)


def _along_iterations(
    cell: EquilibriumCell, args: tuple[Any, Drive], s0_BnS: Array, config: SolverConfig,
    frozen_B: Array,
) -> tuple[Array, Any, Array]:
    (params, drive), effort = args, full_effort(config, cell.dtype)
    G = schedule_map(cell, config, effort.tol)

    def at(k: Array) -> Drive:
        return drive.replace(ssm_cache=jax.tree.map(
            lambda array: jax.lax.dynamic_index_in_dim(array, k, 1, keepdims=False),
            drive.ssm_cache))

    found = fixed_point(
        lambda s, params, k: G(s, (params, at(k))), s0_BnS, params, method=config.method,
        max_iterations=config.max_iterations, tol=effort.tol, damping=config.damping,
        memory=config.memory, regularization=config.regularization, gradient="none",
        indexed=True, record=True, earliest=frozen_B[:, None],
        done=energy_settled(cell, (params, at(jnp.int32(0))), effort.tol_energy))
    ssm = jax.vmap(lambda s, k: _advance(cell, (params, at(k)), s), out_axes=1)(
        found.iterates, jnp.arange(config.max_iterations))
    # Tokens that do not count freeze with the one before; what never froze holds all behind it.
    froze_Bn = jnp.where(found.converged, found.iterations, config.max_iterations + 1)
    return found.value, ssm, jnp.maximum(frozen_B, froze_Bn.max(1))
