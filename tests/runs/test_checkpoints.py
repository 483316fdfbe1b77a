"""Numbered steps on disk: what is kept, what comes back, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from hippocampus.config import CheckpointConfig
from hippocampus.errors import CheckpointError
from hippocampus.runs.checkpoints import Checkpoints, abstract
from hippocampus.training.sharding import make_mesh, replicated

KEEP_ALL = CheckpointConfig(keep_latest=100)


@pytest.fixture(scope="module")
def trees():
    """A small train state with every kind of leaf."""
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(1), (4, 3)),
                        "bias": jnp.asarray([np.pi, -0.0, 1e-45], jnp.float32)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, moments = optimizer.update(params, optimizer.init(params), params)
    progress = {"step": jnp.asarray(7, jnp.int32), "key": jax.random.key(3)}
    sharding = replicated(make_mesh(tiny_run.config().mesh))
    return jax.device_put({"params": params, "optimizer": moments, "progress": progress}, sharding)


def save_all(folder, config, losses, tree) -> list[int]:
    with Checkpoints(folder, config) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"params": tree}, loss)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.steps


LOSSES = {2: 3.0, 4: 1.0, 6: None, 8: 2.0, 10: 2.5}
SMALL = {"x": jnp.zeros(2)}


@pytest.mark.parametrize(("config", "kept"), [
    (CheckpointConfig(keep_latest=2, keep_best=0), [8, 10]),
    (CheckpointConfig(keep_latest=2, keep_best=1), [4, 8, 10]),
    (CheckpointConfig(keep_latest=1, keep_best=2), [4, 8, 10]),
    (CheckpointConfig(keep_latest=1, keep_best=0, keep_every_steps=4), [4, 8, 10]),
    (CheckpointConfig(keep_latest=1, keep_best=0, keep_every_steps=6), [6, 10]),
    (CheckpointConfig(keep_latest=9), [2, 4, 6, 8, 10]),
])
def test_newest_best_and_every_nth_step_are_kept(tmp_path, config, kept):
    assert save_all(tmp_path / "steps", config, LOSSES, SMALL) == kept


def test_best_step_has_the_lowest_loss_and_latest_the_largest_number(tmp_path):
    save_all(tmp_path, KEEP_ALL, LOSSES, SMALL)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (4, 10)
        assert checkpoints.losses() == LOSSES


def test_best_step_is_the_first_of_equals_and_the_newest_without_evaluation(tmp_path):
    save_all(tmp_path / "equal", KEEP_ALL, {1: 2.0, 2: 2.0}, SMALL)
    save_all(tmp_path / "none", KEEP_ALL, {1: None, 2: None}, SMALL)
    with Checkpoints(tmp_path / "equal") as checkpoints:
        assert checkpoints.best == 1
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.best == 2


def test_a_step_that_is_evaluated_later_can_become_the_best(tmp_path):
    save_all(tmp_path, KEEP_ALL, LOSSES, SMALL)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.score(6, 0.5)
        assert checkpoints.best == 6
        with pytest.raises(CheckpointError, match="no step 7"):
            checkpoints.score(7, 0.1)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.losses() == {**LOSSES, 6: 0.5}
        assert checkpoints.best_good() == 6
    (tmp_path / "6" / "eval_loss.json").write_text('{"eval/loss": 0.4}')
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_good() == 4  # a number that was changed is damage too


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    save_all(tmp_path, CheckpointConfig(keep_latest=1, keep_best=1),
             {1: float("nan"), 2: 3.0, 3: float("-inf"), 4: None}, SMALL)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best, checkpoints.best_good(), checkpoints.steps) == (2, 2, [2, 4])


def test_runs_that_kept_the_loss_in_a_file_of_its_own_are_read(tmp_path):
    save_all(tmp_path, KEEP_ALL, {1: None, 2: None}, SMALL)
    (tmp_path / "1" / "metrics").mkdir()
    (tmp_path / "1" / "metrics" / "metrics").write_text('{"eval/loss": 1.5}')
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.losses(), checkpoints.best) == ({1: 1.5, 2: None}, 1)


def test_no_steps_is_no_best_and_no_latest(tmp_path):
    with Checkpoints(tmp_path / "steps", KEEP_ALL) as checkpoints:
        assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([], None, None)


def test_every_leaf_comes_back_bit_for_bit(tmp_path, trees):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(7, trees, None)
    with Checkpoints(tmp_path) as checkpoints:
        back = checkpoints.restore(7, {name: abstract(tree) for name, tree in trees.items()})
    assert jax.tree.structure(back) == jax.tree.structure(trees)
    assert tiny_run.digest(back) == tiny_run.digest(trees)
    key = back["progress"]["key"]
    assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert jnp.array_equal(jax.random.bits(key), jax.random.bits(jax.random.key(3)))
    assert [leaf.dtype for leaf in jax.tree.leaves(back)] == [
        leaf.dtype for leaf in jax.tree.leaves(trees)]


def test_saved_buffers_may_be_donated_at_once(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.arange(1000.0)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, {"params": {"x": x}}, None)
        for _ in range(20):
            x = add(x)
        checkpoints.wait()
        back = checkpoints.restore(1, {"params": abstract({"x": x})})
    np.testing.assert_array_equal(back["params"]["x"], np.arange(1000.0))


def test_only_the_named_trees_are_read(tmp_path, trees):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(7, trees, None)
        checkpoints.wait()
        for part in (tmp_path / "7" / "optimizer").rglob("*"):
            if part.is_file():
                part.write_bytes(b"")
        back = checkpoints.restore(7, {"params": abstract(trees["params"])})
    assert set(back) == {"params"}
    assert tiny_run.digest(back["params"]) == tiny_run.digest(trees["params"])


def refusal(folder, step, like) -> str:
    with Checkpoints(folder) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(step, like)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    assert caught.value.message.startswith(f"step {step} could not be restored: ")
    return caught.value.message


def test_wrong_shapes_names_and_steps_are_readable_errors(tmp_path, trees):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(7, trees, None)
    like = abstract(trees["params"])
    other = jax.tree.map(lambda a: dataclasses.replace(a) if not hasattr(a, "shape") else
                         jax.ShapeDtypeStruct((5, *a.shape[1:]), a.dtype, sharding=a.sharding),
                         like)
    message = refusal(tmp_path, 7, {"params": other})
    assert "shape" in message and "5" in message
    refusal(tmp_path, 7, {"params": {"other": like["layer"]}})
    refusal(tmp_path, 7, {"ema": like})
    refusal(tmp_path, 8, {"params": like})


def test_damaged_step_is_a_checkpoint_error(tmp_path, trees):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(7, trees, None)
    for part in (tmp_path / "7" / "params").rglob("*"):
        if part.is_file():
            part.write_bytes(b"")
    refusal(tmp_path, 7, {"params": abstract(trees["params"])})


@pytest.mark.parametrize("config", [None, KEEP_ALL])
def test_empty_folder_named_like_a_step_is_not_a_step(tmp_path, config):
    save_all(tmp_path, KEEP_ALL, {2: None}, SMALL)
    (tmp_path / "4").mkdir()
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps == [2]


def test_reading_deletes_nothing(tmp_path):
    save_all(tmp_path, KEEP_ALL, LOSSES, SMALL)
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path) as checkpoints:
        assert len(checkpoints.steps) == 5
    assert sorted(tmp_path.rglob("*")) == before


def test_saving_a_step_twice_is_a_checkpoint_error(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(2, {"params": SMALL}, None)
        with pytest.raises(CheckpointError, match="step 2"):
            checkpoints.save(2, {"params": SMALL}, None)
            checkpoints.wait()


def test_leaving_waits_for_the_pending_save(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(2, {"params": {"x": jnp.zeros((512, 512))}}, 1.5)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.losses() == {2: 1.5}
