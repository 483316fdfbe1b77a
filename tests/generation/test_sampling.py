"""Choosing the next token, and the window that it is chosen from."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.generation import sampling
from hippocampus.generation.sampling import (
    SamplerSettings,
    choose_tokens,
    process_logits,
    sample_without_cache,
)
from hippocampus.models.build_model import build_model

LOGITS = jnp.log(jnp.asarray([0.05, 0.4, 0.1, 0.25, 0.2]))


@jax.jit
def draw_many(logits_V, settings: SamplerSettings):
    rows = jnp.broadcast_to(logits_V, (4000, len(logits_V)))
    keys = jax.random.split(jax.random.key(0), 4000)
    return choose_tokens(rows, jnp.zeros(rows.shape, bool), keys, settings)[0]


def shares(logits_V=LOGITS, **settings) -> np.ndarray:
    """How often each token came in 4000 draws."""
    tokens = np.asarray(draw_many(logits_V, SamplerSettings(**settings)))
    return np.bincount(tokens, minlength=len(logits_V)) / len(tokens)


def assert_shares(found: np.ndarray, wanted: list[float]) -> None:
    wanted = np.asarray(wanted) / np.sum(wanted)
    np.testing.assert_array_equal(found[wanted == 0], 0)
    likely = wanted > 0
    chi_square = (4000 * (found - wanted)[likely] ** 2 / wanted[likely]).sum()
    assert chi_square < 25, f"{found} for {wanted}"  # p < 1e-4 at four degrees of freedom


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.01},
                                      {"temperature": 5.0, "top_k": 1},
                                      {"temperature": 0.0, "top_k": 3, "top_p": 0.9}])
def test_one_candidate_is_the_most_likely_token(settings):
    assert_shares(shares(**settings), [0, 1, 0, 0, 0])


def test_draws_follow_the_probabilities():
    assert_shares(shares(), [0.05, 0.4, 0.1, 0.25, 0.2])


def test_temperature_divides_the_logits():
    p = np.asarray([0.05, 0.4, 0.1, 0.25, 0.2])
    assert_shares(shares(temperature=0.5), list(p**2))
    assert_shares(shares(temperature=2.0), list(p**0.5))


@pytest.mark.parametrize(("k", "wanted"), [
    (2, [0, 0.4, 0, 0.25, 0]), (3, [0, 0.4, 0, 0.25, 0.2]), (5, [0.05, 0.4, 0.1, 0.25, 0.2]),
    (99, [0.05, 0.4, 0.1, 0.25, 0.2])])
def test_only_the_k_most_likely_are_drawn(k, wanted):
    assert_shares(shares(top_k=k), wanted)


@pytest.mark.parametrize(("p", "wanted"), [
    (0.39, [0, 0.4, 0, 0, 0]), (0.41, [0, 0.4, 0, 0.25, 0]), (0.64, [0, 0.4, 0, 0.25, 0]),
    (0.66, [0, 0.4, 0, 0.25, 0.2]), (0.99, [0.05, 0.4, 0.1, 0.25, 0.2])])
def test_the_fewest_that_reach_p_are_drawn(p, wanted):
    assert_shares(shares(top_p=p), wanted)


def test_top_p_is_taken_of_what_top_k_left():
    # 0.4 / (0.4 + 0.25) = 0.62 reaches 0.6 alone; of all tokens it would take two.
    assert_shares(shares(top_k=2, top_p=0.6), [0, 1, 0, 0, 0])


def test_tokens_as_likely_as_the_last_kept_one_are_kept():
    assert (shares(jnp.asarray([0.0, 1.0, 0.0, 0.0]), top_k=2) > 0).all()


def test_masked_tokens_are_never_drawn():
    logits = jnp.asarray([0.0, -jnp.inf, 0.0, -jnp.inf])
    assert_shares(shares(logits, temperature=9.0), [1, 0, 1, 0])


@pytest.fixture(scope="module")
def model_and_params(random_parameters):
    """An untrained, lively model of 37 tokens, whose tables have 128 rows."""
    model = build_model(tiny_run.config(model__vocab_size=37, model__position="none",
                                        model__tie_embeddings=False))
    return model, random_parameters(model)


# ---------------------------------------------------------------- against references

def by_sorting(logits, k, p, min_p):
    """What is left of one row, the plain way."""
    kept = np.array(logits)
    if 0 < k < len(kept):
        kept[kept < np.sort(kept)[-k]] = -np.inf
    if p < 1:
        order = np.argsort(-kept, kind="stable")
        share = np.exp(kept[order] - kept.max(), dtype=np.float64)
        share /= share.sum()
        n = max(1, int((np.cumsum(share) - share < p - 1e-9).sum()))
        kept[kept < kept[order][n - 1]] = -np.inf
    if min_p:
        kept[kept < kept.max() + np.log(min_p)] = -np.inf
    return kept


def test_filters_keep_what_sorting_keeps_row_by_row():
    rng, process = np.random.default_rng(0), jax.jit(process_logits)
    for trial in range(60):
        V = (2, 7, 40, 64)[trial % 4]
        logits = (rng.normal(size=(4, V)) * rng.choice([0.1, 1, 10])).astype(np.float32)
        logits = np.round(logits, 1) if trial % 2 else logits  # with ties
        logits[1:, -1] = -np.inf
        k, p = rng.integers(0, V + 3, 4), rng.uniform(0.01, 1, 4).astype(np.float32)
        p[0], min_p = 1.0, rng.choice(np.float32([0, 0.05, 0.5, 1]), 4)
        found = process(logits, np.zeros(logits.shape, bool), SamplerSettings(1.0, k, p, min_p))
        wanted = np.stack([by_sorting(*row) for row in zip(logits, k, p, min_p, strict=True)])
        np.testing.assert_array_equal(found, wanted)


def test_neutral_settings_give_the_bits_that_came_in():
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    logits[:, 40:] = -np.inf
    seen = np.ones(logits.shape, bool)
    np.testing.assert_array_equal(process_logits(logits, seen, SamplerSettings()), logits)


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-38}, {"temperature": 1e-30}, {"temperature": 1e30}, {"temperature": 1e39},
    {"top_p": 1e-9}, {"min_p": 1.0}, {"repetition_penalty": 1e9}, {"repetition_penalty": 1e39},
    {"repetition_penalty": 1e-39, "temperature": 1e-30}])
def test_extreme_settings_still_draw_a_token_that_can_be_drawn(settings):
    logits = jnp.asarray([[-300.0, 50.0, 400.0, 0.0, -jnp.inf]])
    seen, keys = jnp.ones((1, 5), bool), jax.random.split(jax.random.key(0), 1)
    # As 32-bit numbers, in which 1e39 is infinite and 1e-39 may be 0.
    with np.errstate(over="ignore"):
        sampler = SamplerSettings(**{name: np.float32(x) for name, x in settings.items()})
    found = process_logits(logits, seen, sampler)
    assert not jnp.isnan(found).any() and not jnp.isposinf(found).any() and found[0, 4] == -jnp.inf
    tokens, log_p = choose_tokens(logits, seen, keys, sampler)
    assert int(tokens[0]) < 4 and np.isfinite(log_p).all()
    if settings.get("temperature", 1) < 1 and len(settings) == 1:
        assert int(tokens[0]) == 2


def test_the_penalty_falls_on_seen_tokens_towards_less_likely():
    logits = jnp.asarray([[2.0, 2.0, -2.0, -2.0]])
    seen = jnp.asarray([[True, False, True, False]])
    found = process_logits(logits, seen, SamplerSettings(repetition_penalty=4.0))
    np.testing.assert_array_equal(found, [[0.5, 2.0, -8.0, -2.0]])
    keys = jax.random.split(jax.random.key(0), 1)
    greedy = SamplerSettings(temperature=0.0, repetition_penalty=4.0)
    assert int(choose_tokens(logits, seen, keys, greedy)[0][0]) == 1


def test_log_probabilities_are_those_of_the_model():
    logits = jnp.broadcast_to(LOGITS + 3, (2, 5))
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, log_p = choose_tokens(logits, jnp.ones((2, 5), bool), keys, SamplerSettings(
        jnp.asarray([0.0, 3.0]), top_k=2, repetition_penalty=2.0))
    np.testing.assert_allclose(log_p, LOGITS[tokens], rtol=1e-6)


def test_a_row_draws_the_same_beside_other_rows_and_settings():
    rng = np.random.default_rng(0)
    logits, keys = rng.normal(size=(3, 30)).astype(np.float32), jax.random.split(
        jax.random.key(1), 3)
    seen = np.zeros(logits.shape, bool)
    mixed = SamplerSettings(np.float32([1, 0, 2]), np.int32([0, 0, 5]), np.float32([0.5, 1, 1]))
    tokens, log_p = choose_tokens(logits, seen, keys, mixed)
    for b in range(3):
        alone = SamplerSettings(*(value if np.ndim(value) == 0 else value[b] for value in mixed))
        here = slice(b, b + 1)
        one = choose_tokens(logits[here], seen[here], keys[here], alone)
        assert int(one[0][0]) == int(tokens[b]) and float(one[1][0]) == float(log_p[b])


@pytest.mark.parametrize("V", [24, 60])
def test_processors_agree_with_those_of_transformers_row_by_row(V):
    cases = json.loads((Path(__file__).parent / "processors.json").read_text())
    cases = [case for case in cases if len(case["logits"]) == V]
    assert len(cases) >= 10
    seen = np.zeros((len(cases), V), bool)
    for row, case in zip(seen, cases, strict=True):
        row[case["seen"]] = True
    rows = [SamplerSettings(**case["settings"]) for case in cases]
    logits = np.asarray([case["logits"] for case in cases], np.float32)
    found = process_logits(logits, seen, SamplerSettings(*map(np.asarray, zip(*rows, strict=True))))
    wanted = np.asarray([[-np.inf if x is None else x for x in case["processed"]]
                         for case in cases], np.float32)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


# ---------------------------------------------------------------- with a model

def draw(model_and_params, prompt=(1, 2, 3), n=24, seed=0, context=16, **settings) -> list[int]:
    model, params = model_and_params
    return list(sample_without_cache(model, params, np.asarray(prompt, np.int32), context=context,
                              max_new_tokens=n, seed=seed, settings=SamplerSettings(**settings)))


def test_padding_of_the_vocabulary_is_never_sampled(model_and_params):
    assert model_and_params[1]["embedding"].shape[0] == 128
    tokens = draw(model_and_params, n=300, temperature=50.0)
    assert max(tokens) < 37 and len(set(tokens)) > 25


def test_same_seed_same_tokens_and_others_differ(model_and_params):
    assert draw(model_and_params, seed=1) == draw(model_and_params, seed=1)
    assert len({tuple(draw(model_and_params, seed=seed)) for seed in range(5)}) == 5
    assert draw(model_and_params, seed=1)[:8] == draw(model_and_params, seed=1, n=8)


def test_changing_settings_compiles_nothing(model_and_params):
    draw(model_and_params, n=1, temperature=1.0, top_k=0, top_p=1.0)
    before = sampling._next_token._cache_size()
    for settings in ({"temperature": 0.3}, {"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.5}):
        draw(model_and_params, n=2, seed=3, prompt=(4,) * 5, **settings)
    assert sampling._next_token._cache_size() == before


def test_next_token_is_read_off_the_last_token_of_the_last_window(model_and_params):
    model, params = model_and_params
    forward, context, wanted, found = jax.jit(model.apply), 16, [], []
    for seed, length in enumerate([1, 2, 5, 9, 13, 15, 16, 17, 18, 25, 31, 32, 33, 60]):
        prompt = np.random.default_rng(seed).integers(0, 37, length)
        window = prompt[-context:]
        padded = np.full(context, 36, np.int32)
        padded[:len(window)] = window
        logits, _ = forward({"params": params}, padded[None])
        wanted.append(int(jnp.argmax(logits[0, len(window) - 1])))
        found += draw(model_and_params, prompt=prompt, n=1, temperature=0.0)
    assert found == wanted and len(set(wanted)) > 4


def test_new_tokens_are_read_for_the_next_ones(model_and_params):
    tokens = draw(model_and_params, n=6, temperature=0.0)
    for n in range(6):
        assert draw(model_and_params, prompt=[1, 2, 3, *tokens[:n]], n=1,
                    temperature=0.0) == [tokens[n]]


def test_text_beyond_the_window_is_forgotten(model_and_params):
    tail = list(range(16))
    assert draw(model_and_params, prompt=[9] * 30 + tail) == draw(model_and_params, prompt=tail)
    assert draw(model_and_params, prompt=[*tail[:15], 9]) != draw(model_and_params, prompt=tail)


def test_nothing_is_drawn_when_nothing_is_asked_for(model_and_params):
    assert draw(model_and_params, n=0) == []
