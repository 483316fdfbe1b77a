"""The kernel that keeps logits on the chip: its values, and that it is lowered where it belongs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops.cross_entropy import Head, cross_entropy
from hippocampus.ops.kernels import cross_entropy_hopper as module

N, V, D, IDS = 512, 384, 128, 300


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, D)).astype(jnp.bfloat16)
    table = (0.1 * jax.random.normal(keys[1], (V, D))).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (N,), 0, IDS)
    logit = (x.astype(jnp.float32) * table[targets].astype(jnp.float32)).sum(-1)
    return x, table, logit, targets


def check(ratios, sums):
    x, table, logit, targets = (np.asarray(a, np.float64) for a in inputs())
    expected = np.exp(x @ table.T - logit[:, None])
    expected[:, IDS:] = 0
    expected[np.arange(N), targets.astype(int)] = 0
    np.testing.assert_allclose(np.asarray(ratios, np.float64), expected, rtol=2**-8)
    np.testing.assert_allclose(sums, expected.sum(1), rtol=1e-5)


@pytest.mark.parametrize("blocks", [3, 16])
def test_ratios_and_sums_are_those_of_the_formula_without_races(blocks):
    """More tiles than blocks, for both groups of warps; and blocks that have none."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX cannot interpret the kernel")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        check(*module.ratios(*inputs(), IDS, blocks=blocks))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA Hopper GPU")
def test_ratios_and_sums_are_those_of_the_formula_on_a_gpu():
    check(*jax.jit(module.ratios, static_argnums=4)(*inputs(), IDS))


def lowered(head, tokens=(2, 256), dtype=jnp.bfloat16, platform="cuda"):
    """The program of a loss and its gradients, for a device that need not be there."""
    def loss(hidden, table, targets, weight):
        return cross_entropy(hidden, dataclasses.replace(head, weight_VD=table), targets, weight,
                             z_weight=1e-4, backend="fused")[0]

    shapes = (jax.ShapeDtypeStruct((*tokens, head.weight_VD.shape[1]), dtype), head.weight_VD,
              jax.ShapeDtypeStruct(tokens, jnp.int32), jax.ShapeDtypeStruct(tokens, jnp.float32))
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*shapes)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def table(rows=V, width=D):
    return jax.ShapeDtypeStruct((rows, width), jnp.float32)


def test_a_fused_loss_holds_the_kernel_on_a_gpu_and_nowhere_else():
    assert "mosaic_gpu" in lowered(Head(table(), vocab_size=IDS))
    assert "mosaic_gpu" not in lowered(Head(table(), vocab_size=IDS), platform="cpu")


@pytest.mark.parametrize(("head", "dtype"), [
    (Head(table(), softcap=30.0), jnp.bfloat16),
    (Head(table(), bias_V=jnp.zeros(V)), jnp.bfloat16),
    (Head(table(rows=V + 1)), jnp.bfloat16),
    (Head(table(width=D + 8)), jnp.bfloat16),
    (Head(table()), jnp.float32),
    (Head(table()), jnp.float16),
])
def test_what_the_kernel_does_not_know_goes_without_it(head, dtype):
    assert "mosaic_gpu" not in lowered(head, dtype=dtype)


def test_tokens_of_any_number_are_taken():
    """Too few for a tile: without the kernel."""
    assert "mosaic_gpu" not in lowered(Head(table()), tokens=(3, 7))
