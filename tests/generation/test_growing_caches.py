"""Caches that grow in the middle of a row: what follows is as if they had been large at once."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from hippocampus.backbones.loading import load_backbone
from hippocampus.config_adapters import AdaptersConfig, SlotMemoryConfig
from hippocampus.config_hybrid import SSMConfig
from hippocampus.config_memory import MemoryConfig
from hippocampus.generation import decode
from hippocampus.generation.sampling import SamplerSettings
from hippocampus.models.buu import Buu
from hippocampus.models.chopt import CHopT

pytestmark = pytest.mark.usefixtures("quick_compiles")

FIXTURES = Path(__file__).resolve().parents[1] / "backbones" / "fixtures"
SMALL, LARGE, V = 24, 64, 31
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).astype(np.int32) for n in (SMALL, 3)]  # one row fills its cache
THEN = [RNG.integers(0, V, n).astype(np.int32) for n in (30, 32)]
DRAWN = SamplerSettings(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
HYBRID = {"model.n_layers": 1, "data.context": LARGE, "model.segments.train": 1}
ATTENTION = HYBRID | {"model.paths": ("attention",)}
GROWING_WINDOW, FULL_WINDOW = {"model.attention.window": 40}, {"model.attention.window": 8}
FIRST, *OTHERS = ["all paths, a growing window", "llama", "gemma3n", "two passes, a full window",
                  "s6 and attention", "equilibrium, iterations", "buu llama", "chopt llama"]


@pytest.fixture
def made(built, built_equilibrium, random_parameters):
    """name -> (model, variables)."""
    hybrids = {
        "all paths, a growing window": HYBRID | GROWING_WINDOW,
        "two passes, a full window": HYBRID | FULL_WINDOW | {"model.segments.train": 2},
        "s6 and attention": HYBRID | {"model.paths": ("ssm", "attention"), "model.ssm.kind": "s6"}}

    def make(name):
        if name in hybrids:
            model, params = built(hybrids[name])
        elif name == "equilibrium, iterations":
            model, params = built_equilibrium({
                "data.context": LARGE, "model.solver.cache": "iterations",
                "model.solver.max_iterations": 4})
        else:
            decoder = load_backbone(FIXTURES / name.split()[-1])
            model, params = decoder.model, decoder.params
            if name.startswith("buu"):
                model = Buu(model.config, AdaptersConfig(
                    layers=(1,), ssm=SSMConfig(expansion=1.0, backend="associative"),
                    memory=SlotMemoryConfig(slots=4, heads=2, width=8)))
            elif name.startswith("chopt"):
                model = CHopT(model.config, MemoryConfig(n_slots=8, n_heads=2))
            if model is not decoder.model:
                params = random_parameters(model)
        return model, {"params": params}
    return make


def full(model):
    """A state with rows of at most `SMALL` tokens, in which no number is zero."""
    rng, nothing = np.random.default_rng(1), np.zeros(2)
    cache = jax.tree.map(lambda leaf: rng.integers(1, SMALL, leaf.shape).astype(leaf.dtype),
                         jax.eval_shape(lambda: model.init_cache(2, SMALL)))
    return decode.DecodeState(cache, nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("name", [
    FIRST, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_what_is_read_after_growing_is_as_with_caches_that_were_large_at_once(made, name):
    model, variables = made(name)

    def read(max_length):
        state = decode.start(model, variables, PROMPTS, max_length=max_length)
        return decode.grow(model, state, LARGE) if max_length < LARGE else state

    grown, whole = (decode.read(model, variables, read(n), THEN) for n in (SMALL, LARGE))
    np.testing.assert_allclose(grown.logits_BV, whole.logits_BV, rtol=1e-4, atol=1e-5)
    ours, theirs = jax.tree.leaves(grown.cache), jax.tree.leaves(whole.cache)
    for leaf, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("window", [GROWING_WINDOW, FULL_WINDOW])
def test_the_tokens_drawn_after_growing_are_those_of_caches_that_were_large(built, window):
    model, params = built(ATTENTION | window)
    seeds = np.asarray([3, 4], np.uint32)

    def draw(sizes):
        state = decode.start(model, {"params": params}, [p[:8] for p in PROMPTS],
                             max_length=sizes[0])
        tokens, log_p = [], []
        for size, n in zip(sizes, (SMALL - 8, 50), strict=True):
            state = decode.grow(model, state, size)
            state, drawn = decode.write(model, {"params": params}, state, seeds, DRAWN, n)
            tokens.append(drawn.tokens_BM[:, :n])
            log_p.append(drawn.log_p_BM[:, :n])
        return np.concatenate(tokens, 1), np.concatenate(log_p, 1)

    grown, whole = draw((SMALL, LARGE)), draw((LARGE, LARGE))
    np.testing.assert_array_equal(grown[0], whole[0])
    np.testing.assert_allclose(grown[1], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [FIRST, *OTHERS])
def test_what_a_cache_holds_keeps_every_bit_and_only_what_has_room_for_tokens_grows(made, name):
    model, _ = made(name)
    state = full(model)
    small = state.cache
    grown = decode.grow(model, state, LARGE)
    larger = jax.eval_shape(lambda: model.init_cache(2, LARGE))
    assert jax.tree.structure(grown.cache) == jax.tree.structure(larger)
    more = set()
    for old, new, wanted in zip(*map(jax.tree.leaves, (small, grown.cache, larger)), strict=True):
        assert (new.shape, new.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(old, new[tuple(map(slice, old.shape))])
        assert np.count_nonzero(new) == old.size, "what is behind it is empty"
        more.update(b - a for a, b in zip(old.shape, new.shape, strict=True))
    assert {0, LARGE - SMALL} <= more


def test_a_cache_neither_shrinks_nor_grows_behind_what_it_has_lost(made):
    model, _ = made("llama")
    state = full(model)
    with pytest.raises(ValueError, match=f"cache of {SMALL - 1} tokens would be smaller"):
        decode.grow(model, state, SMALL - 1)
    lost = dataclasses.replace(state, cache=state.cache.replace(
        length_B=np.array([3, SMALL + 1], np.int32)))
    with pytest.raises(ValueError, match=f"{SMALL + 1} tokens are read and a cache held {SMALL}"):
        decode.grow(model, lost, LARGE)
    same = decode.grow(model, lost, SMALL)
    assert jax.tree.map(np.shape, same) == jax.tree.map(np.shape, lost)
