"""The decode loop: it draws what a full forward pass for every token would, row by row."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.generation import decode
from hippocampus.generation.sampling import SamplerSettings, sample_without_cache

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONTEXT, N = 48, 14
PROMPTS = [np.asarray(prompt, np.int32) for prompt in
           ([3, 1, 4, 1, 5], [9] * 33, [2])]  # of one chunk, of two, of one token
SEEDS = np.asarray([0, 7, 2**32 - 1], np.uint32)
GREEDY = SamplerSettings(temperature=0.0)
DRAWN = SamplerSettings(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
ALL = {"model.n_layers": 1, "data.context": CONTEXT}
WINDOW = {"model.n_layers": 1, "model.paths": ("attention",), "data.context": 16,
          "model.segments.train": 1}


def draw(built, prompts=PROMPTS, seeds=SEEDS, settings=DRAWN, n=N, *, kind=ALL, end_id=None,
         calls=None):
    """Tokens and log-probabilities of every row; -1 and nothing behind a row's end."""
    model, params = built(kind)
    state = decode.start(model, {"params": params}, prompts, max_length=kind["data.context"])
    tokens, log_p = [], []
    ends = () if end_id is None else (end_id,)
    for limit in calls or (n,):
        state, drawn = decode.write(model, {"params": params}, state, seeds, settings, limit,
                                    ends)
        tokens.append(np.asarray(drawn.tokens_BM)[:, :int(drawn.n)])
        log_p.append(np.asarray(drawn.log_p_BM)[:, :int(drawn.n)])
    return np.concatenate(tokens, 1), np.concatenate(log_p, 1)


def without_cache(built, row, settings, kind=ALL, n=N):
    model, params = built(kind)
    return list(sample_without_cache(
        model, params, PROMPTS[row], context=kind["data.context"], max_new_tokens=n,
        settings=settings, seed=int(SEEDS[row])))


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_every_row_is_what_full_forward_passes_give(built, settings):
    tokens, _ = draw(built, settings=settings)
    for row in range(3):
        assert tokens[row].tolist() == without_cache(built, row, settings)
    assert len({tuple(row) for row in tokens.tolist()}) == 3


def test_beyond_the_context_a_layer_of_attention_slides_along(built):
    # One layer, so that what a token left in the cache depends on that token alone.
    tokens, _ = draw(built, kind=WINDOW, n=40)
    for row in range(3):
        assert tokens[row].tolist() == without_cache(built, row, DRAWN, WINDOW, 40)


def test_log_probabilities_are_those_of_the_full_forward_pass(built):
    model, params = built(ALL)
    forward = jax.jit(model.apply)
    tokens, log_p = draw(built)
    for row, prompt in enumerate(PROMPTS):
        text = np.zeros(CONTEXT, np.int32)
        text[:len(prompt) + N] = [*prompt, *tokens[row]]
        logits, _ = forward({"params": params}, text[None])
        at = len(prompt) - 1 + np.arange(N)
        wanted = jax.nn.log_softmax(logits[0, at])[np.arange(N), tokens[row]]
        np.testing.assert_allclose(log_p[row], wanted, rtol=1e-4, atol=1e-4)


def test_rows_have_settings_of_their_own(built):
    both = SamplerSettings(*(np.asarray([a, b, a]) for a, b in zip(GREEDY, DRAWN, strict=True)))
    tokens, _ = draw(built, settings=both)
    for row, settings in enumerate((GREEDY, DRAWN, GREEDY)):
        assert tokens[row].tolist() == draw(built, settings=settings)[0][row].tolist()


# ---------------------------------------------------------------- rows apart

def test_a_row_keeps_every_bit_beside_other_mates(built):
    tokens, log_p = draw(built)
    for row in range(3):
        mates = [np.asarray([8, 8, 8 + m], np.int32) for m in range(3)]
        seeds = np.asarray([5, 6, 7], np.uint32)
        mates[row], seeds[row] = PROMPTS[row], SEEDS[row]
        other_tokens, other_log_p = draw(built, mates, seeds)
        np.testing.assert_array_equal(tokens[row], other_tokens[row])
        np.testing.assert_array_equal(log_p[row], other_log_p[row])
        assert (np.delete(tokens, row, 0) != np.delete(other_tokens, row, 0)).any()


def test_a_row_alone_has_the_same_text(built):
    tokens, log_p = draw(built)
    for row in range(3):
        alone, alone_log_p = draw(built, PROMPTS[row:row + 1], SEEDS[row:row + 1])
        assert alone[0].tolist() == tokens[row].tolist()
        np.testing.assert_allclose(alone_log_p[0], log_p[row], rtol=1e-4, atol=1e-5)


def test_the_same_seed_is_the_same_stream_in_every_row(built):
    tokens, _ = draw(built, [PROMPTS[0]] * 3, np.asarray([4, 4, 5], np.uint32))
    assert tokens[0].tolist() == tokens[1].tolist() != tokens[2].tolist()


def test_rows_without_a_prompt_stand_for_nothing(built):
    nothing = np.zeros(0, np.int32)
    tokens, _ = draw(built, [PROMPTS[0], nothing, PROMPTS[1]], SEEDS)
    whole, _ = draw(built, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], SEEDS)
    np.testing.assert_array_equal(tokens[[0, 2]], whole[[0, 2]])
    assert (tokens[1] == -1).all()


# ---------------------------------------------------------------- where rows end

def test_a_row_ends_with_its_end_and_the_others_go_on(built):
    plain, _ = draw(built)
    end = int(plain[0, 4])
    tokens, _ = draw(built, end_id=end)
    for row in range(3):
        found = np.flatnonzero(plain[row] == end)
        length = found[0] + 1 if found.size else N
        assert tokens[row, :length].tolist() == plain[row, :length].tolist()
        assert (tokens[row, length:] == -1).all()
    assert tokens.shape == (3, N) and (tokens[0] == -1).any() and (tokens[:, -1] >= 0).any()


def test_the_loop_ends_when_every_row_has(built):
    plain, _ = draw(built, PROMPTS[:1], SEEDS[:1])
    end = int(plain[0, 4])
    tokens, _ = draw(built, PROMPTS[:1], SEEDS[:1], end_id=end, calls=(N, N))
    assert tokens[0].tolist() == plain[0, :plain[0].tolist().index(end) + 1].tolist()


def test_calls_of_any_size_draw_the_same_tokens(built):
    whole, log_p = draw(built)
    parts, parts_log_p = draw(built, calls=(1, 2, 3, 8, 0))
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(log_p, parts_log_p)


def test_a_row_that_is_stopped_draws_no_more(built):
    model, params = built(ALL)
    state = decode.start(model, {"params": params}, PROMPTS, max_length=CONTEXT)
    state, first = decode.write(model, {"params": params}, state, SEEDS, DRAWN, 5)
    state = decode.stop_rows(state, np.asarray([False, True, False]))
    before = [np.asarray(leaf[1]) for leaf in jax.tree.leaves(state.cache)]
    state, then = decode.write(model, {"params": params}, state, SEEDS, DRAWN, 9)
    tokens = np.concatenate([first.tokens_BM[:, :5], then.tokens_BM[:, :9]], 1)
    whole, _ = draw(built)
    np.testing.assert_array_equal(tokens[[0, 2]], whole[[0, 2]])
    assert (tokens[1, 5:] == -1).all()
    for old, new in zip(before, jax.tree.leaves(state.cache), strict=True):
        np.testing.assert_array_equal(old, new[1])


# ---------------------------------------------------------------- few programs

def test_changing_settings_compiles_nothing(built):
    draw(built, n=2)
    before = decode._compiled_write("cpu")._cache_size()
    for n, settings in enumerate((GREEDY, SamplerSettings(1, 5), SamplerSettings(0.5, top_p=1),
                                  SamplerSettings(min_p=0.2, repetition_penalty=2))):
        draw(built, seeds=SEEDS - np.uint32(n), n=n, settings=settings, end_id=n)
    assert decode._compiled_write("cpu")._cache_size() == before


@pytest.mark.parametrize(("context", "most"), [
    (256, 3), pytest.param(1024, 6, marks=pytest.mark.full)])
def test_prompts_of_any_length_compile_a_handful_of_programs(built, context, most):
    model, params = built(WINDOW | {"data.context": context})
    programs = (decode._read, decode._compiled_write("cpu"))
    before = sum(program._cache_size() for program in programs)
    for length in np.linspace(1, context - 4, 20).astype(int):
        state = decode.start(model, {"params": params}, [np.ones(length, np.int32)],
                             max_length=decode.capacity(length + 4, context))
        state, _ = decode.write(model, {"params": params}, state, SEEDS[:1], GREEDY, 4)
        assert int(state.cache.length_B[0]) == length + 4
    assert sum(program._cache_size() for program in programs) - before <= most


@pytest.mark.parametrize("length", [1, 31, 32, 33, 255, 256, 257, 1000])
def test_chunks_hold_a_prompt_and_little_more(length):
    chunks = list(decode._chunks(length))
    assert [begin for begin, _ in chunks] == np.cumsum([0, *(n for _, n in chunks)])[:-1].tolist()
    assert length <= sum(n for _, n in chunks) < length + decode.CHUNKS[-1]
    assert {n for _, n in chunks} <= set(decode.CHUNKS)
    assert len(chunks) <= math.ceil(length / 256) + 8


def test_caches_have_few_capacities_that_hold_the_row():
    sizes = {length: decode.capacity(length, 3000) for length in range(1, 5000)}
    assert all(min(length, 3000) <= size <= 3000 for length, size in sizes.items())
    assert len(set(sizes.values())) == 3 and decode.capacity(9, 16) == 16


def test_options_that_a_compiler_does_not_know_are_left_out():
    assert decode.known_options({"no_such_option": "1"}) == {}
    assert decode.known_options({**decode._GPU_OPTIONS, "no_such_option": "1"}) == {}
    assert decode.known_options(decode._GPU_OPTIONS) == decode._GPU_OPTIONS


def test_the_vocabularys_padding_is_never_drawn(built):
    tokens, log_p = draw(built, settings=SamplerSettings(temperature=50.0), n=200)
    assert 25 < len(np.unique(tokens)) <= 31 and tokens.max() < 31
    assert np.isfinite(log_p).all() and jnp.all(log_p < 0)
