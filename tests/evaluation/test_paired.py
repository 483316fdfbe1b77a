"""Paired comparisons against numbers worked out by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy.stats import permutation_test

from hippocampus.errors import DataError
from hippocampus.evaluation import paired
from hippocampus.evaluation.paired import compare_paired, mean_interval, smallest_effect


def by_name(values):
    return {f"s{i}": value for i, value in enumerate(values)}


def compare(differences, **changes):
    theirs = np.linspace(0.1, 0.6, len(differences))
    return compare_paired(by_name(theirs + differences), by_name(theirs), **changes)


def test_four_stories_by_hand():
    # Sums of +-1, +-2, +-3, +-4 that are at least 8 in size: 10, 8 (-1) and their negatives.
    found = compare_paired(by_name([1.0, 2.0, 3.0, 4.0]), by_name([0.0, 0.0, 0.0, 0.0]))
    assert (found.n, found.difference, found.better, found.worse) == (4, 2.5, 4, 0)
    assert found.p_sign == found.p_flip == 2 / 16 and found.exact
    found = compare_paired(by_name([-1.0, 2.0, 3.0, 4.0]), by_name([0.0, 0.0, 0.0, 0.0]))
    assert found.p_flip == 4 / 16 and found.p_sign == 10 / 16  # 2 (1 + 4) / 2^4


def test_stories_without_a_difference_are_no_votes_and_keep_their_signs():
    found = compare([0.0, 0.5, 0.5, 0.0, 0.5])
    assert (found.better, found.worse, found.p_sign) == (3, 0, 0.25)
    assert found.p_flip == 0.25
    nothing = compare([0.0, 0.0, 0.0])
    assert (nothing.p_sign, nothing.p_flip, nothing.low, nothing.high) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("n", [2, 5, 11])
def test_flipped_signs_are_scipys(n):
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    theirs = permutation_test((differences,), np.mean, permutation_type="samples",
                              n_resamples=np.inf)
    assert compare(differences).p_flip == pytest.approx(theirs.pvalue, abs=1e-12)


def test_many_stories_are_sampled_and_come_near_the_exact_p(monkeypatch):
    differences = np.random.default_rng(0).normal(0.5, 1, 14)
    exact = compare(differences)
    monkeypatch.setattr(paired, "EXACT_UP_TO", 13)
    sampled = compare(differences)
    assert exact.exact and not sampled.exact
    spread = math.sqrt(exact.p_flip * (1 - exact.p_flip) / paired.RESAMPLES)
    assert 0 < abs(sampled.p_flip - exact.p_flip) < 5 * spread
    assert compare(differences, seed=1).p_flip != sampled.p_flip
    assert compare(differences) == sampled


def test_a_sampled_p_is_never_zero(monkeypatch):
    monkeypatch.setattr(paired, "EXACT_UP_TO", 3)
    assert compare(np.full(40, 0.25)).p_flip == 1 / (paired.RESAMPLES + 1)


def test_the_bootstrap_interval_is_that_of_the_mean():
    differences = np.random.default_rng(3).normal(0.2, 1, 200)
    found = compare(differences)
    half = 1.96 * differences.std() / math.sqrt(200)
    assert found.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_the_interval_of_two_stories_is_what_can_be_drawn():
    found = compare([0.0, 1.0])  # means 0, 1/2, 1/2, 1
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_smallest_effect_is_found_as_often_as_it_says():
    sd, n = 0.3, 40
    effect = smallest_effect(sd, n)
    assert effect == pytest.approx((1.959963984540054 + 0.8416212335729143) * sd / math.sqrt(40))
    rng = np.random.default_rng(0)
    z = rng.normal(effect, sd, (4000, n)).mean(1) / (sd / math.sqrt(n))
    assert (np.abs(z) > 1.959963984540054).mean() == pytest.approx(0.8, abs=0.02)


def test_the_note_says_what_could_have_been_found():
    found = compare(np.random.default_rng(1).normal(0, 0.1, 23))
    assert f"{found.smallest_effect:.3g}" in found.note and "23 stories" in found.note
    assert "80%" in found.note and "p < 0.05" in found.note
    # 5 stories: 2 / 2^5 = 0.0625.
    assert "no outcome has p below 0.0625" in compare([0.1, 0.2, 0.3, 0.4, 0.5]).note
    assert "is found" in compare([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).note


def test_only_stories_that_both_have_are_paired():
    found = compare_paired({"a": 1.0, "b": 0.5, "c": 9.0}, {"b": 0.0, "a": 0.0, "d": 7.0})
    assert (found.n, found.difference) == (2, 0.75)
    assert compare_paired({"a": 1.0}, {"a": 0.5}).smallest_effect is None


@pytest.mark.parametrize(("ours", "theirs", "message"), [
    ({"a": 1.0}, {"b": 1.0}, "no story together"),
    ({"a": math.nan}, {"a": 1.0}, "not finite"),
])
def test_what_cannot_be_compared_is_refused(ours, theirs, message):
    with pytest.raises(DataError, match=message):
        compare_paired(ours, theirs)


def test_a_stricter_level_needs_a_larger_effect():
    usual, strict = smallest_effect(2.0, 16), smallest_effect(2.0, 16, 0.01)
    assert strict / usual == pytest.approx((2.5758 + 0.8416) / (1.9600 + 0.8416), rel=1e-3)


def test_the_interval_of_a_mean_is_that_of_a_comparison_with_nothing():
    values = {f"s{i}": float(x) for i, x in enumerate(np.random.default_rng(0).normal(size=9))}
    one = compare_paired(values, dict.fromkeys(values, 0.0), seed=4)
    assert mean_interval(list(values.values()), seed=4) == (one.low, one.high)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)
