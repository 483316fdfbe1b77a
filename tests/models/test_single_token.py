"""One token by kernels is one token by layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.models import single_token
from hippocampus.models.hybrid_block import HybridBlock, block_specs
from hippocampus.testing import assert_close

INTERPRET = jax.default_backend() != "gpu"
pytestmark = pytest.mark.usefixtures("quick_compiles")
VARIANTS = {
    "all paths": {},
    "groups, scales, half steps": {
        "model.attention.n_kv_heads": 1, "model.ssm.expansion": 1.0, "model.ssm.input_scale": True,
        "model.hopfield.rope": True, "model.hopfield.step_size": 0.5,
        "model.hopfield.normalize": "rms", "model.attention.qk_norm": False},
    "window, no rope": {"model.paths": "ssm,attention", "model.position": "none",
                        "model.attention.window": 16},
    "no state space": {"model.paths": "hopfield,attention"},
}


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, "float32" if INTERPRET else "bfloat16",
                 marks=() if name.startswith("groups") else pytest.mark.full)
    for name in VARIANTS] + [pytest.param("all paths", "bfloat16", marks=pytest.mark.full)])
def test_a_block_reads_a_token_as_its_layers_do(name, dtype, tiny_config):
    config = tiny_config({
        "model.d_model": 64, "model.n_layers": 1, "model.compute_dtype": dtype,
        "model.ssm.backend": "sequential", "model.attention.backend": "xla",
        **VARIANTS[name]}).model
    (spec,), B, C = block_specs(config), 4, 48
    assert single_token.supports(config, C)
    block = HybridBlock(config, spec, jnp.dtype(dtype), parent=None)
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(B, 21, 64)), dtype)
    params = block.init(jax.random.key(0), x_BTD[:, :2], None, jnp.zeros((B, 2), int))["params"]
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(a.dtype), params)
    lengths_B = jnp.asarray([20, 7, 0, 12])
    valid_BT = jnp.arange(20) < lengths_B[:, None]
    control_BP = jnp.asarray(rng.normal(size=(B, 3)), jnp.float32)
    extend = jax.jit(lambda *a: block.apply({"params": params}, *a, method="extend"))
    _, caches = extend(x_BTD[:, :20], jnp.cumsum(valid_BT, 1) - valid_BT,
                       block.init_cache(B, C), valid_BT)
    valid_B = jnp.asarray([True, True, True, False])
    wanted, wanted_caches = extend(x_BTD[:, 20:], lengths_B[:, None], caches, valid_B[:, None],
                                   control_BP[:, None])
    fused = single_token.fuse(params, spec, jnp.dtype(dtype))
    found, found_caches = jax.jit(lambda x, caches: single_token.extend(
        config, spec, params, fused, x, lengths_B, caches, valid_B, control_BP,
        interpret=INTERPRET))(x_BTD[:, 20], caches)
    close = {"dtype": dtype, "n_operations": 32}
    assert_close(np.asarray(found, np.float32)[:3], np.asarray(wanted, np.float32)[:3, 0], **close)
    def f32(tree):
        return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)

    assert_close(f32(found_caches), f32(wanted_caches), **close)
    for new, old in zip(jax.tree.leaves(found_caches), jax.tree.leaves(caches), strict=True):
        np.testing.assert_array_equal(new[3], old[3])  # what is not valid leaves no trace


@pytest.mark.parametrize(("change", "capacity"), [
    ({"model.ssm.kind": "diagonal"}, 48), ({"model.ssm.kind": "s6"}, 48),
    ({"model.hopfield.patterns": "both"}, 48), ({"model.mlp.kind": "gelu"}, 48), ({}, 50),
    ({"model.d_model": 24}, 48), ({"model.attention.window": 5}, 48),
    ({"model.mlp.width": 20}, 48)])
def test_what_the_kernels_do_not_cover_is_left_to_the_layers(change, capacity, tiny_config):
    config = tiny_config({"model.d_model": 32, **change}).model
    assert not single_token.supports(config, capacity)
