"""Bad steps are skipped whole, are counted, and latch; spikes are told from noise."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from eight_devices import on_eight_devices
from guard_on_devices import POISONS, Poisoned

from hippocampus.config import GuardConfig
from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.models.build_model import build_model
from hippocampus.training import sharding
from hippocampus.training.guard import first_guard, judge, released, statistics_of
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.state import TrainState, init_state
from hippocampus.training.step import jit_train_step, sharded_init, train_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

PATIENCE = 3
SPIKE_WINDOW = 8


@functools.cache
def parts(**changes):
    """(jitted step without donation, first state) of the tiny attention model, poisoned."""
    config, _ = resolve(tiny_run.config(**{
        "guard__patience": PATIENCE, "guard__spike_sigmas": 6.0,
        "guard__spike_window": SPIKE_WINDOW, **changes}))
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    model = Poisoned(model)
    state = jax.jit(lambda: init_state(model, optimizer, config))()
    return jax.jit(train_step(model, optimizer, config)), state


def a_batch(seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 250, (8, 17)).astype(np.int32)
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.ones((8, 16)))


def one_entry(field: str, value: float) -> Batch:
    """A good batch with one bad entry."""
    batch = a_batch()
    return batch.replace(**{field: getattr(batch, field).at[3, 5].set(value)})


def what_is_trained(state: TrainState) -> str:
    return tiny_run.digest((state.params, state.ema, state.opt_state, state.key))


def counts(state: TrainState) -> tuple[int, int, int]:
    return (int(state.step), int(state.guard["skipped"]), int(state.guard["in_a_row"]))


BROKEN = [("loss_weight_BT", np.nan), ("loss_weight_BT", np.inf), ("loss_weight_BT", -1.0),
          ("tokens_BT", -1), ("tokens_BT", 256), ("targets_BT", -1), ("targets_BT", 256),
          ("targets_BT", 2**31 - 1)]


@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_batch_with_one_broken_entry_changes_no_bit_of_what_is_trained(field, value):
    step, state = parts()
    state, _ = step(state, a_batch())
    before = what_is_trained(state)
    state, metrics = step(state, one_entry(field, value))
    assert what_is_trained(state) == before
    assert counts(state) == (2, 1, 1)
    assert (float(metrics["train/skipped"]), float(metrics["train/skipped_in_a_row"])) == (1, 1)
    state, metrics = step(state, a_batch(1))
    assert what_is_trained(state) != before
    assert counts(state) == (3, 1, 0)
    assert (float(metrics["train/skipped"]), float(metrics["train/skipped_in_a_row"])) == (1, 0)
    assert int(optax.tree.get_all_with_path(state.opt_state, "count")[0][1]) == 2


def test_good_steps_are_never_skipped():
    step, state = parts()
    for n in range(3):
        state, _ = step(state, a_batch(n))
    assert counts(state) == (3, 0, 0)


def test_enough_skips_in_a_row_latch_until_the_guard_is_released():
    step, state = parts()
    bad, before = one_entry("tokens_BT", -1), what_is_trained(state)
    for batch in (*[bad] * PATIENCE, a_batch(), a_batch()):
        state, _ = step(state, batch)
    assert what_is_trained(state) == before and counts(state) == (5, 5, 5)
    state, _ = step(state.replace(guard=released(state.guard)), a_batch())
    assert what_is_trained(state) != before and counts(state) == (6, 5, 0)


def test_fewer_skips_in_a_row_than_the_patience_do_not_latch():
    step, state = parts()
    bad = one_entry("tokens_BT", -1)
    for batch in (bad, bad, a_batch(), bad, bad, a_batch()):
        state, _ = step(state, batch)
    assert counts(state) == (6, 4, 0)


@pytest.mark.parametrize("changes", [{}, {"train__grad_accumulation": 4}])
@pytest.mark.parametrize("poison", [251, 252, 254, 255])
def test_loss_or_gradient_that_is_not_finite_changes_no_bit_of_what_is_trained(poison, changes):
    step, state = parts(**changes)
    state, _ = step(state, a_batch())
    before = what_is_trained(state)
    state, metrics = step(state, one_entry("tokens_BT", poison))
    assert what_is_trained(state) == before and counts(state) == (2, 1, 1)
    assert np.isfinite(metrics["train/loss"]) == (POISONS[poison][0] == "gradient")
    assert not np.isfinite(metrics["train/grad_norm"])
    state, _ = step(state, a_batch(1))
    assert what_is_trained(state) != before and counts(state) == (3, 1, 0)


def test_skipped_step_takes_over_the_buffers_of_the_old_state_with_all_their_bits():
    config, _ = resolve(tiny_run.config())
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    make, _, shardings = sharded_init(model, optimizer, config, mesh)
    step = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    state, _ = step(make(), a_batch())
    before, place = what_is_trained(state), state.params["embedding"].unsafe_buffer_pointer()
    new, _ = step(state, one_entry("tokens_BT", -1))
    assert what_is_trained(new) == before and state.params["embedding"].is_deleted()
    assert new.params["embedding"].unsafe_buffer_pointer() == place
    again, _ = step(new.replace(guard=released(new.guard)), a_batch())
    assert counts(again) == (3, 1, 0)
    assert step._cache_size() == 1  # a released guard lies where a step puts one


def test_what_one_device_meets_is_skipped_on_all_of_them():
    found, _ = on_eight_devices(Path(__file__).with_name("guard_on_devices.py"), "")
    for case, seen in found.items():
        assert seen["counts"] == [[1, 0, 0], [2, 1, 1], [3, 1, 0]], case
        assert seen["kept"] and seen["moved"], case
        assert seen["copies"] == [8, 1], f"{case}: every device holds the same guard"


def test_the_guard_adds_no_traffic_between_devices_and_none_to_the_host():
    found, _ = on_eight_devices(Path(__file__).with_name("guard_on_devices.py"), "")
    for case, seen in found.items():
        assert seen["collectives"] == seen["collectives without"], case
        assert seen["to the host"] == 0, case


def test_checkpoint_of_an_older_version_begins_with_a_fresh_guard():
    _, state = parts()
    trees = {name: tree for name, tree in state.trees().items() if name != "guard"}
    assert counts(TrainState.from_trees(trees)) == (0, 0, 0)
    again = TrainState.from_trees(trees, like=state)
    assert tiny_run.digest(again) == tiny_run.digest(state)
    assert again.guard["window"].sharding == state.guard["window"].sharding


# ---------------------------------------------------------------- spikes

SPIKES = GuardConfig(spike_sigmas=6.0, spike_window=128, patience=10)


@functools.cache
def judged(config: GuardConfig = SPIKES):
    """A jitted (losses, norms, guard) -> (skipped or not, guard), step by step."""
    @jax.jit
    def run(losses, norms, guard):
        def one(guard, seen):
            skip, guard = judge(guard, config, *seen, jnp.zeros((), bool))
            return guard, skip

        guard, skips = jax.lax.scan(one, guard, (losses, norms))
        return skips, guard

    return run


def noise(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall and gradient norms that do not, both noisy."""
    draw = np.random.default_rng(seed)
    losses = 2 + 3 * np.exp(-np.arange(n) / 300) + 0.05 * draw.normal(size=n)
    return losses.astype(np.float32), (0.5 + 0.05 * draw.normal(size=n)).astype(np.float32)


def spike_at(place: int, of: str, times: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    losses, norms = noise(place + 5)
    {"loss": losses, "norm": norms}[of][place] *= times
    return losses, norms


@pytest.mark.parametrize("seed", range(5))
def test_thousand_steps_of_noise_are_no_spike(seed):
    skips, guard = judged()(*noise(1000, seed), first_guard(SPIKES))
    assert not skips.any() and int(guard["accepted"]) == 1000


@pytest.mark.parametrize("of", ["loss", "norm"])
def test_step_of_twenty_times_the_loss_or_norm_is_skipped_and_leaves_the_window_alone(of):
    losses, norms = spike_at(200, of)
    before = judged()(losses[:200], norms[:200], first_guard(SPIKES))[1]
    skips, guard = judged()(losses[:201], norms[:201], first_guard(SPIKES))
    assert np.flatnonzero(skips).tolist() == [200] and int(guard["skipped"]) == 1
    assert tiny_run.digest(guard["window"]) == tiny_run.digest(before["window"])
    skips, guard = judged()(losses, norms, first_guard(SPIKES))
    assert np.flatnonzero(skips).tolist() == [200] and int(guard["accepted"]) == 204
    good = np.delete(np.stack([losses, norms]), 200, axis=1)
    order = np.arange(204 - 128, 204)
    np.testing.assert_array_equal(guard["window"][:, order % 128], good[:, order])


@pytest.mark.parametrize(("place", "skipped"), [(20, []), (63, []), (64, [64])])
def test_spike_rule_is_off_until_the_window_is_half_full(place, skipped):
    skips, _ = judged()(*spike_at(place, "loss"), first_guard(SPIKES))
    assert np.flatnonzero(skips).tolist() == skipped


def test_loss_that_falls_far_is_no_spike():
    skips, _ = judged()(*spike_at(100, "loss", 1e-3), first_guard(SPIKES))
    assert not skips.any()


def test_last_bit_after_equal_losses_is_no_spike():
    seen = np.full(500, 0.5, np.float32)  # whose mean is exact, so that the sd is 0
    seen[300] = np.nextafter(seen[300], np.float32(1))
    assert not judged()(seen, 3 * seen, first_guard(SPIKES))[0].any()


def test_value_that_is_not_finite_never_enters_the_window():
    losses, norms = noise(100)
    losses[[3, 70]], norms[71] = np.nan, np.inf
    skips, guard = judged()(losses, norms, first_guard(SPIKES))
    assert np.flatnonzero(skips).tolist() == [3, 70, 71]
    assert np.isfinite(guard["window"]).all() and int(guard["accepted"]) == 97


def test_without_the_spike_rule_any_finite_loss_is_accepted_and_no_window_is_kept():
    off = GuardConfig()
    assert set(first_guard(off)) == {"skipped", "in_a_row"}
    skips, _ = judged(off)(*spike_at(200, "loss", 1e6), first_guard(off))
    assert not skips.any()


def test_spike_changes_no_bit_of_what_is_trained():
    step, state = parts()
    for n in range(SPIKE_WINDOW // 2):
        state, _ = step(state, a_batch(n))
    before = what_is_trained(state)
    state, metrics = step(state, one_entry("tokens_BT", 253))
    assert np.isfinite(metrics["train/loss"]) and np.isfinite(metrics["train/grad_norm"])
    assert what_is_trained(state) == before and counts(state) == (5, 1, 1)
    state, _ = step(state, a_batch(9))
    assert what_is_trained(state) != before and int(state.guard["accepted"]) == 5


# ---------------------------------------------------------------- what is told of a broken run

def test_statistics_name_each_parameter_with_its_largest_value_and_what_is_not_finite():
    tree = {"a": {"kernel": jnp.asarray([[1.0, -7.0], [jnp.nan, jnp.inf]])},
            "bias": jnp.full(3, -jnp.inf, jnp.bfloat16), "count": jnp.asarray(3)}
    assert statistics_of(tree) == {
        "a/kernel": {"largest": 7.0, "not_finite": 2}, "bias": {"largest": 0.0, "not_finite": 3},
        "count": {"largest": 3.0, "not_finite": 0}}
    assert set(statistics_of(parts()[1].params)["embedding"]) == {"largest", "not_finite"}
