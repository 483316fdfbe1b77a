"""Solving for a cell's fixed point: the three schedules, the curriculum, and the gradient.

A schedule is a map G of state and query whose fixed points are those of the cell: one sweep of
`EquilibriumCell.sweep`, or, as "cascade", the state solved for at a fixed query and then the
retrieval steps. Whatever the schedule, the implicit and the phantom gradient are those of the
alternating sweep at the point that was found: at a fixed point all schedules have the same
gradient, and there the retrieval stands in front of the state that the model reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config_equilibrium import SolverConfig
from hippocampus.layers.equilibrium_cell import Drive, EquilibriumCell
from hippocampus.ops.fixed_point import fixed_point

INNER_TOL = 0.1
"""Tolerance of a cascade's inner solve, as a share of the outer one, which reads its result."""


class Effort(struct.PyTreeNode):
    """How far a solve goes; each may be traced.

    Attributes:
      limit: sweeps at most; None = `solver.max_iterations`.
      tol: of the state, relative.
      tol_energy: what a retrieval step may still gain of the energy.
    """

    limit: Int[Array, ""] | None
    tol: Float[Array, ""] | float
    tol_energy: Float[Array, ""] | float


class Solved(struct.PyTreeNode):
    """A fixed point, or the best iterate on the way to it.

    Attributes:
      s_BTS: state and query, with the gradient that was asked for.
      converged_BT, iterations_BT, residual_BT, residual_trace_KBT, evaluations: as in
        `hippocampus.ops.fixed_point.Solution`, of the schedule's map.
      iterates_KBTS: what the sweeps were made at; None = not recorded.
    """

    s_BTS: Float[Array, "B T S"]
    converged_BT: Bool[Array, "B T"]
    iterations_BT: Int[Array, "B T"]
    residual_BT: Float[Array, "B T"]
    residual_trace_KBT: Float[Array, "K B T"]
    evaluations: Int[Array, ""]
    iterates_KBTS: Float[Array, "K B T S"] | None = None


def least_tol(dtype: jnp.dtype) -> float:
    """The relative residual that rounding leaves when a cell's products read this dtype.

    Each of them rounds by up to half the distance of two numbers next to each other. In bfloat16
    that is 0.004; what was left of a fresh cell's residuals was 0.002 to 0.004 (D = 64).
    """
    return float(jnp.finfo(dtype).eps) / 2


def full_effort(config: SolverConfig, dtype: jnp.dtype = jnp.float32) -> Effort:
    """Of evaluation, and of the end of training; `dtype`: of the cell's products."""
    tol = max(config.tol_fixedpoint, least_tol(dtype)) if config.tol_fixedpoint else 0.0
    return Effort(None, tol, config.tol_energy)


def effort_at(config: SolverConfig, progress: Float[Array, ""], key: Array | None = None,
              dtype: jnp.dtype = jnp.float32) -> Effort:
    """The curriculum after the warm-up: more sweeps, finer tolerances.

    Args:
      config: `ramp_fraction` of the training goes from `warmup_iterations` to `max_iterations`,
        and from `ramp_tol` times the tolerances to themselves.
      progress: share of the training that is done.
      key: draws the sweeps within `jitter` of their number; None = does not.
      dtype: of the cell's products.
    """
    last = full_effort(config, dtype)
    if config.ramp_fraction:
        share = jnp.clip((progress - config.warmup_fraction) / config.ramp_fraction, 0.0, 1.0)
    else:
        share = jnp.ones(())
    first = min(config.warmup_iterations, config.max_iterations)
    limit = jnp.round(first + share * (config.max_iterations - first)).astype(jnp.int32)
    if key is not None and config.jitter:
        limit = limit + jax.random.randint(key, (), -config.jitter, config.jitter + 1)
    loose = config.ramp_tol ** (1 - share)
    return Effort(jnp.clip(limit, 1, config.max_iterations),
                  jnp.maximum(last.tol, config.tol_fixedpoint * loose), last.tol_energy * loose)


def solve_at(progress: Float[Array, ""] | None, cell: EquilibriumCell, params: Any, drive: Drive,
             s0_BTS: Float[Array, "B T S"], config: SolverConfig, *, key: Array | None = None,
             remat: bool = False, record: bool = False) -> Solved:
    """Solves as the curriculum has it at a point of the training.

    Args:
      progress: share of the training that is done; None = all of it.
      key: draws the number of sweeps; None = does not.
      cell, params, drive, s0_BTS, config, remat, record: as for `solve`.
    """
    inputs = (cell, params, drive, s0_BTS, config)
    if progress is None:
        return solve(*inputs, full_effort(config, cell.dtype), remat=remat, record=record)
    effort = effort_at(config, progress, key, cell.dtype)
    if not config.warmup_fraction:
        return solve(*inputs, effort, remat=remat)
    return jax.lax.cond(progress < config.warmup_fraction, lambda: warm_up(*inputs, remat=remat),
                        lambda: solve(*inputs, effort, remat=remat))


def solve(cell: EquilibriumCell, params: Any, drive: Drive, s0_BTS: Float[Array, "B T S"],
          config: SolverConfig, effort: Effort, *, remat: bool = False,
          record: bool = False) -> Solved:
    """Solves from a first state.

    Args:
      cell: unbound.
      params: of the cell.
      drive: of the cell, from these parameters.
      s0_BTS: first state and query.
      config: method, schedule and gradient.
      effort: how far to go.
      remat: compute every sweep again in the backward pass (gradient unroll).
      record: keep what the sweeps were made at.
    """
    args = (params, drive)
    G = schedule_map(cell, config, effort.tol, unroll=config.gradient == "unroll")
    unroll = config.gradient == "unroll"
    found = fixed_point(
        G, s0_BTS, args, method=config.method, max_iterations=config.max_iterations,
        tol=effort.tol, limit=effort.limit, damping=config.damping, memory=config.memory,
        regularization=config.regularization, document_ids=drive.document_ids_BT,
        done=energy_settled(cell, args, effort.tol_energy),
        gradient="unroll" if unroll else "none", remat=remat, record=record)
    solved = Solved(found.value, found.converged, found.iterations, found.residual,
                    found.residual_trace, found.evaluations, found.iterates)
    return solved if unroll else solved.replace(
        s_BTS=_with_gradient(cell, found.value, args, config))


def warm_up(cell: EquilibriumCell, params: Any, drive: Drive, s0_BTS: Float[Array, "B T S"],
            config: SolverConfig, *, remat: bool = False) -> Solved:
    """`warmup_iterations` plain alternating sweeps that gradients go through one by one.

    Arguments as for `solve`, and a result of the same shapes without iterates.
    """
    def sweep(s: Array, args: Any) -> Array:
        return apply(cell, args, "sweep", s, schedule="alternating")

    steps = min(config.warmup_iterations, config.max_iterations)
    body = jax.checkpoint(sweep) if remat else sweep
    s, residuals = s0_BTS, []
    for _ in range(steps):
        new = body(s, (params, drive))
        residuals.append(_residual(s, new))
        s = new
    residuals += residuals[-1:] * (config.max_iterations - steps)
    shape, count = s.shape[:2], jnp.int32(steps)
    return Solved(s, residuals[-1] <= config.tol_fixedpoint, jnp.full(shape, count),
                  residuals[-1], jnp.stack(residuals), count)


def schedule_map(cell: EquilibriumCell, config: SolverConfig, tol: Float[Array, ""] | float,
                 *, unroll: bool = False) -> Callable[[Array, Any], Array]:
    """The schedule's map G: (s_BTS, (params, drive)) -> s_BTS.

    Args:
      cell: unbound.
      config: its schedule.
      tol: of the outer solve.
      unroll: gradients go through a cascade's inner solve.
    """
    if config.schedule != "cascade":
        return lambda s, args: apply(cell, args, "sweep", s, schedule=config.schedule)

    def state_sweep(s: Array, args: Any) -> Array:
        return apply(cell, args, "state_sweep", s)

    def cascade(s: Array, args: Any) -> Array:
        if config.inner_iterations > 1:
            # Of a solve the state that was tried is returned; its image is the better one.
            s = fixed_point(state_sweep, s, args, method="picard", tol=INNER_TOL * tol,
                            max_iterations=config.inner_iterations - 1,
                            gradient="unroll" if unroll else "none",
                            document_ids=args[1].document_ids_BT).value
        return apply(cell, args, "query_sweep", state_sweep(s, args))

    return cascade


def apply(cell: EquilibriumCell, args: tuple[Any, Drive], method: str, s_BTS: Array,
          **options: Any) -> Any:
    """A method of the cell on a solver's vector, as a pure function of (params, drive)."""
    params, drive = args
    return call(cell, params, method, s_BTS, drive, **options)


def call(cell: EquilibriumCell, params: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """A method of the cell as a pure function of its parameters."""
    return cell.apply({"params": params}, *inputs, method=method, **options)


def continued(s0_BTS: Float[Array, "B T S"], last_BS: Float[Array, "B S"],
              reset_B: Bool[Array, " B"] | None, document_ids_BT: Int[Array, "B T"] | None,
              ) -> Float[Array, "B T S"]:
    """First states; in a row that goes on with its last document those of its last token.

    Args:
      s0_BTS: first states of a row that begins.
      last_BS: where the row's last token ended, in the batch before.
      reset_B: rows that do not go on; None = none does.
      document_ids_BT: document of each token; a later one begins.
    """
    if reset_B is None:
        return s0_BTS
    goes_on_BT = jnp.broadcast_to(~reset_B[:, None], s0_BTS.shape[:2])
    if document_ids_BT is not None:
        goes_on_BT &= document_ids_BT == document_ids_BT[:, :1]
    return jnp.where(goes_on_BT[..., None], jax.lax.stop_gradient(last_BS)[:, None], s0_BTS)


def rate(residual_trace_KBT: Float[Array, "K B T"],
         iterations_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """By what factor a token's residual fell per sweep, on the geometric mean; 0 = one sweep."""
    steps_BT = iterations_BT - 1
    last_BT = jnp.take_along_axis(residual_trace_KBT, jnp.maximum(steps_BT, 0)[None], 0)[0]
    tiny = jnp.finfo(jnp.float32).tiny
    ratio_BT = jnp.maximum(last_BT, tiny) / jnp.maximum(residual_trace_KBT[0], tiny)
    found_BT = ratio_BT ** (1.0 / jnp.maximum(steps_BT, 1))
    return jnp.where((steps_BT > 0) & jnp.isfinite(found_BT), found_BT, 0.0)


def energy_settled(cell: EquilibriumCell, args: Any, tol: Float[Array, ""] | float,
                   ) -> Callable[[Array, Array], Array] | None:
    """(s, G(s)) -> whether no retrieval step of a token can have gained more energy than `tol`."""
    if "hopfield" not in cell.config.parts:
        return None
    params = jax.lax.stop_gradient(args[0])

    def done(s: Array, new: Array) -> Array:
        gain_BT: Array = call(cell, params, "largest_gain", *jax.lax.stop_gradient((s, new)))
        return gain_BT <= tol

    return done


def _with_gradient(cell: EquilibriumCell, s_BTS: Array, args: Any,
                   config: SolverConfig) -> Array:
    """The point that was found, with its implicit gradient, or some sweeps behind it."""
    def sweep(s: Array, args: Any) -> Array:
        return apply(cell, args, "sweep", s, schedule="alternating")

    return fixed_point(  # no evaluation of its own
        sweep, s_BTS, args, limit=0, max_iterations=1, method=config.method,
        damping=config.damping, memory=config.memory, regularization=config.regularization,
        gradient=config.gradient, phantom_steps=config.phantom_steps,
        backward_iterations=config.backward_iterations,
        backward_tol=max(config.backward_tol, least_tol(cell.dtype))).value


def _residual(s: Array, new: Array) -> Array:
    s, new = jax.lax.stop_gradient((s, new))
    return jnp.linalg.norm(new - s, axis=-1) / (jnp.linalg.norm(new, axis=-1) + 1e-9)
