"""Against numbers worked out by hand."""

import math

import pytest

from hippocampus.probing.ablation.statistics import holm, paired_test, summarize

DIFFERENCES = {0: 1.0, 1: 2.0, 2: 4.0}
"""Mean 7/3, standard deviation sqrt(7/3), so t = sqrt(7) with two degrees of freedom."""


def test_mean_and_standard_deviation_are_those_of_a_sample():
    found = summarize([1.0, 2.0, 4.0])
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(7 / 3), pytest.approx(
        math.sqrt(7 / 3)))


def test_one_seed_has_no_standard_deviation_and_none_has_nothing():
    assert summarize([2.5]).sd is None and summarize([2.5]).mean == 2.5
    assert summarize([]) is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_seed_that_is_not_finite_makes_both_not_a_number(broken):
    found = summarize([2.0, broken])
    assert math.isnan(found.mean) and math.isnan(found.sd)
    assert math.isnan(summarize([broken]).mean)


def test_paired_test_is_students_on_the_differences():
    # For two degrees of freedom the t distribution has a closed form: p = 1 - t / sqrt(2 + t^2).
    theirs = {0: 10.0, 1: -3.0, 2: 0.5}
    ours = {seed: theirs[seed] + d for seed, d in DIFFERENCES.items()}
    found = paired_test(ours, theirs)
    assert found.n == 3 and found.difference == pytest.approx(7 / 3)
    assert found.p == pytest.approx(1 - math.sqrt(7) / 3, abs=1e-12)
    half = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)  # the 97.5 % quantile of t with 2
    assert (found.low, found.high) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))


def test_only_seeds_that_both_have_are_paired():
    found = paired_test({**DIFFERENCES, 3: 100.0}, {0: 0.0, 1: 0.0, 2: 0.0, 4: -7.0})
    assert found.n == 3 and found.p == pytest.approx(1 - math.sqrt(7) / 3)
    assert paired_test({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_a_difference_and_no_p_value():
    found = paired_test({5: 2.0}, {5: 1.5})
    assert (found.n, found.difference, found.p, found.low) == (1, 0.5, None, None)


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.25, 0.0)])
def test_differences_without_spread_are_certain(shift, p):
    theirs = {0: 1.0, 1: 2.0}
    found = paired_test({seed: value + shift for seed, value in theirs.items()}, theirs)
    assert (found.p, found.low, found.high) == (p, shift, shift)


def test_a_loss_that_is_not_finite_has_no_p_value():
    assert paired_test({0: math.nan, 1: 2.0}, {0: 1.0, 1: 1.0}).p is None


def test_holm_multiplies_by_the_tests_that_are_left_and_never_falls():
    found = holm([0.01, 0.04, None, 0.03, 0.005])
    assert found == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06),
                     pytest.approx(0.02)]


def test_holm_stays_below_one():
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
