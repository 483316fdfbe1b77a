"""Choosing the next token, and the window that it is chosen from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.generation import sampling
from hippocampus.generation.sampling import SamplerSettings, choose_token, sample_tokens
from hippocampus.models.build_model import build_model

LOGITS = jnp.log(jnp.asarray([0.05, 0.4, 0.1, 0.25, 0.2]))


@jax.jit
def draw_many(logits_V, settings: SamplerSettings):
    keys = jax.random.split(jax.random.key(0), 4000)
    return jax.vmap(lambda key: choose_token(logits_V, key, settings))(keys)


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


def test_equal_logits_give_exactly_k_candidates():
    assert (shares(jnp.zeros(6), top_k=2) > 0).sum() == 2


def test_masked_tokens_are_never_drawn():
    logits = jnp.asarray([0.0, -jnp.inf, 0.0, -jnp.inf])
    assert_shares(shares(logits, temperature=9.0), [1, 0, 1, 0])


# ---------------------------------------------------------------- with a model

@pytest.fixture(scope="module")
def model_and_params(random_parameters):
    """An untrained, lively model of 37 tokens, whose tables have 128 rows."""
    model = build_model(tiny_run.config(model__vocab_size=37, model__position="none",
                                        model__tie_embeddings=False))
    return model, random_parameters(model)


def draw(model_and_params, prompt=(1, 2, 3), n=24, seed=0, context=16, **settings) -> list[int]:
    model, params = model_and_params
    return list(sample_tokens(model, params, np.asarray(prompt, np.int32), context=context,
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
