"""A decoder with adapters in every way that it runs: they change nothing but what they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict, unflatten_dict

from hippocampus.backbones.loading import Backbone, build_decoder, save_backbone
from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.layers.lora import LoRA, init_adapters, merge, with_adapters
from hippocampus.ops.cross_entropy import cross_entropy
from hippocampus.testing import assert_close

FAMILIES = ("llama", "qwen3", "gemma3", "gemma3n")
T, CHUNK = 12, 4  # together longer than the window
EVERY = LoRA(3, 4.0, targets=("*",))


def trained(adapters, seed=2):
    """Adapters that move every output by about a tenth of it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf if np.any(leaf) else jnp.asarray(
        0.1 * rng.normal(size=leaf.shape), jnp.float32), adapters)


def batch_of(ids):
    return Batch(ids, ids, jnp.ones(ids.shape))


@pytest.fixture(scope="module", autouse=True)
def operations_apart():
    """Bits are compared: joined with an addition, other operations are rounded anew."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def ids(reference_of):
    return jnp.asarray(reference_of("llama")["ids"][:, :T])


@pytest.fixture(scope="module")
def logits(family, backbone_of, ids):
    """A tree of parameters -> logits; compiled once for each of its structures."""
    run = jax.jit(backbone_of(family).model.apply)
    return lambda params: np.asarray(run({"params": params}, ids)[0])


def test_a_fresh_adapter_changes_no_logit(family, backbone_of, logits):
    params = backbone_of(family).params
    fresh = init_adapters(jax.random.key(0), params, EVERY)
    np.testing.assert_array_equal(logits(with_adapters(params, fresh, EVERY)), logits(params))


def test_merged_adapters_say_the_same(family, backbone_of, logits):
    params = backbone_of(family).params
    adapters = trained(init_adapters(jax.random.key(0), params, EVERY))
    found = logits(with_adapters(params, adapters, EVERY))
    merged = jax.jit(merge, static_argnums=2)(params, adapters, EVERY)
    assert_close(found, logits(merged), n_operations=10_000)
    assert np.abs(found - logits(params)).max() > 0.1


def test_a_decoder_with_adapters_reads_on_from_its_cache(family, backbone_of, logits, ids):
    backbone = backbone_of(family)
    params = with_adapters(backbone.params, trained(init_adapters(
        jax.random.key(0), backbone.params, EVERY)), EVERY)

    @jax.jit
    def extend(ids, cache):
        hidden, cache = backbone.model.apply({"params": params}, ids, cache, method="extend")
        return backbone.model.head(params).logits(hidden), cache

    found, cache = [], backbone.model.init_cache(2, 32)
    for t in range(0, T, CHUNK):
        part, cache = extend(ids[:, t:t + CHUNK], cache)
        found.append(part)
    expected = logits(params)
    found = np.concatenate(found, axis=1)[..., :expected.shape[-1]]
    assert_close(found, expected, n_operations=10_000)


@pytest.mark.parametrize("lora", [
    LoRA(3, 4.0, dropout=0.3, targets=("*",)),
    LoRA(3, 4.0, targets=("layers_1.attention.*", "layers_*.mlp.up"))], ids=("every", "some"))
def test_scanned_layers_learn_as_unrolled_ones(backbone_of, ids, lora):
    """With the same elements dropped, and where equal layers have unequal adapters."""
    backbone = backbone_of("llama")
    adapters = trained(init_adapters(jax.random.key(0), backbone.params, lora))

    def gradient(**settings):
        model = build_decoder(backbone.model.config, **settings)

        def loss(adapters, key):
            tree = with_adapters(backbone.params, adapters, lora)
            hidden, _, _ = model.apply({"params": tree}, batch_of(ids), train=True,
                                       rngs={"dropout": key}, method="forward")
            return cross_entropy(hidden, model.head(tree), ids, jnp.ones(ids.shape))[0]

        return jax.jit(jax.value_and_grad(loss))(adapters, jax.random.key(1))

    one, other = gradient(scan_layers=True, remat="full"), gradient(scan_layers=False)
    assert_close(one, other, n_operations=10_000)
    assert jax.tree.structure(one[1]) == jax.tree.structure(adapters)
    assert all(leaf.any() for leaf in jax.tree.leaves(one[1]))


def test_dropout_is_on_while_training_alone(backbone_of, ids):
    """In the layers, and around the streams of a Gemma-3n."""
    model, params = backbone_of("gemma3n").model, backbone_of("gemma3n").params
    targets = ("layers_1.attention.query", "per_layer_in", "streams_in_0", "streams_out_1")
    lora = LoRA(3, 4.0, dropout=0.4, targets=targets)
    adapters = trained(init_adapters(jax.random.key(0), params, lora))

    @functools.partial(jax.jit, static_argnums=2)
    def run(adapters, key, train):
        return model.apply({"params": with_adapters(params, adapters, lora)}, batch_of(ids),
                           train=train, rngs={"dropout": key}, method="forward")[0]

    key, other = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(adapters, key, False), run(adapters, other, False))
    for target in targets:
        only = unflatten_dict({
            path: leaf * (".".join(path[:-1]) == target)
            for path, leaf in flatten_dict(adapters).items()})
        assert jnp.abs(run(only, key, True) - run(only, key, False)).max() > 1e-3, target
        np.testing.assert_array_equal(run(only, key, True), run(only, key, True))
        assert (run(only, key, True) != run(only, other, True)).any(), target


def test_every_layer_drops_as_often_as_asked_and_for_itself(backbone_of, ids):
    """With W = 0 and A = B = 1 a query that is not rotated is what was left of the input."""
    model, params = backbone_of("llama").model, backbone_of("llama").params
    lora = LoRA(48, 48.0, dropout=0.3, targets=("layers_*.attention.query",))
    adapters = jax.tree.map(lambda leaf: jnp.eye(*leaf.shape), init_adapters(
        jax.random.key(0), params, lora))
    tree = unflatten_dict({
        path: 0 * leaf if path[-2:] == ("query", "kernel") else leaf
        for path, leaf in flatten_dict(with_adapters(params, adapters, lora)).items()})
    batch = batch_of(ids).replace(positions_BT=jnp.zeros_like(ids))
    _, out, _ = jax.jit(lambda key: model.apply(
        {"params": tree}, batch, train=True, rngs={"dropout": key}, method="forward"))(
            jax.random.key(1))
    dropped = [np.asarray(out[f"layers.{i}.attention.query"]) == 0 for i in (0, 1)]
    n = dropped[0].size
    for one in dropped:
        assert abs(one.mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5
    together = (dropped[0] & dropped[1]).mean()
    assert abs(together - 0.09) < 5 * (0.09 * 0.91 / n) ** 0.5


def test_dropout_without_a_random_stream_is_an_error(backbone_of, ids):
    lora = LoRA(2, dropout=0.1)
    model, params = backbone_of("llama").model, backbone_of("llama").params
    tree = with_adapters(params, init_adapters(jax.random.key(0), params, lora), lora)
    with pytest.raises(InvalidRngError, match="dropout"):
        jax.eval_shape(lambda: model.apply({"params": tree}, batch_of(ids), train=True,
                                           method="forward"))


def test_half_precision_is_near(backbone_of, ids):
    backbone = backbone_of("llama")
    half = build_decoder(backbone.model.config, compute_dtype="bfloat16")
    params = with_adapters(backbone.params, trained(init_adapters(
        jax.random.key(0), backbone.params, EVERY)), EVERY)
    (found, out), (exact, _) = (jax.jit(model.apply)({"params": tree}, ids) for model, tree in (
        (half, half.decode_params(params)), (backbone.model, params)))
    assert out["final"].dtype == jnp.bfloat16
    assert np.abs(found - exact).mean() < 0.05


def test_adapters_beside_matrices_are_not_written_as_a_model(backbone_of, tmp_path):
    backbone = backbone_of("llama")
    fresh = init_adapters(jax.random.key(0), backbone.params, EVERY)
    tree = with_adapters(backbone.params, fresh, EVERY)
    with pytest.raises(ConfigError, match="is an adapter") as caught:
        save_backbone(tmp_path / "new", Backbone(backbone.model, tree))
    assert "merge" in caught.value.hint and not list(tmp_path.iterdir())
