"""Attention against the formula written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.ops.attention import attention, same_document
from hippocampus.testing import assert_close

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, H, D_HEAD = 2, 9, 4, 6
IDS = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 1 + [2] * 5 + [3] * 3], np.int32)

CASES = {
    "plain": {},
    "documents": {"document_ids": IDS},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window in documents": {"window": 3, "document_ids": IDS},
    "window beside a rest": {"window": 4, "document_ids": IDS},
    "window of more than half": {"window": 5, "document_ids": IDS},
    "scale": {"scale": 2.5},
}


def reference(q, k, v, *, document_ids=None, window=0, scale=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [s for s in range(t + 1)
                    if (not window or t - s < window)
                    and (document_ids is None or document_ids[b, s] == document_ids[b, t])]
            for h in range(q.shape[2]):
                score = k[b, seen, h // group] @ q[b, t, h]
                score = score * (q.shape[-1] ** -0.5 if scale is None else scale)
                p = np.exp(score - score.max())
                out[b, t, h] = p / p.sum() @ v[b, seen, h // group]
    return out


def inputs(G, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, H, D_HEAD))
    k, v = rng.normal(size=(2, B, T, G, D_HEAD))
    return tuple(a.astype(np.float32) for a in (q, k, v))


@functools.cache
def value_and_gradients(case):
    @jax.jit
    def run(q, k, v, g):
        o, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, **CASES[case]), q, k, v)
        return o, vjp(g)

    return run


@pytest.mark.parametrize(("case", "G"), [
    ("plain", 1), ("plain", 4), *((case, 2) for case in CASES if case != "plain")])
def test_values_and_gradients_are_those_of_the_formula(case, G):
    qkv, g = inputs(G), inputs(H, seed=1)[0]
    o, gradients = value_and_gradients(case)(*qkv, g)
    expected = reference(*qkv, **CASES[case])
    assert_close(o, expected, n_operations=T * D_HEAD)
    rng = np.random.default_rng(2)
    for n, gradient in enumerate(gradients):  # along a random direction, by central differences
        direction, step = rng.normal(size=qkv[n].shape), 1e-5

        def along(sign, n=n, direction=direction, step=step):
            moved = [a + sign * step * direction if i == n else a.astype(np.float64)
                     for i, a in enumerate(qkv)]
            return (reference(*moved, **CASES[case]) * g).sum()

        slope = (along(1) - along(-1)) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_its_dtype_and_is_close_to_float32():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in inputs(2))
    o = attention(q, k, v, document_ids=jnp.asarray(IDS))
    assert o.dtype == jnp.bfloat16
    assert_close(o, reference(*(a.astype(np.float32) for a in (q, k, v)), document_ids=IDS))


def test_a_first_token_attends_to_itself_only():
    q, k, v = inputs(H)
    o = attention(q, k, v, document_ids=jnp.asarray(IDS))
    np.testing.assert_array_equal(o[:, 0], v[:, 0])
    np.testing.assert_allclose(o[0, 4], v[0, 4], rtol=1e-6)  # the first of document 2


def test_very_large_scores_stay_finite():
    q, k, v = inputs(H)
    o = attention(q * 1e4, k * 1e4, v)
    assert np.isfinite(o).all()
    assert np.abs(o).max() <= np.abs(v).max() * (1 + 1e-6)


def test_same_document_is_equality_of_ids():
    same = np.asarray(same_document(jnp.asarray(IDS)))
    assert (same == (IDS[:, :, None] == IDS[:, None, :])).all()


def test_a_windows_scores_and_their_gradients_grow_with_the_window_not_with_the_length():
    B, T, H, d, window = 1, 4096, 1, 8, 64

    def loss(q, ids):
        return attention(q, q, q, window=window, document_ids=ids).sum()

    for ids in (None, jax.ShapeDtypeStruct((B, T), jnp.int32)):
        memory = jax.jit(jax.grad(loss)).lower(
            jax.ShapeDtypeStruct((B, T, H, d), jnp.float32), ids).compile().memory_analysis()
        assert memory.temp_size_in_bytes < T * T  # a quarter of the scores, which are float32


def test_an_unknown_backend_is_refused_with_the_known_ones():
    q, k, v = inputs(H)
    with pytest.raises(ConfigError, match="xla, cudnn, flash"):
        attention(q, k, v, backend="fast")
