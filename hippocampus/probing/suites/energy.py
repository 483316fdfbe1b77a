"""Energy: how far each retrieval of the Hopfield path descends, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from hippocampus.evaluation.result_table import FLAG, Column, ResultTable
from hippocampus.probing import views
from hippocampus.probing.plots import PATH_COLORS, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "The energy along each retrieval"

FAMILIES = ("hybrid",)
"""What it looks into."""

_COLUMNS = (
    Column("step", "layer and step"), Column("energy", "energy"),
    Column("spread", "sd over tokens"), Column("change", "change"),
    Column("change_stderr", "± s.e."), Column("fell", "fell", "share of tokens", 3),
    Column("rose", "rose", "share of tokens", 6), Column("largest_rise", "largest rise", "", 7))


def run(probe: Probe) -> SuiteResult:
    """Measures the energy of every token's state before and after each step."""
    layers = views.layers_with("hopfield", probe.specs)
    if not layers:
        raise SkipSuite("the model has no Hopfield path")
    context = probe.protocol.context
    dtype = jnp.dtype(probe.model.config.compute_dtype)
    tolerance = 4 * float(jnp.finfo(dtype).eps) * context**0.5
    patterns = probe.config.model.hopfield.n_slots + context
    floats = probe.config.model.n_heads * patterns

    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        def of_rows(part: Any) -> dict[str, Any]:
            _, out, _ = model.apply({"params": params}, part, method="forward")
            return {f"{i}.{name}": value for i in layers for name, value in views.energy_view(
                out[f"layers.{i}.hopfield.energy"], part.loss_weight_BT, tolerance).items()}

        return {**views.by_rows(of_rows, batch, floats), "weight": batch.loss_weight_BT.sum(1)}

    found = views.over_windows(probe, view)
    weight_W = found["weight"] * probe.config.model.n_heads
    rows = [row for i in layers for row in _rows(i, found, weight_W)]
    rising = [row["step"] for row in rows if row.get(FLAG)]
    notes = (
        "E(xi) = -lse(beta, K xi) + |xi|^2 / 2 + log(n) / beta + M^2 / 2 (Ramsauer et al. 2020): "
        "a step of at most 1 never raises it",
        f"mean over tokens and heads; rose: by more than {tolerance:.1g} of the largest energy, "
        f"which rounding in {dtype.name} explains",
        f"! the energy ROSE: {', '.join(rising)}" if rising else "no retrieval raised its energy")
    table = ResultTable("energy", "Energy after each step", _COLUMNS, views.known(rows),
                        (probe.protocol,), notes)
    height = 1.0 + 1.5 * -(-len(layers) // 4)
    plot = Plot(
        "descent", "Energy along a retrieval",
        "Energy E of the query (step 0) and after each step: mean and standard deviation over "
        f"{int(weight_W.sum()):,} states (tokens times heads). It must not rise.",
        themed_svg(lambda figure: _draw(figure, layers, rows), height=max(2.6, height)))
    return SuiteResult("energy", TITLE, (table,), (plot,))


def _rows(layer: int, found: dict[str, np.ndarray], weight_W: np.ndarray) -> list[dict[str, Any]]:
    """One per state of a layer: the query, then after each step."""
    energy, _ = views.window_mean(found[f"{layer}.energy"], weight_W)
    square, _ = views.window_mean(found[f"{layer}.square"], weight_W)
    change, error = views.window_mean(np.diff(found[f"{layer}.energy"], axis=1), weight_W)
    fell, _ = views.window_mean(found[f"{layer}.fell"], weight_W)
    rose, _ = views.window_mean(found[f"{layer}.rose"], weight_W)
    largest = found[f"{layer}.largest_rise"].max(0)
    rows: list[dict[str, Any]] = []
    for j in range(len(energy)):
        row: dict[str, Any] = {
            "step": f"layer {layer} step {j}", "layer": layer, "j": j, "energy": float(energy[j]),
            "spread": float(np.sqrt(max(square[j] - energy[j] ** 2, 0.0)))}
        if j:
            row |= {"change": float(change[j - 1]), "change_stderr": float(error[j - 1]),
                    "fell": float(fell[j - 1]), "rose": float(rose[j - 1]),
                    "largest_rise": max(0.0, float(largest[j - 1])),
                    FLAG: "!" if rose[j - 1] else ""}
        rows.append(row)
    return rows


def _draw(figure: Figure, layers: list[int], rows: list[dict[str, Any]]) -> None:
    across = min(4, len(layers))
    grid = figure.subplots(-(-len(layers) // across), across, sharey=True, squeeze=False)
    for axes in grid.flat[len(layers):]:
        axes.set_axis_off()
    color = PATH_COLORS["hopfield"]
    for axes, layer in zip(grid.flat, layers, strict=False):
        own = [row for row in rows if row["layer"] == layer]
        mean = np.asarray([row["energy"] for row in own])
        spread = np.asarray([row["spread"] for row in own])
        steps = np.arange(len(own))
        axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
        axes.plot(steps, mean, color=color, marker="o", ms=4)
        axes.set_title(f"layer {layer}")
        axes.set_xticks(steps)
        axes.set_xlim(-0.25, len(own) - 0.75)
        axes.set_xlabel("step")
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel("energy")
