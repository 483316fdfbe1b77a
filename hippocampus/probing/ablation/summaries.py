"""What the runs of an ablation come to, cell by cell: the numbers of its tables and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hippocampus.config import Config
from hippocampus.probing.ablation import progress
from hippocampus.probing.ablation.grid import Cell, Grid, value_text
from hippocampus.probing.ablation.knockout import Knockout
from hippocampus.probing.ablation.progress import Reached
from hippocampus.probing.ablation.runs import BITS, NATS, CellRun, unit_of
from hippocampus.probing.ablation.scaling import LEAST_SIZES, PowerLaw, fit_power_law
from hippocampus.probing.ablation.statistics import (
    PairedTest,
    Summary,
    holm,
    paired_test,
    summarize,
)

SERIES = {NATS: "eval/loss", BITS: "eval/bits_per_byte"}
"""Unit -> the series of metrics.jsonl that is in it."""


@dataclass(frozen=True)
class CellResult:
    """A cell with its finished runs.

    Attributes:
      cell: what was trained.
      runs: one per seed, as far as they are finished.
      unit: of every loss here.
      loss, raw: of the averaged and of the raw weights; None where nothing is finished.
      bits_per_byte: of the averaged weights; None where bytes mean nothing.
      accuracy: of the averaged weights; None where it was not measured.
      test: loss against the baseline's; None for the baseline and without runs.
      p_holm: its p-value for as many comparisons as there are.
      knockout, knockout_raw: the whole model without the paths that this cell lacks, gates of the
        others renormalised or as they were; None where there is no such thing.
      reached: when each seed reached the target, by seed; seeds that never did are missing.
    """

    cell: Cell
    runs: tuple[CellRun, ...]
    unit: str
    loss: Summary | None
    raw: Summary | None
    bits_per_byte: Summary | None
    accuracy: Summary | None
    test: PairedTest | None
    p_holm: float | None
    knockout: Summary | None
    knockout_raw: Summary | None
    reached: Mapping[int, Reached]

    @property
    def worse_than_unigram(self) -> bool | None:
        """Whether counting tokens beats a seed of it; None where nobody counted."""
        known = [run.worse_than_unigram for run in self.runs
                 if run.worse_than_unigram is not None]
        return any(known) if known else None

    def reaching(self, of: Callable[[Reached], float | None]) -> Summary | None:
        """Of steps, tokens or seconds to the target; None unless every seed reached it."""
        values = [of(found) for found in self.reached.values()]
        known = [value for value in values if value is not None]
        return summarize(known) if known and len(known) == len(self.runs) else None


@dataclass(frozen=True)
class Findings:
    """All numbers of an ablation.

    Attributes:
      grid: of it.
      results: cell by cell.
      unit: of the losses.
      target: the loss that speed is measured to; None where there is none.
      asked: whether a person chose the target.
    """

    grid: Grid
    results: tuple[CellResult, ...]
    unit: str
    target: float | None
    asked: bool

    @property
    def runs(self) -> tuple[CellRun, ...]:
        """All finished ones."""
        return tuple(run for result in self.results for run in result.runs)

    @property
    def baseline(self) -> CellResult:
        """What the others are compared with."""
        return next(r for r in self.results if r.cell.name == self.grid.baseline)

    def __getitem__(self, name: str) -> CellResult:
        return next(result for result in self.results if result.cell.name == name)


def find(grid: Grid, runs: Sequence[CellRun], knockouts: Sequence[Knockout] = (),
         target: float | None = None) -> Findings:
    """Computes everything.

    Args:
      grid: of the ablation.
      runs: finished ones.
      knockouts: of whole models, one per seed.
      target: a loss in the unit of `unit_of(runs)`; default: the lowest one that all runs reach.
    """
    unit = unit_of(runs)
    asked, series = target is not None, SERIES[unit]
    if target is None:
        target = progress.common_target([run.rows for run in runs], series)
    by_cell = {cell.name: tuple(run for run in runs if run.cell == cell.name)
               for cell in grid.cells}
    theirs = {run.seed: run.losses[unit][0] for run in by_cell[grid.baseline]}
    results = [_result(cell, by_cell[cell.name], unit, theirs if cell.name != grid.baseline else {},
                       knockouts, target) for cell in grid.cells]
    adjusted = holm([result.test.p if result.test else None for result in results])
    return Findings(grid, tuple(dataclasses.replace(result, p_holm=p)
                                for result, p in zip(results, adjusted, strict=True)),
                    unit, target, asked)


def _result(cell: Cell, runs: tuple[CellRun, ...], unit: str, baseline: Mapping[int, float],
            knockouts: Sequence[Knockout], target: float | None) -> CellResult:
    ours = {run.seed: run.losses[unit] for run in runs}
    reached = {run.seed: progress.reached(run.rows, target, run.tokens_per_step, SERIES[unit])
               for run in runs if target is not None}
    cut = [] if cell.match or not cell.paths else [
        found.losses[cell.paths] for found in knockouts
        if found.whole == (cell.whole or cell.name) and cell.paths in found.losses]
    return CellResult(
        cell, runs, unit, summarize([averaged for averaged, _ in ours.values()]),
        summarize([raw for _, raw in ours.values()]),
        summarize([run.losses[BITS][0] for run in runs if BITS in run.losses]),
        summarize([run.accuracy for run in runs if run.accuracy is not None]),
        paired_test({seed: loss for seed, (loss, _) in ours.items()}, baseline), None,
        summarize([loss for loss, _ in cut]), summarize([raw for _, raw in cut]),
        {seed: found for seed, found in reached.items() if found is not None})


@dataclass(frozen=True)
class ScalingFit:
    """Cells that differ in size alone.

    Attributes:
      label: what they have in common; "" where that is everything else.
      results: from the smallest to the largest.
      law: the curve; None where a loss is not finite.
    """

    label: str
    results: tuple[CellResult, ...]
    law: PowerLaw | None


def scaling_fits(findings: Findings, parameters: Callable[[Config], int]) -> list[ScalingFit]:
    """A fit for every family of cells with at least three different sizes.

    Cells are of one family if they differ in nothing but the fields that change the number of
    parameters. A subset of paths is a family of its own.

    Args:
      findings: of the ablation.
      parameters: of a config's model.
    """
    sized = _size_fields(findings.grid, parameters)
    families: dict[tuple, list[CellResult]] = {}
    for result in findings.results:
        cell = result.cell
        same = {name: value for name, value in cell.changes.items() if name not in sized}
        families.setdefault((cell.paths, cell.match, tuple(same.items())), []).append(result)
    fits = []
    for (paths, _, same), members in families.items():
        known = [result for result in members if result.runs]
        sizes = {result.runs[0].parameters for result in known}
        if len(sizes) < LEAST_SIZES:
            continue
        known.sort(key=lambda result: result.runs[0].parameters)
        losses: dict[float, list[float]] = {}
        for result in known:
            losses.setdefault(result.runs[0].parameters, []).extend(
                run.losses[findings.unit][0] for run in result.runs)
        label = [known[0].cell.title.partition(", ")[0]] if paths else []
        label += [f"{name.split('.')[-1]}={value_text(value)}" for name, value in same]
        fits.append(ScalingFit(", ".join(label), tuple(known), fit_power_law(losses)))
    return fits


def _size_fields(grid: Grid, parameters: Callable[[Config], int]) -> set[str]:
    """Axes along which the number of parameters changes."""
    def others(cell: Cell, axis: str) -> tuple[Any, ...]:
        rest = tuple((name, value) for name, value in cell.changes.items() if name != axis)
        return (cell.paths, cell.match, rest)

    counts = {cell.name: parameters(cell.config) for cell in grid.cells}
    return {axis for axis in grid.axes for a in grid.cells for b in grid.cells
            if others(a, axis) == others(b, axis) and counts[a.name] != counts[b.name]}
