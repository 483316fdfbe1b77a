"""SSM: how long each channel of the state-space path remembers, from the decays it chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.probing import views
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "How long the channels of the state-space path remember"

FAMILIES = ("hybrid",)
"""What it looks into."""

_COLUMNS = (
    Column("layer", "layer"), Column("channels", "channels"), Column("decay", "decay (median)"),
    Column("low", "10 %", "tokens", 1), Column("median", "median", "tokens", 1),
    Column("high", "90 %", "tokens", 1), Column("beyond", "beyond the context", "share", 3),
    Column("selectivity", "selectivity", "sd / mean", 2))


_NOTES = {
    "gru": ("a GRU's decay is its update gate",),
    "s6": ("each of S6's N decays a channel counts as a channel",),
    "ssd": ("SSD has one decay a head: heads are counted, not channels",)}


def run(probe: Probe) -> SuiteResult:
    """Measures the decays of every channel."""
    layers = views.layers_with("ssm", probe.specs)
    if not layers:
        raise SkipSuite("the model has no state-space path")

    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        _, out, _ = model.apply({"params": params}, batch, method="forward")
        positions_BT = views.positions(batch)
        return {f"{i}.{name}": value for i in layers for name, value in views.decay_view(
            out[f"layers.{i}.ssm.decay"], positions_BT, batch.loss_weight_BT).items()}

    found = views.over_windows(probe, view)
    rates = {i: views.window_mean(found[f"{i}.rate"], found[f"{i}.counted"])[0] for i in layers}
    squares = {i: views.window_mean(found[f"{i}.square"], found[f"{i}.counted"])[0]
               for i in layers}
    lengths = {i: views.memory_length(rate) for i, rate in rates.items()}
    context = probe.protocol.context
    rows = [_row(i, lengths[i], rates[i], squares[i], context) for i in layers]
    notes = (
        "memory of a channel: tokens after which 1/e of its state is left, 1 / mean(-log decay) "
        "over the tokens; quantiles are over channels",
        "selectivity: how much -log decay varies from token to token (0 = the same for every "
        "token), its standard deviation over its mean, median channel",
        *_NOTES.get(probe.config.model.ssm.kind, ()))
    table = ResultTable("memory", "Memory of the state-space channels", _COLUMNS, tuple(rows),
                        (probe.protocol,), notes)
    n = sum(len(length) for length in lengths.values())
    plot = Plot(
        "memory", "Memory of the state-space channels",
        f"Share of a layer's channels that remember at most so many tokens (1/e of the state is "
        f"left after that; logarithmic). {n:,} channels; decays are means over "
        f"{probe.protocol.tokens:,} tokens. Dashed: the context of {context} tokens.",
        themed_svg(lambda figure: _draw(figure, lengths, context)))
    return SuiteResult("ssm", TITLE, (table,), (plot,))


def _row(layer: int, length: np.ndarray, rate: np.ndarray, square: np.ndarray,
         context: int) -> dict[str, Any]:
    low, median, high = np.quantile(length, (0.1, 0.5, 0.9), method="closest_observation")
    varies = np.sqrt(np.maximum(square - rate**2, 0)) / np.maximum(rate, 1e-30)
    return {"layer": f"layer {layer}", "channels": len(length),
            "decay": float(np.exp(-np.median(rate))), "low": float(low), "median": float(median),
            "high": float(high), "beyond": float((length > context).mean()),
            "selectivity": float(np.median(varies))}


def _draw(figure: Figure, lengths: dict[int, np.ndarray], context: int) -> None:
    axes = figure.subplots()
    longest = max(10.0 * context, 1.0)
    for color, (layer, length) in zip(np.resize(SERIES, len(lengths)), lengths.items(),
                                      strict=True):
        ordered = np.sort(np.minimum(length, longest))
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step([ordered[0], *ordered], [0, *share], where="post", color=color,
                  label=f"layer {layer}")
    axes.axvline(context, color=INK, ls="--", lw=1, alpha=0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("memory (tokens)")
    axes.set_ylabel("share of channels")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(loc="upper left")
