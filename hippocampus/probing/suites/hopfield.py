"""Hopfield: how deep tokens retrieve, how many patterns they mix, and what each step is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.config import PATHS
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.models.interventions import Interventions
from hippocampus.probing import views
from hippocampus.probing.drawing import shades, stacked_bars
from hippocampus.probing.plots import INK, PATH_COLORS, SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.rows import loss_row, loss_table
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "What the associative memory retrieves"

FAMILIES = ("hybrid",)
"""What it looks into."""

REGIMES = ("single", "metastable", "global")

_RETRIEVALS = (
    Column("head", "layer and head"), Column("beta", "beta", "", 2),
    Column("entropy", "entropy", "nats", 3), Column("entropy_stderr", "± s.e.", "", 3),
    Column("effective", "patterns mixed", "1 / sum p²", 1), Column("patterns", "of", "", 1),
    *(Column(regime, regime, "share", 3) for regime in REGIMES))
_BEYOND = 2
"""Steps beyond the trained ones that the sweep goes on."""
_MOST_BARS = 48


def run(probe: Probe) -> SuiteResult:
    """Reads depth gates and retrieval weights, and measures the loss with other depths."""
    layers = views.layers_with("hopfield", probe.specs)
    if not layers:
        raise SkipSuite("the model has no Hopfield path")
    hopfield = probe.config.model.hopfield
    patterns = (0 if hopfield.patterns == "context" else hopfield.n_slots) + (
        0 if hopfield.patterns == "slots" else probe.protocol.context)

    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        def of_rows(part: Any) -> dict[str, Any]:
            _, out, _ = model.apply({"params": params}, part, method="forward")
            rows = part.tokens_BT.shape[0]
            return {f"{i}.{name}": value for i in layers for name, value in {
                **views.retrieval_view(out, i, part.loss_weight_BT),
                "beta": out[f"layers.{i}.hopfield.beta"][None].repeat(rows, 0)}.items()}

        return {**views.by_rows(of_rows, batch, model.config.n_heads * patterns),
                "weight": batch.loss_weight_BT.sum(1)}

    found = views.over_windows(probe, view)
    depths = [_depth_row(found, i) for i in layers]
    heads = [row for i in layers for row in _head_rows(found, i)]
    deepest = max(len(row["gates"]) for row in depths)
    gates = tuple(Column(f"depth_{j}", f"depth {j}", "gate", 3) for j in range(1, deepest + 1))
    tables = (
        ResultTable("depths", "Depth of the retrievals",
                    (Column("layer", "layer"), Column("mean", "mean depth", "steps", 2), *gates),
                    tuple(depths), (probe.protocol,),
                    ("the output mixes the states after each step by these gates, per token",)),
        ResultTable("retrievals", "Patterns that a retrieval mixes", _RETRIEVALS,
                    views.known(heads), (probe.protocol,),
                    (f"of the last step's weights, over tokens with {views.FEWEST_PATTERNS} "
                     "patterns or more to retrieve from",
                     "single: fewer than 1.5 patterns mixed; global: more than half of them; "
                     "metastable: between (Ramsauer et al. 2020)")),
        depth_sweep(probe, layers))
    plots = [_regimes(probe, heads), _sweep(probe, layers, tables[-1])]
    if deepest > 1:
        plots.append(_depths(probe, depths, deepest))
    return SuiteResult("hopfield", TITLE, tables, tuple(plots))


def depth_sweep(probe: Probe, layers: list[int]) -> ResultTable:
    """The loss when retrieval stops after k steps, in every layer at once and in one.

    Args:
      probe: what is measured.
      layers: those with a Hopfield path.
    """
    deepest = max(probe.specs[i].depth for i in layers) + _BEYOND
    everywhere = np.isin(np.arange(probe.n_layers), layers)
    sweeps: dict[str, tuple[int | None, np.ndarray]] = {
        f"k_{k}": (None, np.where(everywhere, k, 0)) for k in range(1, deepest + 1)}
    for i in layers:
        one = np.arange(probe.n_layers) == i
        sweeps |= {f"k_{k}_layer_{i}": (i, np.where(one, k, 0))
                   for k in range(1, probe.specs[i].depth + _BEYOND + 1)}
    memory_P = np.asarray(PATHS) == "hopfield"
    rows = tuple(
        loss_row(probe, name, "depth", probe.measure(Interventions(
            depth_L=depth_L)), path="hopfield", layer=layer,
            changed=(depth_L > 0)[:, None] & memory_P)
        for name, (layer, depth_L) in sweeps.items())
    trained = ", ".join(f"{probe.specs[i].depth} in layer {i}" for i in layers)
    return loss_table(probe, "depth_sweep", "What each retrieval step is worth", rows, (
        f"k_<k>: retrieval stops after k steps, or goes on to k; trained with {trained}",))


def _depth_row(found: dict[str, np.ndarray], layer: int) -> dict[str, Any]:
    gates, _ = views.window_mean(found[f"{layer}.depth_gates"], found["weight"])
    return {"layer": f"layer {layer}", "gates": [float(gate) for gate in gates],
            "mean": float((gates * np.arange(1, len(gates) + 1)).sum()),
            **{f"depth_{j}": float(gate) for j, gate in enumerate(gates, 1)}}


def _head_rows(found: dict[str, np.ndarray], layer: int) -> list[dict[str, Any]]:
    """One per head of a layer."""
    mean = {name: views.window_mean(found[f"{layer}.{name}"], found[f"{layer}.counted"])
            for name in ("entropy", "effective", "patterns", "regime")}
    beta = found[f"{layer}.beta"][0]
    return [{"head": f"layer {layer} head {h}", "layer": layer, "beta": float(beta[h]),
             "entropy": float(mean["entropy"][0][h]),
             "entropy_stderr": float(mean["entropy"][1][h]),
             "effective": float(mean["effective"][0][h]),
             "patterns": float(mean["patterns"][0][h]),
             **{regime: float(mean["regime"][0][h, r]) for r, regime in enumerate(REGIMES)}}
            for h in range(len(beta))]


def _regimes(probe: Probe, heads: list[dict[str, Any]]) -> Plot:
    shown = heads[:_MOST_BARS]
    more = f" The first {_MOST_BARS} of {len(heads)} heads." if len(heads) > _MOST_BARS else ""
    shares = np.asarray([[row[regime] for regime in REGIMES] for row in shown])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        stacked_bars(axes, shares, [row["head"] for row in shown],
                     shades(PATH_COLORS["hopfield"], len(REGIMES))[::-1], REGIMES)
        axes.set_xlabel("share of the tokens")
        figure.legend(loc="outside upper center", ncols=len(REGIMES))

    return Plot(
        "regimes", "Regimes of the retrievals",
        "What the last step of each head found: one pattern (single), some (metastable) or most "
        f"of those at hand (global). {probe.protocol.tokens:,} tokens.{more}",
        themed_svg(draw, height=1.2 + 0.2 * len(shown)))


def _sweep(probe: Probe, layers: list[int], table: ResultTable) -> Plot:
    """Damage against k; `table` is from `depth_sweep`."""
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lines = [("all layers", None, INK), *(
            (f"layer {i} (K = {probe.specs[i].depth})", i, color)
            for i, color in zip(layers, np.resize(SERIES, len(layers)), strict=True))]
        for name, layer, color in lines:
            own = [row for row in table.rows if row["layer"] == layer]
            axes.errorbar(range(1, len(own) + 1), [row["delta"] for row in own],
                          [row["delta_stderr"] or 0.0 for row in own], color=color, marker="o",
                          ms=4, capsize=2, label=name, ls="--" if layer is None else "-")
        axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
        axes.set_xticks(range(1, 1 + max(spec.depth for spec in probe.specs) + _BEYOND))
        axes.set_xlabel("steps of the retrieval, k")
        axes.set_ylabel("damage (nats/token)")
        axes.legend()

    return Plot("sweep", "What each retrieval step is worth",
                "How much the loss rises when retrieval stops after k steps, or goes on, in all "
                "layers or in one; 0 at the K that a layer was trained with. Bars: one standard "
                f"error, paired over windows; {probe.protocol.tokens:,} tokens.", themed_svg(draw))


def _depths(probe: Probe, depths: list[dict[str, Any]], deepest: int) -> Plot:
    shares = np.asarray([row["gates"] + [0.0] * (deepest - len(row["gates"])) for row in depths])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        stacked_bars(axes, shares, [row["layer"] for row in depths],
                     shades(PATH_COLORS["hopfield"], deepest),
                     [f"after step {j}" for j in range(1, deepest + 1)])
        axes.set_xlabel("mean depth gate")
        figure.legend(loc="outside upper center", ncols=min(deepest, 4))

    return Plot("depths", "How deep the tokens retrieve",
                "Mean gate of the state after each step; layers differ in how many steps they "
                f"were trained with. {probe.protocol.tokens:,} tokens.",
                themed_svg(draw, height=1.3 + 0.35 * len(depths)))
