"""optimizer.groups: learning rates and decays of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import OptimizerConfig
from hippocampus.training.optimizer import build_optimizer, group_of

PARAMS = {"cell": {"slots": np.full(3, 2.0, np.float32), "mlp": {"bias": np.ones(2, np.float32)}},
          "embedding": np.full((2, 2), 0.5, np.float32)}
PLAIN = OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=0.1, weight_decay=0.3,
                        clip_norm=0.0)


def updates(config: OptimizerConfig, steps: int = 2):
    """Updates of some steps with the same gradient, one tree a step."""
    optimizer, params = build_optimizer(config, 10), jax.tree.map(jnp.asarray, PARAMS)
    grads = jax.tree.map(lambda a: 0.1 * a, params)
    state, found = optimizer.init(params), []
    for _ in range(steps):
        update, state = optimizer.update(grads, state, params)
        found.append(jax.tree.map(np.asarray, update))
    return found


def with_groups(*groups) -> OptimizerConfig:
    return dataclasses.replace(PLAIN, groups=groups)


def test_a_group_that_matches_nothing_changes_no_bit():
    for plain, grouped in zip(updates(PLAIN), updates(with_groups(("nothing$", 0.1, 0.0))),
                              strict=True):
        jax.tree.map(np.testing.assert_array_equal, plain, grouped)


def test_a_group_has_a_share_of_the_learning_rate_and_a_decay_of_its_own():
    bare = dataclasses.replace(PLAIN, weight_decay=0.0)
    adam = updates(bare)[1]["cell"]["slots"]
    found = updates(with_groups((r"slots$", 0.25, 0.7)))[1]
    decayed = -PLAIN.learning_rate * 0.7 * PARAMS["cell"]["slots"]
    np.testing.assert_allclose(found["cell"]["slots"], 0.25 * (adam + decayed), rtol=1e-6)
    np.testing.assert_array_equal(found["embedding"], updates(PLAIN)[1]["embedding"])


def test_a_group_with_rate_0_stays_where_it_is():
    for update in updates(with_groups((r"^cell/", 0.0, 0.3))):
        assert not update["cell"]["slots"].any() and not update["cell"]["mlp"]["bias"].any()
        assert update["embedding"].all()


def test_what_is_not_decayed_is_not_decayed_in_a_group_either():
    found = updates(with_groups((r"^cell/", 1.0, 5.0)))[0]["cell"]["mlp"]["bias"]
    wanted = updates(dataclasses.replace(PLAIN, weight_decay=0.0))[0]["cell"]["mlp"]["bias"]
    np.testing.assert_array_equal(found, wanted)


def test_the_first_group_that_matches_counts():
    config = with_groups((r"slots$", 0.5, 0.1), (r"^cell/", 0.2, 0.2))
    assert group_of(config, "cell/slots") == (0.5, 0.1)
    assert group_of(config, "cell/mlp/up/kernel") == (0.2, 0.2)
    assert group_of(config, "embedding") == (1.0, PLAIN.weight_decay)


@pytest.mark.parametrize("groups", [(), (("slots$", 0.5, 0.0),)])
def test_the_state_has_the_same_places_with_groups_and_without(groups):
    """The counter and the moments: checkpoints, and rules of sharding, go by their paths."""
    state = build_optimizer(with_groups(*groups), 10).init(PARAMS)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/")
             for path, _ in jax.tree.leaves_with_path(state)}
    assert {"1/0/count", "1/0/mu/cell/slots", "1/0/nu/embedding", "1/2/count"} <= paths
    assert len(paths) == 2 + 2 * 3
