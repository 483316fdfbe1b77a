"""Interventions: arrays that change nothing keep every bit, and the others change what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla

from hippocampus.config import PATHS
from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.models.interventions import (
    CONTROLLER_MOVED,
    CONTROLLER_NORMAL,
    CONTROLLER_RANDOM,
    CONTROLLER_ZERO,
    Interventions,
    LayerInterventions,
    change_controller,
)
from hippocampus.testing import assert_close, check_causality, pack

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, L, P = 2, 24, 2, len(PATHS)
SSM, HOPFIELD, ATTENTION = range(P)
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, 31, jnp.int32)
PACKED = pack((9, 1, 11), B, T)
NEUTRAL = Interventions.neutral(L, B, T, 2)
OWN_BT = NEUTRAL.controller_source_BT
FEW = {"model.paths": ("hopfield", "attention"), "model.n_layers": 1}
FEW_NEUTRAL = Interventions.neutral(1, B, T, 2)


def batch_of(tokens, ids=None, positions=None):
    return Batch(tokens, tokens, jnp.ones(tokens.shape), ids, positions)


@functools.cache
def compiled(model):
    """(params, batch, interventions) -> final states and the intermediates of a forward pass."""
    @jax.jit
    def run(params, batch, interventions):
        hidden, out, _ = model.apply({"params": params}, batch, method="forward",
                                     interventions=interventions)
        names = [name for name in out if name.endswith((
            "gates", "hidden", ".out", "query", "controller.bias", "contribution"))]
        return hidden, {name: out[name] for name in names}

    return run


def hidden_of(model, params, interventions=NEUTRAL, tokens=TOKENS, packed=PACKED):
    return np.asarray(compiled(model)(params, batch_of(tokens, *packed), interventions)[0])


def differs(a, b):
    return bool((np.asarray(a) != np.asarray(b)).any())


def all_layers(*paths):
    """L,P: 1 for these paths."""
    return jnp.zeros((L, P)).at[:, jnp.asarray(paths)].set(1)


# ---------------------------------------------------------------- nothing changes

@pytest.fixture
def full_compiles():
    """With all optimisations, because they are what could change the bits."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


ONE = {"model.n_layers": 1}


@pytest.mark.parametrize(("passes", "packed", "overrides"), [
    (2, PACKED, ONE),
    (2, (None, None), {"model.scan_layers": True, "model.hopfield.step_size": 0.5,
                       "model.paths": ("hopfield", "attention")}),
    (1, PACKED, {"model.segments.train": 1, "model.hopfield.patterns": "both",
                 "model.paths": ("ssm", "hopfield")}),
    (3, PACKED, {**ONE, "model.segments.train": 3, "model.hopfield.patterns": "slots",
                 "model.segments.feedback": True, "model.paths": ("hopfield", "attention")}),
    pytest.param(2, PACKED, {}, marks=pytest.mark.full),
    pytest.param(2, PACKED, {"model.scan_layers": True}, marks=pytest.mark.full),
], ids=["all paths", "scan", "R=1", "R=3", "two layers", "two layers, scan"])
@pytest.mark.usefixtures("full_compiles")
def test_arrays_that_change_nothing_give_the_bits_of_the_plain_run(
        passes, packed, overrides, built):
    model, params = built(overrides)
    neutral = Interventions.neutral(model.config.n_layers, B, T, passes)
    # Everything is an argument: what XLA folds as a constant, it rounds in another way.
    run = jax.jit(lambda params, batch, interventions: model.apply(
        {"params": params}, batch, method="forward", interventions=interventions)[0],
        compiler_options=quick_xla.USUAL_EMITTERS)
    batch = batch_of(TOKENS, *packed)
    np.testing.assert_array_equal(run(params, batch, neutral), run(params, batch, Interventions()))


@pytest.mark.full
@pytest.mark.usefixtures("full_compiles")
def test_they_give_the_same_bits_in_a_model_of_real_size(built):
    """Where XLA's CPU library takes over whole chains of operations, what reads a value between
    them changes the chain and with it the rounding; without the library the bits are the same."""
    model, params = built({
        "model.d_model": 128, "model.n_heads": 4, "model.mlp.width": 256, "model.mixer.width": 32})
    rows, length = 32, 128
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, 31, jnp.int32)
    neutral = Interventions.neutral(L, rows, length, 2)

    def run(**options):
        program = jax.jit(lambda params, batch, interventions: model.apply(
            {"params": params}, batch, method="forward", interventions=interventions)[0], **options)
        return [np.asarray(program(params, batch_of(tokens), one))
                for one in (neutral, Interventions())]

    np.testing.assert_array_equal(
        *run(compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""}))
    assert_close(*run(), n_operations=length * 128)


def test_one_compilation_serves_every_intervention(built):
    model, params = built(FEW)
    traces, neutral = [], FEW_NEUTRAL

    @jax.jit
    def run(interventions):
        traces.append(0)
        return model.apply({"params": params}, batch_of(TOKENS), method="forward",
                           interventions=interventions)[0]

    mask = neutral.path_mask_LP.at[0, ATTENTION].set(0)
    changed = [
        neutral.replace(path_mask_LP=mask),
        neutral.replace(path_mask_LP=mask, renormalize=jnp.asarray(False)),
        neutral.replace(gate_override_LP=jnp.zeros((1, P)) + 0.7),
        neutral.replace(depth_L=jnp.asarray([7])),
        neutral.replace(shuffle_LP=jnp.ones((1, P)), source_PBT=neutral.source_PBT[..., ::-1]),
        *[neutral.replace(controller=jnp.int32(mode), controller_source_BT=OWN_BT[::-1],
                          controller_noise_BTC=jnp.ones((B, T, P))) for mode in (1, 2, 3)],
        neutral.replace(segments=jnp.int32(3))]
    results = [np.asarray(run(one)).tobytes() for one in (neutral, *changed)]
    assert len(traces) == 1
    assert len(set(results)) == len(results)


# ---------------------------------------------------------------- masks and gates

@pytest.mark.parametrize("path", PATHS)
def test_a_masked_path_is_gone(path, built):
    model, params = built()
    masked = NEUTRAL.replace(path_mask_LP=jnp.ones((L, P)).at[1, PATHS.index(path)].set(0))

    def shaken(layer):
        own = params[layer][path]
        return {**params, layer: {**params[layer], path: jax.tree.map(lambda a: a + 0.5, own)}}

    without = hidden_of(model, params, masked)
    np.testing.assert_array_equal(without, hidden_of(model, shaken("layers_1"), masked))
    assert differs(without, hidden_of(model, shaken("layers_0"), masked))
    assert differs(without, hidden_of(model, params))


def test_gates_of_the_paths_that_are_kept_sum_to_one_or_keep_their_values(built):
    model, params = built()
    run = compiled(model)
    mask = jnp.ones((L, P)).at[:, ATTENTION].set(0)

    def gates(**changes):
        out = run(params, batch_of(TOKENS, *PACKED), NEUTRAL.replace(**changes))[1]
        return np.asarray(out["segments.0.layers.0.mixer.gates"])

    plain, kept = gates(), gates(path_mask_LP=mask)
    raw = gates(path_mask_LP=mask, renormalize=jnp.asarray(False))
    np.testing.assert_array_equal(raw, plain * np.asarray(mask[0]))
    assert_close(kept, raw / raw.sum(-1, keepdims=True), n_operations=4)


def test_an_overridden_gate_is_the_one_that_counts(built):
    model, params = built()
    override = jnp.asarray([[1.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
    _, out = compiled(model)(params, batch_of(TOKENS, *PACKED),
                             NEUTRAL.replace(gate_override_LP=override))
    np.testing.assert_array_equal(out["layers.0.mixer.gates"],
                                  np.broadcast_to(override[0], (B, T, P)))
    second = out["layers.1.mixer.gates"]
    assert differs(second, np.broadcast_to(second[0, 0], (B, T, P)))


def test_a_layer_without_a_path_ignores_its_entries(built):
    model, params = built({"model.layer_paths": ("attention", "ssm+attention"),
                           "model.hopfield.depth_schedule": (1,), "model.segments.train": 1})
    plain = Interventions.neutral(L, B, T, 1)
    changed = plain.replace(
        path_mask_LP=jnp.ones((L, P)).at[0, SSM].set(0).at[:, HOPFIELD].set(0),
        shuffle_LP=all_layers(HOPFIELD), depth_L=jnp.asarray([3, 3]),
        source_PBT=plain.source_PBT[:, ::-1])
    np.testing.assert_array_equal(hidden_of(model, params, plain),
                                  hidden_of(model, params, changed))


# ---------------------------------------------------------------- retrieval depth

@pytest.mark.parametrize("patterns", ["context", "slots"])
def test_retrieval_makes_the_steps_that_it_is_told(patterns, built):
    """Gates that read the deepest state only: k steps are then those of a model with K = k."""
    overrides = {"model.paths": ("hopfield",), "model.hopfield.patterns": patterns,
                 "model.segments.train": 1, "model.hopfield.depth_schedule": (2,)}

    def deepest(K):
        model, params = built({**overrides, "model.hopfield.depth_schedule": (K,)})
        gate = {"kernel": jnp.zeros((16, K)), "bias": jnp.full(K, -1e9).at[-1].set(0)}
        params = {**built(overrides)[1]}
        for layer in ("layers_0", "layers_1"):
            params[layer] = {**params[layer], "hopfield": {**params[layer]["hopfield"],
                                                           "depth_gate": gate}}
        return model, params

    trained = deepest(2)
    neutral = Interventions.neutral(L, B, T, 1)
    found = {k: hidden_of(*trained, neutral.replace(depth_L=jnp.asarray([k, k])))
             for k in (0, 1, 2, 4)}
    np.testing.assert_array_equal(found[0], found[2])
    for k in (1, 4):
        assert differs(found[k], found[2])
        assert_close(found[k], hidden_of(*deepest(k), neutral), n_operations=T * 16)


def test_a_shallow_depth_reads_no_later_state(built):
    """Gates that read the first state only: further steps do not matter, nor do fewer."""
    model, params = built({"model.paths": ("hopfield",), "model.segments.train": 1})
    gate = {"kernel": jnp.zeros((16, 2)), "bias": jnp.asarray([0, -1e9])}
    params = {**params, **{layer: {**params[layer], "hopfield": {
        **params[layer]["hopfield"], "depth_gate": gate}} for layer in ("layers_0", "layers_1")}}
    neutral = Interventions.neutral(L, B, T, 1)
    for k in (1, 5):
        np.testing.assert_array_equal(
            hidden_of(model, params, neutral),
            hidden_of(model, params, neutral.replace(depth_L=jnp.asarray([k, k]))))


# ---------------------------------------------------------------- shuffles

@pytest.mark.parametrize("scan", [False, True])
def test_a_shuffled_path_is_read_from_elsewhere_and_only_by_the_mixer(scan, built):
    """Layer 0 reads another row's output; what the path itself computes there stays."""
    model, params = built({"model.scan_layers": scan, "model.segments.train": 1,
                           "model.n_layers": 1})
    neutral = Interventions.neutral(1, B, T, 1)
    source = neutral.source_PBT.at[ATTENTION].set(OWN_BT[::-1])
    moved = neutral.replace(shuffle_LP=jnp.zeros((1, P)).at[0, ATTENTION].set(1),
                            source_PBT=source)
    batch = batch_of(TOKENS, *PACKED)
    _, plain = compiled(model)(params, batch, neutral)
    _, out = compiled(model)(params, batch, moved)
    np.testing.assert_array_equal(out["layers.0.attention.out"], plain["layers.0.attention.out"])
    # What a path adds is |gate| times a norm of its own token alone.
    norm = {name: np.asarray(o["layers.0.mixer.contribution"] / o["layers.0.mixer.gates"])
            for name, o in (("plain", plain), ("moved", out))}
    np.testing.assert_array_equal(norm["moved"][..., SSM], norm["plain"][..., SSM])
    assert_close(norm["moved"][..., ATTENTION], norm["plain"][::-1, :, ATTENTION], n_operations=4)
    assert differs(norm["moved"][..., ATTENTION], norm["plain"][..., ATTENTION])


def test_a_shuffle_within_the_past_reads_no_future_token(built):
    model, params = built()
    earlier = jnp.maximum(OWN_BT % T - 3, 0) + OWN_BT // T * T
    moved = NEUTRAL.replace(shuffle_LP=jnp.ones((L, P)),
                            source_PBT=jnp.broadcast_to(earlier, (P, B, T)))
    check_causality(lambda tokens: compiled(model)(params, batch_of(tokens), moved)[0], TOKENS,
                    jit=False, positions=(0, 3, 9, T - 1))


def test_a_shuffle_that_does_not_say_from_where_is_refused():
    with pytest.raises(ConfigError, match="shuffle_LP needs source_PBT"):
        LayerInterventions(shuffle_P=jnp.ones(P)).move(SSM, jnp.zeros((B, T, 4)))


# ---------------------------------------------------------------- controller and passes

def bias_and_noise():
    """A bias of a lower rank than it has entries, as gates that share a direction have."""
    rng = np.random.default_rng(0)
    rows, length, C = 16, 128, L * P
    bias = rng.normal(size=(rows, length, 4)) @ rng.normal(size=(4, C)) + rng.normal(size=C)
    return (jnp.asarray(np.moveaxis(bias.reshape(rows, length, L, P), 2, 0), jnp.float32),
            jnp.asarray(rng.normal(size=(rows, length, C)), jnp.float32))


def test_the_controller_is_kept_silenced_moved_or_replaced_by_noise_of_its_moments():
    bias, noise = bias_and_noise()
    rows, length = noise.shape[:2]
    weight = jnp.ones((rows, length)).at[:, 100:].set(0)
    bias = bias.at[:, :, 100:].set(1e3)  # of tokens that do not count
    source = jnp.arange(rows * length).reshape(rows, length)[::-1]

    def changed(mode):
        return np.asarray(jax.jit(change_controller)(bias, Interventions(
            controller=jnp.asarray(mode), controller_source_BT=source,
            controller_noise_BTC=noise), weight))

    np.testing.assert_array_equal(changed(CONTROLLER_NORMAL), bias)
    np.testing.assert_array_equal(changed(CONTROLLER_ZERO), np.zeros_like(bias))
    np.testing.assert_array_equal(changed(CONTROLLER_MOVED), bias[:, ::-1])
    random = np.moveaxis(changed(CONTROLLER_RANDOM), 0, 2).reshape(-1, L * P)
    counted = np.moveaxis(np.asarray(bias), 0, 2)[:, :100].reshape(-1, L * P)
    np.testing.assert_allclose(random.mean(0), counted.mean(0), atol=0.2)
    np.testing.assert_allclose(np.cov(random.T), np.cov(counted.T), atol=0.8)
    assert abs(np.cov(counted.T)).max() > 5 and differs(random[:10], counted[:10])


def test_moments_are_exact_where_the_noise_is():
    """Noise with mean 0 and covariance 1 in the batch itself leaves no sampling error."""
    bias, noise = bias_and_noise()
    flat = np.asarray(noise, np.float64).reshape(-1, L * P)
    flat = (flat - flat.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(flat.T, ddof=0))).T
    random = change_controller(bias, Interventions(
        controller=CONTROLLER_RANDOM, controller_source_BT=jnp.zeros(noise.shape[:2], jnp.int32),
        controller_noise_BTC=jnp.asarray(flat.reshape(noise.shape), jnp.float32)),
        jnp.ones(noise.shape[:2]))
    random, own = (np.moveaxis(np.asarray(a, np.float64), 0, 2).reshape(-1, L * P)
                   for a in (random, bias))
    np.testing.assert_allclose(random.mean(0), own.mean(0), atol=1e-4)
    np.testing.assert_allclose(np.cov(random.T), np.cov(own.T), atol=2e-3)


def test_a_controller_that_is_changed_needs_its_arrays():
    with pytest.raises(ConfigError, match="controller needs controller_source_BT"):
        change_controller(bias_and_noise()[0], Interventions(controller=1), jnp.ones((16, 128)))


def test_a_silenced_controller_leaves_a_second_pass_that_repeats_the_first(built):
    model, params = built()
    found = {(r, mode): hidden_of(model, params, NEUTRAL.replace(
        segments=jnp.int32(r), controller=jnp.int32(mode)))
        for r, mode in ((1, 0), (1, 1), (2, 0), (2, 1))}
    np.testing.assert_array_equal(found[1, 0], found[1, 1])
    assert_close(found[2, 1], found[1, 0], n_operations=T * 16)
    assert np.abs(found[2, 0] - found[1, 0]).max() > 1e-3


def test_any_number_of_passes_can_be_chosen(built):
    model, params = built(FEW)
    for r in (1, 3):
        alone = built({**FEW, "model.segments.train": r})[0]
        own = {name: tree for name, tree in params.items() if r > 1 or name != "reasoner"}
        assert_close(hidden_of(model, params, FEW_NEUTRAL.replace(segments=jnp.int32(r))),
                     hidden_of(alone, own, Interventions()), n_operations=T * 16)


def test_names_belong_to_the_last_trained_pass_whichever_is_chosen(built):
    model, params = built(FEW)
    batch = batch_of(TOKENS, *PACKED)
    plain = compiled(model)(params, batch, Interventions())[1]
    for r in (1, 3):
        _, out = compiled(model)(params, batch, FEW_NEUTRAL.replace(segments=jnp.int32(r)))
        assert set(out) - set(plain) == {"segments.2.hidden", "segments.2.controller.bias"}
        for name in ("layers.0.mixer.gates", "segments.0.layers.0.mixer.gates"):
            assert_close(out[name], plain[name], n_operations=T * 16)
