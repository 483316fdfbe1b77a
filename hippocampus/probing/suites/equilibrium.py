"""The fixed point of an equilibrium model: solvers, starts, rate, energy, gradient, causality.

Everything is measured on a few rows of the text, with the run's parameters and with random ones
beside them, which say what of a finding is the architecture's and not learned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hippocampus.evaluation.result_table import FLAG, Column, Protocol, ResultTable
from hippocampus.probing.equilibrium import around, convergence, trials
from hippocampus.probing.equilibrium.descent import astray, descent, energies_along
from hippocampus.probing.equilibrium.system import (
    METHODS,
    SCHEDULES,
    Problem,
    System,
    energy,
    open_systems,
    retrieval,
)
from hippocampus.probing.results import SuiteResult
from hippocampus.probing.views import known

if TYPE_CHECKING:
    from hippocampus.probing.probe import Probe

TITLE = "The fixed point: solvers, starts, rate, energy, gradient, causality"

FAMILIES = ("equilibrium",)
"""What it looks into."""

Systems = Mapping[str, System]
Row = dict[str, Any]

_STARTS = (
    Column("name", "start"), Column("converged", "converged", "", 3),
    Column("distance", "distance, mean", "", 6), Column("largest_distance", "largest", "", 6),
    Column("apart", "ended elsewhere", "share", 4))
_ENERGY = (
    Column("name", "step"), Column("moves", "moves"), Column("rose", "rose", "share", 6),
    Column("fell", "fell", "share", 3), Column("largest_rise", "largest rise", "", 7))


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
      tokens: at most, in whole rows.
      iterations: sweeps at most.
      tol: relative residual.
      schedules, methods: which.
      starts: random first states.
      allowed: relative distance within which two results are the same point.
      limits: sweeps after which causality is looked at.
      row: tokens of the rows that rates and gradients are measured on.
      power: products with the Jacobian of the short and the long estimate of the contraction.
      steps: retrieval steps from each state.
    """

    tokens: int = 512
    iterations: int = 100
    tol: float = 1e-4
    schedules: tuple[str, ...] = SCHEDULES
    methods: tuple[str, ...] = METHODS
    starts: int = 3
    allowed: float = 1e-2
    limits: tuple[int, ...] = (2, 4, 30)
    row: int = 32
    power: tuple[int, int] = (3, 30)
    steps: int = 5


def run(probe: Probe, settings: Settings = Settings()) -> SuiteResult:
    """Measures all of it.

    Raises:
      SkipSuite: the model has no fixed point.
    """
    systems = open_systems(probe, settings.tokens)
    tokens = systems["trained"].tokens
    protocol = dataclasses.replace(probe.protocol, tokens=tokens)
    found = {parameters: trials.run_trials(
        system, settings.schedules, settings.methods, tol=settings.tol,
        iterations=settings.iterations) for parameters, system in systems.items()}
    solver = systems["trained"].solver
    base = f"{solver.schedule} {solver.method}"
    names = [trial.name for trial in found["trained"]]
    base = base if base in names else names[0]
    pieces = {name: around.in_pieces(system, settings.row) for name, system in systems.items()}
    rate_table, rate_plot = around.rates(
        pieces, [schedule for schedule in settings.schedules if schedule in around.SWEEPS],
        sweeps=settings.iterations, power=settings.power, seed=probe.seed, protocol=protocol)
    tables = [
        trials.cost_table(found, settings.tol, settings.iterations, protocol),
        trials.ends_table(found, base, protocol),
        _starts(systems, found, base, settings, probe.seed, protocol), rate_table,
        *_energy(systems, found, base, settings, probe.seed, protocol),
        around.gradient_table(pieces, sweeps=settings.iterations, seed=probe.seed,
                              protocol=protocol),
        _causality(systems["trained"], settings, probe.seed, protocol)]
    plots = (trials.residual_plot(found, settings.tol),
             trials.agreement_plot(found["trained"], settings.tol), rate_plot)
    notes = (
        "state and query are solved for together, in float32; untrained: random parameters, on "
        "the same rows",)
    return SuiteResult("equilibrium", TITLE, tuple(tables), plots, notes=notes)


# ---------------------------------------------------------------- starts

def _starts(systems: Systems, found: trials.Trials, base: str, settings: Settings, seed: int,
            protocol: Protocol) -> ResultTable:
    """Random first states must end where the usual one does."""
    rows: list[Row] = []
    schedule, method = base.split()
    for parameters, system in systems.items():
        trial = next(trial for trial in found[parameters] if trial.name == base)

        def solve_from(s0_BTS: np.ndarray, system: System = system) -> tuple[Array, Array]:
            solved = system.solve(s0_BTS, schedule=schedule, method=method, tol=settings.tol,
                                  iterations=settings.iterations, record=schedule == "cascade")
            return solved.s_BTS, solved.converged_BT

        starts = convergence.random_starts(trial.value_BTS, settings.starts, seed)
        ends = convergence.from_starts(solve_from, starts, trial.value_BTS, trial.converged_BT,
                                       settings.allowed)
        rows += [{"name": trials.row_name(f"random {i + 1}", parameters),
                  "parameters": parameters, "converged": converged, "distance": off.mean,
                  "largest_distance": off.largest, "apart": off.apart,
                  FLAG: "!" if off.apart > 0 else ""} for i, (converged, off) in enumerate(ends)]
    notes = (f"{base} from noise of the state's size, against the usual first state, over tokens "
             f"that converged from both; elsewhere: further than {settings.allowed:g} away",
             *(("! there is more than one fixed point",) if any(row[FLAG] for row in rows)
               else ("every start ended at the same point",)))
    return ResultTable("starts", "Does the start matter?", _STARTS, known(rows), (protocol,), notes)


# ---------------------------------------------------------------- energy

def _energy(systems: Systems, found: trials.Trials, base: str, settings: Settings, seed: int,
            protocol: Protocol) -> list[ResultTable]:
    """The retrieval step must not raise the energy, from wherever it starts."""
    if "hopfield" not in systems["trained"].cell.config.parts:
        return []
    cell = systems["trained"].cell
    tolerance = 4 * float(np.finfo(np.float32).eps) * (cell.memory.n_slots + protocol.context)**0.5
    rows: list[Row] = []
    for parameters, system in systems.items():
        value = next(t for t in found[parameters] if t.name == base).value_BTS
        starts = [*convergence.random_starts(value, settings.starts, seed), system.first_state()]
        before, after, wrong = np.concatenate([jax.device_get(_energies(
            system.problem, jnp.asarray(start), jax.random.key(seed), cell=cell, n=settings.steps))
            for start in starts], 2)
        for name, energies in (("retrieval", after), ("as long, astray", wrong)):
            seen = descent(before, energies, tolerance)
            rows.append({"name": trials.row_name(name, parameters), "parameters": parameters,
                         "moves": seen.moves, "rose": seen.rose, "fell": seen.fell,
                         "largest_rise": seen.largest_rise, "slack": seen.slack,
                         FLAG: "!" if seen.rose and name == "retrieval" else ""})
    notes = (
        f"E(xi; q) = E_Hopfield(xi) + kappa/2 |xi - q|^2 of {settings.steps} retrieval steps at a "
        f"fixed state, from {len(starts)} first states; rose: by more than {tolerance:.1g} of the "
        "largest energy, which rounding explains",
        "astray: a step of the same length from the same state in a random direction, which need "
        "not descend anything",
        "! the energy ROSE" if any(row[FLAG] for row in rows) else "no retrieval raised its energy",
        "of state and query together there is no energy")
    return [ResultTable("energy", "Does a retrieval descend its energy?", _ENERGY, tuple(rows),
                        (protocol,), notes)]


@functools.partial(jax.jit, static_argnames=("cell", "n"))
def _energies(problem: Problem, s0_BTS: Array, key: Array, *, cell: Any,
              n: int) -> Array:
    def step(s: Array) -> Array:
        return retrieval(s, problem, cell)

    def of(s: Array) -> Array:
        return energy(s, problem, cell)

    D = problem.u_BTD.shape[-1]

    def wrong(s: Array) -> Array:  # the query alone goes astray
        moved = astray(lambda xi: step(s.at[..., D:].set(xi))[..., D:], key)(s[..., D:])
        return s.at[..., D:].set(moved)

    return energies_along(step, wrong, of, s0_BTS, n)


# ---------------------------------------------------------------- causality

def _causality(system: System, settings: Settings, seed: int, protocol: Protocol) -> ResultTable:
    """A change at one token must not change a bit in front of it, however few the sweeps."""
    B, T, D = system.problem.u_BTD.shape
    token = T // 2
    noise = np.random.default_rng(seed).standard_normal((B, D)).astype(np.float32)
    changed = system.with_problem(u_BTD=system.problem.u_BTD.at[:, token].set(noise))
    limits = tuple(min(limit, settings.iterations) for limit in settings.limits)

    def found(solve_to: Any) -> Row:
        leaks = convergence.leaks(solve_to, system, changed, token, limits)
        return {**{f"before_{leak.limit}": leak.before for leak in leaks},
                "after": leaks[-1].after, "before": sum(leak.before for leak in leaks)}

    rows: list[Row] = []
    for schedule in settings.schedules:
        for method in settings.methods:
            def solve_to(own: System, limit: int, schedule: str = schedule,
                         method: str = method) -> Array:
                return own.solve(own.first_state(), schedule=schedule, method=method, limit=limit,
                                 iterations=settings.iterations, tol=settings.tol,
                                 record=schedule == "cascade").s_BTS

            row = {"name": f"{schedule} {method}", **found(solve_to)}
            rows.append({**row, FLAG: "!" if row["before"] else ""})
    together = found(lambda own, limit: own.solve_together(
        own.first_state(), limit, settings.iterations))
    rows.append({"name": "anderson by whole rows (control)", **together, FLAG: ""})
    columns = (Column("name", "solver"),
               *(Column(f"before_{limit}", f"changed before, {limit} sweeps", "numbers")
                 for limit in limits), Column("after", "changed from it on", "tokens", 3))
    notes = (
        f"what drives token {token} of each row was replaced by noise; numbers of the {B * token}"
        f" tokens before it of which any bit changed (of {2 * B * token * D:,})",
        "! a token SAW A LATER ONE" if any(row[FLAG] for row in rows) else
        "no token saw a later one",
        "control: one set of mixing weights for a whole row lets every token see all others")
    return ResultTable("causality", "Does a token see the future?", columns, tuple(rows),
                       (protocol,), notes)

