"""What a memory recalls, where it is known."""

import numpy as np
import pytest

from hippocampus.probing.equilibrium import capacity
from hippocampus.probing.equilibrium.capacity import Dynamics, cues, random_patterns, recall

pytestmark = pytest.mark.usefixtures("quick_compiles")

H, D = 2, 16
APART = np.broadcast_to(np.eye(D, dtype=np.float32)[:, None], (D, H, D))


def dynamics(beta, kappa=0.0, alpha=1.0):
    return Dynamics(np.full(H, beta, np.float32), alpha, kappa, steps=4)


def test_a_sharp_memory_recalls_patterns_that_are_far_apart_and_a_blunt_one_mixes_them():
    sharp, blunt = (recall(APART, dynamics(beta), 0.3) for beta in (40.0, 0.1))
    assert sharp["memory"] == (1, 1)
    assert blunt["memory"].within == 0 and blunt["nearest"].right == 1
    mixed = [capacity.effective_patterns(APART, dynamics(beta).beta_H) for beta in (40.0, 0.1)]
    np.testing.assert_allclose(mixed[0], 1, atol=1e-3)
    assert (mixed[1] > D - 1).all()


def test_an_anchor_holds_the_query_near_its_cue():
    held = recall(APART, dynamics(40.0, kappa=1.0), 0.6)
    assert held["memory"].right == 1 and held["memory"].within == 0
    assert held["free"] == (1, 1)  # the same memory without it


def test_more_patterns_than_fit_are_not_recalled():
    many = recall(random_patterns(3000, H, D, 0), dynamics(10.0), 0.25, most=D)
    few = recall(random_patterns(D, H, D, 0), dynamics(10.0), 0.25)
    assert few["sharp"].within == 1 > few["free"].within > many["free"].within == 0
    assert many["nearest"].right == 1  # nearer than any other, and still not recalled


def test_a_linear_memory_confuses_what_a_softmax_keeps_apart():
    found = recall(random_patterns(D, H, D, 0), dynamics(30.0), 0.25)
    assert found["free"].right == 1 and found["linear"].right < 0.9


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_the_noise_of_a_cue_points_nowhere_in_particular(noise):
    """Also where patterns were drawn by the same seed."""
    patterns = random_patterns(500, H, D, seed=7)
    of, cue = cues(patterns, noise, 500, seed=7)
    cosine = (cue * patterns[of]).sum(-1)
    assert cosine.mean() == pytest.approx(1 / (1 + noise**2) ** 0.5, abs=0.05)


def test_cues_are_of_patterns_spread_over_all_and_of_unit_length():
    of, cue = cues(random_patterns(1000, H, D, 0), 0.5, 11, seed=0)
    assert len(of) == 11 and (of[0], of[-1]) == (0, 999)
    np.testing.assert_allclose(np.linalg.norm(cue, axis=-1), 1, rtol=1e-5)


def test_shuffled_patterns_have_the_same_values_in_other_company():
    patterns = random_patterns(50, H, D, 0) * np.arange(1, D + 1)  # columns of different size
    shuffled = capacity.shuffled_patterns(patterns, seed=0)
    sizes = np.abs(shuffled).mean((0, 1))
    assert (np.diff(sizes) > 0).mean() > 0.7
    closest = np.einsum("shd,thd->hst", shuffled, capacity.unit(patterns)).max(-1)
    assert closest.mean() < 0.95


def test_blocks_of_cues_do_not_change_what_is_found(monkeypatch):
    patterns = random_patterns(D, H, D, 0)
    whole = recall(patterns, dynamics(8.0), 1.0)
    monkeypatch.setattr(capacity, "MOST_SCORES", 8 * H * D)
    assert recall(patterns, dynamics(8.0), 1.0) == whole
