"""One optimizer step of an equilibrium model: what it carries, leaves out, and keeps equal."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.models.build_model import build_model
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.sharding import path_name
from hippocampus.training.state import TrainState, init_state
from hippocampus.training.step import train_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

# No state space: what compiles fast. No token converges to 1e-8 in three sweeps, but before the
# curriculum is over, at step 3, no step is left out for that. A large epsilon, because Adam's root
# would blow up the last bits of tiny gradients.
FAST: dict[str, Any] = {
    "model__family": "equilibrium", "model__n_layers": 0, "model__cell__parts": ("hopfield", "mlp"),
    "model__solver__method": "picard", "model__solver__max_iterations": 3,
    "model__solver__gradient": "phantom", "model__solver__warm_start": "stream",
    "model__solver__tol_fixedpoint": 1e-8, "model__solver__on_expansion": "skip",
    "model__solver__ramp_fraction": 0.25, "data__order": "streams", "ema__decay": 0.0,
    "optimizer__epsilon": 1.0, "optimizer__clip_norm": 0.0}


@functools.cache
def parts(**changes: Any):
    """(jitted step without donation, first state) of the tiny equilibrium model."""
    config, _ = resolve(tiny_run.config(**{**FAST, **changes}))
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    return jax.jit(train_step(model, optimizer, config)), state


def a_batch(step: int = 0) -> Batch:
    """Rows of unequal weight, which go on from batch to batch."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 256, (8, 17)).astype(np.int32)
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]),
                 jnp.asarray(draw.integers(0, 2, (8, 16)), jnp.float32),
                 reset_B=jnp.full(8, step == 0))


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=path_name(path))


def test_micro_batches_give_what_one_big_batch_gives_and_carry_the_same_rows():
    step, state = parts()
    split, same = parts(train__grad_accumulation=4)
    assert tiny_run.digest(same) == tiny_run.digest(state)
    for n in range(2):
        (state, whole), (same, cut) = step(state, a_batch(n)), split(same, a_batch(n))
        assert set(whole) == set(cut)
        assert_close(whole, cut, 1e-5)
        assert_close(state.params, same.params, 1e-6)
        assert_close(state.carried, same.carried, 1e-5)
        assert np.abs(state.carried["z_last"]).max() > 0.1


def test_a_row_that_goes_on_begins_where_it_ended_and_one_that_does_not_begins_anew():
    step, state = parts()
    state, _ = step(state, a_batch(0))
    other = state.replace(carried=jax.tree.map(lambda a: -a, state.carried))
    on = a_batch(1)
    anew = on.replace(reset_B=jnp.ones(8, bool))
    residuals = [float(step(s, b)[1]["solver/residual"]) for s in (state, other)
                 for b in (on, anew)]
    assert residuals[0] != residuals[2] and residuals[1] == residuals[3]


def test_what_is_carried_stays_in_the_state_and_in_a_checkpoint_s_trees():
    _, state = parts()
    trees = state.trees()
    assert set(trees) == {"params", "optimizer", "guard", "progress", "carried"}
    assert set(parts(model__solver__warm_start="none")[1].trees()) == set(trees) - {"carried"}
    back = TrainState.from_trees(trees, state)
    assert tiny_run.digest(back) == tiny_run.digest(state)
    # A checkpoint from before the model carried anything: it begins with nothing.
    del trees["carried"]
    assert tiny_run.digest(TrainState.from_trees(trees, state)) == tiny_run.digest(state)


def test_a_step_that_does_not_converge_is_left_out_where_the_rule_says_so():
    step, state = parts()
    early, metrics = step(state, a_batch())
    assert metrics["train/skipped"] == 0 and metrics["solver/converged"] == 0
    late, metrics = step(early.replace(step=jnp.int32(3)), a_batch(1))
    assert metrics["train/skipped"] == 1 and metrics["solver/converged"] == 0
    for part in ("params", "opt_state", "carried"):
        assert tiny_run.digest(getattr(late, part)) == tiny_run.digest(getattr(early, part))
    assert int(late.step) == 4


def test_a_row_that_goes_on_from_nothing_begins_at_zeros():
    """As after a roll-back, whose checkpoint belongs to batches that are left out."""
    step, state = parts()
    after, metrics = step(state, a_batch(1))
    assert metrics["train/skipped"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, after.carried)))
