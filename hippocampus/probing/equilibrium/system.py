"""The fixed point of an equilibrium model on some rows of a text, as functions of arrays.

Everything is computed in float32, whatever the run computes in, so that small residuals can be
reached; the parameters are the run's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from hippocampus.config_equilibrium import EquilibriumConfig, SolverConfig
from hippocampus.data.batches import Batch
from hippocampus.layers.equilibrium_cell import Drive, EquilibriumCell
from hippocampus.layers.equilibrium_solver import (
    INNER_TOL,
    Effort,
    Solved,
    apply,
    call,
    schedule_map,
    solve,
)
from hippocampus.models.build_model import initialise
from hippocampus.ops.fixed_point import fixed_point
from hippocampus.ops.positions import token_positions
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from hippocampus.probing.probe import Probe

SCHEDULES = ("alternating", "simultaneous", "cascade")
METHODS = ("picard", "anderson", "broyden")

_ROWS = ("u_BTD", "document_ids_BT", "positions_BT")
"""Of a problem, what has rows."""

_STATES = 64
"""Of a token that are looked at together."""


class Problem(struct.PyTreeNode):
    """What the cell solves: its parameters and what drives it.

    Attributes:
      params: of the cell.
      u_BTD: what the layers before it say.
      document_ids_BT, positions_BT: of each token; no ids = one document a row.
    """

    params: Any
    u_BTD: Float[Array, "B T D"]
    document_ids_BT: Int[Array, "B T"] | None
    positions_BT: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class System:
    """A cell with a problem; every method is one compiled program for all problems of a shape.

    Attributes:
      cell: unbound.
      solver: of the run.
      problem: its parameters and what drives it.
    """

    cell: EquilibriumCell
    solver: SolverConfig
    problem: Problem

    @property
    def tokens(self) -> int:
        """B T."""
        return self.problem.u_BTD[..., 0].size

    def with_problem(self, **changed: Any) -> System:
        """The same cell with another problem."""
        return dataclasses.replace(self, problem=self.problem.replace(**changed))

    def cut(self, length: int) -> System:
        """The first tokens of the first row: what they are does not depend on the others."""
        problem = self.problem
        ids = problem.document_ids_BT
        return self.with_problem(
            u_BTD=problem.u_BTD[:1, :length], positions_BT=problem.positions_BT[:1, :length],
            document_ids_BT=None if ids is None else ids[:1, :length])

    def repeated(self, n: int) -> System:
        """The first row n times."""
        one = {name: getattr(self.problem, name) for name in _ROWS}
        return self.with_problem(**jax.tree.map(
            lambda a: jnp.broadcast_to(a[:1], (n, *a.shape[1:])), one))

    def first_state(self) -> Float[np.ndarray, "B T S"]:
        """Where a solve begins."""
        return np.asarray(_first_state(self.problem, cell=self.cell))

    def solve(self, s0_BTS: Float[Array | np.ndarray, "B T S"], *, schedule: str = "",
              method: str = "", iterations: int = 0, limit: int | None = None, tol: float = 1e-4,
              record: bool = False) -> Solved:
        """Solves from any first state; a token has converged by its residual alone.

        Args:
          s0_BTS: first state and query.
          schedule, method: "" = the run's.
          iterations: sweeps that it is compiled for; 0 = the run's.
          limit: sweeps at most; None = `iterations`.
          tol: relative residual.
          record: keep the states.
        """
        solver = dataclasses.replace(
            self.solver, schedule=schedule or self.solver.schedule, gradient="implicit",
            method=method or self.solver.method,
            max_iterations=iterations or self.solver.max_iterations)
        limit = solver.max_iterations if limit is None else limit
        found: Solved = _solve(self.problem, s0_BTS, jnp.int32(limit), jnp.float32(tol),
                               cell=self.cell, solver=solver, record=record)
        return found

    def state_updates(self, solved: Solved, tol: float) -> int:
        """Evaluations of the state update f in a solve by cascade that was recorded.

        Args:
          solved: from `solve`, with its iterates.
          tol: of that solve.
        """
        assert solved.iterates_KBTS is not None
        inner_K = _inner_updates(self.problem, solved.iterates_KBTS, jnp.float32(tol),
                                 cell=self.cell, solver=self.solver)
        return int(np.asarray(inner_K)[:int(solved.evaluations)].sum())

    def solve_together(self, s0_BTS: Float[Array | np.ndarray, "B T S"], limit: int,
                       iterations: int) -> Float[Array, "B T S"]:
        """Anderson with one set of weights for a whole row, which lets tokens see later ones."""
        together: Array = _solve_together(self.problem, s0_BTS, jnp.int32(limit), cell=self.cell,
                                          solver=self.solver, iterations=iterations)
        return together

    def last_token(self, states_nS: Float[np.ndarray, "n S"], others_TS: Float[np.ndarray, "T S"],
                   ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Residual and energy of the first row's last token in each of some states.

        Args:
          states_nS: of the last token.
          others_TS: of the whole row; its last one is not read, the others are held.
        """
        found: tuple[np.ndarray, np.ndarray] = jax.device_get(_last_token(
            self.problem, jnp.asarray(states_nS), jnp.asarray(others_TS), cell=self.cell))
        return found

    def retrievals(self, s_BTS: Float[np.ndarray, "B T S"], n: int) -> Float[np.ndarray, "J B T S"]:
        """A state and what n retrieval steps make of its query (J = n + 1)."""
        return np.asarray(_retrievals(self.problem, jnp.asarray(s_BTS), cell=self.cell, n=n))


def open_systems(probe: Probe, tokens: int) -> dict[str, System]:
    """The run's system on rows of its text, and that of random parameters on the same rows.

    Args:
      probe: of an equilibrium model.
      tokens: at most, in whole rows of the first batch; at least a row, which may be cut.

    Returns:
      "trained" and "untrained".

    Raises:
      SkipSuite: the model has no fixed point.
    """
    if config_of(probe).solver.method == "explicit":
        raise SkipSuite("the model has no fixed point (model.solver.method is explicit)")
    batch = some_rows(probe.host_batches[0], tokens)
    return {"trained": system_of(probe.model, probe.params, batch),
            "untrained": system_of(probe.model, untrained(probe), batch)}


def config_of(probe: Probe) -> EquilibriumConfig:
    """The config of the probe's model.

    Raises:
      SkipSuite: it is of another family.
    """
    config = probe.config.model
    if not isinstance(config, EquilibriumConfig):
        raise SkipSuite(f"it looks into equilibrium models, and this is of the {config.family} "
                        "family")
    return config


def some_rows(batch: Batch, tokens: int) -> Batch:
    """The first rows of a batch that have at most so many tokens; one row is cut to them."""
    length = min(tokens, batch.tokens_BT.shape[1])
    rows = max(1, tokens // length)

    def cut(array: Any) -> Any:
        return array[:rows] if array.ndim == 1 else array[:rows, :length]

    part: Batch = jax.tree.map(cut, batch)
    return part


def untrained(probe: Probe) -> Any:
    """Parameters of the probe's model as training would begin with, drawn by the probe's seed."""
    return initialise(probe.model)(jax.random.key(probe.seed))


def system_of(model: Any, params: Any, batch: Batch) -> System:
    """The system of a model on a batch.

    Args:
      model: an unbound EquilibriumLM with a fixed point.
      params: of the model.
      batch: rows of a text.
    """
    config = dataclasses.replace(model.config, compute_dtype="float32")
    exact = model.clone(config=config)
    problem = Problem(params["cell"], injection(exact, params, batch), batch.document_ids_BT,
                      token_positions(batch.tokens_BT, batch.document_ids_BT, batch.positions_BT))
    # By the host, because what is bound to a device is another program to compile.
    return System(exact.cell, config.solver, jax.tree.map(jnp.asarray, jax.device_get(problem)))


def drive_of(problem: Problem, cell: EquilibriumCell) -> Drive:
    """What a solve holds fixed."""
    drive: Drive = call(cell, problem.params, "drive", problem.u_BTD, problem.document_ids_BT,
                        problem.positions_BT)
    return drive


def sweep(s_BTS: Array, problem: Problem, cell: EquilibriumCell, schedule: str) -> Array:
    """One sweep, alternating or simultaneous."""
    new: Array = apply(cell, (problem.params, drive_of(problem, cell)), "sweep", s_BTS,
                       schedule=schedule)
    return new


def retrieval(s_BTS: Array, problem: Problem, cell: EquilibriumCell) -> Array:
    """The retrieval step of a simultaneous sweep, with the state as it was."""
    D = problem.u_BTD.shape[-1]
    new = sweep(s_BTS, problem, cell, "simultaneous")
    return jnp.concatenate([s_BTS[..., :D], new[..., D:]], axis=-1)


def energy(s_BTS: Array, problem: Problem, cell: EquilibriumCell) -> Array:
    """The memory's energy of each token."""
    total: Array = apply(cell, (problem.params, drive_of(problem, cell)), "energies",
                         s_BTS)["total"]
    return total


def residual(s_BTS: Array, problem: Problem, cell: EquilibriumCell) -> Float[Array, "B T"]:
    """|G(s) - s| / |G(s)| of a simultaneous sweep, token by token."""
    new = sweep(s_BTS, problem, cell, "simultaneous")
    return jnp.linalg.norm(new - s_BTS, axis=-1) / jnp.linalg.norm(new, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def injection(model: Any, params: Any, batch: Batch) -> Float[Array, "B T D"]:
    """What drives the cell of a model on a batch."""
    _, out, _ = model.apply({"params": params}, batch, method="forward")
    u_BTD: Array = out["injection"]
    return u_BTD


@functools.partial(jax.jit, static_argnames="cell")
def _first_state(problem: Problem, *, cell: EquilibriumCell) -> Array:
    first: Array = call(cell, problem.params, "first_state", drive_of(problem, cell))
    return first


@functools.partial(jax.jit, static_argnames=("cell", "solver", "record"))
def _solve(problem: Problem, s0_BTS: Array, limit: Array, tol: Array, *, cell: EquilibriumCell,
           solver: SolverConfig, record: bool) -> Solved:
    return solve(cell, problem.params, drive_of(problem, cell), s0_BTS, solver,
                 Effort(limit, tol, jnp.inf), record=record)


@functools.partial(jax.jit, static_argnames=("cell", "solver"))
def _inner_updates(problem: Problem, iterates_KBTS: Array, tol: Array, *, cell: EquilibriumCell,
                   solver: SolverConfig) -> Int[Array, " K"]:
    if solver.inner_iterations < 2:
        return jnp.ones(len(iterates_KBTS), jnp.int32)
    args = (problem.params, drive_of(problem, cell))

    def updates(s_BTS: Array) -> Array:
        return 1 + fixed_point(
            lambda s, args: apply(cell, args, "state_sweep", s), s_BTS, args, method="picard",
            tol=INNER_TOL * tol, max_iterations=solver.inner_iterations - 1, gradient="none",
            document_ids=problem.document_ids_BT).evaluations

    return lax.map(updates, iterates_KBTS)


@functools.partial(jax.jit, static_argnames=("cell", "solver", "iterations"))
def _solve_together(problem: Problem, s0_BTS: Array, limit: Array, *, cell: EquilibriumCell,
                    solver: SolverConfig, iterations: int) -> Array:
    solver = dataclasses.replace(solver, schedule="alternating")
    return fixed_point(
        schedule_map(cell, solver, 0.0), s0_BTS, (problem.params, drive_of(problem, cell)),
        method="anderson", granularity="sequence", causal=False, tol=0.0, limit=limit,
        max_iterations=iterations, memory=solver.memory, gradient="none",
        regularization=solver.regularization).value


@functools.partial(jax.jit, static_argnames="cell")
def _last_token(problem: Problem, states_nS: Array, others_TS: Array, *,
                cell: EquilibriumCell) -> tuple[Array, Array]:
    def one(state_S: Array) -> tuple[Array, Array]:
        s_BTS = others_TS.at[-1].set(state_S)[None]
        return (residual(s_BTS, one_row, cell)[0, -1], energy(s_BTS, one_row, cell)[0, -1])

    one_row = problem.replace(**jax.tree.map(lambda array: array[:1], {
        name: getattr(problem, name) for name in _ROWS}))

    found: tuple[Array, Array] = lax.map(one, states_nS, batch_size=_STATES)
    return found


@functools.partial(jax.jit, static_argnames=("cell", "n"))
def _retrievals(problem: Problem, s_BTS: Array, *, cell: EquilibriumCell, n: int) -> Array:
    def step(s: Array, _: None) -> tuple[Array, Array]:
        new = retrieval(s, problem, cell)
        return new, new

    return jnp.concatenate([s_BTS[None], lax.scan(step, s_BTS, None, length=n)[1]])
