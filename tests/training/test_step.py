"""One optimizer step: its numbers, and the laws it keeps."""

import functools
import json
import math
import re

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from make_golden_step import TABLE, machine, measure

from hippocampus.config import OptimizerConfig
from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.training import sharding
from hippocampus.training.optimizer import (
    build_optimizer,
    decay_mask,
    learning_rate_schedule,
    path_name,
)
from hippocampus.training.state import TrainState, ema_decay, init_state
from hippocampus.training.step import jit_train_step, sharded_init, train_step

# ---------------------------------------------------------------- golden numbers

UPDATE = ("the numbers of a training step moved. If that was meant (another initialisation, loss, "
          "optimizer or model), run `python tests/training/make_golden_step.py`, look at the "
          "difference and commit it with the reason; if not, this is a bug")


def test_training_step_gives_the_golden_numbers():
    table = json.loads(TABLE.read_text())
    found = measure()
    assert found == pytest.approx(table["metrics"], rel=1e-4), UPDATE
    if table["machine"] == machine():
        assert found == table["metrics"], f"to the last bit: {UPDATE}"


# ---------------------------------------------------------------- laws of a step

DECAY = 0.15
# A large epsilon, because Adam's root would blow up the last bits of tiny gradients.
UNCLIPPED = {"optimizer__epsilon": 1.0, "optimizer__clip_norm": 0.0}


@functools.cache
def parts(**changes):
    """(jitted step without donation, first state, config) of the tiny attention model."""
    config, _ = resolve(tiny_run.config(**{
        "ema__decay": DECAY, "optimizer__clip_norm": 1e-3, **changes}))
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    state = jax.jit(lambda: init_state(model, optimizer, config))()
    return jax.jit(train_step(model, optimizer, config)), state, config


def a_batch(step: int = 0, weights: bool = False) -> Batch:
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 256, (8, 17)).astype(np.int32)
    weight = draw.integers(0, 2, (8, 16)) if weights else np.ones((8, 16))
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]),
                 jnp.asarray(weight, jnp.float32))


def assert_close(one, other, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=path_name(path))


def test_micro_batches_give_what_one_big_batch_gives():
    # Rows of unequal weight, which an average of averages would get wrong.
    step, state, _ = parts(**UNCLIPPED)
    split, same, _ = parts(train__grad_accumulation=4, **UNCLIPPED)
    assert tiny_run.digest(same) == tiny_run.digest(state)
    batch = a_batch(weights=True)
    (big, whole), (small, cut) = step(state, batch), split(state, batch)
    assert set(whole) == set(cut)
    assert_close(whole, cut, 1e-5)
    assert_close(big.params, small.params, 1e-6)
    assert_close(big.opt_state[1][0].mu, small.opt_state[1][0].mu, 1e-6)


def test_loss_is_the_mean_over_weighted_tokens_only():
    step, state, _ = parts(**UNCLIPPED)
    batch = a_batch(weights=True)
    nonsense = batch.replace(targets_BT=jnp.where(batch.loss_weight_BT > 0, batch.targets_BT, 3))
    one, other = (float(step(state, b)[1]["train/loss"]) for b in (batch, nonsense))
    assert one == other
    doubled = batch.replace(loss_weight_BT=2 * batch.loss_weight_BT)
    assert_close(step(state, batch)[0].params, step(state, doubled)[0].params, 1e-6)


def test_batch_without_a_counted_token_teaches_nothing_and_breaks_nothing():
    step, state, _ = parts()
    new, metrics = step(state, a_batch().replace(loss_weight_BT=jnp.zeros((8, 16))))
    assert metrics["train/loss"] == metrics["train/grad_norm"] == metrics["train/skipped"] == 0
    assert not jax.tree.reduce(
        jnp.logical_or, jax.tree.map(jnp.any, new.opt_state[1][0].mu))
    assert all(jax.tree.leaves(jax.tree.map(lambda a: np.isfinite(a).all(), new.params)))


@pytest.mark.parametrize(("name", "vocabulary"), [
    ("everything", 1), pytest.param("packed", 1, marks=pytest.mark.full),
    pytest.param("everything", 256, marks=pytest.mark.full)])
def test_one_token_and_one_id_train_without_what_is_not_finite(name, vocabulary):
    step, state, _ = parts(**{
        **eight_devices.MODELS[name], "data__context": 1, "model__vocab_size": vocabulary,
        "train__grad_accumulation": 1, "mesh__sequence": 1})
    zero = jnp.zeros((8, 1), jnp.int32)
    for weight in (1.0, 0.0):
        state, metrics = step(state, Batch(zero, zero, jnp.full((8, 1), weight), document_ids_BT=(
            zero if name == "packed" else None)))
        for path, leaf in jax.tree.leaves_with_path((metrics, state.params, state.opt_state)):
            assert np.isfinite(leaf).all(), path_name(path)
    assert int(state.guard["skipped"]) == 0
    assert vocabulary > 1 or metrics["train/loss"] == 0


def test_dropout_is_a_function_of_seed_and_step():
    step, state, _ = parts(model__dropout=0.5)
    later = state.replace(step=state.step + 1)
    other = state.replace(key=jax.random.key(99))
    first, again, second, third = (
        float(step(s, a_batch())[1]["train/loss"]) for s in (state, state, later, other))
    assert first == again
    assert len({first, second, third}) == 3


def test_first_state_is_a_function_of_the_seed():
    first, again, other = (parts(train__seed=seed)[1] for seed in (0, 0, 1))
    assert tiny_run.digest(first) == tiny_run.digest(again) == tiny_run.digest(parts()[1])
    assert tiny_run.digest(first.params) != tiny_run.digest(other.params)


def test_average_follows_its_formula():
    step, state, _ = parts()
    wanted = jax.tree.map(np.asarray, state.params)
    assert_close(state.ema, wanted, 0)
    for t in range(3):
        state, _ = step(state, a_batch(t))
        mu = min(DECAY, (1 + t) / (10 + t))
        wanted = jax.tree.map(lambda e, p, mu=mu: mu * e + (1 - mu) * np.asarray(p), wanted,
                              state.params)
        assert_close(state.ema, wanted, 1e-6)
    assert [float(ema_decay(DECAY, jnp.asarray(t))) for t in (0, 1, 90)] == pytest.approx(
        [0.1, 0.15, 0.15])


def test_without_an_average_none_is_kept():
    _, state, _ = parts(ema__decay=0.0)
    assert state.ema == {} and "ema" not in state.trees()
    assert TrainState.from_trees(state.trees()) == state


def test_trees_of_a_checkpoint_are_the_whole_state():
    _, state, _ = parts()
    assert set(state.trees()) == {"params", "ema", "optimizer", "progress", "guard"}
    assert tiny_run.digest(TrainState.from_trees(state.trees())) == tiny_run.digest(state)


def test_step_takes_over_the_buffers_of_the_old_state():
    config, _ = resolve(tiny_run.config())
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    make, _, shardings = sharded_init(model, optimizer, config, mesh)
    state = make()
    new, _ = jit_train_step(train_step(model, optimizer, config), mesh, shardings)(state, a_batch())
    old = [*jax.tree.leaves(state.params), *jax.tree.leaves(state.ema),
           *jax.tree.leaves(state.opt_state[1][0].mu), *jax.tree.leaves(state.opt_state[1][0].nu)]
    assert all(leaf.is_deleted() for leaf in old)
    assert int(new.step) == 1 and not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_metrics_are_float32_scalars_with_slash_names():
    _, metrics = parts()[0](parts()[1], a_batch())
    assert {"train/loss", "train/grad_norm", "train/learning_rate",
            "mixer/gate/attention"} <= set(metrics)
    for name, value in metrics.items():
        assert "/" in name and value.shape == () and value.dtype == jnp.float32, name


# ---------------------------------------------------------------- the optimizer

MODELS = [
    {"model__paths": ("ssm", "hopfield", "attention"), "model__hopfield__depth_schedule": (2,)},
    {"model__paths": ("ssm", "hopfield"), "model__hopfield__patterns": "both",
     "model__ssm__kind": "diagonal", "model__ssm__input_scale": True, "model__mlp__kind": "gelu",
     "model__tie_embeddings": False, "model__segments__train": 2, "model__segments__feedback": True,
     "loss__rectified_flow__segment_weight": 0.1},
    {"model__position": "learned"},
]


@pytest.mark.parametrize("changes", MODELS)
def test_matrices_decay_and_nothing_else_does(changes):
    config = tiny_run.config(**changes)
    shapes = parameter_shapes(build_model(config))
    mask = decay_mask(shapes, config.optimizer.no_decay)
    names = {path_name(path): decays for path, decays in jax.tree.leaves_with_path(mask)}
    spared = re.compile(r"(bias|scale|decay|log_beta|skip|log_\w+)$")
    for name, decays in names.items():
        assert decays == (not spared.search(name)), name
        if name.endswith(("kernel", "embedding", "head", "slots")):
            assert decays, name
    assert sum(names.values()) > 5 and len(names) - sum(names.values()) > 5


def test_only_what_the_mask_names_shrinks():
    config = OptimizerConfig(weight_decay=0.5, learning_rate=0.1, warmup_steps=0,
                             schedule="constant", no_decay=("bias$", "^frozen/"))
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
              "frozen": {"kernel": jnp.ones(2)}}
    optimizer = build_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["layer"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(new["layer"]["bias"], 1)
    np.testing.assert_array_equal(new["frozen"]["kernel"], 1)


def rates(steps: int, **fields) -> list[float]:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **fields), steps)
    return [float(schedule(jnp.asarray(step))) for step in range(steps)]


def test_cosine_warms_up_linearly_and_ends_at_its_final_scale():
    found = rates(12, schedule="cosine", warmup_steps=4, final_scale=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    wanted = [0.2 + 1.8 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(1, 9)]
    assert found[4:] == pytest.approx(wanted, rel=1e-5)
    assert found[-1] == pytest.approx(0.2)


def test_wsd_is_flat_then_linear():
    found = rates(20, schedule="wsd", warmup_steps=4, decay_fraction=0.25, final_scale=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:15] == pytest.approx([2.0] * 11)
    assert found[15:] == pytest.approx([1.64, 1.28, 0.92, 0.56, 0.2], rel=1e-5)


def test_constant_stays_at_the_peak():
    assert rates(8, schedule="constant", warmup_steps=2) == pytest.approx([1.0] + [2.0] * 7)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_warm_up_starts_at_the_peak(schedule):
    found = rates(10, schedule=schedule, warmup_steps=0, final_scale=0.5)
    assert found[0] == pytest.approx(2.0) and min(found) >= 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_longer_than_the_run_is_cut_off(schedule):
    assert rates(4, schedule=schedule, warmup_steps=8) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_logged_learning_rate_is_the_one_applied():
    step, state, config = parts()
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    nonsense = a_batch().replace(loss_weight_BT=jnp.full((8, 16), jnp.nan))
    for updates, batch in ((0, a_batch()), (1, a_batch()), (2, nonsense), (2, a_batch())):
        state, metrics = step(state, batch)
        assert float(metrics["train/learning_rate"]) == pytest.approx(float(schedule(updates)))


@pytest.mark.parametrize(("clip", "norm"), [(0.5, 0.5), (0.0, 5.0), (7.0, 5.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, norm):
    config = OptimizerConfig(clip_norm=clip, beta1=0.9, warmup_steps=0)
    optimizer = build_optimizer(config, 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.asarray([3.0]), "b": jnp.asarray([-4.0])}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moment = state[1][0].mu
    assert float(optax.tree.norm(moment)) == pytest.approx(0.1 * norm, rel=1e-5)
    assert float(moment["a"][0] / moment["b"][0]) == pytest.approx(-0.75)


def test_logged_gradient_norm_is_the_one_before_clipping():
    loose, state, _ = parts(**UNCLIPPED)
    tight, _, _ = parts()
    one, other = (float(step(state, a_batch())[1]["train/grad_norm"]) for step in (loose, tight))
    assert one == other > 1e-2
