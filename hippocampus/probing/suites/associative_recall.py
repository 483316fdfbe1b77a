"""The memory of an equilibrium model by itself: what it recalls, from how much noise, how much.

The retrieval map is the cell's, with its learned inverse temperatures, step size and anchor. What
is stored is, in turn, what the model has learned and what was drawn at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.generation.language_model import LanguageModel
from hippocampus.layers.equilibrium_cell import EquilibriumCell
from hippocampus.layers.mor_hopfield import inverse_temperature
from hippocampus.probing.equilibrium.capacity import (
    SHARP,
    Dynamics,
    Recall,
    effective_patterns,
    random_patterns,
    recall,
    shuffled_patterns,
    unit,
)
from hippocampus.probing.equilibrium.system import (
    config_of,
    injection,
    some_rows,
    untrained,
)
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.rows import baseline_row, loss_row, loss_table
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "Associative recall: what the memory holds"

FAMILIES = ("equilibrium",)
"""What it looks into."""

METHODS = ("memory", "free", "sharp", "linear", "nearest")
"""Of `hippocampus.probing.equilibrium.capacity.recall`."""

_RETRIEVING = METHODS[:3]
"""Those whose result can come within a tolerance of a pattern."""

Row = dict[str, Any]
Patterns = Mapping[str, Float[np.ndarray, "S H d"]]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
      noises: length of what is added to a pattern to make a cue.
      steps: retrieval steps.
      tolerance: distance at which a pattern counts as recalled.
      cues: at most, of each case.
      sizes: numbers of random patterns of the capacity curve.
      widths: of a head, beside the model's own.
      capacity_noise: of the cues of the capacity curve.
      keys: tokens whose keys are stored, where the memory reads its context.
    """

    noises: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)
    steps: int = 5
    tolerance: float = 0.1
    cues: int = 128
    sizes: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10_000)
    widths: tuple[int, ...] = (16, 64)
    capacity_noise: float = 0.25
    keys: int = 256


def run(probe: Probe, settings: Settings = Settings()) -> SuiteResult:
    """Measures the memory, and what the text's loss owes to it.

    Raises:
      SkipSuite: another family, no cell, or a cell without a memory.
    """
    config_of(probe)
    names = probe.model.cell_names
    if not names:
        raise SkipSuite("the model has no cell (model.cell.copies is 0)")
    cell = probe.model.cell
    if "hopfield" not in cell.config.parts:
        raise SkipSuite("the cell has no memory (model.cell.parts)")
    params = probe.params[names[0]]
    dynamics = dynamics_of(cell, params, settings.steps)
    stored = stored_patterns(probe, cell, params, settings)
    noise_rows = _noise_rows(stored, dynamics, settings, probe.seed)
    capacity_rows = _capacity_rows(cell, dynamics, settings, probe.seed)
    tables = (_head_table(stored, dynamics, settings, probe.protocol),
              _noise_table(noise_rows, settings, probe.protocol),
              _capacity_table(capacity_rows, settings, probe.protocol), _text_table(probe, names))
    plots = (_noise_plot(noise_rows, settings), _capacity_plot(capacity_rows, settings))
    notes = (() if len(names) == 1 else (
        f"the memory is that of the first of {len(names)} cells; the text's rows are of all",))
    return SuiteResult("associative_recall", TITLE, tables, plots, notes=notes)


def dynamics_of(cell: EquilibriumCell, params: Any, steps: int) -> Dynamics:
    """The cell's retrieval, for patterns of unit length."""
    beta_H = np.asarray(inverse_temperature(params["log_beta"]))
    if cell.memory.normalize == "rms":  # patterns of length sqrt(d)
        beta_H = beta_H * (cell.d_model // cell.n_heads)
    return Dynamics(beta_H, cell.memory.step_size, cell.memory.anchor, steps)


def stored_patterns(probe: Probe, cell: EquilibriumCell, params: Any,
                    settings: Settings) -> Patterns:
    """What the model has stored, and the same without what it has learned."""
    found: dict[str, np.ndarray] = {}
    if "slots" in params:
        found["slots"] = unit(params["slots"])
    if "key" in params:
        batch = some_rows(probe.host_batches[0], settings.keys)
        u_BTD = injection(probe.model, probe.params, batch).astype(jnp.float32)
        keys_BTD = np.asarray(u_BTD @ params["key"]["kernel"])
        found["keys"] = unit(keys_BTD.reshape(-1, cell.n_heads, cell.d_model // cell.n_heads))
    for name in tuple(found):
        found[f"{name}, shuffled"] = shuffled_patterns(found[name], probe.seed)
    S, H, d = next(iter(found.values())).shape
    return {**found, "random": random_patterns(S, H, d, probe.seed)}


# ---------------------------------------------------------------- noise

def _head_table(stored: Patterns, dynamics: Dynamics, settings: Settings,
                protocol: Protocol) -> ResultTable:
    """Head by head: how sharp retrieval is, and how alike what is stored."""
    rows = []
    for name, patterns_SHd in stored.items():
        effective_H = effective_patterns(patterns_SHd, dynamics.beta_H, settings.cues)
        some = patterns_SHd[:2048]
        cosine_HSS = np.einsum("shd,thd->hst", some, some)
        cosine_HSS[:, *np.diag_indices(len(some))] = -1
        rows += [{"name": f"{name}, head {h}", "patterns": len(patterns_SHd),
                  "beta": float(dynamics.beta_H[h]), "mixed": float(effective_H[h]),
                  "closest": float(np.mean(cosine_HSS[h].max(-1)))}
                 for h in range(patterns_SHd.shape[1])]
    columns = (Column("name", "stored"), Column("patterns", "patterns"), Column("beta", "beta", "",
               2), Column("mixed", "patterns mixed", "", 1),
               Column("closest", "cosine to the next one", "", 3))
    notes = ("beta: for patterns of unit length; mixed: 1 / sum p^2 of a retrieval from a stored "
             "pattern, 1 = that pattern alone; the cosine is a mean over patterns",
             "shuffled: every coordinate from another pattern; random: from the unit sphere")
    return ResultTable("heads", "How sharply each head retrieves", columns, tuple(rows),
                       (protocol,), notes)


def _noise_rows(stored: Patterns, dynamics: Dynamics, settings: Settings,
                seed: int) -> list[Row]:
    rows = []
    for name, patterns_SHd in stored.items():
        for noise in settings.noises:
            found = recall(patterns_SHd, dynamics, noise, most=settings.cues,
                           tolerance=settings.tolerance, seed=seed)
            rows.append({"name": f"{name}, noise {noise:g}", "stored": name, "noise": noise,
                         "patterns": len(patterns_SHd), **_flat(found)})
    return rows


def _flat(found: Mapping[str, Recall]) -> Row:
    return {f"{name}_{kind}": getattr(value, kind) for name, value in found.items()
            for kind in ("right", "within")}


def _recall_columns() -> tuple[Column, ...]:
    return (*(Column(f"{name}_right", name, "right", 2) for name in METHODS),
            *(Column(f"{name}_within", name, "within", 2) for name in _RETRIEVING))


def _recall_notes(settings: Settings) -> tuple[str, ...]:
    return (
        f"shares over at most {settings.cues} cues and all heads, after {settings.steps} retrieval "
        "steps; right: the stored pattern next to the result is the cue's own; within: the result "
        f"is at most {settings.tolerance:g} away from it",
        "memory: the cell's map, whose anchor holds the query near the cue; free: without anchor "
        f"(kappa = 0); sharp: free, with {SHARP:g} times the beta; linear: steps of a memory "
        "without a softmax; nearest: the cue as it is")


def _noise_table(rows: Sequence[Row], settings: Settings, protocol: Protocol) -> ResultTable:
    columns = (Column("name", "stored"), Column("patterns", "patterns"), *_recall_columns())
    notes = ("noise: length of what is added to a pattern of length 1, in a random direction",
             *_recall_notes(settings))
    return ResultTable("noise", "Recall from noisy cues", columns, tuple(rows), (protocol,), notes)


def _noise_plot(rows: Sequence[Row], settings: Settings) -> Plot:
    names = list(dict.fromkeys(row["stored"] for row in rows))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, names, strict=True):
            own = [row for row in rows if row["stored"] == name]
            _draw_methods(axes, [row["noise"] for row in own], own)
            axes.set(title=f"{name} ({own[0]['patterns']:,})", xlabel="noise", ylim=(0, 1))
        grid[0].set_ylabel("share recalled")
        _legend(figure, grid[0])

    return Plot("noise", "Recall from noisy cues",
                f"Share of cues whose own pattern is the one next to the result after "
                f"{settings.steps} steps, and (dashed) within {settings.tolerance:g} of it. What "
                "lies below `nearest` is worse than not retrieving at all.",
                themed_svg(draw, width=max(6.4, 2.5 * len(names)), height=3.4))


# ---------------------------------------------------------------- capacity

def _capacity_rows(cell: EquilibriumCell, dynamics: Dynamics, settings: Settings,
                   seed: int) -> list[Row]:
    own = cell.d_model // cell.n_heads
    rows = []
    for width in sorted({own, *settings.widths}):
        scaled = dynamics._replace(beta_H=dynamics.beta_H * (width / own)**0.5)
        for size in settings.sizes:
            found = recall(random_patterns(size, cell.n_heads, width, seed), scaled,
                           settings.capacity_noise, most=settings.cues,
                           tolerance=settings.tolerance, seed=seed)
            rows.append({"name": f"{width} wide, {size:,}", "width": width,
                         "patterns": size, "beta": float(scaled.beta_H.mean()), **_flat(found)})
    return rows


def _capacity_table(rows: Sequence[Row], settings: Settings, protocol: Protocol) -> ResultTable:
    columns = (Column("name", "head, patterns"), Column("beta", "beta, mean", "", 2),
               *_recall_columns())
    notes = (f"cues with noise {settings.capacity_noise:g}; each head with its learned beta, times "
             "the root of width / own width", *_recall_notes(settings))
    return ResultTable("capacity", "How many patterns the memory holds", columns, tuple(rows),
                       (protocol,), notes)


def _capacity_plot(rows: Sequence[Row], settings: Settings) -> Plot:
    widths = list(dict.fromkeys(row["width"] for row in rows))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
        for axes, width in zip(grid, widths, strict=True):
            own = [row for row in rows if row["width"] == width]
            _draw_methods(axes, [row["patterns"] for row in own], own)
            axes.set_xscale("log")
            axes.set(title=f"head width {width}", xlabel="patterns stored", ylim=(0, 1))
        grid[0].set_ylabel("share recalled")
        _legend(figure, grid[0])

    return Plot("capacity", "The capacity of the memory",
                f"Share of cues with noise {settings.capacity_noise:g} whose own pattern is next "
                f"to the result after {settings.steps} steps, and (dashed) within "
                f"{settings.tolerance:g} of it, by the number of random patterns that are stored.",
                themed_svg(draw, width=max(6.4, 2.5 * len(widths)), height=3.4))


def _draw_methods(axes: Axes, at: Sequence[float], rows: Sequence[Row]) -> None:
    for i, name in enumerate(METHODS):
        color = INK if name == "nearest" else SERIES[i]
        axes.plot(at, [row[f"{name}_right"] for row in rows], color=color, label=name, marker="o",
                  ms=6 - i, lw=3.5 - 0.6 * i, clip_on=False)  # the widest first: they may coincide
        if name in _RETRIEVING:
            axes.plot(at, [row[f"{name}_within"] for row in rows], color=color, ls="--", lw=1.2,
                      clip_on=False)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))


# ---------------------------------------------------------------- the text

def _text_table(probe: Probe, names: Sequence[str]) -> ResultTable:
    """What the loss on the text owes to the memory and to what is stored in it."""
    fresh = untrained(probe)
    changes: dict[str, Any] = {"memory_silent": _silent}
    if "slots" in probe.params[names[0]]:
        changes["memory_shuffled"] = lambda own, _: {
            **own, "slots": jnp.asarray(np.random.default_rng(probe.seed).permuted(
                np.asarray(own["slots"]), axis=0))}
        changes["memory_untrained"] = lambda own, other: {**own, "slots": other["slots"]}
    rows = [baseline_row(probe)]
    for name, change in changes.items():
        params = {**probe.params, **{cell: change(probe.params[cell], fresh[cell])
                                     for cell in names}}
        changed = dataclasses.replace(probe, lm=LanguageModel(
            probe.model, params, probe.lm.tokenizer, probe.config, probe.lm.step))
        rows.append(loss_row(probe, name, "memory", changed.measure()))
    return loss_table(probe, "text", "What the text's loss owes to the memory", rows, (
        "silent: the cell reads zeros from its memory; shuffled: every coordinate of the slots "
        "from another slot; untrained: slots as before training",
        "the model was trained with its memory: how much it leans on it, not what it is worth"))


def _silent(own: Any, _: Any) -> Any:
    kernel = own["recalled"]["kernel"]
    return {**own, "recalled": {**own["recalled"], "kernel": jnp.zeros_like(kernel)}}
