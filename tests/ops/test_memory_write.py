"""The rules of writing against the same rules said again in numpy, one write after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.layers.norms import unit_normalize
from hippocampus.ops.memory_state import MemoryState, empty_state, take_users
from hippocampus.ops.memory_write import LARGEST_VALUE, Entries, write

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, S, H, d, n = 2, 5, 2, 4, 3
STRATEGIES = ("ring", "gated", "delta", "consolidate")
BETA = np.asarray([1.5, 6.0], np.float32)


def entries(rng, m, *, of=None, users=B):
    """m random writes; keys repeat a few directions, so that some are alike."""
    centers = rng.normal(size=(7, H, d)) if of is None else of
    keys = centers[rng.integers(0, len(centers), (users, m))]
    keys = np.asarray(unit_normalize(keys + 0.05 * rng.normal(size=keys.shape)))
    return Entries(
        key_BmHd=keys, value_BmHd=rng.normal(size=keys.shape).astype(np.float32),
        active_Bm=np.arange(m) < rng.integers(1, m + 1, (users, 1)),
        position_Bm=rng.integers(0, 99, (users, m)).astype(np.int32),
        source_Bmn=rng.integers(0, 99, (users, m, n)).astype(np.int32),
        erase_BmHd=rng.uniform(size=keys.shape).astype(np.float32),
        gate_Bm=rng.uniform(size=(users, m)).astype(np.float32))


@functools.partial(jax.jit, static_argnames=("strategy", "eta", "decay", "similarity"))
def run(state, new, strategy, eta=0.7, decay=0.03, similarity=0.9, beta=BETA):
    return write(state, new, strategy, beta_H=jnp.asarray(beta), similarity=similarity, eta=eta,
                 decay=decay)


def run_sharply(state, new, strategy):
    """With all weight on the slot that the key is."""
    return run(state, new, strategy, eta=1.0, decay=0.0, beta=np.full(H, 200.0, np.float32))


# ---------------------------------------------------------------- the reference

def reference(state, new, strategy, eta=0.7, decay=0.03, similarity=0.9):
    users = [dict(zip(state.arrays(), map(np.array, leaves), strict=True))
             for leaves in zip(*state.arrays().values(), strict=True)]
    rule = {"ring": ring, "consolidate": consolidate, "delta": addressed, "gated": addressed}
    for b, user in enumerate(users):
        for i in range(new.active_Bm.shape[1]):
            if new.active_Bm[b, i]:
                entry = Entries(*(part[b, i] for part in new))
                rule[strategy](user, entry, strategy, eta, decay, similarity)
    return MemoryState(**{name: np.stack([user[name] for user in users]) for name in users[0]})


def mark(user, entry, slot):
    user["age_BS"] += 1
    user["age_BS"][slot] = 0
    user["valid_BS"][slot] = True
    user["position_BS"][slot] = entry.position_Bm
    user["source_BSn"][slot] = entry.source_Bmn
    user["writes_B"] += 1


def cosines(user, key):
    keys = user["keys_BSHd"].reshape(S, -1)
    norms = np.linalg.norm(keys, axis=1) * np.linalg.norm(key)
    return np.where(user["valid_BS"], keys @ key.reshape(-1) / np.maximum(norms, 1e-9), -2)


def replace(user, entry, slot):
    user["keys_BSHd"][slot], user["values_BSHd"][slot] = entry.key_BmHd, entry.value_BmHd
    user["usage_BS"][slot], user["strength_BS"][slot] = 0, 1
    mark(user, entry, slot)


def ring(user, entry, strategy, eta, decay, similarity):
    user["strength_BS"] *= 1 - decay
    free = np.flatnonzero(~user["valid_BS"])
    replace(user, entry, free[0] if len(free) else user["age_BS"].argmax())


def consolidate(user, entry, strategy, eta, decay, similarity):
    user["strength_BS"] *= 1 - decay
    cos = cosines(user, entry.key_BmHd)
    if cos.max() > similarity:
        slot = cos.argmax()
        count = user["strength_BS"][slot]
        for name, one in (("keys_BSHd", entry.key_BmHd), ("values_BSHd", entry.value_BmHd)):
            user[name][slot] = (count * user[name][slot] + one) / (count + 1)
        user["strength_BS"][slot] += 1
        mark(user, entry, slot)
        return
    free = np.flatnonzero(~user["valid_BS"])
    worth = user["strength_BS"] / (1 + user["age_BS"])
    replace(user, entry, free[0] if len(free) else worth.argmin())


def addressed(user, entry, strategy, eta, decay, similarity):
    user["strength_BS"] *= 1 - decay
    user["values_BSHd"] *= 1 - decay
    free = np.flatnonzero(~user["valid_BS"])
    valid = user["valid_BS"]
    w = np.zeros((S, H))
    if len(free) and cosines(user, entry.key_BmHd).max() <= similarity:
        w[free[0]] = 1
        user["keys_BSHd"][free[0]], user["values_BSHd"][free[0]] = entry.key_BmHd, 0
        user["strength_BS"][free[0]] = user["usage_BS"][free[0]] = 0
    else:
        scores = np.einsum("shd,hd->sh", user["keys_BSHd"], entry.key_BmHd) * BETA
        e = np.where(valid[:, None], np.exp(scores), 0)
        w = e / e.sum(0)
    v = user["values_BSHd"]
    if strategy == "delta":
        w *= eta
        found = np.einsum("sh,shd->hd", w / eta, v)
        v = v + w[..., None] * (entry.value_BmHd - found)
    else:
        w *= entry.gate_Bm
        v = (1 - w[..., None] * entry.erase_BmHd) * v + w[..., None] * entry.value_BmHd
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    user["values_BSHd"] = v * np.minimum(1, LARGEST_VALUE * d**0.5 / np.maximum(length, 1e-9))
    user["strength_BS"] += w.mean(-1)
    mark(user, entry, w.mean(-1).argmax())


def assert_same(actual, desired):
    for name, value in actual.arrays().items():
        np.testing.assert_allclose(value, getattr(desired, name), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_writes_are_those_of_the_rule_said_in_numpy(strategy):
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(7, H, d))
    state = desired = empty_state(B, S, H, d, n)
    for _ in range(10):
        new = entries(rng, 4, of=centers)
        state, desired = run(state, new, strategy), reference(desired, new, strategy)
        assert_same(state, desired)
        state = state.replace(usage_BS=state.usage_BS + 1)
        desired = desired.replace(usage_BS=desired.usage_BS + 1)
    assert np.asarray(state.valid_BS).all(), "some rows never had to replace anything"
    assert np.asarray(state.writes_B).min() > S


def test_standard_is_another_name_of_ring():
    new = entries(np.random.default_rng(2), 4)
    state = empty_state(B, S, H, d, n)
    for one, other in zip(*(run(state, new, name).arrays().values()
                            for name in ("ring", "standard")), strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- what each rule is for

def orthogonal(m):
    """Keys that are alike in no head, and values."""
    keys = np.tile(np.eye(d)[None, :m, None], (B, 1, H, 1)).astype(np.float32)
    everything = entries(np.random.default_rng(3), m)
    return everything._replace(key_BmHd=keys, active_Bm=np.ones((B, m), bool))


def test_ring_overwrites_the_oldest_and_nothing_else():
    rng, state = np.random.default_rng(4), empty_state(B, S, H, d, n)
    everything = entries(rng, S)._replace(active_Bm=np.ones((B, S), bool))
    state = run(state, everything, "ring")
    state = state.replace(age_BS=jnp.asarray([[3, 9, 1, 4, 2], [0, 1, 2, 3, 4]], jnp.int32))
    two = entries(rng, 2)._replace(active_Bm=np.ones((B, 2), bool))
    after = run(state, two, "ring")
    changed = np.asarray(after.values_BSHd != state.values_BSHd).any((-1, -2))
    np.testing.assert_array_equal(changed, [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(after.values_BSHd[0, 1], two.value_BmHd[0, 0])
    np.testing.assert_array_equal(after.values_BSHd[0, 3], two.value_BmHd[0, 1])


def test_delta_of_rate_one_stores_the_value_where_the_key_is_a_slot_s():
    first, second = orthogonal(4), orthogonal(4)
    second = second._replace(value_BmHd=second.value_BmHd[:, ::-1] * 0.5)
    state = run_sharply(empty_state(B, S, H, d, n), first, "delta")
    np.testing.assert_array_equal(state.values_BSHd[:, :4], first.value_BmHd)
    state = run_sharply(state, second, "delta")
    np.testing.assert_allclose(state.values_BSHd[:, :4], second.value_BmHd, atol=1e-6)
    assert not np.asarray(state.valid_BS[:, 4]).any()


def test_gated_with_open_gates_replaces_and_with_closed_ones_changes_nothing():
    new = orthogonal(4)
    state = run_sharply(empty_state(B, S, H, d, n), new, "gated")
    other = new._replace(value_BmHd=-new.value_BmHd, gate_Bm=np.ones((B, 4), np.float32),
                         erase_BmHd=np.ones_like(new.erase_BmHd))
    after = run_sharply(state, other, "gated")
    np.testing.assert_allclose(after.values_BSHd[:, :4], other.value_BmHd, atol=1e-6)
    shut = other._replace(gate_Bm=np.zeros((B, 4), np.float32))
    np.testing.assert_array_equal(run_sharply(after, shut, "gated").values_BSHd,
                                  after.values_BSHd)


def test_consolidate_joins_what_is_near_and_else_replaces_the_least_used():
    state = run(empty_state(B, S, H, d, n), orthogonal(4), "consolidate", decay=0.0)
    again = orthogonal(1)._replace(value_BmHd=np.ones((B, 1, H, d), np.float32))
    joined = run(state, again, "consolidate", decay=0.0)
    np.testing.assert_allclose(joined.values_BSHd[:, 0], (state.values_BSHd[:, 0] + 1) / 2,
                               atol=1e-6)
    np.testing.assert_array_equal(joined.strength_BS[0], [2, 1, 1, 1, 0])
    np.testing.assert_array_equal(joined.values_BSHd[:, 1:], state.values_BSHd[:, 1:])
    full = joined.replace(valid_BS=jnp.ones((B, S), bool),
                          strength_BS=jnp.asarray([[2, 9, 1, 3, 4]] * B, jnp.float32),
                          age_BS=jnp.asarray([[9, 1, 1, 1, 1]] * B, jnp.int32))
    strange = again._replace(key_BmHd=-again.key_BmHd)
    after = run(full, strange, "consolidate", decay=0.0)
    changed = np.asarray(after.values_BSHd != full.values_BSHd).any((-1, -2))
    np.testing.assert_array_equal(changed, [[1, 0, 0, 0, 0]] * B)  # 2 / 10 is least
    assert float(after.strength_BS[0, 0]) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_without_entries_keeps_every_bit_and_rows_do_not_mix(strategy):
    rng = np.random.default_rng(5)
    new = entries(rng, 4)
    state = run(empty_state(B, S, H, d, n), new, strategy)
    silent = new._replace(active_Bm=np.array([[False] * 4, [True] * 4]))
    after = run(state, silent, strategy)
    for name, value in after.arrays().items():
        np.testing.assert_array_equal(value[0], getattr(state, name)[0], err_msg=name)
    assert int(after.writes_B[1]) == int(state.writes_B[1]) + 4
    others = Entries(*(part if part is None else np.concatenate([part[1:], part[1:]])
                       for part in silent))
    beside = run(take_users(state, [1, 1]), others, strategy)  # another neighbour
    for name, value in beside.arrays().items():
        np.testing.assert_array_equal(value[1], getattr(after, name)[1], err_msg=name)
    swapped = run(take_users(state, [1, 0]), Entries(*(part[::-1] for part in silent)), strategy)
    for name, value in take_users(swapped, [1, 0]).arrays().items():
        np.testing.assert_array_equal(value, getattr(after, name), err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_thousand_writes_leave_finite_numbers_of_bounded_size(strategy):
    m, chunks = 4, 2500

    @jax.jit
    def live(state, key):
        def step(state, key):
            draw = jax.random.normal(key, (3, B, m, H, d))
            new = Entries(
                key_BmHd=unit_normalize(draw[0]), value_BmHd=3 * draw[1],
                active_Bm=jnp.ones((B, m), bool), position_Bm=jnp.zeros((B, m), jnp.int32),
                source_Bmn=jnp.zeros((B, m, n), jnp.int32),
                # What erases nearly nothing adds up for ever, were it not for the bound.
                erase_BmHd=jax.nn.sigmoid(draw[2] - 6), gate_Bm=jnp.ones((B, m)))
            new = new._replace(value_BmHd=jnp.where(jnp.arange(d) == 0, 3.0, new.value_BmHd))
            state = write(state, new, strategy, beta_H=jnp.asarray(BETA))
            return state, jnp.abs(state.values_BSHd).max()
        return jax.lax.scan(step, state, jax.random.split(key, chunks))

    state, largest = live(empty_state(B, S, H, d, n), jax.random.key(0))
    assert all(np.isfinite(value).all() for value in state.arrays().values())
    assert int(state.writes_B[0]) == m * chunks
    limit = 20.0 if strategy in ("ring", "consolidate") else LARGEST_VALUE * d**0.5 * 1.0001
    assert float(largest.max()) <= limit
    assert np.linalg.norm(state.keys_BSHd, axis=-1).max() <= 1.0001
    assert int(state.age_BS.max()) <= m * chunks and np.asarray(state.valid_BS).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_what_was_written_and_are_finite_from_an_empty_memory(strategy):
    new = orthogonal(4)

    def loss(keys, values):
        state = empty_state(B, S, H, d, n)
        for _ in range(2):
            state = write(state, new._replace(key_BmHd=keys, value_BmHd=values), strategy,
                          beta_H=jnp.asarray(BETA))
        return (jnp.cos(state.values_BSHd).sum() + jnp.sin(state.keys_BSHd).sum())

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(new.key_BmHd, new.value_BmHd):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


def test_more_entries_than_slots_and_unknown_strategies_are_refused():
    new, state = entries(np.random.default_rng(6), S + 1), empty_state(B, S, H, d, n)
    with pytest.raises(ValueError, match="6 entries for 5 slots"):
        write(state, new, "ring", beta_H=jnp.asarray(BETA))
    few = Entries(*(part[:, :2] for part in new))
    with pytest.raises(ValueError, match="'lru'"):
        write(state, few, "lru", beta_H=jnp.asarray(BETA))
