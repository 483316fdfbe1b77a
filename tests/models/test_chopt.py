"""CHopT: the decoder's logits at first; then what a memory may know, of whom, and since when."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.backbones.loading import load_backbone
from hippocampus.config_memory import MemoryConfig
from hippocampus.data.batches import Batch
from hippocampus.data.story_rows import StoryBatch
from hippocampus.layers.memory_bank import MODES
from hippocampus.models.chopt import CHopT
from hippocampus.ops.cross_entropy import token_nll

pytestmark = pytest.mark.usefixtures("quick_compiles")

FIXTURES = Path(__file__).resolve().parents[1] / "backbones" / "fixtures"
B, C, N = 2, 5, 3
T = C * N
FIELDS = {"n_slots": 8, "n_heads": 2, "n_writes": 2, "source_tokens": 2, "beta": 4.0}


def assert_close(found, wanted, tolerance):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@functools.cache
def backbone(family="llama"):
    return load_backbone(FIXTURES / family)


def ids(seed=0, rows=B, length=T):
    vocabulary = backbone().model.config.vocab_size
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, length), np.int32)


def batch_of(tokens, **fields):
    kind = StoryBatch if "question_B" in fields else Batch
    if kind is StoryBatch:
        fields["story_B"] = np.zeros(len(tokens), np.int32)
    return kind(tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), **fields)


@functools.cache
def made(chunk=C, gate=0.7, **fields):
    """(model, parameters with an open gate, jitted forward)."""
    decoder = backbone()
    model = CHopT(decoder.model.config, MemoryConfig(**{**FIELDS, **fields}), chunk)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids())["params"]["memory_bank"]
    rng = np.random.default_rng(1)
    bank = jax.tree.map(lambda leaf: rng.normal(
        scale=0.3, size=leaf.shape).astype(leaf.dtype), shapes)
    bank |= {"read_gate": np.float32(gate), "log_beta": np.full(2, np.log(4), np.float32)}
    params = {"backbone": decoder.params, "memory_bank": bank}

    @jax.jit
    def forward(batch, state=None, modes=None):
        return model.apply({"params": params}, batch, state, interventions=modes, method="forward")

    return model, params, forward


def carried(state, **fields):
    """A batch's further fields by which it goes on with a state."""
    return {"reset_B": np.zeros(B, bool), **fields}, state


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
def test_a_fresh_memory_changes_no_logit(family):
    decoder = backbone(family)
    model = CHopT(decoder.model.config, MemoryConfig(**FIELDS))
    tokens = ids() % decoder.model.config.vocab_size
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    bank = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(
        size=leaf.shape).astype(leaf.dtype), shapes["memory_bank"])
    bank["read_gate"] = np.float32(0)
    assert jax.tree.map(np.shape, shapes["backbone"]) == jax.tree.map(np.shape, decoder.params)
    new = jax.jit(model.apply)({"params": {"backbone": decoder.params, "memory_bank": bank}},
                               tokens)[0]
    old = jax.jit(decoder.model.apply)({"params": decoder.params}, tokens)[0]
    assert_close(new, old, 2e-6)  # compiled in another order


def test_what_a_token_knows_of_earlier_chunks_came_through_the_memory():
    _, _, forward = made()
    tokens = ids()
    other = tokens.copy()
    other[:, :C] = ids(7)[:, :C]
    hidden, changed = forward(batch_of(tokens))[0], forward(batch_of(other))[0]
    assert np.abs(hidden - changed)[:, C:].max() > 1e-3
    closed = made(gate=0.0)[2]
    assert np.array_equal(closed(batch_of(tokens))[0][:, C:], closed(batch_of(other))[0][:, C:])


@pytest.mark.parametrize("t", [0, C - 1, C, T - 1])
def test_future_tokens_do_not_change_the_past(t):
    _, _, forward = made(select="stride")
    tokens, other = ids(), ids()
    other[:, t] = (other[:, t] + 1) % 7
    one, two = forward(batch_of(tokens))[0], forward(batch_of(other))[0]
    assert np.array_equal(one[:, :t], two[:, :t]) and not np.array_equal(one[:, t:], two[:, t:])


@pytest.mark.parametrize("fields", [{}, {"strategy": "delta", "initial": "learned"},
                                    {"select": "surprise", "strategy": "consolidate"}], ids=str)
def test_rows_that_go_on_with_a_memory_are_one_long_row(fields):
    _, _, forward = made(**fields)
    tokens = ids()
    hidden, _, after = forward(batch_of(tokens))
    state, parts = made(**fields)[0].init_state(batch_of(tokens[:, :C])), []
    for i in range(N):
        fresh = np.full(B, i == 0)
        part, _, state = forward(batch_of(tokens[:, i * C:(i + 1) * C], reset_B=fresh), state)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), hidden, 1e-5)
    for name, value in after["memory"].arrays().items():
        assert_close(state["memory"].arrays()[name], value, 1e-5)
    assert np.all(after["memory"].writes_B == N * 2)


def test_a_row_that_starts_afresh_knows_nothing_of_the_one_before():
    _, _, forward = made()
    tokens = ids()
    _, _, state = forward(batch_of(ids(3)))
    reset = np.array([True, False])
    hidden, _, after = forward(batch_of(tokens, reset_B=reset), state)
    new, _, fresh = forward(batch_of(tokens))
    assert np.array_equal(hidden[0], new[0]) and not np.array_equal(hidden[1], new[1])
    assert np.array_equal(after["memory"].keys_BSHd[0], fresh["memory"].keys_BSHd[0])
    # Without the field every row does.
    assert np.array_equal(forward(batch_of(tokens), state)[0], new)


def test_memories_of_users_do_not_mix():
    _, _, forward = made()
    _, _, state = forward(batch_of(ids(3)))
    tokens = ids()
    one = forward(batch_of(tokens, reset_B=np.zeros(B, bool)), state)
    swapped = jax.tree.map(lambda a: a[::-1], state)
    two = forward(batch_of(tokens[::-1], reset_B=np.zeros(B, bool)), swapped)
    assert_close(two[0][::-1], one[0], 1e-6)
    assert_close(two[2]["memory"].values_BSHd[::-1], one[2]["memory"].values_BSHd, 1e-6)
    three = jax.tree.map(lambda a: a[:1], state)
    with pytest.raises(ValueError, match="this layer and batch need"):
        forward(batch_of(tokens, reset_B=np.zeros(B, bool)), three)


def test_questions_and_padding_are_not_written():
    _, _, forward = made()
    tokens = ids()
    _, _, state = forward(batch_of(ids(3)))
    on = {"reset_B": np.zeros(B, bool)}
    _, _, after = forward(batch_of(tokens, question_B=np.array([True, False]), **on), state)
    before, now = state["memory"], after["memory"]
    assert np.array_equal(now.keys_BSHd[0], before.keys_BSHd[0])
    assert np.array_equal(now.writes_B, before.writes_B + np.array([0, N * 2]))
    # Padding: whatever stands there, memory and other tokens are the same.
    documents = np.ones((B, T), np.int32)
    documents[:, C + 2:] = 0
    other = np.where(documents, tokens, (tokens + 1) % 7)
    one = forward(batch_of(tokens, document_ids_BT=documents))
    two = forward(batch_of(other, document_ids_BT=documents))
    assert all(np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(one[2]), jax.tree.leaves(two[2]), strict=True))
    assert np.array_equal(one[0][:, :C + 2], two[0][:, :C + 2])
    assert np.all(one[2]["memory"].tokens_B == C + 2)


def test_modes_of_a_call_are_those_of_the_memory():
    _, _, forward = made()
    tokens, on = ids(), {"reset_B": np.zeros(B, bool)}
    _, _, state = forward(batch_of(ids(3)))

    def of(mode):
        return forward(batch_of(tokens, **on), state, np.int32(MODES.index(mode)))

    plain, frozen, written = of("read+write"), of("frozen"), of("write_only")
    assert all(np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(frozen[2]), jax.tree.leaves(state), strict=True))
    assert_close(written[0], made(gate=0.0)[2](batch_of(tokens, **on), state)[0], 1e-6)
    assert_close(written[2]["memory"].keys_BSHd, plain[2]["memory"].keys_BSHd, 1e-6)
    assert np.array_equal(of("read_only")[0], frozen[0])
    assert not np.array_equal(plain[0][:, C:], frozen[0][:, C:])  # the row's own chunks are missing


def test_decoding_reads_the_memory_and_gives_what_a_read_only_row_gives():
    model, params, forward = made(chunk=0)
    _, _, state = forward(batch_of(ids(3)))
    tokens = ids(length=9)
    hidden, _, _ = forward(batch_of(tokens, reset_B=np.zeros(B, bool)), state,
                           np.int32(MODES.index("read_only")))
    extend = jax.jit(lambda part, cache: model.apply(
        model.decode_variables(params, 9), part, cache, method="extend"))
    cache, parts = model.init_cache(B, 16).replace(memory=state["memory"]), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part, cache = extend(tokens[:, begin:end], cache)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), hidden, 1e-5)
    assert np.array_equal(cache.memory.keys_BSHd, state["memory"].keys_BSHd)
    cleared = model.reset(cache, np.array([True, False]))
    assert not cleared.memory.valid_BS[0].any() and cleared.memory.valid_BS[1].any()
    assert cleared.decoder.length_B.tolist() == [0, 9]


def test_a_loss_in_the_last_chunk_moves_what_was_written_in_the_first():
    model, params, _ = made()
    tokens = ids()
    first = np.zeros((B, T), bool)
    first[:, :C] = True

    def loss(scale, weight):
        # The embeddings of the first chunk reach the last one through the memory alone.
        table = params["backbone"]["embedding"]
        changed = {**params, "backbone": {**params["backbone"], "embedding": table * scale}}
        batch = batch_of(np.where(first, tokens, 0))
        hidden, _, _ = model.apply({"params": changed}, batch, method="forward")
        return (token_nll(hidden, model.head(params), batch.targets_BT) * weight).sum()

    weight = np.zeros((B, T), np.float32)
    weight[:, -2:] = 1
    used = np.unique(tokens[:, :C][tokens[:, :C] > 0])
    scale = np.ones((params["backbone"]["embedding"].shape[0], 1), np.float32)
    gradient = np.asarray(jax.jit(jax.grad(loss))(scale, weight))[used]
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6


def test_a_row_must_be_whole_chunks():
    with pytest.raises(ValueError, match="no whole number of chunks of 5"):
        made()[2](batch_of(ids(length=7)))


def test_the_named_intermediates_have_whole_rows():
    _, out, _ = made()[2](batch_of(ids()))
    assert out["layers.0.residual"].shape[:2] == out["memory.read"].shape[:2] == (B, T)
    assert out["memory.energy"].shape[:3] == (3, B, T)
    assert np.all(np.diff(out["memory.energy"], axis=0) <= 1e-5)
    assert out["memory.gate"].shape == () and out["segments.hidden"].shape[:3] == (1, B, T)
    assert jnp.asarray(out["final"]).shape[:2] == (B, T)


def test_what_surprises_the_decoder_is_what_is_written():
    forward = made(chunk=0, select="surprise", n_writes=1)[2]
    tokens, decoder = ids(length=9), backbone()
    memory = forward(batch_of(tokens))[2]["memory"]
    logits = np.asarray(decoder.model.apply({"params": decoder.params}, tokens)[0])
    nll = -jax.nn.log_softmax(logits[:, :-1])[np.arange(B)[:, None], np.arange(8), tokens[:, 1:]]
    written = np.asarray(memory.valid_BS)
    assert np.array_equal(written.sum(1), np.ones(B))
    assert np.array_equal(memory.position_BS[written], nll.argmax(1) + 1)


def test_an_edit_that_changes_nothing_changes_nothing_and_others_reach_decoder_and_memory():
    model, params, forward = made()
    tokens, seen = ids(), []

    def run(edit):
        edited = model.clone(edit=edit)
        return jax.jit(lambda batch: edited.apply({"params": params}, batch, method="forward"))(
            batch_of(tokens))[0]

    def watch(name, value):
        seen.append(name)
        return value

    plain = forward(batch_of(tokens))[0]
    assert_close(run(watch), plain, 1e-5)
    assert {"layers.0.residual", "memory.read", "memory.final"} <= set(seen)
    without = run(lambda name, value: value * 0 if name == "memory.read" else value)
    assert_close(without, made(gate=0.0)[2](batch_of(tokens))[0], 1e-5)


def test_a_memory_of_next_tokens_makes_a_text_that_it_has_read_likelier_without_training():
    decoder = backbone()
    model = CHopT(decoder.model.config, MemoryConfig(
        n_slots=2 * C, n_heads=1, n_writes=C, beta=60.0, steps=1, values="next_token"), C)
    chunk = ids(rows=1, length=C)
    batch = batch_of(np.concatenate([chunk, chunk], axis=1))

    @jax.jit
    def second(key, modes):
        bank = model.init(key, chunk)["params"]["memory_bank"]
        params = {"backbone": decoder.params,
                  "memory_bank": {**bank, "read_gate": jnp.float32(0.5)}}
        hidden, _, _ = model.apply({"params": params}, batch, interventions=modes,
                                   method="forward")
        return token_nll(hidden[:, C:-1], model.head(params), chunk[:, 1:]).mean()

    key = jax.random.key(0)
    without = float(second(key, np.array([MODES.index("write_only")])))
    assert float(second(key, np.array([MODES.index("read+write")]))) < without - 1
