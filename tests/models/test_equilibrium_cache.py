"""The equilibrium model read on from a cache: exactly, to its tolerance, and row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.testing import assert_close

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, V = 2, 12, 16, 31
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V, jnp.int32)
ITERATIONS = {"model.solver.cache": "iterations", "model.solver.tol_fixedpoint": 1e-3}
EXPLICIT = {"model.solver.method": "explicit", "model.cell.copies": 2,
            "model.solver.ramp_fraction": 0.0}
CHUNKS = (5, 1, 1, 5)
MODELS = {  # how far from all at once, and in which chunks
    "iterations, anderson": (ITERATIONS, None, CHUNKS),
    "equilibrium": ({"model.hopfield.patterns": "context"}, 1e-4, (4, 4, 4)),
    "explicit": (EXPLICIT, None, (1,) * T),
    "equilibrium, cascade": ({"model.solver.schedule": "cascade"}, 1e-4, CHUNKS),
    "iterations, picard, ssd": (ITERATIONS | {
        "model.solver.method": "picard", "model.solver.schedule": "simultaneous",
        "model.cell.ssm.kind": "ssd", "model.cell.ssm.head_width": 8,
        "model.hopfield.patterns": "slots"}, None, CHUNKS),
    "iterations, broyden, not converged": (ITERATIONS | {
        "model.solver.method": "broyden", "model.solver.max_iterations": 5}, None, CHUNKS),
    "bfloat16, iterations": (ITERATIONS | {"model.compute_dtype": "bfloat16"}, 0.05, CHUNKS),
}
QUICK = ("iterations, anderson", "equilibrium", "explicit")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in MODELS]


@functools.cache
def extend(model):
    return jax.jit(functools.partial(model.apply, method="extend"))


def same_bits(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def row(tree, b):
    return jax.tree.map(lambda array: array[b], tree)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_read_in_chunks_gives_what_it_gives_at_once(name, built_equilibrium):
    overrides, atol, chunks = MODELS[name]
    model, params = built_equilibrium(overrides)
    out = jax.jit(model.apply)({"params": params}, TOKENS)[1]
    cache, found, start = model.init_cache(B, T), [], 0
    form = jax.tree.map(lambda array: (array.shape, array.dtype), cache)
    for n in chunks:
        hidden, cache = extend(model)({"params": params}, TOKENS[:, start:start + n], cache,
                                      jnp.ones((B, n), bool))
        found.append(hidden)
        start += n
        assert jax.tree.map(lambda array: (array.shape, array.dtype), cache) == form
    found, wanted = jnp.concatenate(found, 1), out["segments.hidden"][0]
    if atol is None:
        assert_close(found, wanted, n_operations=T * D * 8)
    else:
        np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32),
                                   atol=atol)
        assert out["solver.converged"].all()
    assert cache.length_B.tolist() == [T, T]
    if name == "iterations, anderson":  # a token waits for those before it
        np.testing.assert_array_equal(cache.frozen_B, out["solver.iterations"][:, -1])
        assert (np.diff(out["solver.iterations"], axis=1) > 0).any()


def test_rows_of_other_lengths_are_each_as_alone_and_can_begin_anew(built_equilibrium):
    model, params = built_equilibrium(ITERATIONS)
    step = functools.partial(extend(model), {"params": params})
    everything, fresh = step(TOKENS[:, :5], model.init_cache(B, T), jnp.ones((B, 5), bool))
    # Row 0 reads 5 tokens; row 1 reads 3, none, and 2 more behind tokens that do not count.
    first = jnp.arange(5) < jnp.asarray([[5], [3]])
    hidden, cache = step(TOKENS[:, :5], model.init_cache(B, T), first)
    assert_close(hidden[1, :3], everything[1, :3], n_operations=T * D * 8)
    again, after = step(TOKENS[:, 5:10], cache, jnp.asarray([[True], [False]]) & first)
    same_bits(row(cache, 1), row(after, 1))
    assert np.isfinite(again).all()
    rest, after = step(jnp.roll(TOKENS, -3, 1)[:, :5], after, jnp.asarray([[False], [True]]) & (
        jnp.arange(5) < 2))
    assert_close(rest[1, :2], everything[1, 3:5], n_operations=T * D * 8)
    assert after.length_B.tolist() == [10, 5]

    reset = model.reset(after, jnp.asarray([False, True]))
    same_bits(row(reset, 1), row(model.init_cache(B, T), 1))
    same_bits(row(reset, 0), row(after, 0))
    begun, cache = step(TOKENS[:, :5], reset, jnp.ones((B, 5), bool))
    same_bits(begun[1], everything[1])
    same_bits(row(cache, 1), row(fresh, 1))


def test_the_iterations_of_a_cascade_have_no_cache(built_equilibrium):
    with pytest.raises(ConfigError, match="cascade"):
        built_equilibrium(ITERATIONS | {"model.solver.schedule": "cascade"})


def test_a_decoder_holds_matrices_in_compute_dtype_and_the_rest_in_float32(built_equilibrium):
    model, params = built_equilibrium({"model.compute_dtype": "bfloat16"})
    cast = model.decode_variables(params, T)["params"]
    kept = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
            if leaf.dtype == jnp.float32}
    assert {"part_scale", "slots", "log_beta", "scale", "log_decay"} <= kept
    assert not {"kernel", "embedding"} & kept
