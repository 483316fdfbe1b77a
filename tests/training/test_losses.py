"""The training loss against its formulas: what is summed, what is weighed, what is cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import SegmentsConfig
from hippocampus.data.batches import Batch
from hippocampus.models.build_model import build_model
from hippocampus.testing import assert_close
from hippocampus.training.losses import segment_weights, training_loss
from hippocampus.training.rectified_flow import depth_straightness, segment_flow

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, V = 2, 24, 31
KEY = jax.random.key(5)


def a_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, V, (2, B, T)).astype(np.int32)
    weight = rng.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32)
    return Batch(tokens, targets, weight)


@pytest.fixture(scope="module")
def losses(tiny_config, random_parameters):
    """(overrides, batch) -> (loss, sums, states of every pass, head, out) of a small model."""
    small = {"model.n_layers": 1, "model.paths": ("ssm", "attention"), "loss.backend": "full"}

    @functools.cache
    def build(items):
        config = tiny_config({**small, **dict(items)})
        model = build_model(config)
        params = random_parameters(model)

        @jax.jit
        def run(batch):
            total, (sums, out, _) = training_loss(model, params, batch, KEY, config)
            kept = ("segments.hidden", "segments.0.hidden", "segments.1.hidden", "embedding",
                    "layers.0.residual", "layers.1.residual")
            return total, sums, {name: out[name] for name in kept if name in out}

        return run, model.head(params)

    def call(overrides, batch):
        run, head = build(tuple(overrides.items()))
        return *run(batch), head

    return call


def formulas(states, head, batch):
    """nll, smoothing and z of one pass as sums over tokens, in float64."""
    logits = np.asarray(states, np.float64) @ np.asarray(head.weight_VD, np.float64)[:V].T
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    nll = -np.take_along_axis(log_p, np.asarray(batch.targets_BT)[..., None], -1)[..., 0]
    w = batch.loss_weight_BT
    return {"nll": (w * nll).sum(), "smoothing": -(w * log_p.mean(-1)).sum(),
            "z": (w * log_z**2).sum()}


# ---------------------------------------------------------------- the weights of the passes

@pytest.mark.parametrize(("train", "weights", "expected"), [
    (1, (1.0,), (1.0,)),
    (1, (0.3, 1.0), (1.0,)),
    (2, (0.3, 1.0), (0.3, 1.0)),
    (2, (1.0,), (0.0, 1.0)),
    (3, (0.3, 1.0), (0.0, 0.3, 1.0)),
    (2, (0.1, 0.2, 0.7), (0.2, 0.7)),
    (4, (2.0,), (0.0, 0.0, 0.0, 2.0)),
])
def test_weights_of_passes_are_aligned_with_the_last_one(train, weights, expected):
    assert segment_weights(SegmentsConfig(train=train, weights=weights)) == expected


# ---------------------------------------------------------------- the sums

@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_the_loss_is_the_weighted_sum_of_the_terms_of_every_pass(losses, backend):
    eps, z = 0.1, 0.01
    batch = a_batch()
    total, sums, out, head = losses({
        "loss.label_smoothing": eps, "loss.z_weight": z, "loss.backend": backend}, batch)
    passes = [formulas(states, head, batch) for states in out["segments.hidden"]]
    expected = sum(w * ((1 - eps) * p["nll"] + eps * p["smoothing"] + z * p["z"])
                   for w, p in zip((0.3, 1.0), passes, strict=True))
    assert_close(total, expected, n_operations=B * T * V)
    terms = {**passes[1], "nll_segment_1": passes[0]["nll"], "total": expected,
             "weight": batch.loss_weight_BT.sum()}
    assert_close(sums, terms, n_operations=B * T * V)


def test_a_loss_is_a_sum_over_tokens_not_a_mean(losses):
    batch = a_batch()
    total, sums, *_ = losses({}, batch)
    twice = dataclasses.replace(batch, loss_weight_BT=2 * batch.loss_weight_BT)
    assert_close(losses({}, twice)[0], 2 * total, n_operations=B * T)
    halves = [dataclasses.replace(batch, loss_weight_BT=batch.loss_weight_BT * part)
              for part in (np.arange(T) < 10, np.arange(T) >= 10)]
    assert_close(sum(losses({}, half)[0] for half in halves), total, n_operations=B * T)
    assert float(sums["weight"]) == batch.loss_weight_BT.sum()


def test_targets_of_weight_zero_do_not_count(losses):
    batch = a_batch()
    unseen = batch.loss_weight_BT == 0
    assert unseen.any()
    changed = dataclasses.replace(
        batch, targets_BT=np.where(unseen, (batch.targets_BT + 1) % V, batch.targets_BT))
    np.testing.assert_array_equal(losses({}, changed)[0], losses({}, batch)[0])
    counted = dataclasses.replace(
        batch, targets_BT=np.where(unseen, batch.targets_BT, (batch.targets_BT + 1) % V))
    assert float(losses({}, counted)[0]) != float(losses({}, batch)[0])


@pytest.mark.parametrize(("gradient", "passes_back"), [("stop", 1), ("full", 2)])
def test_a_pass_that_learns_nothing_costs_no_backward_pass(
        gradient, passes_back, tiny_config, random_parameters):
    def products(overrides):
        config = tiny_config({"model.d_model": 64, "model.n_layers": 1, "model.mlp.width": 1024,
                              "model.paths": ("ssm", "attention"), "loss.backend": "full",
                              **overrides})
        model = build_model(config)
        loss = jax.grad(lambda params: training_loss(model, params, a_batch(), KEY, config)[0])
        compiled = jax.jit(loss).lower(random_parameters(model)).compile()
        return compiled.cost_analysis()["flops"]

    one = products({"model.segments.train": 1})
    two = products({"model.segments.train": 2, "model.segments.weights": (1.0,),
                    "model.segments.gradient": gradient})
    # A forward pass and a backward pass of two products for each of its products.
    assert two / one == pytest.approx((2 + 2 * passes_back) / 3, rel=0.1)


def test_unsupervised_passes_and_absent_terms_are_not_reported(losses):
    _, sums, out, head = losses({"model.segments.weights": (1.0,)}, a_batch())
    assert set(sums) == {"weight", "nll", "total"}
    assert_close(sums["nll"], formulas(out["segments.hidden"][1], head, a_batch())["nll"],
                 n_operations=B * T * V)


def test_the_flow_terms_are_added_with_their_weights(losses):
    batch = a_batch()
    total, sums, out, _ = losses({
        "loss.rectified_flow.segment_weight": 0.5, "loss.rectified_flow.depth_weight": 0.25,
        "model.n_layers": 2, "model.paths": ("attention",)}, batch)
    ce = 0.3 * sums["nll_segment_1"] + sums["nll"]
    assert_close(total, ce + 0.5 * sums["flow_segment"] + 0.25 * sums["flow_depth"],
                 n_operations=B * T)
    states = [out[name] for name in ("embedding", "layers.0.residual", "layers.1.residual")]
    assert_close(sums["flow_depth"], (batch.loss_weight_BT * straightness(states)).sum(),
                 n_operations=B * T * V)
    assert float(sums["flow_segment"]) > 0


# ---------------------------------------------------------------- rectified flow

def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rms(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def straightness(states):
    h = np.stack([np.asarray(s, np.float64) for s in states])
    n = len(h) - 1
    off = sum(((h[i] - ((1 - i / n) * h[0] + i / n * h[n])) ** 2).sum(-1) for i in range(1, n))
    return off / (((h[n] - h[0]) ** 2).sum(-1) + 1e-4 * (h[0] ** 2).sum(-1) + 1e-6)


FIRST, LAST = normal(B, 3, 8, seed=1), normal(B, 3, 8, seed=2)
TAU = jax.random.uniform(jax.random.key(0), (B, 3))


def test_the_segment_flow_is_that_of_the_formula():
    def velocity(x, tau):
        return 0.5 * x + tau[..., None]

    x0, x1, tau = rms(FIRST), rms(LAST), np.asarray(TAU, np.float64)[..., None]
    miss = 0.5 * ((1 - tau) * x0 + tau * x1) + tau - (x1 - x0)
    expected = (miss**2).sum(-1) / (((x1 - x0) ** 2).sum(-1) + 1e-4 * 8)
    assert_close(segment_flow(velocity, FIRST, LAST, TAU), expected, n_operations=8)


def test_a_perfect_velocity_has_no_loss():
    move = jnp.asarray(rms(LAST) - rms(FIRST), jnp.float32)
    assert float(segment_flow(lambda x, tau: move, FIRST, LAST, TAU).max()) < 1e-10
    assert float(segment_flow(lambda x, tau: 0 * x, FIRST, LAST, TAU).min()) > 0.99


def test_the_segment_flow_trains_the_velocity_and_not_the_passes():
    def loss(first, last, scale):
        return segment_flow(lambda x, tau: scale * x, first, last, TAU).sum()

    into_first, into_last, into_velocity = jax.grad(loss, (0, 1, 2))(FIRST, LAST, 0.3)
    assert not np.asarray(into_first).any() and not np.asarray(into_last).any()
    assert float(into_velocity) != 0


@pytest.mark.parametrize("n", [3, 4, 6])
def test_depth_straightness_is_that_of_the_formula(n):
    states = [normal(B, 3, 8, seed=i) for i in range(n)]
    assert_close(depth_straightness(states), straightness(states), n_operations=8 * n)


def test_a_straight_path_has_no_loss():
    states = [(1 - share) * FIRST + share * LAST for share in np.linspace(0, 1, 5)]
    assert float(depth_straightness(states).max()) < 1e-10
    bent = [*states[:2], states[2] + 1.0, *states[3:]]
    assert float(depth_straightness(bent).min()) > 0.1


def test_two_states_are_always_straight():
    assert not np.asarray(depth_straightness([FIRST, LAST])).any()


def test_the_ends_of_a_path_get_no_gradient():
    states = [normal(B, 3, 8, seed=i) for i in range(4)]
    gradients = jax.grad(lambda states: depth_straightness(states).sum())(states)
    assert [bool(np.asarray(g).any()) for g in gradients] == [False, True, True, False]


def test_a_path_that_does_not_move_has_a_finite_loss_and_gradient():
    def both(first, middle):
        flow = segment_flow(lambda x, tau: 0.1 * x, first, first, TAU)
        return (flow + depth_straightness([first, middle, first])).sum()

    for first in (FIRST, FIRST * 0):
        value, gradients = jax.value_and_grad(both, (0, 1))(first, first)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    value = segment_flow(lambda x, tau: 0 * x, FIRST, FIRST, TAU)
    assert not np.asarray(value).any()
