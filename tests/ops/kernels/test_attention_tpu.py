"""Splash attention in JAX's interpreter, against XLA's attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops.attention import attention
from hippocampus.ops.kernels import attention_tpu
from hippocampus.testing import assert_close

B, T, H, G = 2, 256, 4, 2
IDS = np.sort(np.random.default_rng(3).integers(0, 4, (B, T))).astype(np.int32)
CASES = {
    "plain": {},
    "window in documents": {"window": 40, "document_ids": IDS},
    "scale, as the Hopfield steps have it": {"scale": 1.0, "document_ids": IDS},
}


@pytest.fixture
def interpreted(monkeypatch):
    """Calls of the kernels, counted."""
    calls, real = [], attention_tpu.attention

    def run(*arrays, **settings):
        calls.append(arrays[0].shape)
        return real(*arrays, **settings, interpret=True)

    monkeypatch.setattr(attention_tpu, "attention", run)
    return calls


def inputs(T=T, d=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, d)) * size, dtype)
                 for heads, size in ((H, 0.5), (G, 0.5), (G, 1), (H, 1)))


def run(backend, case, *arrays):
    *qkv, g = arrays
    function = functools.partial(attention, backend=backend, **CASES[case])
    o, vjp = jax.vjp(function, *qkv)
    return o, *vjp(g)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_xla(case, interpreted):
    arrays = inputs()
    for found, expected in zip(run("flash", case, *arrays), run("xla", case, *arrays),
                               strict=True):
        assert_close(found, expected, n_operations=T)
    assert interpreted == [(B, T, H, 64)]


def test_keys_as_values_give_one_gradient(interpreted):
    q, k, _, g = inputs(128)

    def gradients(backend):
        return jax.grad(lambda q, k: (attention(q, k, k, scale=2.0, backend=backend) * g).sum(),
                        argnums=(0, 1))(q, k)

    assert_close(gradients("flash"), gradients("xla"), n_operations=128)


def test_half_precision_keeps_its_dtype(interpreted):
    q, k, v, _ = inputs(128, dtype=jnp.bfloat16)
    o = attention(q, k, v, backend="flash")
    assert o.dtype == jnp.bfloat16
    assert_close(o, attention(*(x.astype(jnp.float32) for x in (q, k, v))), n_operations=4)


@pytest.mark.parametrize(("T", "d"), [(96, 64), (200, 128), (128, 48)])
def test_what_does_not_fill_tiles_runs_on_xla(T, d, interpreted):
    q, k, v, _ = inputs(T, d)
    np.testing.assert_array_equal(attention(q, k, v, backend="flash"), attention(q, k, v))
    assert interpreted == []
