"""Hopfield retrieval: it is a gradient step, its energy never rises, one step is attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops import hopfield
from hippocampus.ops.attention import attention
from hippocampus.testing import assert_close, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, H, D_HEAD, S = 2, 8, 2, 4, 5
IDS = jnp.asarray([[1] * 5 + [2] * 3, [1] * 1 + [2] * 4 + [0] * 3])

energy = jax.jit(hopfield.energy)
retrieve = jax.jit(hopfield.retrieve, static_argnames=("alpha", "backend"))
effective_patterns = jax.jit(hopfield.effective_patterns)

PATTERNS = ("context", "slots", "both")
BETAS = (0.25, 1.0, 8.0)
ALPHAS = (0.3, 1.0)


def memory(patterns, size=1.0):
    keys = jax.random.normal(jax.random.key(1), (B, T, H, D_HEAD)) * size
    slots = jax.random.normal(jax.random.key(2), (S, H, D_HEAD)) * size
    return keys if patterns != "slots" else None, slots if patterns != "context" else None


def queries():
    return jax.random.normal(jax.random.key(3), (B, T, H, D_HEAD)) * 1.5


@functools.cache
def descent(patterns, alpha, with_documents, steps=25):
    """A jitted (xi, beta) -> (every state, its energies), steps first."""
    keys, slots = memory(patterns)
    ids = IDS if with_documents else None

    @jax.jit
    def run(xi, beta_H):
        def step(xi, _):
            new = retrieve(xi, keys, slots, beta_H, alpha=alpha, document_ids=ids)
            return new, (xi, energy(xi, keys, slots, beta_H, ids))

        return jax.lax.scan(step, xi, None, length=steps)[1]

    return run


def energy_by_hand(xi, keys, slots, beta, ids):
    """The docstring's formula in float64, token by token."""
    xi, keys, slots = (None if a is None else np.asarray(a, np.float64) for a in (xi, keys, slots))
    beta, ids = np.asarray(beta, np.float64), None if ids is None else np.asarray(ids)
    out = np.zeros(xi.shape[:3])
    for b, t, h in np.ndindex(*out.shape):
        patterns = []
        if keys is not None:
            patterns += [keys[b, s, h] for s in range(t + 1)
                         if ids is None or ids[b, s] == ids[b, t]]
        if slots is not None:
            patterns += list(slots[:, h])
        k = np.stack(patterns)
        scores = beta[h] * k @ xi[b, t, h]
        lse = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
        out[b, t, h] = (-lse / beta[h] + xi[b, t, h] @ xi[b, t, h] / 2
                        + np.log(len(k)) / beta[h] + (k**2).sum(1).max() / 2)
    return out


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_energy_is_that_of_the_formula(patterns, documents):
    keys, slots = memory(patterns)
    ids, beta = IDS if documents else None, jnp.asarray([0.7, 3.0])
    assert_close(energy(queries(), keys, slots, beta, ids),
                 energy_by_hand(queries(), keys, slots, beta, ids), n_operations=T + S)


def test_one_whole_step_is_attention_with_keys_as_values():
    keys, _ = memory("context")
    beta = jnp.asarray([0.5, 2.0])
    new = retrieve(queries(), keys, None, beta, document_ids=IDS)
    for h in range(H):
        one = slice(h, h + 1)
        expected = attention(queries()[:, :, one], keys[:, :, one], keys[:, :, one],
                             document_ids=IDS, scale=float(beta[h]))
        assert_close(new[:, :, one], expected, n_operations=T)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_a_step_goes_down_the_gradient_of_the_energy(patterns, documents):
    keys, slots = memory(patterns)
    ids, beta, xi = IDS if documents else None, jnp.asarray([0.25, 4.0]), queries()
    slope = jax.jit(jax.grad(lambda xi: energy(xi, keys, slots, beta, ids).sum()))(xi)
    for alpha in ALPHAS:
        new = retrieve(xi, keys, slots, beta, alpha=alpha, document_ids=ids)
        assert_close(new, xi - alpha * slope, n_operations=T + S)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_energy_never_rises_and_is_never_negative(patterns, alpha, documents):
    for beta in BETAS:
        _, energies = descent(patterns, alpha, documents)(queries(), jnp.full((H,), beta))
        energies = np.asarray(energies)
        slack = 1e-5 * np.abs(energies).max()  # float32 values of a size that cancels
        assert (np.diff(energies, axis=0) <= slack).all(), f"rises at beta {beta}"
        assert energies.min() >= -slack
        assert (energies[0] - energies[-1]).max() > 0.1, "nothing moved: proves nothing"


def test_a_step_beyond_one_may_raise_the_energy():
    """Why alpha is held to (0, 1]: the check above can fail."""
    keys, slots = memory("context", size=0.1)
    xi, beta = queries(), jnp.ones(H)
    before = energy(xi, keys, slots, beta)
    after = energy(
        retrieve(xi, keys, slots, beta, alpha=2.5), keys, slots, beta)
    assert (after > before).any()


@pytest.mark.parametrize("patterns", ["context", "both"])
def test_retrieval_and_energy_see_the_past_only(patterns):
    _, slots = memory(patterns)
    beta = jnp.ones(H)

    def run(keys):
        xi = jnp.flip(keys, -1)
        effective, n = effective_patterns(xi, keys, slots, beta)
        return {"new": retrieve(xi, keys, slots, beta), "n": n, "effective": effective,
                "energy": energy(xi, keys, slots, beta)}

    check_causality(run, memory("both")[0])


@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_retrieval_weights_sum_to_one_over_all_patterns(patterns):
    keys, slots = memory(patterns)
    context, of_slots = hopfield.probabilities(queries(), keys, slots, jnp.ones(H), IDS)
    assert (context is None, of_slots is None) == (keys is None, slots is None)
    total = sum(p.sum(-1) for p in (context, of_slots) if p is not None)
    assert_close(total, np.ones_like(total))
    if context is not None:
        assert context[0, :, 6, :5].max() == 0  # another document
        assert context[0, :, 2, 3:].max() == 0  # the future


def test_slots_are_added_to_the_context_not_put_in_its_place():
    """With a slot far away, both = context; with only slots near, both = slots."""
    keys, slots = memory("both")
    xi = 8 * keys  # each token is near its own key
    far = jnp.zeros_like(slots).at[..., 0].set(-50.0)
    near_context = retrieve(jnp.abs(xi), jnp.abs(keys), far, jnp.ones(H))
    context_only = retrieve(jnp.abs(xi), jnp.abs(keys), None, jnp.ones(H))
    assert_close(near_context, context_only, n_operations=T)


@pytest.mark.parametrize("patterns", PATTERNS)
def test_effective_patterns_lie_between_one_and_all(patterns):
    keys, slots = memory(patterns)
    for beta in BETAS:
        effective, n = effective_patterns(queries(), keys, slots, jnp.full((H,), beta),
                                                   IDS)
        assert (effective >= 1 - 1e-5).all() and (effective <= n * (1 + 1e-5)).all()
    context = np.array([[1, 2, 3, 4, 5, 1, 2, 3], [1, 1, 2, 3, 4, 1, 2, 3]])
    expected = (context if patterns != "slots" else 0) + (S if patterns != "context" else 0)
    np.testing.assert_array_equal(n, np.broadcast_to(np.asarray(expected)[..., None], n.shape)
                                  if patterns != "slots" else np.full(n.shape, S))


def test_equal_keys_are_all_mixed_and_a_sharp_match_is_alone():
    equal = jnp.ones((B, T, H, D_HEAD))
    effective, n = effective_patterns(queries(), equal, None, jnp.ones(H))
    assert_close(effective, n, n_operations=T)
    assert n[0, :, 0].tolist() == list(range(1, T + 1))
    basis = jnp.broadcast_to(jnp.eye(D_HEAD)[None, :, None], (1, D_HEAD, 1, D_HEAD))
    sharp, _ = effective_patterns(basis, basis, None, jnp.asarray([50.0]))
    assert_close(sharp, np.ones_like(sharp))
    even = hopfield.entropy(queries(), equal, None, jnp.ones(H))
    assert_close(even, jnp.log(n), n_operations=T)
    assert np.abs(hopfield.entropy(basis, basis, None, jnp.asarray([50.0]))).max() < 1e-6


def test_two_of_three_equally_likely_patterns_count_two():
    keys = jnp.asarray([[1.0, 0], [1, 0], [-1, 0]])[None, :, None]
    xi = jnp.asarray([[0.0, 0], [0, 0], [30, 0]])[None, :, None]
    effective, _ = effective_patterns(xi, keys, None, jnp.ones(1))
    assert_close(effective[0, :, 0], np.array([1.0, 2.0, 2.0]))
    assert_close(hopfield.entropy(xi, keys, None, jnp.ones(1))[0, :, 0], np.log([1.0, 2.0, 2.0]))


def test_a_retrieval_is_single_metastable_or_global():
    effective, n = jnp.asarray([1.0, 1.4, 1.6, 5.0, 5.1, 10.0]), jnp.full(6, 10.0)
    assert hopfield.regime(effective, n).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_stored_pattern_is_completed_from_a_noisy_cue():
    slots = jnp.eye(4)[:, None] * 4.0
    cue = slots[2][None, None] + 0.8 * jax.random.normal(jax.random.key(0), (1, 1, 1, 4))
    xi = cue
    for _ in range(3):
        xi = retrieve(xi, None, slots, jnp.ones(1))
    assert float(jnp.abs(xi[0, 0] - slots[2]).max()) < 1e-3 < float(
        jnp.abs(cue[0, 0] - slots[2]).max())


def test_the_energy_is_float32_when_the_states_are_not():
    keys, slots = memory("both")
    xi = queries().astype(jnp.bfloat16)
    value = energy(xi, keys.astype(jnp.bfloat16), slots, jnp.ones(H))
    assert value.dtype == jnp.float32
    assert retrieve(xi, keys.astype(jnp.bfloat16), slots, jnp.ones(H)).dtype == xi.dtype
