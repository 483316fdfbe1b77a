"""Retrieval in blocks of tokens: what the whole table of scores gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.layers.norms import unit_normalize
from hippocampus.ops import hopfield
from hippocampus.ops.pattern_recall import energy, recall
from hippocampus.testing import assert_close, pack

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, S, H, d = 2, 11, 7, 2, 4
DRAW = np.random.default_rng(0)
XI, KEYS = DRAW.normal(size=(2, B, T, H, d)).astype(np.float32)
SLOTS = DRAW.normal(size=(S, H, d)).astype(np.float32)
BETA = jnp.asarray([0.7, 3.0])
IDS, _ = pack((4, 6), B, T)
BLOCK = 3 * B * H * S
MEMORIES = {"slots, blocks": (False, True, None, BLOCK),
            "context, blocks": (True, False, IDS, BLOCK),
            "both, whole": (True, True, IDS, 2**24),
            "both, one document, blocks": (True, True, None, BLOCK)}


def results(xi, keys, slots, ids, **options):
    keys, slots = (None if p is None else unit_normalize(p) for p in (keys, slots))
    across = None if keys is None else jnp.moveaxis(keys, 1, 2)
    found = recall(xi, across, slots, BETA, document_ids_BT=ids, **options)
    return found.value_BTHd, energy(xi, found, BETA, 1.0)


def reference(xi, keys, slots, ids):
    memory = tuple(None if p is None else unit_normalize(p) for p in (keys, slots))
    return (hopfield.retrieve(xi, *memory, BETA, document_ids=ids),
            hopfield.energy(xi, *memory, BETA, ids))


@pytest.mark.parametrize("name", MEMORIES)
def test_blocks_give_retrieval_energy_and_gradients_of_the_whole_table(name):
    has_keys, has_slots, ids, block_scores = MEMORIES[name]

    def with_gradient(function, inputs):
        value, pull = jax.vjp(lambda inputs: function(*inputs, ids), inputs)
        return value, pull(jax.tree.map(jnp.cos, value))

    @jax.jit
    def run(inputs):
        blocks = functools.partial(results, block_scores=block_scores)
        return with_gradient(blocks, inputs), with_gradient(reference, inputs)

    actual, desired = run((XI, KEYS if has_keys else None, SLOTS if has_slots else None))
    # The unit length of a pattern is one but for the epsilon of its norm.
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_a_given_view_of_the_keys_counts_instead_of_the_causal_one():
    visible = jnp.tril(jnp.ones((T, T), bool)) & hopfield.same_document(IDS)

    @jax.jit
    def run(xi, keys, slots):
        keys = jnp.moveaxis(keys, 1, 2)
        return (recall(xi, keys, slots, BETA, visible_BTC=visible, block_scores=BLOCK),
                recall(xi, keys, slots, BETA, document_ids_BT=IDS))

    assert_close(*run(XI, KEYS, SLOTS), n_operations=T)


def test_the_gradient_of_many_slots_holds_the_scores_of_one_block():
    xi, slots = jnp.zeros((1, 64, 2, 8)), jnp.zeros((1000, 2, 8))

    def loss(xi, slots, block_scores):
        return recall(xi, None, slots, BETA, block_scores=block_scores).value_BTHd.sum()

    def scratch(block_scores):
        gradient = jax.grad(functools.partial(loss, block_scores=block_scores), (0, 1))
        return jax.jit(gradient).lower(xi, slots).compile().memory_analysis().temp_size_in_bytes

    table = 4 * 64 * 2 * 1000
    assert scratch(4 * 2 * 1000) < table < scratch(2**24)
