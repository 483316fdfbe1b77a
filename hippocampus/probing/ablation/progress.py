"""How soon a run reaches a loss: in steps, tokens and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOSS = "eval/loss"
"""The series of metrics.jsonl that is compared, where all runs have one tokenizer: of the averaged
weights, evaluated while training."""

_SPENT_ON = ("time/training", "time/data")


@dataclass(frozen=True)
class Reached:
    """When a run had reached a loss.

    Attributes:
      step: the first evaluated step at or below it.
      tokens: of training text read by then.
      seconds: of training by then, waiting for data included, and without starting, compiling,
        evaluating and saving; None where the run kept no account.
    """

    step: int
    tokens: int
    seconds: float | None


def evaluations(rows: Iterable[Mapping[str, Any]], series: str = LOSS) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation of the rows of metrics.jsonl, as far as it is finite."""
    return [(row["step"], float(row[series])) for row in rows
            if row.get(series) is not None and math.isfinite(row[series])]


def common_target(runs: Iterable[Sequence[Mapping[str, Any]]],
                  series: str = LOSS) -> float | None:
    """The lowest loss that every run reaches: the best one of the worst run.

    Args:
      runs: rows of metrics.jsonl of each.
      series: what is compared.

    Returns:
      None where a run has no evaluation.
    """
    best = [min((loss for _, loss in evaluations(rows, series)), default=None) for rows in runs]
    known = [loss for loss in best if loss is not None]
    return max(known) if known and len(known) == len(best) else None


def reached(rows: Sequence[Mapping[str, Any]], target: float, tokens_per_step: int,
            series: str = LOSS) -> Reached | None:
    """When a run first reached a loss; None if never.

    Args:
      rows: of metrics.jsonl.
      target: in the unit of the series.
      tokens_per_step: of the run.
      series: what is compared.
    """
    step = next((step for step, loss in evaluations(rows, series) if loss <= target), None)
    if step is None:
        return None
    timed = [row for row in rows if row.get(_SPENT_ON[0]) is not None]
    spent = [math.fsum(row.get(name) or 0.0 for name in _SPENT_ON) for row in timed]
    seconds = float(np.interp(step, [row["step"] for row in timed], spent)) if timed else None
    return Reached(step, step * tokens_per_step, seconds)
