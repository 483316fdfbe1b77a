"""Paths: the model without some of its paths, in all layers or in one.

What is taken away here was there in training, so that a row says how much the trained model leans
on a path, not how good a model without it would be: `python -m hippocampus.ablate` trains those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from hippocampus.config import PATHS
from hippocampus.models.interventions import Interventions
from hippocampus.probing.damage_plots import damage_bars, damage_by_layer
from hippocampus.probing.probe import Probe
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.rows import SHORT, baseline_row, line_rows, loss_row, loss_table

TITLE = "What the model loses without its paths"

FAMILIES = ("hybrid",)
"""What it looks into."""

_RAW = "_raw"
_ERRORS = "Bars: one standard error, paired over windows."

Row = Mapping[str, Any]


def run(probe: Probe) -> SuiteResult:
    """Knock-outs of paths, per layer too, with the gates that stay renormalised and raw."""
    knocked, layers = list(_subsets(probe)), list(_in_layers(probe))
    notes = [
        "knock-out: the paths that are named stay, their gates sum to 1 again; rows ending in "
        "_raw leave the gates as they were. It overstates what a path is worth: compare with "
        "models that were trained without (python -m hippocampus.ablate)"]
    missing = [SHORT[path] for path in PATHS if path not in probe.paths]
    if missing:
        notes.append(f"the model has no {' and no '.join(missing)} path: rows with it are left out")
    tables = [loss_table(probe, "knockout", "Knock-out of paths in all layers",
                         [*line_rows(probe), baseline_row(probe), *knocked], notes)]
    if layers:
        tables.append(loss_table(
            probe, "knockout_layers", "Knock-out of one path in one layer", layers,
            ["no_<path>_layer_<i>: that path is removed in that layer alone"]))
    return SuiteResult("paths", TITLE, tuple(tables), tuple(_plots(knocked, layers)))


def _subsets(probe: Probe) -> Iterator[Row]:
    """Every proper part of the paths, as the rows of the table of old are named."""
    for size in range(1, len(probe.paths)):
        for kept in combinations(probe.paths, size):
            short = [SHORT[path] for path in kept]
            name = f"only_{short[0]}" if size == 1 else "+".join(short)
            mask_LP = np.broadcast_to([path in kept for path in PATHS], probe.present.shape)
            yield from _masked(probe, name, "knockout", mask_LP, kept[0] if size == 1 else "")


def _in_layers(probe: Probe) -> Iterator[Row]:
    for i, spec in enumerate(probe.specs):
        for path in spec.paths if len(spec.paths) > 1 else ():
            mask_LP = np.ones(probe.present.shape, bool)
            mask_LP[i, PATHS.index(path)] = False
            yield from _masked(probe, f"no_{SHORT[path]}_layer_{i}", "knockout_layer", mask_LP,
                               path, i)


def _masked(probe: Probe, name: str, category: str, mask_LP: np.ndarray, path: str,
            layer: int | None = None) -> Iterator[Row]:
    for renormalize, ending in ((True, ""), (False, _RAW)):
        measured = probe.measure(Interventions(path_mask_LP=mask_LP, renormalize=renormalize))
        yield loss_row(probe, name + ending, category + ending, measured, path=path, layer=layer,
                       changed=probe.present & ~mask_LP)


def _plots(knocked: list[Row], layers: list[Row]) -> Iterator[Plot]:
    if knocked:
        groups = _by_gates(knocked)
        yield Plot("knockout", "Damage of knock-outs", "Rise of the loss when only the paths that "
                   f"are named are left. {_ERRORS}", damage_bars(
                       groups, [row["name"] for row in next(iter(groups.values()))]))
    if layers:
        yield Plot("knockout_layers", "Damage of knock-outs in one layer", "Rise of the loss when "
                   f"one path is removed in one layer. {_ERRORS}",
                   damage_by_layer(_by_gates(layers)))


def _by_gates(rows: list[Row]) -> dict[str, list[Row]]:
    return {"gates renormalised": [row for row in rows if not row["name"].endswith(_RAW)],
            "gates as they were": [row for row in rows if row["name"].endswith(_RAW)]}
