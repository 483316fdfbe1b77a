"""Gates: how the mixer weighs the paths per token, and what its weighing is worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.config import PATHS
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.models.interventions import Interventions
from hippocampus.probing import views
from hippocampus.probing.drawing import PASSAGE, fading, heat_map, pieces, token_ticks
from hippocampus.probing.plots import INK, PATH_COLORS, themed_svg
from hippocampus.probing.results import Plot, SuiteResult, TokenText
from hippocampus.probing.rows import SHORT, loss_row, loss_table
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.models.hybrid_block import BlockSpec
    from hippocampus.probing.probe import Probe

TITLE = "How the mixer weighs the paths, token by token"

FAMILIES = ("hybrid",)
"""What it looks into."""

_GATES = (
    Column("place", "layer and path"), Column("gate", "gate", "", 3),
    Column("spread", "sd over tokens", "", 3), Column("first_pass", "gate in pass 1", "", 3),
    Column("wins", "largest gate", "share of tokens", 3),
    Column("contribution", "contribution", "norm", 3), Column("share", "contribution", "share", 3))
_MIXERS = (
    Column("layer", "layer"), Column("entropy", "entropy", "nats", 3),
    Column("even", "of even gates", "share", 3),
    Column("saturated", "one gate above 0.9", "share of tokens", 3))
_CELLS = 2000
"""Most cells of a heat map: each is a shape in the SVG."""


def run(probe: Probe) -> SuiteResult:
    """Reads the gates of every token, and measures the loss with gates that read nothing."""
    specs = probe.specs
    if all(len(spec.paths) == 1 for spec in specs):
        raise SkipSuite("every layer has one path: there is nothing to weigh")
    passes = probe.config.model.passes
    found = views.over_windows(probe, _view(len(specs), passes))
    rows = [row for i, spec in enumerate(specs) for row in _gate_rows(found, i, spec, passes)]
    tables = (
        ResultTable("gates", "Gates and contributions of the paths", _GATES, tuple(rows),
                    (probe.protocol,),
                    ("contribution: |g scale rms(y)|, the length of what a path adds to the "
                     "residual stream; a gate alone does not say how much a path matters",
                     "of the last pass, as trained")),
        ResultTable("mixers", "Spread of the gates", _MIXERS,
                    tuple(_mixer_row(found, i, spec) for i, spec in enumerate(specs)
                          if len(spec.paths) > 1), (probe.protocol,)))
    texts = (_winners(probe, found),)
    return SuiteResult("gates", TITLE, (*tables, fixed_gates(probe, rows)),
                       (_heat_maps(probe, found),), texts)


def fixed_gates(probe: Probe, gates: list[dict[str, Any]]) -> ResultTable:
    """The loss with even gates, and with gates that are held at their means.

    Args:
      probe: what is measured.
      gates: the table of gates: the mean of every layer and path.
    """
    learned = np.full((probe.n_layers, len(PATHS)), -1, np.float32)
    means, even = learned.copy(), learned.copy()
    for row in gates:
        place = row["layer"], PATHS.index(row["path"])
        means[place], even[place] = row["gate"], 1 / len(probe.specs[row["layer"]].paths)
    overrides: dict[str, tuple[str, int | None, np.ndarray]] = {
        "gates_uniform": ("", None, even), "gates_mean": ("", None, means)}
    for path in dict.fromkeys(row["path"] for row in gates):
        only = np.where(np.arange(len(PATHS)) == PATHS.index(path), means, learned)
        overrides[f"gates_mean_{SHORT[path]}"] = (path, None, only)
    for i in range(probe.n_layers):
        only = np.where(np.arange(probe.n_layers)[:, None] == i, means, learned)
        overrides[f"gates_mean_layer_{i}"] = ("", i, only)
    rows = tuple(
        loss_row(probe, name, "gates", probe.measure(Interventions(
            gate_override_LP=array)), changed=array >= 0, path=path, layer=layer)
        for name, (path, layer, array) in overrides.items())
    return loss_table(probe, "fixed_gates", "What the weighing per token is worth", rows, (
        "uniform: 1/P for every token; mean: the mean gate of each layer and path for every token, "
        "in every pass; of one path or in one layer, the other gates stay as they are",
        "damage: how much the loss rises when these gates no longer read the token"))


def _view(n_layers: int, passes: int) -> Any:
    """The function that runs on the device."""
    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        _, out, _ = model.apply({"params": params}, batch, method="forward")
        found = {"weight": batch.loss_weight_BT, "token": batch.tokens_BT,
                 "real": views.real_tokens(batch)}
        for i in range(n_layers):
            for name in ("gates", "contribution", "entropy"):
                found[f"{i}.{name}"] = out[f"layers.{i}.mixer.{name}"]
            if passes > 1:
                found[f"{i}.first"] = views.token_sum(
                    out[f"segments.0.layers.{i}.mixer.gates"], batch.loss_weight_BT)
        return found

    return view


def _mean(value_WT: np.ndarray, weight_WT: np.ndarray) -> Any:
    """Over all tokens, in float64."""
    return np.einsum("wt,wt...->...", weight_WT, value_WT.astype(np.float64)) / weight_WT.sum()


def _gate_rows(found: dict[str, np.ndarray], layer: int, spec: BlockSpec,
               passes: int) -> list[dict[str, Any]]:
    """One per path of a layer."""
    weight, gates = found["weight"].astype(np.float64), found[f"{layer}.gates"]
    mean = _mean(gates, weight)
    spread = np.sqrt(np.maximum(_mean((gates - mean) ** 2, weight), 0))
    wins = _mean(gates.argmax(-1)[..., None] == np.arange(len(spec.paths)), weight)
    norm = _mean(found[f"{layer}.contribution"], weight)
    first = found[f"{layer}.first"].sum(0) / weight.sum() if passes > 1 else None
    return [{"place": f"layer {layer} {path}", "layer": layer, "path": path,
             "gate": float(mean[p]), "spread": float(spread[p]),
             "first_pass": None if first is None else float(first[p]), "wins": float(wins[p]),
             "contribution": float(norm[p]), "share": float(norm[p] / max(norm.sum(), 1e-30))}
            for p, path in enumerate(spec.paths)]


def _mixer_row(found: dict[str, np.ndarray], layer: int, spec: BlockSpec) -> dict[str, Any]:
    weight = found["weight"].astype(np.float64)
    entropy = float(_mean(found[f"{layer}.entropy"], weight))
    return {"layer": f"layer {layer}", "entropy": entropy,
            "even": entropy / math.log(len(spec.paths)),
            "saturated": float(_mean(found[f"{layer}.gates"].max(-1) > 0.9, weight))}


def _shares(found: dict[str, np.ndarray], specs: tuple[BlockSpec, ...],
            tokens: np.ndarray) -> np.ndarray:
    """Share of every path in what the paths of all layers add, for tokens of the first window."""
    total = np.zeros((len(tokens), len(PATHS)))
    for i, spec in enumerate(specs):
        for p, path in enumerate(spec.paths):
            total[:, PATHS.index(path)] += found[f"{i}.contribution"][0, tokens, p]
    return total / np.maximum(total.sum(1, keepdims=True), 1e-30)


def _winners(probe: Probe, found: dict[str, np.ndarray]) -> TokenText:
    tokens = np.flatnonzero(found["real"][0])[:PASSAGE]
    present = [path for path in PATHS if any(path in spec.paths for spec in probe.specs)]
    shares = _shares(found, probe.specs, tokens)[:, [PATHS.index(path) for path in present]]
    even = 1 / len(present)
    strength = (shares.max(1) - even) / max(1 - even, 1e-9)
    return TokenText(
        "winners", "The path that adds most",
        "The first window's tokens as they are read: the path with the largest contribution, "
        "summed over the layers; the darker, the larger its share (no colour: "
        f"{even:.0%}, full colour: all of it).",
        pieces(probe.lm.tokenizer, found["token"][0, tokens]),
        tuple(int(path) for path in shares.argmax(1)),
        tuple(round(float(s), 3) for s in np.clip(strength, 0, 1)), tuple(present))


def _heat_maps(probe: Probe, found: dict[str, np.ndarray]) -> Plot:
    """Gates of the first tokens, a panel per path."""
    specs = probe.specs
    n = min(64, max(8, _CELLS // (len(specs) * len(PATHS))))
    tokens = np.flatnonzero(found["real"][0])[:n]
    gates = {path: np.full((len(specs), len(tokens)), np.nan) for path in PATHS}
    for i, spec in enumerate(specs):
        for p, path in enumerate(spec.paths):
            gates[path][i] = found[f"{i}.gates"][0, tokens, p]
    shown = {path: values for path, values in gates.items() if np.isfinite(values).any()}
    labels = pieces(probe.lm.tokenizer, found["token"][0, tokens])
    height = 0.9 + len(shown) * (0.45 + 0.2 * len(specs))
    return Plot(
        "heat", "Gates of every layer and token",
        f"Gate of each path for the first {len(tokens)} tokens of the text, layer by layer: "
        "clear = 0, full colour = the largest gate in sight. A dashed row: a layer without the "
        "path.",
        themed_svg(lambda figure: _draw(figure, shown, labels), width=8.0, height=height))


def _draw(figure: Figure, shown: dict[str, np.ndarray], tokens: tuple[str, ...]) -> None:
    high = max(float(np.nanmax(values)) for values in shown.values())
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (path, values) in zip(grid, shown.items(), strict=True):
        mesh = heat_map(axes, values, fading(PATH_COLORS[path]), low=0, high=high,
                        rows=[f"layer {i}" for i in range(len(values))])
        for i in np.flatnonzero(np.isnan(values).all(1)):
            axes.axhline(i + 0.5, color=INK, ls="--", lw=0.6, alpha=0.5)
        axes.set_title(path, loc="left", pad=3)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.01, ticks=(0, high))
        bar.ax.set_yticklabels(["0", f"{high:.2f}"])
        bar.outline.set_visible(False)
    token_ticks(grid[-1], tokens)
