"""The surroundings of a fixed point: residual and energy on planes, trajectories, the basin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.probing.equilibrium.around import in_pieces
from hippocampus.probing.equilibrium.landscape import (
    Plane,
    basin,
    displaced,
    principal_plane,
    random_plane,
)
from hippocampus.probing.equilibrium.system import System, open_systems
from hippocampus.probing.plots import HEAT, INK, SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.views import known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "The landscape around the fixed point"

FAMILIES = ("equilibrium",)
"""What it looks into."""

_LEAST = 1e-8
"""Of a residual, for its logarithm."""

_SLICES = (
    Column("name", "slice"), Column("extent", "half width", "", 3),
    Column("in_plane", "trajectories in the plane", "share", 3),
    Column("center", "at the fixed point", "", 6), Column("lowest", "lowest on the grid", "", 6),
    Column("off", "its distance", "", 3), Column("minima", "minima"))


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
      tokens: of the basin, at most.
      length: tokens of a row; slices are of the last one of the first row.
      starts: whose trajectories are drawn, at most; there are as many as rows of the basin.
      distance: of those, relative to the length of the fixed point.
      grid: points of a slice each way.
      radii: distances of the basin's starts, relative to the length of the fixed point.
      within: relative distance at which a start has come back.
      tol: relative residual.
      iterations: sweeps at most.
      steps: retrieval steps of a trajectory in the energy's slice.
    """

    tokens: int = 256
    length: int = 16
    starts: int = 8
    distance: float = 1.0
    grid: int = 25
    radii: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    within: float = 1e-2
    tol: float = 1e-4
    iterations: int = 60
    steps: int = 12


class Slice(NamedTuple):
    """A quantity on a plane through a fixed point, and trajectories in it.

    Attributes:
      name: of the plane.
      plane: through the fixed point.
      extent: half of its width.
      values_GG: on the grid, the first axis upwards.
      center: at the fixed point.
      paths_nK2: where the states of each start lie in the plane.
    """

    name: str
    plane: Plane
    extent: float
    values_GG: Float[np.ndarray, "G G"]
    center: float
    paths_nK2: Float[np.ndarray, "n K 2"]


def run(probe: Probe, settings: Settings = Settings()) -> SuiteResult:
    """Measures all of it.

    Raises:
      SkipSuite: the model has no fixed point.
    """
    systems = open_systems(probe, settings.tokens)
    pieces = {name: in_pieces(system, settings.length) for name, system in systems.items()}
    protocol = dataclasses.replace(probe.protocol, tokens=systems["trained"].tokens)
    slices: dict[str, list[Slice]] = {"residual": [], "energy": []}
    for parameters, system in pieces.items():
        for kind, found in _slices(system, parameters, settings, probe.seed).items():
            slices[kind] += found
    memory = "hopfield" in systems["trained"].cell.config.parts
    kinds = ("residual", "energy") if memory else ("residual",)
    tables = tuple(_slice_table(kind, slices[kind], protocol) for kind in kinds)
    plots = tuple(_slice_plot(kind, slices[kind], settings) for kind in kinds)
    shares = _basin(pieces, settings, probe.seed)
    return SuiteResult("energy_landscape", TITLE,
                       (*tables, _basin_table(shares, settings, protocol)),
                       (*plots, _basin_plot(shares, settings)))


# ---------------------------------------------------------------- slices

def _slices(system: System, parameters: str, settings: Settings,
            seed: int) -> dict[str, list[Slice]]:
    """Of the first row's last token: in the plane of trajectories and, trained, a random one."""
    many = system.cut(settings.length).repeated(len(system.problem.u_BTD))
    value_TS = _solved(many, many.first_state(), settings)[0]
    starts_nTS = np.repeat(value_TS[None], len(many.problem.u_BTD), 0)
    starts_nTS[:, -1] = displaced(starts_nTS[:, -1], settings.distance, seed)
    solved = many.solve(starts_nTS, tol=settings.tol, iterations=settings.iterations, record=True)
    sweeps = max(3, int(solved.evaluations))
    # The first sweep brings any start near; the plane is of what comes after it.
    paths = {"residual": np.asarray(solved.iterates_KBTS)[1:sweeps, :, -1],
            "energy": many.retrievals(_with_state_of(value_TS, starts_nTS, many),
                                      settings.steps)[:, :, -1]}
    origin_S = value_TS[-1]
    found: dict[str, list[Slice]] = {}
    for i, (kind, paths_KnS) in enumerate(paths.items()):
        paths_nKS = np.moveaxis(paths_KnS, 0, 1)
        plane = principal_plane(paths_nKS, origin_S)
        extent = 1.1 * float(np.abs(plane.project(paths_nKS)).max())
        planes = {f"{parameters}, plane of trajectories": plane}
        if parameters == "trained":
            used = np.ptp(paths_nKS, (0, 1)) > 0  # retrievals leave the state as it is
            planes["trained, random plane"] = random_plane(origin_S, seed, used)
        for name, own in planes.items():
            states = own.points(extent, settings.grid).reshape(-1, len(origin_S))
            values = many.last_token(np.concatenate([states, origin_S[None]]), value_TS)[i]
            values_GG = values[:-1].reshape(settings.grid, settings.grid)
            found.setdefault(kind, []).append(Slice(name, own, extent, values_GG,
                                                    float(values[-1]), own.project(paths_nKS)))
    return found


def _with_state_of(value_TS: np.ndarray, starts_nTS: np.ndarray, system: System) -> np.ndarray:
    """The starts with the fixed point's state: only their queries are elsewhere."""
    D = system.problem.u_BTD.shape[-1]
    starts_nTS = starts_nTS.copy()
    starts_nTS[..., :D] = value_TS[..., :D]
    return starts_nTS


def _solved(system: System, s0_BTS: np.ndarray, settings: Settings, method: str = "",
            ) -> np.ndarray:
    return np.asarray(system.solve(s0_BTS, tol=settings.tol, iterations=settings.iterations,
                                   method=method, record=True).s_BTS)


def minima(values_GG: Float[np.ndarray, "G G"]) -> int:
    """Points of a grid that are lower than all their eight neighbours; its edge is not counted."""
    inner = values_GG[1:-1, 1:-1]
    G = len(values_GG)
    lower = np.ones(inner.shape, bool)
    for i, j in np.ndindex(3, 3):
        if (i, j) != (1, 1):
            lower &= inner < values_GG[i:G - 2 + i, j:G - 2 + j]
    return int(lower.sum())


def _slice_table(kind: str, slices: list[Slice], protocol: Protocol) -> ResultTable:
    rows = []
    for own in slices:
        G = len(own.values_GG)
        b, a = np.unravel_index(int(np.argmin(own.values_GG)), own.values_GG.shape)
        at = np.linspace(-own.extent, own.extent, G)
        rows.append({"name": own.name, "extent": own.extent, "in_plane": own.plane.share,
                     "center": own.center, "lowest": float(own.values_GG.min()),
                     "off": float(np.hypot(at[a], at[b])), "minima": minima(own.values_GG),
                     "spacing": float(at[1] - at[0])})
    what = {"residual": "|G(s) - s| / |G(s)| of one token; another minimum that comes near 0 would "
                        "be another fixed point, given the tokens before it",
            "energy": "E(xi; q) of one token's queries, its state held at the fixed point, where E "
                      "is stationary"}[kind]
    notes = (f"{what}", "distances: in the units of the state, whose numbers have a mean square of "
             "1; the fixed point is a point of the grid")
    return ResultTable(kind, f"The {kind} around a fixed point", _SLICES, known(rows),
                       (protocol,), notes)


def _slice_plot(kind: str, slices: list[Slice], settings: Settings) -> Plot:
    shown = [np.log10(np.maximum(own.values_GG, _LEAST)) if kind == "residual" else own.values_GG
             for own in slices]
    every = np.concatenate([values.ravel() for values in shown])
    # The fixed point itself is a hole in a logarithm: the colours are for what is around it.
    levels = np.linspace(np.percentile(every, 0.5), every.max() + 1e-9, 15)

    shown_starts = min(settings.starts, len(slices[0].paths_nK2))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(slices), squeeze=False)[0]
        for axes, own, values in zip(grid, slices, shown, strict=True):
            filled = _draw_slice(axes, own, values, levels, settings.starts)
        grid[0].set_ylabel("second direction")
        label = "log10 of the residual" if kind == "residual" else "energy"
        bar = figure.colorbar(filled, ax=grid, shrink=0.85, pad=0.02, label=label, format="%.2f")
        bar.ax.tick_params(labelsize=7)

    quantity, way = {
        "residual": ("the relative residual of one token",
                     "by the run's solver, from the first sweep (dot) on"),
        "energy": ("the memory's energy of one token, its state held,",
                   f"(dots) by {settings.steps} retrieval steps")}[kind]
    return Plot(
        kind, f"The {kind} around a fixed point",
        f"Colour: {quantity} on a plane through its fixed point (+), earlier tokens at theirs. "
        f"Lines: trajectories of {shown_starts} starts {way}. The plane is the one in which "
        "they move most; beside it a random plane, and random parameters.",
        themed_svg(draw, width=8.4, height=3.0))


def _draw_slice(axes: Axes, own: Slice, values_GG: np.ndarray, levels: np.ndarray,
                most: int) -> Any:
    at = np.linspace(-own.extent, own.extent, len(values_GG))
    filled = axes.contourf(at, at, values_GG, levels=levels, cmap=HEAT, extend="min")
    for path_K2 in own.paths_nK2[:most]:
        axes.plot(*path_K2.T, color="white", lw=1.0, alpha=0.9)
        axes.plot(*path_K2[0], color="white", marker="o", ms=3)
    axes.plot(0, 0, color=SERIES[1], marker="+", ms=9, mew=2)
    axes.set(xlim=(-own.extent, own.extent), ylim=(-own.extent, own.extent), aspect="equal",
             title=own.name, xlabel="first direction")
    axes.grid(False)
    axes.tick_params(labelsize=7)
    return filled


# ---------------------------------------------------------------- basin

def _basin(pieces: Mapping[str, System], settings: Settings, seed: int) -> dict[str, list[float]]:
    """By the run's method and by plain iteration, with its parameters and with random ones."""
    shares: dict[str, list[float]] = {}
    for parameters, system in pieces.items():
        tight = system.solve(system.first_state(), tol=settings.tol / 10,
                             iterations=settings.iterations, record=True)
        value, counted = np.asarray(tight.s_BTS), np.asarray(tight.converged_BT)
        for method in dict.fromkeys((system.solver.method, "picard")):
            def solve(start: np.ndarray, system: System = system, method: str = method) -> Any:
                return _solved(system, start, settings, method)

            name = f"{method}, {parameters}"
            shares[name] = basin(solve, value, counted, settings.radii, settings.within, seed)
            shares[name].append(float(counted.mean()))
    return shares


def _basin_table(shares: Mapping[str, list[float]], settings: Settings,
                 protocol: Protocol) -> ResultTable:
    columns = (Column("name", "solver and parameters"),
               *(Column(f"from_{radius:g}", f"from {radius:g}", "", 3)
                 for radius in settings.radii), Column("counted", "tokens counted", "share", 3))
    rows = [{"name": name, **{f"from_{radius:g}": share for radius, share in
                              zip(settings.radii, own, strict=False)}, "counted": own[-1]}
            for name, own in shares.items()]
    notes = (
        "share of tokens that come back when state and query of every token are moved at once, "
        "each in a random direction, by so many times their own length",
        f"back: within {settings.within:g} of the fixed point after at most {settings.iterations} "
        "sweeps; counted: tokens whose fixed point was found to a tenth of the tolerance")
    return ResultTable("basin", "From how far one comes back", columns, known(rows), (protocol,),
                       notes)


def _basin_plot(shares: Mapping[str, list[float]], settings: Settings) -> Plot:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        solvers = list(dict.fromkeys(name.split(",")[0] for name in shares))
        for i, (name, own) in enumerate(shares.items()):  # the widest first: lines may coincide
            axes.plot(settings.radii, own[:-1], color=SERIES[solvers.index(name.split(",")[0])],
                      ls=":" if name.endswith("untrained") else "-", marker="o", ms=7 - i,
                      lw=3.5 - 0.7 * i, label=name, clip_on=False)
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.axvline(1, color=INK, lw=0.8, alpha=0.3)
        axes.set(xlabel="distance of the start / length of the fixed point",
                 ylabel="share that comes back")
        figure.legend(loc="outside upper center", ncols=2)

    return Plot("basin", "The basin of attraction",
                "Share of tokens that come back to their fixed point from growing distances; "
                "dotted: random parameters.", themed_svg(draw))
