import math

import numpy as np
import pytest

from hippocampus.probing.ablation.scaling import fit_power_law

SIZES = (1e5, 3e5, 1e6, 3e6, 1e7)


def curve(size: float) -> float:
    return 1.2 + 40 * size**-0.3


def test_a_curve_without_noise_is_found_exactly():
    found = fit_power_law({size: [curve(size)] for size in SIZES})
    assert found.offset == pytest.approx(1.2, abs=1e-5)
    assert found.alpha == pytest.approx(0.3, abs=1e-5)
    assert found.factor == pytest.approx(40 * found.scale**-0.3, rel=1e-5)
    assert found.fits_offset and found.falls
    np.testing.assert_allclose(found(np.array(SIZES)), [curve(size) for size in SIZES], rtol=1e-7)
    low, high = found.band(np.array([2e6]))
    assert low[0] == pytest.approx(curve(2e6)) and high[0] == pytest.approx(curve(2e6))


def test_three_sizes_fit_a_straight_line_in_logarithms_through_no_offset():
    # ln L = ln A - alpha ln N: two points decide, the third lies on it.
    found = fit_power_law({100: [4.0], 1000: [2.0], 10_000: [1.0]})
    assert not found.fits_offset and found.offset == 0
    assert found.alpha == pytest.approx(math.log10(2), abs=1e-6)
    assert found.factor == pytest.approx(2.0, abs=1e-5)
    assert found.scale == pytest.approx(1000)


def test_fewer_than_three_sizes_or_a_loss_that_is_not_finite_give_no_fit():
    assert fit_power_law({1e5: [2.0, 2.1], 1e6: [1.9]}) is None
    assert fit_power_law({1e5: [2.0], 1e6: [math.nan], 1e7: [1.0]}) is None


def test_a_loss_that_does_not_fall_with_size_is_said_not_to():
    assert not fit_power_law({size: [2.0 + i] for i, size in enumerate(SIZES)}).falls
    assert not fit_power_law({size: [2.0] for size in SIZES}).falls


def test_the_offset_is_never_negative():
    found = fit_power_law({size: [5 - math.log10(size) / 2] for size in SIZES})
    assert found.offset == 0 and found.falls


def test_the_same_data_give_the_same_interval():
    losses = {size: [curve(size) + d for d in (-0.02, 0.01, 0.03)] for size in SIZES}
    first, again = fit_power_law(losses), fit_power_law(losses)
    assert first.interval("alpha") == again.interval("alpha")
    low, high = first.interval("alpha")
    assert low < first.alpha < high


def test_more_noise_gives_a_wider_interval():
    def width(noise):
        losses = {size: [curve(size) + noise * d for d in (-1, 0, 1)] for size in SIZES}
        low, high = fit_power_law(losses).interval("alpha")
        return high - low

    assert width(0.001) < width(0.01) < width(0.1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw, inside = np.random.default_rng(0), 0
    for i in range(60):
        losses = {size: curve(size) + draw.normal(0, 0.02, 3) for size in SIZES}
        low, high = fit_power_law(losses, replicates=200, seed=i).interval("alpha")
        inside += low <= 0.3 <= high
    assert 50 <= inside <= 60
