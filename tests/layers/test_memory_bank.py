"""The memory of a layer: what it may see, what it may change, and whose it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config_memory import MemoryConfig
from hippocampus.errors import ConfigError
from hippocampus.layers.memory_bank import MODES, MemoryBank
from hippocampus.ops.memory_read import recall
from hippocampus.ops.memory_state import join_users, take_users
from hippocampus.testing import assert_close, check_batch_invariance, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, S = 3, 9, 8, 6
H_BTD = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T)
SURPRISE = np.random.default_rng(1).uniform(size=(B, T)).astype(np.float32)
SURPRISE[0, 0] = 2.0  # the first token of a chunk may be the one of most surprise
EMBEDDED = np.random.default_rng(3).normal(size=(B, T, D)).astype(np.float32)
ALL = np.ones((B, T), bool)
FIELDS = {"n_slots": S, "n_heads": 2, "n_writes": 3, "source_tokens": 2, "beta": 4.0}


@functools.cache
def made(**fields):
    """(bank, random variables with an open gate, a compiled call of it)."""
    bank = MemoryBank(MemoryConfig(**{**FIELDS, **fields}), D)
    shapes = jax.eval_shape(bank.init, jax.random.key(0), H_BTD, surprise_BT=SURPRISE,
                            embedded_BTD=EMBEDDED)
    rng = np.random.default_rng(2)  # in no time, where the layer's own start is compiled
    variables = jax.tree.map(lambda leaf: rng.normal(
        scale=D**-0.5, size=leaf.shape).astype(leaf.dtype), shapes)
    variables["params"] |= {"read_gate": np.float32(0.7), "norm": {"scale": np.ones(D, np.float32)},
                            "log_beta": np.full(2, np.log(bank.config.beta), np.float32)}

    @functools.partial(jax.jit, static_argnames="mode")
    def compiled(hidden, state, mask, mode, tokens, embedded):
        return bank.apply(variables, hidden, state, mask, mode=mode, surprise_BT=SURPRISE,
                          tokens_BT=tokens, embedded_BTD=embedded)

    def call(hidden, state, mask=ALL, mode="read+write", tokens=TOKENS, embedded=EMBEDDED):
        return jax.device_get(compiled(hidden, state, mask, mode, tokens, embedded))

    return bank, variables, call


@functools.cache
def new_state(**fields):
    bank, variables, _ = made(**fields)
    return jax.device_get(jax.jit(lambda v: bank.apply(v, B, method="init_state"))(variables))


@functools.cache
def filled(**fields):
    """A memory after a chunk, and the bank's call."""
    call = made(**fields)[2]
    return call(H_BTD[:, ::-1], new_state(**fields))[2], call


def assert_equal(actual, desired, but=()):
    for name, value in actual.arrays().items():
        if name not in but:
            np.testing.assert_array_equal(value, getattr(desired, name), err_msg=name)


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize(("initial", "dtype"), [
    ("empty", "float32"), ("random", "bfloat16"), ("learned", "float32")])
def test_a_fresh_layer_changes_no_bit_of_the_hidden_states(initial, dtype):
    bank = MemoryBank(MemoryConfig(**FIELDS, initial=initial), D)
    hidden = jnp.asarray(H_BTD, dtype)

    @jax.jit
    def two_chunks(hidden):
        variables = bank.init(jax.random.key(0), hidden)
        read, _, state = bank.apply(variables, hidden)
        again, out, _ = bank.apply(variables, hidden, state)
        return (read, again), out["read"], state

    reads, found, state = two_chunks(hidden)
    assert np.abs(found).max() > 0.1
    for new in reads:
        assert new.dtype == hidden.dtype and (new == hidden).all()
    assert state.keys_BSHd.dtype == state.values_BSHd.dtype == jnp.float32


def test_an_empty_memory_gives_exactly_zero_and_finite_gradients():
    bank, variables, _ = made()

    def loss(variables, hidden):
        read, out, _ = bank.apply(variables, hidden)
        return (read**2).sum(), (read, out)

    (_, (read, out)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        variables, H_BTD)
    np.testing.assert_array_equal(read, H_BTD)
    assert not np.asarray(out["read"]).any() and not np.asarray(out["weights"]).any()
    assert not np.asarray(out["energy"]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_only_valid_slots_are_read():
    state, call = filled()
    read, out, _ = call(H_BTD, state)
    valid = np.asarray(state.valid_BS)
    assert valid.any(1).all() and not valid.all(1).any()
    weights = np.asarray(out["weights"])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not weights[np.broadcast_to(~valid[:, None, None], weights.shape)].any()
    noise = np.where(valid[..., None, None], 0, np.float32(100))
    spoiled = state.replace(keys_BSHd=state.keys_BSHd + noise,  # of what no write has made
                            values_BSHd=state.values_BSHd + noise)
    np.testing.assert_array_equal(call(H_BTD, spoiled)[0], read)
    assert np.abs(np.asarray(read) - H_BTD).max() > 0.01


def test_energy_never_rises_and_a_retrieval_is_softmax_over_the_slots():
    fields = {"steps": 4, "step_size": 0.3, "initial": "learned", "beta": 6.0}
    _, out, state = made(**fields)[2](H_BTD, new_state(**fields), mode="frozen")
    whole_steps = jax.jit(functools.partial(recall, steps=4))(
        out["query"], state.keys_BSHd, state.values_BSHd, state.valid_BS, out["beta"])
    for energy in (out["energy"], np.asarray(whole_steps.energy_jBTH)):
        assert energy.shape == (5, B, T, 2) and energy.min() > -1e-5
        assert np.diff(energy, axis=0).max() < 1e-5 and np.diff(energy, axis=0).min() < -1e-3
    last = np.asarray(out["step3"])
    scores = 6 * np.einsum("bthd,bshd->bths", last, state.keys_BSHd)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(out["weights"], p, atol=1e-5)
    np.testing.assert_allclose(out["read"], np.einsum("bths,bshd->bthd", p, state.values_BSHd),
                               atol=1e-5)


def test_a_chunk_sees_only_earlier_chunks():
    state, call = filled(select="surprise")
    check_causality(lambda hidden: call(hidden, state)[0], H_BTD, jit=False)
    later = call(H_BTD, call(H_BTD, state)[2])[0]
    other = H_BTD.copy()
    other[0, SURPRISE[0].argmax()] += 1  # what the chunk does write
    changed = call(H_BTD, call(other, state)[2])[0]
    assert np.abs(later - changed)[0].max() > 1e-4


# ---------------------------------------------------------------- users

def test_users_do_not_mix_and_permuting_them_permutes_their_memories():
    state, call = filled(strategy="gated")
    check_batch_invariance(lambda hidden: call(hidden, state)[0], H_BTD, jit=False)
    read, _, after = call(H_BTD, state)
    turn = [2, 0, 1]
    turned, _, turned_after = call(H_BTD[turn], take_users(state, turn), tokens=TOKENS[turn])
    assert_close((turned, turned_after), (read[turn], take_users(after, turn)), n_operations=D)
    other = H_BTD.copy()
    other[1] += 1
    assert_equal(take_users(call(other, state)[2], [0, 2]), take_users(after, [0, 2]))
    assert_equal(join_users([take_users(after, [0, 1]), take_users(after, [2])]), after)


def test_a_memory_of_another_number_of_users_is_refused_not_shared():
    state = filled()[0]
    bank, variables, _ = made()
    with pytest.raises(ValueError, match=r"\(1, 6, 2, 4\); this layer and batch need \(3, 6"):
        bank.apply(variables, H_BTD, take_users(state, [0]), mode="frozen")
    with pytest.raises(ValueError, match="need"):
        bank.apply(variables, H_BTD, take_users(state, [0]), mode="write_only")
    with pytest.raises(ValueError, match="need"):
        bank.apply(variables, take_users(state, [0]), np.array([False] * B), method="reset")


def test_reset_makes_the_marked_users_new_and_leaves_the_others():
    bank, variables, _ = made(initial="learned")
    state, _ = filled(initial="learned")
    after = jax.device_get(jax.jit(lambda state, rows: bank.apply(
        variables, state, rows, method="reset"))(state, np.array([False, True, False])))
    assert_equal(take_users(after, [0, 2]), take_users(state, [0, 2]))
    new = new_state(initial="learned")
    assert_close(take_users(after, [1]), take_users(new, [1]), n_operations=D)
    assert np.asarray(new.valid_BS).all() and int(after.writes_B[1]) == 0


# ---------------------------------------------------------------- modes and padding

def test_modes_do_what_they_are_named_statically_and_as_an_array():
    state, call = filled()
    read, _, both = call(H_BTD, state)
    results = {mode: call(H_BTD, state, mode=mode) for mode in MODES}
    for mode in ("read_only", "frozen"):
        np.testing.assert_array_equal(results[mode][0], read)
    np.testing.assert_array_equal(results["write_only"][0], H_BTD)
    assert_equal(results["frozen"][2], state)
    assert_equal(results["read_only"][2], state, but=["usage_BS"])
    assert (np.asarray(results["read_only"][2].usage_BS) > np.asarray(state.usage_BS)).any()
    assert_equal(results["write_only"][2], both, but=["usage_BS"])
    assert (np.asarray(both.writes_B) == np.asarray(state.writes_B) + 3).all()

    bank, variables, _ = made()
    traced = jax.jit(lambda codes, state: bank.apply(
        variables, H_BTD, state, mode=codes, tokens_BT=TOKENS))
    for codes in ([0, 1, 2], [3, 2, 0]):
        new, _, after = jax.device_get(traced(np.asarray(codes), state))
        for b, code in enumerate(codes):
            expected = results[MODES[code]]
            assert_close((new[b], take_users(after, [b])),
                         (expected[0][b], take_users(expected[2], [b])), n_operations=D)
    assert_equal(take_users(after, [0]), take_users(state, [0]))
    with pytest.raises(ValueError, match="mode is 'read'"):
        bank.apply(variables, H_BTD, state, mode="read")


@pytest.mark.parametrize(("select", "values"), [
    ("stride", "hidden"), ("surprise", "hidden"), ("mean", "hidden"), ("mean", "next_token")])
def test_padding_neither_reads_nor_is_written(select, values):
    state, call = filled(select=select, values=values)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1, 1, 1, 1], [0] * 9], bool)
    poison = np.where(mask[..., None], H_BTD, np.nan)
    read, _, after = call(H_BTD, state, mask)
    poisoned, _, same = call(poison, state, mask, tokens=np.where(mask, TOKENS, 10**6),
                             embedded=np.where(mask[..., None], EMBEDDED, np.nan))
    np.testing.assert_array_equal(np.asarray(poisoned)[mask], np.asarray(read)[mask])
    np.testing.assert_array_equal(np.asarray(read)[~mask], H_BTD[~mask])
    assert_equal(same, after)
    assert_equal(take_users(after, [2]), take_users(state, [2]))
    np.testing.assert_array_equal(after.tokens_B - state.tokens_B, mask.sum(1))
    assert (np.asarray(after.writes_B - state.writes_B) == [3, 3, 0]).all()
    short = call(H_BTD, state, ALL & (np.arange(T) < 2))[2]
    assert (np.asarray(short.writes_B - state.writes_B) == 2 - (values == "next_token")).all()


def test_a_slot_remembers_which_tokens_wrote_it():
    state, call = new_state(), made()[2]
    mask = np.ones((B, T), bool)
    mask[1, :3] = False
    state = call(H_BTD, state, mask)[2]
    np.testing.assert_array_equal(state.source_BSn[0, :3], [[1, 2], [4, 5], [7, 8]])
    np.testing.assert_array_equal(state.source_BSn[1, :3], [[12, 13], [14, 15], [16, 17]])
    np.testing.assert_array_equal(state.position_BS[1, :3], [1, 3, 5])
    state = call(H_BTD, state)[2]
    np.testing.assert_array_equal(state.position_BS[1, 3:], [6 + 2, 6 + 5, 6 + 8])
    bank, variables, call = made(select="surprise", source_tokens=4)
    state = call(H_BTD, new_state(source_tokens=4))[2]
    most = np.sort(np.argsort(SURPRISE, axis=1)[:, -3:], axis=1)
    np.testing.assert_array_equal(state.position_BS[:, :3], most)
    first = most[0, 0]
    expected = [-1] * (3 - min(first, 3)) + list(range(max(first - 3, 0), first + 1))
    np.testing.assert_array_equal(state.source_BSn[0, 0], expected)
    with pytest.raises(ValueError, match="needs surprise_BT"):
        jax.eval_shape(bank.apply, variables, H_BTD)


def test_a_slot_can_hold_the_token_that_came_behind_its_key():
    bank, variables, call = made(select="surprise", values="next_token")
    state = call(H_BTD, new_state(values="next_token"))[2]
    later = np.sort(1 + np.argsort(SURPRISE[:, 1:], axis=1)[:, -3:], axis=1)  # never the first
    np.testing.assert_array_equal(state.position_BS[:, :3], later)
    np.testing.assert_array_equal(state.source_BSn[:, :3, 1],
                                  np.take_along_axis(TOKENS, later, axis=1))
    kernels = {name: variables["params"][name]["kernel"] for name in ("key", "value", "out")}
    before = np.take_along_axis(H_BTD, later[..., None] - 1, axis=1)
    before = before / np.sqrt((before**2).mean(-1, keepdims=True) + bank.norm_epsilon)
    keys = (before @ kernels["key"]).reshape(B, 3, 2, D // 2)
    np.testing.assert_allclose(state.keys_BSHd[:, :3],
                               keys / np.linalg.norm(keys, axis=-1, keepdims=True), atol=1e-5)
    values = np.take_along_axis(EMBEDDED, later[..., None], axis=1) @ kernels["value"]
    values = values.reshape(B, 3, 2, D // 2)
    np.testing.assert_allclose(state.values_BSHd[:, :3], values / np.sqrt(
        (values**2).mean(-1, keepdims=True)), atol=1e-4)
    read, out, _ = call(H_BTD, state)
    size = np.sqrt((H_BTD**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(
        read - H_BTD, np.tanh(0.7) * size * (out["read"].reshape(B, T, D) @ kernels["out"]),
        atol=1e-5)
    check_causality(lambda hidden: call(hidden, state)[0], H_BTD, jit=False)
    with pytest.raises(ValueError, match="needs embedded_BTD"):
        jax.eval_shape(functools.partial(bank.apply, surprise_BT=SURPRISE), variables, H_BTD)


def test_a_memory_of_next_tokens_finds_alike_states_from_the_first_step_on():
    bank = MemoryBank(MemoryConfig(**{**FIELDS, "n_heads": 1, "beta": 60.0, "n_slots": T},
                                   values="next_token"), D)
    bank = bank.clone(config=dataclasses.replace(bank.config, n_writes=T - 1))

    @jax.jit
    def twice(key):
        variables = bank.init(key, H_BTD, embedded_BTD=EMBEDDED)
        same, _, state = bank.apply(variables, H_BTD, None, embedded_BTD=EMBEDDED)
        return variables, same, bank.apply(variables, H_BTD, state, mode="frozen")[1]

    variables, same, out = jax.device_get(twice(jax.random.key(0)))
    np.testing.assert_array_equal(same, H_BTD)
    np.testing.assert_array_equal(out["weights"][:, :-1, 0].argmax(-1),
                                  np.tile(np.arange(T - 1), (B, 1)))
    said = out["read"][:, :, 0] @ variables["params"]["out"]["kernel"]
    said, told = said[:, :-1], EMBEDDED[:, 1:]
    cosine = (said * told).sum(-1) / np.linalg.norm(said, axis=-1) / np.linalg.norm(told, axis=-1)
    assert np.median(cosine) > 0.95


def test_means_of_parts_are_written():
    rows = np.tile(np.repeat(np.eye(D)[:3] * 4, 3, 0)[None], (B, 1, 1)).astype(np.float32)
    state, call = new_state(), made(select="mean")[2]
    single = made()[2](rows, state)[2]  # each part has tokens of one kind
    np.testing.assert_allclose(call(rows, state)[2].keys_BSHd, single.keys_BSHd, atol=1e-5)
    uneven = rows + np.where(np.arange(T)[:, None] % 3 == 1, 1.0, -0.5)  # of mean 0 in a part
    np.testing.assert_allclose(call(uneven.astype(np.float32), state)[2].keys_BSHd,
                               single.keys_BSHd, atol=1e-5)


# ---------------------------------------------------------------- training

def test_chunks_can_be_scanned_and_gradients_reach_what_earlier_ones_wrote():
    bank, variables, call = made(strategy="gated")
    chunks = np.random.default_rng(3).normal(size=(3, B, T, D)).astype(np.float32)
    state = filled(strategy="gated")[0]  # which is full after the first chunk

    def loss(variables, chunks, state):
        def step(state, hidden):
            read, _, state = bank.apply(variables, hidden, state, tokens_BT=TOKENS)
            return state, read
        state, reads = jax.lax.scan(step, state, chunks)
        return (reads[-1] ** 3).sum(), (reads, state)

    (_, (reads, last)), (params, hidden) = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, chunks, state)
    step_by_step = state
    for c in range(3):
        read, _, step_by_step = call(chunks[c], step_by_step)
        np.testing.assert_allclose(reads[c], read, atol=1e-5)
    np.testing.assert_allclose(last.values_BSHd, step_by_step.values_BSHd, atol=1e-5)
    params = params["params"]
    for name in ("query", "key", "value", "out", "erase", "write_gate"):
        gradient = np.abs(params[name]["kernel"]).max()
        assert np.isfinite(gradient) and gradient > 1e-5, name
    assert np.abs(params["read_gate"]) > 1e-5 and np.abs(params["log_beta"]).max() > 1e-6
    assert (np.abs(np.asarray(hidden)).max((1, 2, 3)) > 1e-6).all()  # the first chunk's too


def test_learned_slots_are_trained_through_the_read():
    bank, variables, _ = made(initial="learned")
    gradients = jax.jit(jax.grad(lambda v: (bank.apply(v, H_BTD)[0] ** 3).sum()))(variables)
    for name in ("prior_keys", "prior_values"):
        assert np.abs(gradients["params"][name]).max() > 1e-5


@pytest.mark.parametrize("fields", [{"n_heads": 3}, {"n_writes": 7}, {"width": 7}])
def test_settings_that_do_not_fit_are_refused(fields):
    bank = MemoryBank(MemoryConfig(**{**FIELDS, **fields}), D)
    with pytest.raises(ConfigError, match=r"model\.memory\."):
        jax.eval_shape(bank.init, jax.random.key(0), H_BTD)


def test_bfloat16_products_keep_a_float32_memory_near_the_exact_one():
    config = MemoryConfig(**FIELDS)
    variables = made()[1]
    rough = MemoryBank(config, D, dtype=jnp.bfloat16)
    half = jnp.asarray(H_BTD, jnp.bfloat16)
    read, out, state = jax.jit(rough.apply)(variables, half, filled()[0])
    desired, _, other = filled()[1](H_BTD, filled()[0])
    assert read.dtype == jnp.bfloat16 and out["energy"].dtype == jnp.float32
    assert state.keys_BSHd.dtype == jnp.float32
    np.testing.assert_allclose(read.astype(jnp.float32), desired, atol=0.05)
    np.testing.assert_allclose(state.keys_BSHd, other.keys_BSHd, atol=0.03)
