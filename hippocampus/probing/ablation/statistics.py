"""What a difference between trained models is worth: means over seeds, paired tests, Holm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Summary:
    """Of the same number over seeds.

    Attributes:
      n: seeds.
      mean: of them.
      sd: standard deviation of a seed (n - 1 in the denominator); None for one seed.
    """

    n: int
    mean: float
    sd: float | None


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean and standard deviation over seeds; None where there is no value.

    Both are not a number where one of the values is none, or infinite.
    """
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Summary(len(values), math.nan, math.nan if len(values) > 1 else None)
    return Summary(len(values), statistics.fmean(values),
                   statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class PairedTest:
    """A model against another one, seed by seed.

    Attributes:
      n: seeds that both have.
      difference: mean of (ours - theirs).
      low, high: bounds of its interval; None for one seed.
      p: of the two-sided paired t-test; None for one seed.
    """

    n: int
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedTest | None:
    """Student's t-test of the differences between runs of equal seed.

    Runs of one seed read the same batches in the same order, so that part of what a seed changes
    falls out of the difference.

    Args:
      ours, theirs: a number by seed; only seeds that both have are used.

    Returns:
      None where they have no seed together.

    Source: Student (1908), The probable error of a mean; scipy.stats.ttest_rel.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not all(map(math.isfinite, differences)):
        return PairedTest(len(seeds), math.nan)
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return PairedTest(len(seeds), mean)
    if len(set(differences)) == 1:  # no spread to divide by
        return PairedTest(len(seeds), mean, mean, mean, 0.0 if mean else 1.0)
    from scipy.stats import ttest_rel

    found = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    interval = found.confidence_interval(CONFIDENCE)
    return PairedTest(len(seeds), mean, float(interval.low), float(interval.high),
                      float(found.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values for as many comparisons as there are: the chance of any false one stays bounded.

    Args:
      p_values: of the single tests; None where there was no test.

    Returns:
      The adjusted ones, in the same order, never above 1.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted
