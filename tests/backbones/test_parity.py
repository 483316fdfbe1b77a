"""Decoders say what transformers says, of whole texts and of texts read bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compiles")

FAMILIES = ("llama", "qwen3", "gemma3", "gemma3n")
TOLERANCE = {"gemma3n": 2e-4}
PROMPT, CAPACITY = 12, 64


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """An accelerator would round the factors of matrix products."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def extend(family, backbone_of):
    """(ids, cache) -> (logits, cache), compiled once per number of ids."""
    backbone = backbone_of(family)

    @jax.jit
    def run(params, ids, cache):
        hidden, cache = backbone.model.apply({"params": params}, ids, cache, method="extend")
        return backbone.model.head(params).logits(hidden), cache

    return lambda ids, cache: run(backbone.params, ids, cache)


@pytest.fixture
def tolerance(family):
    return TOLERANCE.get(family, 1e-4)


def test_logits_of_a_whole_text_are_those_of_transformers(family, backbone_of, reference_of,
                                                          tolerance):
    backbone, reference = backbone_of(family), reference_of(family)
    logits, _ = jax.jit(backbone.model.apply)({"params": backbone.params}, reference["ids"])
    assert logits.shape == reference["logits"].shape and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=tolerance)


def test_logits_behind_a_cache_are_those_of_transformers(family, backbone_of, reference_of, extend,
                                                         tolerance):
    """A chunk longer than the sliding window, then single tokens far beyond it."""
    ids, cache = reference_of(family)["ids"], backbone_of(family).model.init_cache(2, CAPACITY)
    logits, cache = extend(ids[:, :PROMPT], cache)
    found = [logits]
    for t in range(PROMPT, ids.shape[1]):
        logits, cache = extend(ids[:, t:t + 1], cache)
        found.append(logits)
    logits = np.concatenate(found, axis=1)
    expected = reference_of(family)["logits"]
    n_ids = expected.shape[-1]
    np.testing.assert_allclose(logits[..., :n_ids], expected, rtol=0, atol=tolerance)
    assert (logits[..., n_ids:] == -np.inf).all(), "ids beyond the vocabulary can be drawn"


def test_the_most_likely_continuation_is_that_of_transformers(family, backbone_of, reference_of,
                                                              extend):
    reference = reference_of(family)
    logits, cache = extend(reference["ids"][:, :PROMPT], backbone_of(family).model.init_cache(
        2, CAPACITY))
    drawn = [logits[:, -1].argmax(-1)]
    while len(drawn) < reference["generated"].shape[1]:
        logits, cache = extend(drawn[-1][:, None], cache)
        drawn.append(logits[:, -1].argmax(-1))
    assert (np.stack(drawn, axis=1) == reference["generated"]).all()
