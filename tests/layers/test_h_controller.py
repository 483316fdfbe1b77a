"""The controller: what it reads, and that it starts silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.layers.h_controller import HController
from hippocampus.testing import (
    check_batch_invariance,
    check_causality,
    check_causality_by_gradient,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, L, P = 2, 6, 8, 3, 2
H_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
CONTROLLER = HController(n_layers=L, n_paths=P, width=4)
FIRST = CONTROLLER.init(jax.random.key(1), H_BTD)["params"]
TRAINED = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(2), a.shape), FIRST)


def bias(h):
    return jnp.moveaxis(CONTROLLER.apply({"params": TRAINED}, h), 0, 2)  # B,T,L,P


def test_the_bias_has_a_value_per_layer_token_and_path_and_starts_at_zero():
    first = CONTROLLER.apply({"params": FIRST}, H_BTD)
    assert first.shape == (L, B, T, P) and first.dtype == jnp.float32
    assert not np.asarray(first).any()


def test_the_controller_reads_each_token_alone():
    check_causality(bias, H_BTD)
    check_causality_by_gradient(bias, H_BTD)
    check_batch_invariance(bias, H_BTD)
    changed = np.asarray(bias(H_BTD) != bias(H_BTD.at[:, 2].add(1.0))).any((0, 2, 3))
    assert changed.tolist() == [t == 2 for t in range(T)]


def test_the_bias_is_that_of_the_formula():
    p = jax.tree.map(np.asarray, TRAINED)
    h = np.asarray(H_BTD, np.float64)
    rms = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    z = rms @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    expected = (z / (1 + np.exp(-z)) @ p["out"]["kernel"]).reshape(B, T, L, P)
    np.testing.assert_allclose(bias(H_BTD), expected, rtol=1e-4, atol=1e-5)


def test_the_size_of_what_it_reads_does_not_matter():
    np.testing.assert_allclose(bias(H_BTD), bias(H_BTD * 100), rtol=1e-4, atol=1e-5)
