"""The property checks: they accept what is right, and catch each planted fault."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.testing import (
    assert_close,
    check_batch_invariance,
    check_causality,
    check_causality_by_gradient,
    check_chunked_equals_full,
    check_document_isolation,
    pack,
    tolerance,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D = 3, 12, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 7)
TABLE = jax.random.normal(jax.random.key(2), (7, D))
LENGTHS = (5, 4, 2)  # and one token of padding


def running_mean(x):
    return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]


def mean_pool(x):
    return x + x.mean(1, keepdims=True)


def peek(x):
    """Leaks one token, one step, a little."""
    return running_mean(x) + 1e-3 * jnp.roll(x, -1, axis=1)


def batch_norm(x):
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


def packed_running_mean(x, document_ids, positions):
    same = document_ids[:, :, None] == document_ids[:, None, :]
    weights = jnp.tril(same) / (positions[..., None] + 1)
    return jnp.einsum("bts,bsd->btd", weights, x) + positions[..., None]


# ---------------------------------------------------------------- causality

def test_a_causal_function_passes_both_causality_checks():
    check_causality(running_mean, X)
    check_causality_by_gradient(running_mean, X)


def test_a_causal_function_of_tokens_passes():
    check_causality(lambda tokens: running_mean(TABLE[tokens]), TOKENS)


@pytest.mark.parametrize("leaky", [mean_pool, peek, lambda x: x[:, ::-1]])
@pytest.mark.parametrize("check", [check_causality, check_causality_by_gradient])
def test_a_function_that_sees_the_future_is_caught(check, leaky):
    with pytest.raises(AssertionError, match="future leaks into the past"):
        check(leaky, X)


def test_a_leak_in_tokens_is_caught():
    with pytest.raises(AssertionError, match="future leaks"):
        check_causality(lambda tokens: mean_pool(TABLE[tokens]), TOKENS)


def test_the_message_says_what_leaked_from_where_to_where():
    with pytest.raises(AssertionError, match=r"position 1 changed output\['late'\] at position 0,"):
        check_causality(lambda x: {"good": running_mean(x), "late": peek(x)}, X)
    with pytest.raises(AssertionError, match=r"position 0 .* input at position 1$"):
        check_causality_by_gradient(peek, X)


def test_a_leak_at_one_position_is_caught():
    def leaky(x):
        return running_mean(x).at[:, 7].add(x[:, 9])

    with pytest.raises(AssertionError, match="position 9 changed output at position 7"):
        check_causality(leaky, X)
    check_causality(leaky, X, positions=range(8))  # the leak is elsewhere


@pytest.mark.parametrize("check", [
    check_causality, check_causality_by_gradient, check_batch_invariance])
def test_a_function_of_nothing_does_not_pass(check):
    with pytest.raises(AssertionError, match="proves nothing"):
        check(jnp.zeros_like, X)


def test_a_leak_that_rounding_hides_is_caught_by_its_gradient():
    def leaky(x):
        return 1e6 + running_mean(x) + 1e-6 * mean_pool(x)

    with pytest.raises(AssertionError, match="future leaks"):
        check_causality_by_gradient(leaky, X)


def test_nan_and_wrong_shapes_are_refused():
    with pytest.raises(AssertionError, match="NaN"):
        check_causality(lambda x: x / 0 * 0, X)
    with pytest.raises(AssertionError, match="must begin with B,T"):
        check_causality(lambda x: x[:, 0], X)


def test_a_check_compiles_once():
    traces = []

    def counted(x):
        traces.append(0)
        return running_mean(x)

    check_causality(counted, X)
    check_causality_by_gradient(counted, X)
    assert len(traces) == 2


# ---------------------------------------------------------------- rows and documents

def test_a_function_of_each_row_passes_batch_invariance():
    check_batch_invariance(running_mean, X)
    check_batch_invariance(lambda tokens: TABLE[tokens], TOKENS)


def test_batch_statistics_are_caught():
    with pytest.raises(AssertionError, match=r"rows are mixed: .* of row 0"):
        check_batch_invariance(batch_norm, X)


def test_a_leak_from_the_last_row_to_the_middle_one_is_caught():
    with pytest.raises(AssertionError, match="row 1 at position 4;"):
        check_batch_invariance(lambda x: x.at[1, 4].add(1e-2 * x[2, 3]), X)


def test_isolated_documents_pass():
    check_document_isolation(packed_running_mean, X, LENGTHS)


def test_documents_that_see_each_other_are_caught():
    def mixed(x, document_ids, positions):
        return running_mean(x) + packed_running_mean(x, document_ids, positions)

    with pytest.raises(AssertionError, match="document"):
        check_document_isolation(mixed, X, LENGTHS)


def test_a_leak_into_an_earlier_document_is_caught():
    def mixed(x, document_ids, positions):
        # Document 2 as it stands leaks into the first; alone it has nowhere to leak to.
        second = jnp.where((document_ids == 2)[..., None], x, 0).sum(1, keepdims=True)
        return x + jnp.where((document_ids == 1)[..., None], second * 1e-7, 0)

    with pytest.raises(AssertionError, match="changing document 2 changed output of document 1"):
        check_document_isolation(mixed, X, LENGTHS)


def test_positions_that_do_not_restart_are_caught():
    def absolute(x, document_ids, positions):
        return x * jnp.arange(x.shape[1])[:, None] + positions[..., None]

    with pytest.raises(AssertionError, match="document 2 packed, against the same document alone"):
        check_document_isolation(absolute, X, LENGTHS)


def test_pack_numbers_documents_from_one_and_pads_with_zero():
    ids, positions = pack((3, 2), 2, 6)
    assert ids.tolist() == [[1, 1, 1, 2, 2, 0]] * 2
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0]] * 2


# ---------------------------------------------------------------- caches

CHUNKINGS = [(1,) * T, (T,), (5, 1, 3, 3)]


def ema(x):
    def step(h, x_BD):
        h = 0.9 * h + x_BD
        return h, h

    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros((B, D)), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def extend(x, h):
    def step(h, x_BD):
        h = 0.9 * h + x_BD
        return h, h

    h, out = jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(out, 0, 1), h


def empty():
    return jnp.zeros((B, D))


def test_a_cache_that_carries_everything_passes():
    check_chunked_equals_full(ema, empty, extend, X, CHUNKINGS)


def test_a_cache_that_forgets_is_caught():
    def forgetful(x, h):
        return extend(x, h)[0], jnp.zeros_like(h)

    with pytest.raises(AssertionError, match=r"tokens 1\.\.1 read in chunks of \(1, 1"):
        check_chunked_equals_full(ema, empty, forgetful, X, CHUNKINGS)


def test_a_cache_that_fails_for_odd_chunks_only_is_caught():
    def odd(x, h):
        out, h = extend(x, h)
        return out, jnp.where(x.shape[1] == 3, h * 1.001, h)

    check_chunked_equals_full(ema, empty, odd, X, [(1,) * T])
    with pytest.raises(AssertionError, match=r"tokens 9\.\.11 read in chunks of \(5, 1, 3, 3\)"):
        check_chunked_equals_full(ema, empty, odd, X, CHUNKINGS)


def test_a_cache_that_grows_is_caught():
    def growing(x, h):
        return x, jnp.concatenate([h, x[:, -1]], axis=1)

    with pytest.raises(AssertionError, match="changed its form"):
        check_chunked_equals_full(lambda x: x, empty, growing, X, CHUNKINGS)


def test_chunks_that_do_not_make_the_whole_are_refused():
    with pytest.raises(AssertionError, match="do not make"):
        check_chunked_equals_full(ema, empty, extend, X, [(5, 5)])


# ---------------------------------------------------------------- tolerance

@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_tolerance_covers_a_sum_and_little_more(dtype):
    n = 256
    x = np.random.default_rng(0).normal(size=(200, n))
    total = np.zeros(200, dtype)
    for column in x.astype(dtype).T:
        total = (total + column).astype(dtype)
    exact = x.astype(dtype).astype(np.float64).sum(1)
    error = np.abs(total.astype(np.float64) - exact).max() / np.abs(exact).max()
    assert tolerance(dtype, n) / 100 < error < tolerance(dtype, n)


def test_close_names_the_leaf_and_place_of_the_largest_difference():
    good = {"a": np.ones(3, np.float32), "b": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert_close(good, good)
    bad = {**good, "b": good["b"] + np.eye(2, 3, 1, dtype=np.float32) * 1e-3}
    with pytest.raises(AssertionError, match=r"weights\['b'\]: .* at \(1, 2\)|at \(0, 1\)"):
        assert_close(bad, good, what="weights")
    with pytest.raises(AssertionError, match="nan"):
        assert_close({**good, "a": good["a"] * np.nan}, good)
    with pytest.raises(AssertionError, match="should be 2"):
        assert_close(np.array([1, 3]), np.array([1, 2]))
    with pytest.raises(AssertionError, match="compared with"):
        assert_close({"a": good["a"]}, good)
