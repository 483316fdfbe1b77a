"""Every schedule with every method on the same problem: what each costs, and where it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from hippocampus.evaluation.result_table import FLAG, Column, Protocol, ResultTable
from hippocampus.probing.equilibrium.convergence import agreement, distances
from hippocampus.probing.equilibrium.system import System
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot
from hippocampus.probing.views import known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Trials = Mapping[str, Sequence["Trial"]]
"""Parameters ("trained", "untrained") -> one trial for each schedule and method."""

_PERCENTILES = (50, 90, 99)

_COST = (
    Column("name", "solver"), Column("converged", "converged", "", 3),
    Column("sweeps", "sweeps", "per token", 1), Column("evaluations", "sweeps", "of all"),
    Column("updates", "state updates"), Column("of_picard", "sweeps / Picard's", "", 2),
    Column("seconds", "time", "s", 3))

_ENDS = (
    Column("name", "solver"), *(Column(f"p{p}", f"residual, {p} %", "", 7) for p in _PERCENTILES),
    Column("largest_residual", "largest", "", 7), Column("distance", "distance, mean", "", 6),
    Column("largest_distance", "largest", "", 6))


class Trial(NamedTuple):
    """One solve.

    Attributes:
      schedule, method: of it.
      value_BTS, converged_BT, sweeps_BT, residual_BT, trace_KBT: as a solver gives them.
      evaluations: sweeps until all tokens were done.
      updates: evaluations of the state update.
      seconds: of the fastest of some repetitions, compiled before.
    """

    schedule: str
    method: str
    value_BTS: Float[np.ndarray, "B T S"]
    converged_BT: Bool[np.ndarray, "B T"]
    sweeps_BT: Int[np.ndarray, "B T"]
    residual_BT: Float[np.ndarray, "B T"]
    trace_KBT: Float[np.ndarray, "K B T"]
    evaluations: int
    updates: int
    seconds: float

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.schedule} {self.method}"


def run_trials(system: System, schedules: Sequence[str], methods: Sequence[str], *, tol: float,
               iterations: int, repeats: int = 2) -> list[Trial]:
    """Solves a problem from its usual first state by every schedule with every method.

    Args:
      system: with the problem.
      schedules, methods: which.
      tol: relative residual.
      iterations: sweeps at most.
      repeats: of the timing.
    """
    return [_trial(system, schedule, method, tol, iterations, repeats)
            for schedule in schedules for method in methods]


def _trial(system: System, schedule: str, method: str, tol: float, iterations: int,
           repeats: int) -> Trial:
    s0_BTS, cascade = system.first_state(), schedule == "cascade"

    def solve(limit: int | None = None) -> Any:
        return jax.block_until_ready(system.solve(
            s0_BTS, schedule=schedule, method=method, iterations=iterations, limit=limit, tol=tol,
            record=cascade))

    solve(1)  # compiles
    seconds, found = math.inf, None
    for _ in range(repeats):
        begun = time.perf_counter()
        found = solve()
        seconds = min(seconds, time.perf_counter() - begun)
    assert found is not None
    evaluations = int(found.evaluations)
    updates = system.state_updates(found, tol) if cascade else evaluations
    host = jax.device_get(found)
    return Trial(schedule, method, host.s_BTS, host.converged_BT, host.iterations_BT,
                 host.residual_BT, host.residual_trace_KBT, evaluations, updates, seconds)


def cost_table(trials: Trials, tol: float, iterations: int, protocol: Protocol) -> ResultTable:
    """How many sweeps and how much time each takes; with untrained parameters too."""
    rows = []
    for parameters, own in trials.items():
        picard = {trial.schedule: trial for trial in own if trial.method == "picard"}
        for trial in own:
            share = trial.converged_BT.mean()
            row: Row = {
                "name": row_name(trial.name, parameters), "parameters": parameters,
                "schedule": trial.schedule, "method": trial.method, "converged": float(share),
                "sweeps": float(trial.sweeps_BT.mean()), "evaluations": trial.evaluations,
                "updates": trial.updates, "seconds": trial.seconds,
                FLAG: "!" if share < 1 else ""}
            if trial.schedule in picard and trial.method != "picard":
                row["of_picard"] = trial.sweeps_BT.mean() / picard[trial.schedule].sweeps_BT.mean()
            rows.append(row)
    notes = (
        f"converged: share of tokens with a relative residual of at most {tol:g}, and all before "
        f"them too, within {iterations} sweeps",
        "a sweep of cascade solves for the state first: it has several state updates, the others "
        "one; the time has the energies that the stopping rule reads too",
        *_ratios(trials["trained"], tol),
        *(("! some tokens did not converge",) if any(row[FLAG] for row in rows) else ()))
    return ResultTable("solvers", "What each solver costs", _COST, known(rows), (protocol,), notes)


def ends_table(trials: Trials, reference: str, protocol: Protocol) -> ResultTable:
    """With what residual each solver ends, and how far from the run's own."""
    rows = []
    for parameters, own in trials.items():
        base = next(trial for trial in own if trial.name == reference)
        for trial in own:
            off = distances(trial.value_BTS, base.value_BTS, trial.converged_BT & base.converged_BT)
            residual = np.percentile(trial.residual_BT, _PERCENTILES)
            rows.append({
                "name": row_name(trial.name, parameters), "parameters": parameters,
                **{f"p{p}": float(value)
                   for p, value in zip(_PERCENTILES, residual, strict=True)},
                "largest_residual": float(trial.residual_BT.max()),
                "distance": off.mean, "largest_distance": off.largest, "compared": off.tokens})
    notes = [f"distance: |s - s'| / |s| of state and query from {reference}, over the tokens that "
             "converged in both"]
    for parameters, own in trials.items():
        pairs, _ = agreement([trial.value_BTS for trial in own],
                             [trial.converged_BT for trial in own])
        notes.append(f"{parameters}: over all pairs of solvers the distance is {pairs.mean:.2g} on "
                     f"average and {pairs.largest:.2g} at most" if pairs.tokens else
                     f"{parameters}: no two solvers converged at the same token")
    return ResultTable("agreement", "Where each solver ends", _ENDS, known(rows), (protocol,),
                       tuple(notes))


def row_name(name: str, parameters: str) -> str:
    """Of a row: only what is not trained says so."""
    return name if parameters == "trained" else f"{name}, {parameters}"


def _ratios(trials: Sequence[Trial], tol: float) -> list[str]:
    """Anderson against Picard on the run's parameters."""
    by_name, notes = {trial.name: trial for trial in trials}, []
    for schedule in dict.fromkeys(trial.schedule for trial in trials):
        pair = [by_name.get(f"{schedule} {method}") for method in ("picard", "anderson")]
        if pair[0] is None or pair[1] is None:
            continue
        picard, anderson = (float(trial.sweeps_BT.mean()) for trial in pair if trial)
        bound = "at most " if pair[0].converged_BT.mean() < 1 else ""
        notes.append(
            f"{schedule}, to {tol:g}: {picard:.1f} sweeps a token by Picard, {anderson:.1f} by "
            f"Anderson ({bound}{anderson / picard:.0%}); for all tokens {pair[0].evaluations} and "
            f"{pair[1].evaluations}")
    return notes


# ---------------------------------------------------------------- pictures

def residual_plot(trials: Trials, tol: float) -> Plot:
    """The residual after each sweep, a panel for each schedule."""
    schedules = list(dict.fromkeys(trial.schedule for trial in trials["trained"]))
    methods = list(dict.fromkeys(trial.method for trial in trials["trained"]))
    n = trials["trained"][0].residual_BT.size

    def draw(figure: Figure) -> None:
        from matplotlib.lines import Line2D

        grid = figure.subplots(1, len(schedules), sharey=True, squeeze=False)[0]
        for axes, schedule in zip(grid, schedules, strict=True):
            for parameters, own in trials.items():
                for trial in own:
                    if trial.schedule == schedule:
                        _draw_trace(axes, trial, SERIES[methods.index(trial.method)],
                                    parameters == "trained")
            axes.axhline(tol, color=INK, lw=0.8, ls="--", alpha=0.5)
            axes.set_yscale("log")
            axes.set_xlim(left=1)
            axes.set_title(schedule)
            axes.set_xlabel("sweep")
        grid[0].set_ylabel("relative residual")
        legend = [Line2D([], [], color=SERIES[i], label=method)
                  for i, method in enumerate(methods)]
        legend += [Line2D([], [], color=INK, lw=0.8, label="slowest token"),
                   Line2D([], [], color=INK, ls=":", label="untrained")]
        figure.legend(handles=legend, loc="outside upper center", ncols=len(legend))

    return Plot(
        "residuals", "The residual, sweep by sweep",
        f"Median over {n:,} tokens of |G(s) - s| / |G(s)|, for the three orders of the updates and "
        "each method; thin: the largest of all tokens. A token that is done keeps its last. "
        f"Dotted: random parameters (median). Dashed: the tolerance of {tol:g}.",
        themed_svg(draw))


def _draw_trace(axes: Axes, trial: Trial, color: str, trained: bool) -> None:
    trace_KBT = trial.trace_KBT[:trial.evaluations]
    at = np.arange(1, len(trace_KBT) + 1)
    axes.plot(at, np.median(trace_KBT, axis=(1, 2)), color=color, ls="-" if trained else ":")
    if trained:
        axes.plot(at, trace_KBT.max((1, 2)), color=color, lw=0.8, alpha=0.7)


def agreement_plot(trials: Sequence[Trial], tol: float) -> Plot:
    """The largest distance between the results of each pair of solvers."""
    _, largest_nn = agreement([trial.value_BTS for trial in trials],
                              [trial.converged_BT for trial in trials])
    names = [trial.name for trial in trials]
    with np.errstate(divide="ignore"):
        shown = np.log10(largest_nn)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(False)
        mesh = axes.pcolormesh(np.where(np.isfinite(shown), shown, np.nan), cmap="viridis",
                               vmin=-7, vmax=0, antialiased=False, lw=0)
        axes.invert_yaxis()
        for i, j in np.ndindex(shown.shape):
            if i != j:
                text = "none" if np.isnan(shown[i, j]) else f"{shown[i, j]:.1f}"
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5,
                          color="white" if shown[i, j] < -3 else "black")
        at = np.arange(len(names)) + 0.5
        axes.set_yticks(at, names)
        axes.set_xticks(at, names, rotation=40, ha="right")
        axes.tick_params(length=0)
        figure.colorbar(mesh, ax=axes, label="log10 of the largest distance")

    return Plot(
        "agreement", "Do all solvers end at the same point?",
        "Largest relative distance over the tokens at which both solvers converged, as a power of "
        f"ten; a residual of {tol:g} allows a distance of about {tol:g} / (1 - rate). none: no "
        "token converged in both.", themed_svg(draw, height=4.6))
