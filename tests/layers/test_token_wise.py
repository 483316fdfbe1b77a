"""Norms, the MLP and the velocity network: their formulas, in float32 where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import MLPConfig
from hippocampus.layers.mlp import MLP, mlp_width
from hippocampus.layers.norms import RMSNorm, rms_normalize, unit_normalize
from hippocampus.layers.velocity_field import VelocityField
from hippocampus.testing import assert_close

B, T, D = 2, 3, 8
U = jax.random.normal(jax.random.key(0), (B, T, D))


def silu(x):
    return x / (1 + np.exp(-x))


def test_norms_are_those_of_their_formulas():
    x = np.asarray(U, np.float64)
    square = (x**2).sum(-1, keepdims=True)
    assert_close(rms_normalize(U), x / np.sqrt(square / D + 1e-6), n_operations=D)
    assert_close(unit_normalize(U), x / np.sqrt(square + 1e-6), n_operations=D)


@pytest.mark.parametrize("normalize", [rms_normalize, unit_normalize])
def test_a_norm_of_zeros_is_finite_with_a_finite_gradient(normalize):
    zeros = jnp.zeros(D)
    assert not np.asarray(normalize(zeros)).any()
    assert np.isfinite(jax.grad(lambda x: normalize(x).sum())(zeros)).all()


def test_a_norm_in_bfloat16_has_float32_statistics():
    norm = RMSNorm(dtype=jnp.bfloat16)
    x = jnp.asarray(U * 1e3, jnp.bfloat16)
    params = norm.init(jax.random.key(0), x)["params"]
    assert params["scale"].dtype == jnp.float32
    y = norm.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rms_normalize(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_a_norm_starts_at_the_scale_asked_for():
    params = RMSNorm(scale_init=0.25).init(jax.random.key(0), U)["params"]
    assert (np.asarray(params["scale"]) == 0.25).all()


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_the_mlp_is_that_of_its_formula(kind):
    mlp = MLP(MLPConfig(kind=kind, width=6))
    params = mlp.init(jax.random.key(0), U)["params"]
    h = np.asarray(U, np.float64) @ params["up"]["kernel"]
    if kind == "swiglu":
        h = silu(h[..., :6]) * h[..., 6:]
    else:
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    assert_close(mlp.apply({"params": params}, U), h @ params["down"]["kernel"], n_operations=D * 6)


def test_the_mlp_is_as_wide_as_asked_or_a_multiple_of_16():
    assert mlp_width(MLPConfig(width=7), 64) == 7
    assert mlp_width(MLPConfig(), 96) == 256
    assert mlp_width(MLPConfig(), 100) == 272
    assert mlp_width(MLPConfig(kind="gelu"), 100) == 400


def test_the_velocity_starts_at_zero_and_depends_on_state_and_time():
    field, tau = VelocityField(4), jnp.full((B, T), 0.3)
    params = field.init(jax.random.key(0), U, tau)["params"]
    assert not np.asarray(field.apply({"params": params}, U, tau)).any()
    trained = jax.tree.map(lambda a: a + 0.3, params)
    v = field.apply({"params": trained}, U, tau)
    assert v.shape == U.shape and v.dtype == jnp.float32
    assert (v != field.apply({"params": trained}, U, tau + 0.1)).any()
    p = jax.tree.map(np.asarray, trained)
    z = (np.asarray(U) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
         + 0.3 * p["time_kernel"])
    assert_close(v, silu(z) @ p["out"]["kernel"] + p["out"]["bias"], n_operations=D * 4)
