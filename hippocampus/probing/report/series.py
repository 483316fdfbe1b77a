"""Series of metrics.jsonl as curves of a size that a page can carry: `read_series`, `thin`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_POINTS = 400
"""Points of a curve; of more, means over equal parts are shown."""


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity over the steps of a run.

    Attributes:
      name: in metrics.jsonl.
      steps: at which it was logged, rising.
      values: finite ones.
      broken: rows that had it without a finite value.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    broken: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def scaled(self, factor: float) -> Series:
        """In another unit."""
        return Series(self.name, self.steps, self.values * factor, self.broken)


@dataclass(frozen=True, eq=False)
class Curve:
    """A series as it is drawn.

    Attributes:
      steps: of the points; the mean step of a part.
      values: mean of a part.
      low, high: least and largest value of a part.
      per_point: logged values in a part; 1 = every one is shown.
    """

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_point: int


def names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every series of the rows, in the order of their first appearance."""
    return [name for name in dict.fromkeys(str(name) for row in rows for name in row)
            if name != "step"]


def read_series(rows: Iterable[Mapping[str, Any]], name: str) -> Series:
    """The finite values of a series; what is no number counts as broken."""
    found = [(row["step"], row[name]) for row in rows if name in row and has_step(row)]
    good = [(step, float(value)) for step, value in found if is_finite(value)]
    good.sort(key=lambda point: point[0])
    return Series(name, np.array([step for step, _ in good], float),
                  np.array([value for _, value in good], float), len(found) - len(good))


def thin(series: Series, most: int = MOST_POINTS) -> Curve:
    """Means over equal parts of the series, with their range."""
    n = len(series)
    size = max(1, math.ceil(n / most))
    starts = np.arange(0, n, size)
    if size == 1:
        return Curve(series.steps, series.values, series.values, series.values, 1)
    counts = np.diff(np.append(starts, n))
    return Curve(np.add.reduceat(series.steps, starts) / counts,
                 np.add.reduceat(series.values, starts) / counts,
                 np.minimum.reduceat(series.values, starts),
                 np.maximum.reduceat(series.values, starts), size)


def after_warm_up(all_series: Sequence[Series], share: float = 0.1) -> np.ndarray:
    """The values that an axis has to show: everything but the fall of the first steps."""
    last = max((series.steps[-1] for series in all_series if len(series)), default=0.0)
    kept = [series.values[series.steps >= share * last] for series in all_series if len(series)]
    return np.concatenate(kept) if kept else np.zeros(0)


def has_step(row: Mapping[str, Any]) -> bool:
    """Whether a row says of which step it is."""
    return isinstance(row.get("step"), int) and 0 <= row["step"] < 2**53


def is_finite(value: Any) -> bool:
    """Whether a value of a file is a number that can be drawn."""
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and abs(value) < 1e300)  # false for NaN, and for integers that no float can be
