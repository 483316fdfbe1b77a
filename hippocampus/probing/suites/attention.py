"""Attention: how widely and how far each head looks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.probing import views
from hippocampus.probing.drawing import fading, heat_map
from hippocampus.probing.plots import PATH_COLORS, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "Where the heads of attention look"

FAMILIES = ("hybrid",)
"""What it looks into."""

_COLUMNS = (
    Column("head", "layer and head"), Column("entropy", "entropy", "nats", 3),
    Column("entropy_stderr", "± s.e.", "", 3), Column("tokens", "exp(entropy)", "tokens", 1),
    Column("distance", "distance", "tokens", 1), Column("first", "on the first token", "share", 3),
    Column("itself", "on itself", "share", 3))
_PICTURES = (("entropy", "entropy (nats)", ".1f"), ("distance", "distance (tokens)", ".0f"),
             ("first", "share on the first token", ".2f"))
_MOST_NUMBERS = 64
"""Heads in a heat map beyond which the numbers in its cells are too small to read."""


def run(probe: Probe) -> SuiteResult:
    """Measures entropy, distance and sinks of every head."""
    layers = views.layers_with("attention", probe.specs)
    if not layers:
        raise SkipSuite("the model has no attention path")
    heads, window = probe.config.model.n_heads, probe.config.model.attention.window

    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        def of_rows(part: Any) -> dict[str, Any]:
            _, out, _ = model.apply({"params": params}, part, method="forward")
            found: dict[str, Any] = {}
            for i in layers:
                name = f"layers.{i}.attention."
                p_BHTT = views.attention_weights(out[name + "query"], out[name + "key"],
                                                 part.document_ids_BT, window)
                found |= {f"{i}.{key}": value for key, value in views.attention_view(
                    p_BHTT, views.positions(part), part.loss_weight_BT).items()}
            return found

        later_BT = views.counted_later(views.positions(batch), batch.loss_weight_BT)
        return {**views.by_rows(of_rows, batch, heads * batch.tokens_BT.shape[1]),
                "counted": later_BT.sum(1)}

    found = views.over_windows(probe, view)
    rows = [row for i in layers for row in _rows(i, found)]
    n = int(found["counted"].sum())
    table = ResultTable(
        "heads", "Heads of attention", _COLUMNS, views.known(rows), (probe.protocol,),
        (f"means over {n:,} tokens that have another one before them in their document",
         "distance: of the tokens read, weighted by attention; even attention over n tokens has "
         "the entropy log n and the distance (n - 1) / 2",
         *((f"a token sees the last {window} tokens (model.attention.window)",) if window else ())))
    plot = Plot(
        "heads", "Where the heads look",
        f"Every cell is a head: entropy of its weights, mean distance of what it reads, and its "
        f"weight on the document's first token. Means over {n:,} tokens. The colour runs from the "
        "lowest to the highest head of a panel.",
        themed_svg(lambda figure: _draw(figure, layers, heads, rows),
                   width=max(6.4, 0.45 * 3 * heads), height=1.2 + 0.38 * len(layers)))
    return SuiteResult("attention", TITLE, (table,), (plot,))


def _rows(layer: int, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One per head of a layer."""
    mean = {name: views.window_mean(found[f"{layer}.{name}"], found["counted"])
            for name in ("entropy", "distance", "first", "self")}
    return [{"head": f"layer {layer} head {h}", "layer": layer, "number": h,
             "entropy": float(entropy), "entropy_stderr": float(mean["entropy"][1][h]),
             "tokens": math.exp(entropy), "distance": float(mean["distance"][0][h]),
             "first": float(mean["first"][0][h]), "itself": float(mean["self"][0][h])}
            for h, entropy in enumerate(mean["entropy"][0])]


def _draw(figure: Figure, layers: list[int], heads: int, rows: list[dict[str, Any]]) -> None:
    few = len(rows) <= _MOST_NUMBERS
    for axes, (key, title, numbers) in zip(figure.subplots(1, len(_PICTURES), sharey=True),
                                           _PICTURES, strict=True):
        values = np.asarray([row[key] for row in rows]).reshape(len(layers), heads)
        room = max(0.2 * float(np.ptp(values)), 1e-9)  # so that the lowest is not the page's colour
        heat_map(axes, values, fading(PATH_COLORS["attention"]), low=values.min() - room,
                 high=values.max() + room, rows=[f"layer {i}" for i in layers],
                 columns=[str(h) for h in range(heads)], numbers=numbers if few else "")
        axes.set_title(title)
        axes.set_xlabel("head")
