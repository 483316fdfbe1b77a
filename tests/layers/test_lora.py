"""Adapters: what they add, what they leave alone, and which layers get one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.layers.lora import (
    Linear,
    LoRA,
    adapted_layers,
    init_adapters,
    linear_layers,
    matching,
    merge,
    with_adapters,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, R = 24, 16, 4


class Two(nn.Module):
    """Two linear layers with a bend between them, and what is no linear layer."""

    dtype: jnp.dtype | None = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        self.param("table", nn.initializers.ones, (3, 3))
        h = jnp.tanh(Linear(M, use_bias=False, dtype=self.dtype, name="first_0")(x * scale, train))
        return Linear(N, dtype=self.dtype, name="last")(h, train)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 7, M))


@pytest.fixture(scope="module")
def params(x):
    return Two().init(jax.random.key(1), x)["params"]


def trained(adapters, seed=2):
    """Adapters of which no part is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(
        leaf + 0.3 * rng.normal(size=leaf.shape), jnp.float32), adapters)


def adapters_of(params, lora):
    return trained(init_adapters(jax.random.key(3), params, lora))


EVERY = LoRA(R, targets=("*",))


# ---------------------------------------------------------------- what is added


@pytest.mark.parametrize(("lora", "scale"), [
    (LoRA(R, 6.0, targets=("*",)), 6 / 4), (LoRA(R, 6.0, rslora=True, targets=("*",)), 6 / 2)])
def test_the_output_is_that_of_w_plus_s_a_b(params, x, lora, scale):
    adapters = adapters_of(params, lora)
    found = Two().apply({"params": with_adapters(params, adapters, lora)}, x)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, adapters))

    def weight(name):
        one = wide[1][name]
        return wide[0][name]["kernel"] + scale * one["lora_a"] @ one["lora_b"]

    expected = np.tanh(np.asarray(x, np.float64) @ weight("first_0")) @ weight("last")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.abs(expected - Two().apply({"params": params}, x)).max() > 0.1


def test_the_output_is_that_of_w_plus_s_a_b_to_the_last_digits_of_float64(params, x):
    with jax.enable_x64(True):
        wide, adapters, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64),
                                         (params, adapters_of(params, EVERY), x))
        run = jax.jit(Two(None).apply)
        found = run({"params": with_adapters(wide, adapters, EVERY)}, x)
        expected = run({"params": merge(wide, adapters, EVERY)}, x)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_changes_no_bit(params, x, dtype):
    adapters = init_adapters(jax.random.key(0), params, EVERY)
    run = Two(dtype).apply  # not compiled as one: joined with an addition, others round anew
    found = run({"params": with_adapters(params, adapters, EVERY)}, x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, run({"params": params}, x))
    jax.tree.map(np.testing.assert_array_equal, merge(params, adapters, EVERY), params)


def test_a_layer_without_an_adapter_adds_no_operation(x):
    """Of a model, and of the layer itself: it is the plain dense layer."""
    dense, linear = (kind(N, use_bias=False, dtype=jnp.bfloat16) for kind in (nn.Dense, Linear))
    params = jax.eval_shape(dense.init, jax.random.key(0), x)
    assert str(jax.make_jaxpr(linear.apply)(params, x)) == str(jax.make_jaxpr(dense.apply)(params,
                                                                                           x))


def test_merging_keeps_the_type_of_the_matrix_and_everything_else(params):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    lora = LoRA(R, targets=("last",))
    adapters = adapters_of(params, lora)
    merged = merge(half, adapters, lora)
    one = adapters["last"]
    exact = half["last"]["kernel"].astype(jnp.float32) + lora.scale * one["lora_a"] @ one["lora_b"]
    assert merged["last"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(merged["last"]["kernel"].astype(jnp.float32), exact, rtol=2**-8)
    same = {"last": {"kernel": half["last"]["kernel"]}}
    jax.tree.map(np.testing.assert_array_equal, {**merged, "last": {**merged["last"], **same["last"]
                                                                    }}, half)


# ---------------------------------------------------------------- training


def test_gradients_go_to_adapters_and_are_those_of_the_merged_model(params, x):
    def loss(adapters, join):
        return jnp.square(Two().apply({"params": join(params, adapters, EVERY)}, x)).mean()

    fresh = init_adapters(jax.random.key(0), params, EVERY)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    first = gradient(fresh, with_adapters)
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(first)} == {"lora_a", "lora_b"}
    for a, b in adapted_layers(first).values():
        assert not a.any() and b.any(), "at B = 0 the loss depends on B alone"
    adapters = trained(fresh)
    found, expected = (gradient(adapters, join) for join in (with_adapters, merge))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found,
                 expected)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(found))


def test_a_step_changes_adapters_alone_and_learns(params, x):
    """The optimizer has moments of what is trained, and of nothing else."""
    import optax

    optimizer, adapters = optax.adam(3e-2), init_adapters(jax.random.key(0), params, EVERY)
    wanted = Two().apply({"params": with_adapters(params, trained(adapters), EVERY)}, x)
    state = optimizer.init(adapters)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * sizes + 1

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            tree = with_adapters(params, adapters, EVERY)
            return jnp.square(Two().apply({"params": tree}, x) - wanted).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(60):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 4


def test_dropout_is_of_the_inputs_of_the_low_rank_term_alone(params, x):
    lora = LoRA(R, dropout=0.5, targets=("last",))
    tree = with_adapters(params, adapters_of(params, lora), lora)
    zero = with_adapters(params, init_adapters(jax.random.key(0), params, lora), lora)

    @jax.jit
    def run(tree, key):
        return Two().apply({"params": tree}, x, rngs={"dropout": key})

    key = jax.random.key(5)
    plain = Two().apply({"params": tree}, x)
    np.testing.assert_array_equal(run(zero, key), Two().apply({"params": params}, x))
    assert np.abs(run(tree, key) - plain).max() > 0.1
    np.testing.assert_array_equal(run(tree, key), run(tree, key))
    assert (run(tree, key) != run(tree, jax.random.key(6))).any()
    off = Two().apply({"params": tree}, x, False, rngs={"dropout": key})
    np.testing.assert_array_equal(off, plain)
    many = jax.vmap(lambda key: run(tree, key))(jax.random.split(key, 1000))
    error = np.asarray(many.std(0)) / 1000**0.5
    assert (np.abs(many.mean(0) - plain) < 5.5 * error + 1e-6).all(), "the mean is kept"


# ---------------------------------------------------------------- which layers


NAMES = ("layers_0.attention.query", "layers_0.mlp.up", "layers_1.attention.query",
         "layers_1.mlp.up", "layers_10.mlp.up", "streams_in_0")


@pytest.mark.parametrize(("targets", "expected"), [
    (("*",), NAMES), (("layers_*.mlp.up",), (NAMES[1], NAMES[3], NAMES[4])),
    (("layers_1.*",), NAMES[2:4]), (("*.query", "streams_in_0"), (NAMES[0], NAMES[2], NAMES[5])),
    (("layers_1.mlp.up", "layers_1.mlp.up", "layers_1.*"), NAMES[2:4])])
def test_globs_name_layers(targets, expected):
    assert tuple(matching(NAMES, targets)) == tuple(expected)


@pytest.mark.parametrize("target", ["query", "layers_2.*", "layers_0.attention.query.kernel", ""])
def test_a_glob_that_matches_nothing_says_what_there_is(target):
    with pytest.raises(ConfigError) as caught:
        matching(NAMES, ("*", target))
    assert f"is named {target!r}" in caught.value.message
    assert caught.value.hint == "there are layers_*.attention.query, layers_*.mlp.up, streams_in_*"


def test_linear_layers_are_matrices_of_dense_layers_alone(params):
    blocks = {"gates": {"kernel": jnp.ones((2, 3, 3))}}
    assert linear_layers({**params, **blocks}) == {"first_0": (M, M), "last": (M, N)}
    adapters = init_adapters(jax.random.key(0), jax.eval_shape(lambda: params), EVERY)
    assert {name: (a.shape, b.shape) for name, (a, b) in adapted_layers(adapters).items()} == {
        "first_0": ((M, R), (R, M)), "last": ((M, R), (R, N))}


def test_a_is_drawn_as_peft_draws_it_and_for_each_layer_alone(params):
    lora = LoRA(300, targets=("*",))
    adapters = init_adapters(jax.random.key(7), params, lora)
    a = np.asarray(adapters["first_0"]["lora_a"])
    bound = M**-0.5  # sqrt(6 / ((1 + 5) in))
    assert 0.99 * bound < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.03) and abs(a.mean()) < 0.02 * bound
    assert (a != adapters["last"]["lora_a"]).any()
    alone = init_adapters(jax.random.key(7), params, LoRA(300, targets=("last",)))
    assert set(alone) == {"last"}
    jax.tree.map(np.testing.assert_array_equal, alone["last"], adapters["last"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 0}, "lora.rank is 0"), ({"alpha": 0.0}, "lora.alpha is 0.0"),
    ({"alpha": float("nan")}, "lora.alpha is nan"), ({"dropout": 1.0}, "lora.dropout is 1.0"),
    ({"dropout": -0.1}, "lora.dropout is -0.1")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


def test_adapters_of_another_model_are_refused(params):
    adapters = adapters_of(params, EVERY)
    for join in (with_adapters, merge):
        with pytest.raises(ConfigError, match="there is no linear layer other for its adapter"):
            join(params, {"other": adapters["last"]}, EVERY)
        with pytest.raises(ConfigError, match=r"adapter of last has \[24, 4\] and \[4, 24\]"):
            join(params, {"last": adapters["first_0"]}, EVERY)


# ---------------------------------------------------------------- the project's own models


def test_merged_adapters_serve_a_model_of_the_house(built):
    model, params = built({"model.n_layers": 1, "model.segments.train": 1,
                           "model.paths": "attention"})
    lora = LoRA(2, targets=("layers_*.attention.*", "layers_*.mlp.*"))
    fresh = init_adapters(jax.random.key(0), params, lora)
    ids = jnp.arange(12)[None] % 7

    def loss(adapters):
        logits, _ = model.apply({"params": merge(params, adapters, lora)}, ids)
        return jax.nn.logsumexp(logits, -1).mean()

    grads = jax.jit(jax.grad(loss))(fresh)
    assert set(adapted_layers(grads)) == set(matching(linear_layers(params), lora.targets))
    assert all(b.any() for _, b in adapted_layers(grads).values())

    run = jax.jit(lambda params: model.apply({"params": params}, ids)[0])
    logits = run(params)
    np.testing.assert_array_equal(run(merge(params, fresh, lora)), logits)
    assert np.abs(run(merge(params, trained(fresh), lora)) - logits).max() > 1e-2
