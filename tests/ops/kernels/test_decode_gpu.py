"""The kernels for decoding, against the plain operations; without a GPU they are interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from hippocampus.ops import key_cache
from hippocampus.ops.kernels import decode_gpu
from hippocampus.testing import assert_close

RNG = np.random.default_rng(0)
INTERPRET = jax.default_backend() != "gpu"
pytestmark = pytest.mark.usefixtures("quick_compiles")
DTYPES = [jnp.float32, jnp.bfloat16] if INTERPRET else [jnp.bfloat16]


def draw(*shape, dtype=jnp.float32, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, dtype)


def f32(array):
    return np.asarray(array, np.float32)


@pytest.mark.parametrize(("B", "dtype"), [
    pytest.param(1, DTYPES[-1], marks=pytest.mark.full), (4, DTYPES[0]), (16, DTYPES[0]),
    pytest.param(16, DTYPES[-1], marks=pytest.mark.full)])
def test_linear_is_the_product_with_what_stands_in_front_and_behind(B, dtype):
    x, w, scale = draw(2, B, 96, dtype=dtype), draw(2, 64, 96, dtype=dtype), draw(96)
    gates, residual = draw(1, B, 192, dtype=dtype), draw(B, 64, dtype=dtype)
    close = {"dtype": dtype, "n_operations": 8}

    plain = decode_gpu.linear(x, w, interpret=INTERPRET)
    assert_close(f32(plain), np.einsum("pbk,pnk->pbn", f32(x), f32(w)), **close)

    normed = decode_gpu.linear(x[:1], w[:1], norm_scale_K=scale, epsilon=1e-3,
                                   interpret=INTERPRET)
    u = f32(x[0]) * f32(scale) / np.sqrt((f32(x[0]) ** 2).mean(-1, keepdims=True) + 1e-3)
    assert_close(f32(normed[0]), u @ f32(w[0]).T, **close)

    gated = decode_gpu.linear(gates, w[:1], gated=True, residual_BN=residual,
                                  interpret=INTERPRET)
    a, b = np.split(f32(gates[0]), 2, -1)
    assert_close(f32(gated[0]), (a / (1 + np.exp(-a)) * b) @ f32(w[0]).T + f32(residual), **close)


CASES = {
    "attention, grouped": {"B": 4, "G": 2, "r": 3, "n": 2, "steps": 1, "alpha": 1.0},
    "retrieval, three steps": {"B": 4, "G": 2, "r": 1, "n": 1, "steps": 3, "alpha": 1.0},
    "retrieval, half steps": {"B": 4, "G": 2, "r": 1, "n": 1, "steps": 2, "alpha": 0.5},
    "many rows, one program a cache": {"B": 64, "G": 2, "r": 1, "n": 1, "steps": 2, "alpha": 0.5},
}


@pytest.mark.parametrize(("name", "dtype"), [
    *((name, DTYPES[0]) for name in CASES),
    pytest.param("retrieval, three steps", DTYPES[-1], marks=pytest.mark.full)])
def test_retrieve_is_attention_to_the_ring_and_writes_the_token_into_it(name, dtype):
    B, G, r, n, steps, alpha = CASES[name].values()
    d, C = 16, 48
    q, scale = draw(B, G * r, d, dtype=dtype), jnp.linspace(0.1, 1, G * r)
    new = tuple(draw(B, G, d, dtype=dtype) for _ in range(n))
    caches = tuple(draw(B, G, C, d, dtype=dtype) for _ in range(n))
    positions = jnp.resize(jnp.asarray([0, 5, C + 7, C - 1]), (B,))  # empty, part, past, full
    valid = jnp.arange(B) != 1
    states, written = decode_gpu.retrieve(
        q, new, caches, positions, valid, scale, steps=steps, alpha=alpha, interpret=INTERPRET)

    arrays, visible, wanted = key_cache.recall(
        caches, tuple(part[:, None] for part in new), positions[:, None], valid[:, None])
    for found, cache in zip(written, wanted, strict=True):
        np.testing.assert_array_equal(f32(found), f32(cache))
    xi, rows = q[:, None], np.asarray(valid)
    for j in range(steps):
        found = key_cache.attend(xi, arrays[0], arrays[-1], visible, scale)
        xi = found if alpha == 1 else ((1 - alpha) * xi + alpha * found).astype(dtype)
        assert_close(f32(states[j])[rows], f32(xi[:, 0])[rows], dtype=dtype, n_operations=4 * steps)


@pytest.mark.parametrize("B", [1, 64])
def test_kernels_lower_for_nvidia_gpus_without_one(B):
    bf16 = jnp.bfloat16

    def step(x, w, scale, q, new, cache, positions, valid):
        y = decode_gpu.linear(x, w, norm_scale_K=scale)
        z = decode_gpu.linear(jnp.concatenate([y, y], -1), w[:, :, :64], gated=True,
                                  residual_BN=y[0])
        return z, decode_gpu.retrieve(q, (new,), (cache,), positions, valid, jnp.ones(6),
                                          steps=2)

    shapes = [((1, B, 128), bf16), ((1, 64, 128), bf16), ((128,), jnp.float32),
              ((B, 6, 128), bf16), ((B, 6, 128), bf16), ((B, 6, 256, 128), bf16),
              ((B,), jnp.int32), ((B,), bool)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")  # newer JAX asks which one it is for
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("gpu.triton") >= 3
