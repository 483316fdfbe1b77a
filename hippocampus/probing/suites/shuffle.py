"""Shuffle: each path's output is read from another token, before the mixer weighs it.

What is read has the statistics of the path, only the token is the wrong one: the damage says how
much the model needs *this* token's memory. A path whose output never varies is not damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hippocampus.config import PATHS
from hippocampus.data.batches import Batch
from hippocampus.models.interventions import Interventions
from hippocampus.probing import shuffles
from hippocampus.probing.damage_plots import damage_bars, damage_by_layer
from hippocampus.probing.probe import Probe
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.rows import SHORT, baseline_row, loss_row, loss_table

TITLE = "What the model loses when a path is read at another token"

FAMILIES = ("hybrid",)
"""What it looks into."""

_ENDINGS = {"past": "", "batch": "_batch", "plain": "_plain"}
_LEGEND = {"past": "within the past", "batch": "across the batch",
           "plain": "over the whole row (sees the future)"}

Row = Mapping[str, Any]


def run(probe: Probe) -> SuiteResult:
    """Shuffles of each path within the causal past, across the batch, and plain; per layer too."""
    kinds = [kind for kind in shuffles.KINDS if kind != "batch" or probe.windows.batch_size > 1]
    notes = [
        "shuffle_<path>: every token reads what the path said at an earlier token of its document, "
        "drawn anew for each; _batch: at the same place of another row; _plain: anywhere in the "
        "row, its own future included, for reference only"]
    if len(kinds) < len(shuffles.KINDS):
        notes.append("no shuffle across the batch: there is one window in it")
    order = [PATHS.index(path) for path in ("attention", "ssm", "hopfield") if path in probe.paths]
    rows = {kind: [_shuffled(probe, kind, p, None) for p in order] for kind in kinds}
    layers = list(_in_layers(probe))
    tables = (
        loss_table(probe, "shuffle", "Shuffled paths, in all layers",
                   [baseline_row(probe), *(row for kind in kinds for row in rows[kind])], notes),
        loss_table(probe, "shuffle_layers", "Shuffled within the past, in one layer", layers))
    errors = "Bars: one standard error, paired over windows."
    plots = (
        Plot("shuffle", "Damage of shuffles", "Rise of the loss when a path is read at another "
             f"token, in all layers. {errors}",
             damage_bars({_LEGEND[kind]: rows[kind] for kind in kinds},
                         [f"shuffle_{SHORT[PATHS[p]]}" for p in order])),
        Plot("shuffle_layers", "Damage of shuffles in one layer", "Rise of the loss when a path is "
             f"read at an earlier token, in one layer. {errors}", damage_by_layer({"": layers})))
    return SuiteResult("shuffle", TITLE, tables, plots)


def _in_layers(probe: Probe) -> Iterator[Row]:
    for i, spec in enumerate(probe.specs):
        for path in spec.paths:
            yield _shuffled(probe, "past", PATHS.index(path), i)


def _shuffled(probe: Probe, kind: str, p: int, layer: int | None) -> Row:
    """One path, in all layers or in one. All rows of a kind draw the same tokens."""
    changed = np.zeros_like(probe.present)
    changed[slice(None) if layer is None else layer, p] = True
    changed &= probe.present
    draw, stream = shuffles.KINDS[kind], list(shuffles.KINDS).index(kind)

    def change(i: int, batch: Batch) -> Interventions:
        source_BT = draw(np.random.default_rng((probe.seed, stream, i)), batch)
        return Interventions(shuffle_LP=changed, source_PBT=np.stack([source_BT] * len(PATHS)))

    name = f"shuffle_{SHORT[PATHS[p]]}{_ENDINGS[kind]}"
    where = "" if layer is None else "_layer"
    return loss_row(probe, name if layer is None else f"{name}_layer_{layer}",
                    f"shuffle{_ENDINGS[kind]}{where}", probe.measure(change), path=PATHS[p],
                    layer=layer, changed=changed)
