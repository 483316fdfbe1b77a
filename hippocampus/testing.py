"""Property checks that anyone can run on any causal module or function of a sequence.

    from hippocampus.testing import check_causality
    check_causality(lambda tokens: model.apply({"params": params}, tokens)[0], tokens)

A check takes a function of one array `x` whose first axes are batch and time: token ids B,T or
embeddings B,T,D. The function returns an array, or a pytree of arrays, that begin with B,T. It is
compiled once per check; with `jit=False` it is called as it is, so that several checks can share
one compiled function. Every check also asserts that something did change where it may, so that it
cannot hold for an empty reason, and raises AssertionError saying what leaked from where to where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Apply = Callable[[Array], Any]
PackedApply = Callable[[Array, Array, Array], Any]
"""(x, document_ids_BT, positions_BT) -> a pytree of arrays that begin with B,T."""

_SAFETY = 4.0


def tolerance(dtype: Any, n_operations: int = 1) -> float:
    """The largest relative error that rounding explains: 4 eps sqrt(n).

    Roundings of n operations in a row add up like a random walk, so their usual sum is
    eps sqrt(n); the factor 4 makes it safe.

    Args:
      dtype: what was computed in (the least precise type on the way).
      n_operations: roundings that a result depends on one after the other, such as the length of
        a sum or of a recurrence times the layers it went through.

    Returns:
      The error relative to the largest value of the array.
    """
    return _SAFETY * float(jnp.finfo(dtype).eps) * max(1, n_operations) ** 0.5


def assert_close(actual: Any, desired: Any, *, n_operations: int = 1, dtype: Any = None,
                 what: str = "result") -> None:
    """Asserts that two pytrees agree up to rounding (see `tolerance`); integers agree exactly.

    Args:
      actual: pytree of arrays.
      desired: pytree of the same structure and shapes.
      n_operations, dtype: of `tolerance`; dtype None = that of each actual leaf.
      what: what is compared, for the message.

    Raises:
      AssertionError: naming the leaf, the largest difference and where it is.
    """
    names, actual_leaves = _named_leaves(actual)
    desired_names, desired_leaves = _named_leaves(desired)
    assert names == desired_names, f"{what}: {names} were compared with {desired_names}"
    for name, a, b in zip(names, actual_leaves, desired_leaves, strict=True):
        assert a.shape == b.shape, f"{what}{name}: shape {a.shape}, not {b.shape}"
        if not a.size:
            continue
        inexact = jnp.issubdtype(a.dtype, jnp.inexact)
        limit = tolerance(dtype or a.dtype, n_operations) if inexact else 0.0
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        size = np.abs(b64).max()
        off = np.abs(a64 - b64)
        where = np.unravel_index(np.argmax(off), off.shape)  # a NaN counts as the largest
        assert off[where] <= limit * max(size, np.finfo(np.float32).tiny), (
            f"{what}{name}: {a64[where]:.9g} at {_ints(where)} should be {b64[where]:.9g}; the "
            f"difference is {off[where] / max(size, 1e-300):.2g} of the largest value, rounding "
            f"explains {limit:.2g}")


def check_causality(apply: Apply, x: Array, *, positions: Iterable[int] | None = None,
                    jit: bool = True) -> None:
    """Asserts that no output depends on a later input, by changing one input at a time.

    For every t, x[:, t] is replaced by something else; all outputs before t must keep their bits,
    and some output at t or later must change for some t.

    Args:
      apply: x -> pytree of B,T,… arrays; deterministic.
      x: token ids B,T with at least two different ids, or floats B,T,….
      positions: the t to try; None = all.
      jit: compile `apply`.

    Raises:
      AssertionError: an output saw the future, or nothing ever changed.
    """
    run, before = _compile(apply, x, jit)
    reached = False
    for t in range(x.shape[1]) if positions is None else positions:
        for name, differs_BT, size in _differences(before, run(_replace(x, jnp.asarray(t)))):
            early = np.flatnonzero(differs_BT[:, :t].any(0))
            assert not early.size, (
                f"the future leaks into the past: changing the input at position {t} changed "
                f"output{name} at {_positions(early)}, by up to {size:.2g}")
            reached |= bool(differs_BT[:, t:].any())
    assert reached, "no output depends on any input that was changed: the check proves nothing"


def check_causality_by_gradient(
    apply: Apply, x_BTD: Array, *, positions: Iterable[int] | None = None,
) -> None:
    """Asserts that d output_i / d input_j is exactly 0 for j > i.

    Sees leaks that a change of bits may round away; needs floating-point inputs.

    Args:
      apply: x -> pytree of B,T,… arrays; differentiable.
      x_BTD: floats.
      positions: the i to try; None = all.

    Raises:
      AssertionError: a gradient reaches the future, or some output has no gradient at all.
    """
    @jax.jit
    def gradient_size(x: Array, i: Array) -> Array:
        def probe(x: Array) -> Array:
            total = jnp.zeros(())
            for n, leaf in enumerate(jax.tree.leaves(apply(x))):
                at_i = jnp.take(leaf, i, axis=1).astype(jnp.float32)
                # Random weights: the sum of a normalised output may have no gradient.
                total += (at_i * jax.random.normal(jax.random.key(n), at_i.shape)).sum()
            return total

        grad = jax.grad(probe)(x)
        return jnp.abs(grad.astype(jnp.float32)).reshape(*x.shape[:2], -1).max((0, 2))

    for i in range(x_BTD.shape[1]) if positions is None else positions:
        size_T = np.asarray(gradient_size(x_BTD, jnp.asarray(i)))
        late = i + 1 + np.flatnonzero(size_T[i + 1:] != 0)  # a NaN is not 0 either
        assert not late.size, (
            f"the future leaks into the past: the output at position {i} has a gradient of up to "
            f"{size_T[i + 1:].max():.2g} with respect to the input at {_positions(late)}")
        assert (size_T[:i + 1] > 0).any(), (
            f"the output at position {i} depends on no input up to there: the check proves nothing")


def check_batch_invariance(apply: Apply, x: Array, *, jit: bool = True) -> None:
    """Asserts that a row's result does not depend on the other rows, bit for bit.

    Args:
      apply: x -> pytree of B,T,… arrays; deterministic.
      x: B >= 2 rows of token ids or floats.
      jit: compile `apply`.

    Raises:
      AssertionError: a row saw its neighbours, or nothing ever changed.
    """
    B = x.shape[0]
    assert B >= 2, f"the check needs two rows or more, not {B}"
    run, before = _compile(apply, x, jit)
    other = _replace(x, None)
    reached = False
    for b in range(B):
        own = (jnp.arange(B) == b).reshape(-1, *[1] * (x.ndim - 1))
        for name, differs_BT, size in _differences(before, run(jnp.where(own, x, other))):
            assert not differs_BT[b].any(), (
                f"rows are mixed: changing the other rows changed output{name} of row {b} at "
                f"{_positions(np.flatnonzero(differs_BT[b]))}; the largest difference of any row "
                f"is {size:.2g}")
            reached |= bool(differs_BT.any())
    assert reached, "no output depends on any input that was changed: the check proves nothing"


def check_document_isolation(
    apply: PackedApply, x: Array, lengths: Sequence[int], *, n_operations: int | None = None,
    dtype: Any = None, jit: bool = True,
) -> None:
    """Asserts that documents packed into a row are read as if each stood alone.

    Each document gives what it gives alone (at the start of a row, padding after it) up to
    rounding, and changing one document leaves every bit of the others.

    Args:
      apply: (x, document_ids_BT, positions_BT) -> pytree of B,T,… arrays. Ids count from 1,
        0 is padding; positions restart per document.
      x: token ids B,T with at least two different ids, or floats B,T,….
      lengths: tokens of each document; the rest of a row is padding.
      n_operations: of `tolerance`; None = T.
      dtype: of `tolerance`; None = that of each output.
      jit: compile `apply`.

    Raises:
      AssertionError: a document saw another one, or nothing ever changed.
    """
    B, T = x.shape[:2]
    assert len(lengths) >= 2 and sum(lengths) <= T, f"{lengths} do not pack into {T} tokens"
    run = jax.jit(apply) if jit else apply
    ids, positions = pack(lengths, B, T)
    packed = run(x, ids, positions)
    starts = np.cumsum([0, *lengths[:-1]])
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True), 1):
        here = slice(start, start + length)
        alone = run(jnp.roll(x, -start, axis=1), *pack([length], B, T))
        assert_close(jax.tree.map(lambda a, h=here: a[:, h], packed),
                     jax.tree.map(lambda a, m=length: a[:, :m], alone),
                     n_operations=n_operations or T, dtype=dtype,
                     what=f"document {n} packed, against the same document alone: output")

        mine = (jnp.arange(T) >= start) & (jnp.arange(T) < start + length)
        mine = mine.reshape(1, T, *[1] * (x.ndim - 2))
        changed = run(jnp.where(mine, _replace(x, None), x), ids, positions)
        reached = False
        for name, differs_BT, size in _differences(packed, changed):
            for m, (begin, count) in enumerate(zip(starts, lengths, strict=True), 1):
                leaked = np.flatnonzero(differs_BT[:, begin:begin + count].any(0))
                assert m == n or not leaked.size, (
                    f"documents are mixed: changing document {n} changed output{name} of document "
                    f"{m} at its {_positions(leaked)}, by up to {size:.2g}")
            reached |= bool(differs_BT[:, here].any())
        assert reached, f"changing document {n} changed nothing in it: the check proves nothing"


def pack(lengths: Sequence[int], B: int, T: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Document ids (from 1; 0 = padding) and positions of B rows with the same documents."""
    ids, positions = np.zeros((2, T), np.int32)
    start = 0
    for n, length in enumerate(lengths, 1):
        ids[start:start + length] = n
        positions[start:start + length] = np.arange(length)
        start += length
    positions[start:] = np.arange(T - start)
    return jnp.tile(jnp.asarray(ids), (B, 1)), jnp.tile(jnp.asarray(positions), (B, 1))


def check_chunked_equals_full(
    full: Apply, init_cache: Callable[[], Any], extend: Callable[[Array, Any], tuple[Any, Any]],
    x: Array, chunkings: Iterable[Sequence[int]], *, n_operations: int | None = None,
    dtype: Any = None,
) -> None:
    """Asserts the cache law: reading in chunks of any size gives what reading at once gives.

    Args:
      full: x -> pytree of B,T,… arrays.
      init_cache: () -> the cache before the first token.
      extend: (x_Bn…, cache) -> (outputs of those n tokens, the cache after them), for any n >= 1.
        Compiled once per n; a cache keeps its structure, shapes and dtypes.
      x: token ids B,T, or floats B,T,….
      chunkings: the sizes of the chunks, such as [(1,) * T, (5, 1, T - 6)]; each sums to T.
      n_operations: of `tolerance`; None = T.
      dtype: of `tolerance`; None = that of each output.

    Raises:
      AssertionError: naming the chunking and the chunk that differs first, or what the cache
        changed in its form.
    """
    T = x.shape[1]
    expected, step = jax.jit(full)(x), jax.jit(extend)
    for sizes in chunkings:
        assert sum(sizes) == T and min(sizes) >= 1, f"chunks {tuple(sizes)} do not make {T} tokens"
        cache, start = init_cache(), 0
        form = _form(cache)
        for size in sizes:
            here = slice(start, start + size)
            actual, cache = step(x[:, here], cache)
            assert _form(cache) == form, (
                f"the cache changed its form in a chunk of {size}: {form} became {_form(cache)}")
            assert_close(actual, jax.tree.map(lambda a, h=here: a[:, h], expected),
                         n_operations=n_operations or T, dtype=dtype,
                         what=f"tokens {start}..{start + size - 1} read in chunks of "
                              f"{tuple(sizes)}, against all at once: output")
            start += size


def _compile(apply: Apply, x: Array, jit: bool) -> tuple[Apply, Any]:
    run = jax.jit(apply) if jit else apply
    before = run(x)
    for name, leaf in zip(*_named_leaves(before), strict=True):
        assert leaf.shape[:2] == x.shape[:2], (
            f"output{name} has the shape {leaf.shape}; it must begin with B,T = {x.shape[:2]}")
        assert not np.isnan(leaf).any(), f"output{name} has NaNs"
    return run, before


@jax.jit
def _replace(x: Array, t: Array | None) -> Array:
    """x with another value at position t (None: everywhere) in every row."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        other = jnp.where(x == x.max(), x.min(), x.max())  # ids that are surely valid
    else:
        other = x + jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    if t is None:
        return other
    at_t = (jnp.arange(x.shape[1]) == t).reshape(1, -1, *[1] * (x.ndim - 2))
    return jnp.where(at_t, other, x)


def _differences(before: Any, after: Any) -> list[tuple[str, np.ndarray, float]]:
    """Per leaf its name, whether any bit of a token's value differs (B,T), and by how much."""
    found = []
    names, leaves = _named_leaves(before)
    for name, a, b in zip(names, leaves, _named_leaves(after)[1], strict=True):
        a, b = (leaf.astype(np.float64).reshape(*leaf.shape[:2], -1) for leaf in (a, b))
        found.append((name, (a != b).any(-1), float(np.abs(a - b).max(initial=0))))
    return found


def _named_leaves(tree: Any) -> tuple[list[str], list[np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in leaves], [np.asarray(a) for _, a in leaves]


def _form(tree: Any) -> Any:
    return jax.tree.map(lambda a: f"{jnp.asarray(a).dtype}{list(jnp.shape(a))}", tree)


def _positions(found: np.ndarray) -> str:
    shown = ", ".join(map(str, found[:5].tolist()))
    return f"position{'s' * (len(found) > 1)} {shown}{', …' * (len(found) > 5)}"


def _ints(index: tuple) -> tuple[int, ...]:
    return tuple(map(int, index))
