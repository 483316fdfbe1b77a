"""Dropout: how often, what scale, and that every element is drawn for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.layers.dropout import Dropout


def drop(x: jax.Array, rate: float, seed: int = 0, deterministic: bool = False) -> np.ndarray:
    return np.asarray(Dropout(rate, deterministic).apply(
        {}, x, rngs={"dropout": jax.random.key(seed)}))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_are_dropped_as_often_as_asked_and_the_mean_stays(rate: float) -> None:
    y = drop(jnp.ones((400, 501)), rate)
    n = y.size
    assert abs((y == 0).mean() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert abs(y.mean() - 1) < 5 * (rate / (1 - rate) / n) ** 0.5
    assert np.unique(y).size == 2


def test_the_two_halves_of_a_word_are_drawn_apart() -> None:
    """Elements i and i + D/2 share 32 bits; their fates are independent all the same."""
    kept = drop(jnp.ones((2000, 64)), 0.5) > 0
    together = (kept[:, :32] == kept[:, 32:]).mean()
    assert abs(together - 0.5) < 5 * 0.5 / (2000 * 32) ** 0.5


def test_rows_and_seeds_differ_and_a_seed_repeats() -> None:
    x = jnp.ones((4, 256))
    assert (drop(x, 0.5)[0] != drop(x, 0.5)[1]).any()
    assert (drop(x, 0.5) != drop(x, 0.5, seed=1)).any()
    assert (drop(x, 0.5) == drop(x, 0.5)).all()


def test_evaluation_and_rate_zero_change_no_bit() -> None:
    x = jax.random.normal(jax.random.key(1), (3, 7))
    assert (drop(x, 0.3, deterministic=True) == np.asarray(x)).all()
    assert (drop(x, 0.0) == np.asarray(x)).all()


def test_a_dropped_element_has_no_gradient_and_a_kept_one_the_scale() -> None:
    x = jax.random.normal(jax.random.key(2), (5, 9))
    module, rngs = Dropout(0.25, False), {"dropout": jax.random.key(3)}
    gradient = np.asarray(jax.grad(lambda x: module.apply({}, x, rngs=rngs).sum())(x))
    dropped = np.asarray(module.apply({}, x, rngs=rngs)) == 0
    assert dropped.any() and not dropped.all()
    assert (gradient[dropped] == 0).all()
    np.testing.assert_allclose(gradient[~dropped], 1 / 0.75, rtol=1e-6)
