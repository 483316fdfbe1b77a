"""What the map is like around its fixed point: how fast it gets there, and its gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hippocampus.config_equilibrium import SolverConfig
from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.layers.equilibrium_cell import EquilibriumCell
from hippocampus.layers.equilibrium_solver import Effort, call, solve
from hippocampus.ops.jacobian import contraction
from hippocampus.probing.equilibrium import convergence, gradients
from hippocampus.probing.equilibrium.system import Problem, System, drive_of, sweep
from hippocampus.probing.equilibrium.trials import row_name
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot
from hippocampus.probing.views import known

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

SWEEPS = ("alternating", "simultaneous")
"""The schedules that are one sweep; a cascade's inner solve has no derivative to measure."""

_TIGHT = 1e-7
"""Relative residual that gradients are measured at: all that float32 gives."""

_FEW = 2
"""Unrolled sweeps whose gradient is beside the right one."""

_RATES = (
    Column("name", "map"), Column("rate", "observed rate", "", 3), Column("low", "lowest", "", 3),
    Column("high", "highest", "", 3), Column("short", "contraction, short", "", 3),
    Column("long", "long", "", 3))
_GRADIENT = (
    Column("name", "gradient"), Column("relative", "relative error", "", 7),
    Column("cosine", "cosine", "", 6), Column("size", "norm", "", 4))


def in_pieces(system: System, length: int) -> System:
    """The same tokens in shorter rows, each of them a document of its own."""
    problem = system.problem
    (B, T, D), length = problem.u_BTD.shape, min(length, problem.u_BTD.shape[1])
    n = T // length
    u_nTD = problem.u_BTD[:, :n * length].reshape(B * n, length, D)
    positions_nT = jnp.broadcast_to(jnp.arange(length), (B * n, length))
    return system.with_problem(u_BTD=u_nTD, document_ids_BT=None, positions_BT=positions_nT)


# ---------------------------------------------------------------- rate

def rates(pieces: Mapping[str, System], schedules: Sequence[str], *, sweeps: int,
          power: tuple[int, int], seed: int, protocol: Protocol) -> tuple[ResultTable, Plot]:
    """How fast plain iteration is, beside two estimates of the contraction where it ends.

    Args:
      pieces: "trained" and "untrained" systems of many short rows.
      schedules: some of `SWEEPS`.
      sweeps: of plain iteration.
      power: products with the Jacobian of the short and the long estimate.
      seed: of their first vectors.
      protocol: of the table.
    """
    points: list[Row] = []
    for parameters, system in pieces.items():
        for schedule in schedules:
            residuals_nB, short_B, long_B = jax.device_get(_rate_and_contraction(
                system.problem, jnp.asarray(system.first_state()), jax.random.key(seed),
                cell=system.cell, schedule=schedule, n=sweeps, power=power))
            rate_B = convergence.observed_rate(residuals_nB)
            points += [{"name": row_name(schedule, parameters), "schedule": schedule,
                        "parameters": parameters, "rate": float(rate), "short": float(short),
                        "long": float(long)}
                       for rate, short, long in zip(rate_B, short_B, long_B, strict=True)]
    n, length = next(iter(pieces.values())).problem.u_BTD.shape[:2]
    notes = (
        f"of {n} rows of {length} tokens; observed: the factor by which the residual of a row "
        "falls per sweep of plain iteration, late in the solve; means over rows",
        f"contraction: |J^T v| / |v| at the end, after {power[0]} and after {power[1]} power "
        "iterations. Where tokens depend on many earlier ones a few find more than the rate; with "
        "more they come down to it. Below 1 the iteration converges")
    rows = [_mean_row([point for point in points if point["name"] == name])
            for name in dict.fromkeys(point["name"] for point in points)]
    table = ResultTable("rate", "Convergence rate and contraction", _RATES, known(rows),
                        (protocol,), notes)
    return table, _rate_plot(points, power[1], length)


def _mean_row(points: Sequence[Row]) -> Row:
    """Of one map: means over its rows, without those that were too short to see a rate."""
    rate = np.asarray([point["rate"] for point in points])
    rate = rate[np.isfinite(rate)]
    mean = {key: float(np.mean([point[key] for point in points])) for key in ("short", "long")}
    seen = {"rate": float(rate.mean()), "low": float(rate.min()),
            "high": float(rate.max())} if rate.size else {}
    return {"name": points[0]["name"], "parameters": points[0]["parameters"],
            "rows": len(points), "rows_with_rate": rate.size, **seen, **mean}


@functools.partial(jax.jit, static_argnames=("cell", "schedule", "n", "power"))
def _rate_and_contraction(problem: Problem, s0_BTS: Array, key: Array, *, cell: EquilibriumCell,
                          schedule: str, n: int,
                          power: tuple[int, int]) -> tuple[Array, Array, Array]:
    def one_sweep(s: Array, problem: Problem) -> Array:
        return sweep(s, problem, cell, schedule)

    residuals_nB, end = convergence.picard(lambda s: one_sweep(s, problem), s0_BTS, n)
    short_B, long_B = (contraction(one_sweep, end, problem, key, iterations=k) for k in power)
    return residuals_nB, short_B, long_B


def _rate_plot(points: Sequence[Row], power: int, length: int) -> Plot:
    shown = [point for point in points if np.isfinite(point["rate"] + point["long"])]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name in dict.fromkeys(point["name"] for point in shown):
            own = [point for point in shown if point["name"] == name]
            color = SERIES[SWEEPS.index(own[0]["schedule"])]
            axes.plot([point["long"] for point in own], [point["rate"] for point in own],
                      color=color, linestyle="none", marker="o", markersize=5, label=name,
                      fillstyle="full" if own[0]["parameters"] == "trained" else "none")
        values = [point[key] for point in shown for key in ("long", "rate")] or [0.0, 1.0]
        low, high = 0.9 * min(values), 1.1 * max(values)
        axes.plot([low, high], [low, high], color=INK, lw=0.8, ls="--", alpha=0.5)
        axes.set(xlim=(low, high), ylim=(low, high),
                 xlabel=f"contraction, {power} power iterations", ylabel="observed rate per sweep")
        for line in (axes.axhline, axes.axvline) if high > 1 else ():
            line(1, color=INK, lw=0.8, alpha=0.4)
        figure.legend(loc="outside upper center", ncols=2)

    return Plot("rate", "Convergence rate against the contraction estimate",
                f"A point a row of {length} tokens; hollow: random parameters. On the dashed line "
                "the estimate is the rate; at 1 and above the iteration does not converge.",
                themed_svg(draw, width=4.8, height=4.4))


# ---------------------------------------------------------------- gradient

def gradient_table(pieces: Mapping[str, System], *, sweeps: int, seed: int,
                   protocol: Protocol) -> ResultTable:
    """The implicit gradient against the one through many unrolled sweeps.

    Args:
      pieces: "trained" and "untrained" systems; the first row of each is used.
      sweeps: of the reference, and of the implicit gradient at most.
      seed: of the linear function that is differentiated.
      protocol: of the table.
    """
    rows, ends = [], []
    short = f"{_FEW} sweeps unrolled"
    for parameters, system in pieces.items():
        problem = system.problem
        problem = problem.replace(u_BTD=problem.u_BTD[:1], positions_BT=problem.positions_BT[:1])
        found = {name: jax.device_get(_gradients(
            problem, jax.random.key(seed), jnp.int32(limit), cell=system.cell,
            solver=_long(system.solver, gradient, sweeps)))
            for name, gradient, limit in (("reference", "unroll", sweeps),
                                          ("implicit", "implicit", sweeps),
                                          (short, "unroll", _FEW))}
        reference, residual = found.pop("reference")
        ends.append(f"{float(residual):.1g} ({parameters})")
        for name, (own, end) in found.items():
            for part, error in gradients.compare(own, reference).items():
                rows.append({"name": row_name(f"{name}, {part}", parameters),
                             "parameters": parameters, "relative": error.relative,
                             "cosine": error.cosine, "size": error.size, "residual": float(end)})
    length = problem.u_BTD.shape[1]
    notes = (
        f"of a random linear function of the fixed points of {length} tokens, by the cell's "
        "parameters and by what drives it; error: of the difference to the gradient through "
        f"{sweeps} unrolled sweeps of plain iteration, in float32",
        f"the reference ended with a residual of {', '.join(ends)}: one that has not converged is "
        "no reference",
        f"{short}: a wrong gradient, to see what an error looks like")
    return ResultTable("gradient", "Implicit gradient against long unrolling", _GRADIENT,
                       known(rows), (protocol,), notes)


def _long(solver: SolverConfig, gradient: str, sweeps: int) -> SolverConfig:
    """A solver that goes as far as float32 allows, with this gradient."""
    return dataclasses.replace(
        solver, gradient=gradient, schedule="alternating", damping=1.0,
        method="picard" if gradient == "unroll" else solver.method, max_iterations=sweeps,
        backward_iterations=sweeps, backward_tol=_TIGHT)


@functools.partial(jax.jit, static_argnames=("cell", "solver"))
def _gradients(problem: Problem, key: Array, limit: Array, *, cell: EquilibriumCell,
               solver: SolverConfig) -> tuple[dict[str, Any], Array]:
    """By the cell, its patterns and the injection, and the largest residual of a token."""
    def read(params: Any, u_BTD: Array) -> tuple[Array, Array]:
        drive = drive_of(problem.replace(params=params, u_BTD=u_BTD), cell)
        s0_BTS: Array = call(cell, params, "first_state", drive)
        solved = solve(cell, params, drive, jax.lax.stop_gradient(s0_BTS), solver,
                       Effort(limit, _TIGHT, jnp.inf))
        z_BTD = solved.s_BTS[..., :u_BTD.shape[-1]]
        weight_BTD = jax.random.normal(key, z_BTD.shape) / z_BTD.size**0.5
        return (weight_BTD * z_BTD).sum(), solved.residual_BT.max()

    (own, u_BTD), largest = jax.grad(read, argnums=(0, 1), has_aux=True)(
        problem.params, problem.u_BTD)
    parts = {"cell": {name: value for name, value in own.items() if name != "slots"},
             "injection": u_BTD}
    if "slots" in own:
        parts["patterns"] = own["slots"]
    return parts, largest
