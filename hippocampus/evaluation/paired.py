"""Two systems on the same stories: what their difference is worth, see `compare_paired`.

The story is the unit: questions about one are alike, so that a test over questions would find
differences that are none. For tests over seeds see `hippocampus.probing.ablation.statistics`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

from hippocampus.errors import DataError

CONFIDENCE = 0.95
"""Of the interval; what is left to 1 is the level of the tests."""

POWER = 0.8
"""Chance with which `smallest_effect` would be found."""

EXACT_UP_TO = 22
"""Stories for which all signs are tried: 2^21 sums, for a story's own sign is free."""

RESAMPLES = 10_000
"""Of the bootstrap, and of the signs where there are too many to try them all."""


@dataclass(frozen=True)
class PairedComparison:
    """A system against another one, story by story.

    Attributes:
      n: stories that both have.
      difference: mean of (ours - theirs).
      low, high: bounds of its bootstrap interval.
      better, worse: stories in which ours is above, or below, theirs.
      p_sign: two-sided, of the exact sign test: are `better` and `worse` a fair coin's?
      p_flip: two-sided, of the mean under flipped signs of the differences.
      exact: whether all signs were tried for `p_flip`.
      smallest_effect: the mean difference that such stories show with a chance of `POWER`; None
        for one story, whose spread is not known.
    """

    n: int
    difference: float
    low: float
    high: float
    better: int
    worse: int
    p_sign: float
    p_flip: float
    exact: bool
    smallest_effect: float | None

    @property
    def note(self) -> str:
        """What a reader has to know of a difference that was not found."""
        level = 1 - CONFIDENCE
        if 2.0 ** (1 - self.n) > level:
            return (f"{self.n} stories: no outcome has p below {2.0 ** (1 - self.n):.3g}, so "
                    "nothing could have been found")
        return (f"{self.n} stories: a mean difference of {self.smallest_effect:.3g} is found with "
                f"a chance of {POWER:.0%} at p < {level:.2g}; smaller ones may be there unseen")


def compare_paired(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0
                   ) -> PairedComparison:
    """Compares two systems on the stories that both have.

    Args:
      ours, theirs: a number by story.
      seed: of the resampling; the sign test and up to `EXACT_UP_TO` stories need none.

    Raises:
      DataError: they have no story together, or a number is not finite.

    Source: sign test, Dixon & Mood 1946; flipped signs, Fisher 1935 (The design of experiments,
      section 21); percentile bootstrap, Efron & Tibshirani 1993, chapter 13; smallest effect
      (z_(1-level/2) + z_power) sd / sqrt(n), Cohen 1988.
    """
    d_n = np.array([ours[story] - theirs[story] for story in ours if story in theirs], np.float64)
    if not len(d_n):
        raise DataError("the two systems have no story together", "evaluate both on one split")
    if not np.isfinite(d_n).all():
        raise DataError("a story's score is not finite", "evaluate it again")
    from scipy.stats import binomtest

    n, better, worse = len(d_n), int((d_n > 0).sum()), int((d_n < 0).sum())
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_bootstrap_means(d_n, rng), [(1 - CONFIDENCE) / 2,
                                                         (1 + CONFIDENCE) / 2])
    p_sign = binomtest(better, better + worse).pvalue if better + worse else 1.0
    p_flip = _p_of_all_signs(d_n) if n <= EXACT_UP_TO else _p_of_some_signs(d_n, rng)
    return PairedComparison(
        n, float(d_n.mean()), float(low), float(high), better, worse, float(p_sign), p_flip,
        n <= EXACT_UP_TO, smallest_effect(statistics.stdev(d_n.tolist()), n) if n > 1 else None)


def smallest_effect(sd: float, n: int, level: float = 1 - CONFIDENCE) -> float:
    """The mean difference that is found with a chance of `POWER`.

    Args:
      sd: standard deviation of the differences.
      n: how many there are.
      level: below which p has to be, two-sided.
    """
    z = NormalDist().inv_cdf
    return (z(1 - level / 2) + z(POWER)) * sd / math.sqrt(n)


def effect_size(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """The mean difference in units of the differences' own standard deviation.

    Args:
      ours, theirs: a number by story, of which at least two are in both.

    Returns:
      d_z; None where all differences are equal, or there is only one.

    Source: Cohen 1988, Statistical power analysis, section 2.3.5.
    """
    differences = [ours[story] - theirs[story] for story in ours if story in theirs]
    sd = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return statistics.fmean(differences) / sd if sd else None


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of a mean over stories, as that of `compare_paired`.

    Args:
      values: one a story, at least one, all finite.
      seed: of the resampling.
    """
    means = _bootstrap_means(np.asarray(values, np.float64), np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _bootstrap_means(d_n: Float64[np.ndarray, " n"], rng: np.random.Generator) -> np.ndarray:
    """Means of stories drawn with replacement."""
    # How often each is drawn is all that counts, and is smaller than which are.
    draws = rng.multinomial(len(d_n), np.full(len(d_n), 1 / len(d_n)), RESAMPLES)
    return draws @ d_n / len(d_n)


def _p_of_all_signs(d_n: Float64[np.ndarray, " n"]) -> float:
    """Share of all choices of signs whose sum is as far from 0 as the one that was found."""
    sums = np.abs(d_n[:1])  # the other half of the choices has the same sums with other signs
    for d in d_n[1:]:
        sums = np.concatenate((sums + d, sums - d))
    return float((np.abs(sums) >= _found(d_n)).mean())


def _p_of_some_signs(d_n: Float64[np.ndarray, " n"], rng: np.random.Generator) -> float:
    """The same of a sample of signs, among which what was found counts too."""
    signs = rng.integers(0, 2, (RESAMPLES, len(d_n)), np.int8) * 2 - 1
    hits = int((np.abs(signs @ d_n) >= _found(d_n)).sum())
    return (hits + 1) / (RESAMPLES + 1)


def _found(d_n: Float64[np.ndarray, " n"]) -> float:
    """The sum that was found, less what rounding may take from an equal one."""
    return float(abs(d_n.sum()) - 1e-12 * np.abs(d_n).sum())
