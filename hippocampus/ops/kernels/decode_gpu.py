"""Kernels for decoding on NVIDIA GPUs, where a step is short and the launch of a kernel counts.

    linear    x W for a few rows of x, with a norm or a gate in front and a sum behind
    retrieve  attention of one token per row to its cache, and K steps of it for Hopfield memory

XLA computes the product of one row and a matrix by writing out all its terms, and a masked softmax
over the whole cache in five kernels. These read every weight once, and of a cache what a row has
read. They are Pallas kernels for Triton; with `interpret` they run anywhere. The sizes below were
chosen on an H100 (docs/generation.md has the numbers).

Source: Dao et al. 2022 (arXiv:2205.14135), algorithm 1, for the softmax in one pass.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

ROWS = 16
"""Rows of the smallest product of a tensor core."""
MOST_ROWS = 64
"""More fill the device without these kernels, and were not tried."""
_FEW, _MANY = 8, 32
"""Outputs of one program of `linear`, below `ROWS` rows and from there on."""
_SLOTS = 64
"""Slots of a cache that one program of `retrieve` reads at once."""
_PROGRAMS = 128
"""What a GPU runs side by side; with fewer heads and rows, several programs share a cache."""
_MOST_SPLITS = 8
_HIDDEN = -1e30


def linear(
    x_PBK: Float[Array, "P B K"], w_PNK: Float[Array, "P N K"], *,
    norm_scale_K: Float[Array, " K"] | None = None, epsilon: float = 1e-6, gated: bool = False,
    residual_BN: Float[Array, "B N"] | None = None, interpret: bool = False,
) -> Float[Array, "P B N"]:
    """P independent products x W^T of few rows, with float32 sums.

    Args:
      x_PBK: rows, at most `MOST_ROWS`; a power of two from `ROWS` on. With `gated`, K counts twice:
        gates, values.
      w_PNK: weights, an output's in a row; N and K divide by 16.
      norm_scale_K: use scale * x / rms(x) instead of x.
      epsilon: of that norm.
      gated: use silu(x_1) * x_2 instead of x, its two halves.
      residual_BN: added to the result (P = 1).
      interpret: run without a GPU.

    Returns:
      y_PBN in the dtype of `w_PNK`.
    """
    (P, B, _), (_, N, K) = x_PBK.shape, w_PNK.shape
    columns = _block(N, _FEW if B < ROWS else _MANY)
    arrays, specs = [x_PBK, w_PNK], [
        pl.BlockSpec((None, B, x_PBK.shape[2]), lambda p, n: (p, 0, 0)),
        pl.BlockSpec((None, columns, K), lambda p, n: (p, n, 0))]
    if norm_scale_K is not None:
        arrays.append(norm_scale_K)
        specs.append(pl.BlockSpec((K,), lambda p, n: (0,)))
    if residual_BN is not None:
        arrays.append(residual_BN)
        specs.append(pl.BlockSpec((B, columns), lambda p, n: (0, n)))
    kernel = functools.partial(
        _few_rows_kernel if B < ROWS else _many_rows_kernel, normed=norm_scale_K is not None,
        epsilon=epsilon, gated=gated, added=residual_BN is not None)
    return _call(
        kernel, jax.ShapeDtypeStruct((P, B, N), w_PNK.dtype), grid=(P, N // columns),
        in_specs=specs, out_specs=pl.BlockSpec((None, B, columns), lambda p, n: (p, 0, n)),
        interpret=interpret, name="linear")(*arrays)


def _few_rows_kernel(x_ref: Any, w_ref: Any, *refs: Any, normed: bool, epsilon: float,
                     gated: bool, added: bool) -> None:
    *extra, o_ref = refs
    B, K, dtype = x_ref.shape[0], w_ref.shape[1], w_ref.dtype
    size = _block(K, 256)
    blocks = [pl.ds(begin, size) for begin in range(0, K, size)]
    # All weights are asked for before anything waits for one of them.
    weights = [w_ref[:, block] for block in blocks]

    def read(rows: Any) -> tuple[list[Array], Any]:
        """The inputs block by block, and what their sums are to be multiplied with."""
        parts = [x_ref[rows, block].astype(jnp.float32) for block in blocks]
        factor: Any = 1.0
        if normed:  # a row's norm is one factor of its sums
            square = sum((part * part).sum(axis=-1) for part in parts)
            factor = jax.lax.rsqrt(square / K + epsilon)
            parts = [part * extra[0][block] for part, block in zip(parts, blocks, strict=True)]
        if gated:
            values = [x_ref[rows, pl.ds(K + begin, size)] for begin in range(0, K, size)]
            parts = [part * jax.nn.sigmoid(part) * value.astype(jnp.float32)
                     for part, value in zip(parts, values, strict=True)]
        return parts, factor

    for b in range(B):
        parts, factor = read(b)
        y = factor * sum((weight.astype(jnp.float32) * part.astype(dtype)).sum(axis=1)
                         for weight, part in zip(weights, parts, strict=True))
        o_ref[b, :] = (y + extra[-1][b, :].astype(jnp.float32) if added else y).astype(dtype)


def _many_rows_kernel(x_ref: Any, w_ref: Any, *refs: Any, normed: bool, epsilon: float,
                      gated: bool, added: bool) -> None:
    *extra, o_ref = refs
    (B, _), (columns, K), dtype = x_ref.shape, w_ref.shape, w_ref.dtype
    size = _block(K, 128)

    def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, squares = carry
        here = pl.ds(i * size, size)
        x = x_ref[:, here]
        if normed:
            x = x.astype(jnp.float32)
            squares = squares + (x * x).sum(axis=1)
            x = (x * extra[0][here][None, :]).astype(dtype)
        if gated:
            x = x.astype(jnp.float32)
            values = x_ref[:, pl.ds(K + i * size, size)].astype(jnp.float32)
            x = (x * jax.nn.sigmoid(x) * values).astype(dtype)
        return total + jnp.dot(x, w_ref[:, here].T, preferred_element_type=jnp.float32), squares

    y, squares = jax.lax.fori_loop(0, K // size, step, (
        jnp.zeros((B, columns), jnp.float32), jnp.zeros((B,), jnp.float32)))
    if normed:
        y = y * jax.lax.rsqrt(squares / K + epsilon)[:, None]
    o_ref[:, :] = (y + extra[-1][:, :].astype(jnp.float32) if added else y).astype(dtype)


def retrieve(
    q_BHd: Float[Array, "B H d"], new: tuple[Float[Array, "B G d"], ...],
    caches: tuple[Float[Array, "B G C d"], ...], positions_B: Int[Array, " B"],
    valid_B: Bool[Array, " B"], scale_H: Float[Array, " H"], *, steps: int = 1,
    alpha: float = 1.0, interpret: bool = False,
) -> tuple[Float[Array, "J B H d"], tuple[Float[Array, "B G C d"], ...]]:
    """Softmax retrieval of one token per row from its cache and itself, repeated `steps` times.

    Args:
      q_BHd: queries; d is a power of two.
      new: the token's keys and values of G heads, which divide H; or its keys alone, which are
        then also what is read out.
      caches: of as many kinds, rings of C slots (see `key_cache`); C divides by 16.
      positions_B: of the token: what the row has read.
      valid_B: False leaves a row's caches as they are.
      scale_H: of the scores.
      steps: J; every further step starts from what the last one found.
      alpha: size of a step: (1 - alpha) of the state stays.
      interpret: run without a GPU.

    Returns:
      The states after each step, and the caches with the token in them. Rows that are not valid
      have states without meaning.
    """
    arguments = (positions_B, valid_B, scale_H, alpha)
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // (q_BHd.shape[0] * caches[0].shape[1])))
    if splits == 1:
        found, _, caches = _retrieve(q_BHd, new, caches, *arguments, steps, 1, interpret)
        return found[:, 0].astype(q_BHd.dtype), caches
    states, state = [], q_BHd
    for _ in range(steps):
        found, weights, caches = _retrieve(state, new, caches, *arguments, 1, splits, interpret)
        share = jax.nn.softmax(weights[0], axis=0)[..., None]
        one = (share * found[0]).sum(0).astype(state.dtype)
        state = one if alpha == 1.0 else ((1 - alpha) * state + alpha * one).astype(state.dtype)
        states.append(state)
    return jnp.stack(states), caches


def _retrieve(q_BHd: Array, new: tuple[Array, ...], caches: tuple[Array, ...], positions_B: Array,
              valid_B: Array, scale_H: Array, alpha: float, steps: int, splits: int,
              interpret: bool) -> tuple[Array, Array, tuple[Array, ...]]:
    """Several programs share a row's slots; each says what it found, and log of its weight."""
    (B, H, d), (_, G, C, _) = q_BHd.shape, caches[0].shape
    r, n = H // G, len(caches)
    cache_spec = pl.BlockSpec((None, None, C, d), lambda b, g, s: (b, g, 0, 0))
    row_spec = pl.BlockSpec((None, None, d), lambda b, g, s: (b, g, 0))
    found, weights, *written = _call(
        functools.partial(_retrieve_kernel, n=n, r=r, splits=splits, alpha=alpha),
        [jax.ShapeDtypeStruct((steps, splits, B, G, r, d), jnp.float32),
         jax.ShapeDtypeStruct((steps, splits, B, G, r), jnp.float32),
         *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches)],
        grid=(B, G, splits),
        in_specs=[pl.BlockSpec((B,), lambda b, g, s: (0,)),
                  pl.BlockSpec((B,), lambda b, g, s: (0,)),
                  pl.BlockSpec((None, r), lambda b, g, s: (g, 0)),
                  pl.BlockSpec((None, None, r, d), lambda b, g, s: (b, g, 0, 0)),
                  *[row_spec] * n, *[cache_spec] * n],
        out_specs=[pl.BlockSpec((steps, None, None, None, r, d),
                                lambda b, g, s: (0, s, b, g, 0, 0)),
                   pl.BlockSpec((steps, None, None, None, r), lambda b, g, s: (0, s, b, g, 0)),
                   *[cache_spec] * n],
        input_output_aliases={4 + n + i: 2 + i for i in range(n)},
        interpret=interpret, name="retrieve",
    )(positions_B, valid_B.astype(jnp.int32), scale_H.astype(jnp.float32).reshape(G, r),
      q_BHd.reshape(B, G, r, d),
      *(part.astype(cache.dtype) for part, cache in zip(new, caches, strict=True)), *caches)
    return (found.reshape(steps, splits, B, H, d), weights.reshape(steps, splits, B, H),
            tuple(written))


def _retrieve_kernel(position_ref: Any, valid_ref: Any, scale_ref: Any, q_ref: Any, *refs: Any,
                     n: int, r: int, splits: int, alpha: float) -> None:
    new_refs, cache_refs = refs[:n], refs[n:2 * n]
    found_ref, weight_ref, *written_refs = refs[2 * n:]
    b, split = pl.program_id(0), pl.program_id(2)
    position = position_ref[b]
    (C, d), dtype = cache_refs[0].shape, q_ref.dtype
    size = _block(C, _SLOTS)
    slot, filled = position % C, jnp.minimum(position, C)

    @pl.when((valid_ref[b] != 0) & (split == 0))
    def _() -> None:
        for new_ref, written_ref in zip(new_refs, written_refs, strict=True):
            written_ref[slot, :] = new_ref[:]

    row = jnp.arange(ROWS)
    new_key, new_value = (ref[:].astype(jnp.float32)[None, :]
                          for ref in (new_refs[0], new_refs[-1]))
    state: Any = sum(jnp.where((row == i)[:, None], q_ref[i, :].astype(jnp.float32)[None, :], 0.0)
                for i in range(r))
    scale: Any = sum(jnp.where(row == i, scale_ref[i], 0.0) for i in range(r))
    for j in range(found_ref.shape[0]):
        query = (state * scale[:, None]).astype(dtype)

        def block(i: Any, carry: tuple, query: Array = query) -> tuple:
            top, total, mixed = carry
            begin = (split + i * splits) * size
            keys = cache_refs[0][pl.ds(begin, size), :]
            values = keys if n == 1 else cache_refs[1][pl.ds(begin, size), :]
            scores = jnp.dot(query, keys.T, preferred_element_type=jnp.float32)
            at = begin + jnp.arange(size)
            # In a full ring the token stands in the place of one that is out of sight.
            scores = jnp.where(((at < filled) & (at != slot))[None, :], scores, _HIDDEN)
            higher = jnp.maximum(top, scores.max(axis=1))
            shrink, p = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
            mixed = mixed * shrink[:, None] + jnp.dot(
                p.astype(values.dtype), values, preferred_element_type=jnp.float32)
            return higher, total * shrink + p.sum(axis=1), mixed

        own = (query.astype(jnp.float32) * new_key).sum(axis=1)
        # One of the programs has the token itself.
        carry = (jnp.where(split == 0, own, _HIDDEN),
                 jnp.where(split == 0, jnp.ones_like(own), jnp.zeros_like(own)),
                 jnp.where(split == 0, jnp.broadcast_to(new_value, (ROWS, d)), 0.0))
        rounds = pl.cdiv(jnp.maximum(pl.cdiv(filled, size) - split, 0), splits)
        top, total, mixed = jax.lax.fori_loop(0, rounds, block, carry)
        found = mixed / jnp.maximum(total, 1e-30)[:, None]
        if splits == 1:  # then every further step starts from here
            found = found.astype(dtype).astype(jnp.float32)
            state = found = found if alpha == 1.0 else (
                (1 - alpha) * state + alpha * found).astype(dtype).astype(jnp.float32)
        weight = top + jnp.log(jnp.maximum(total, 1e-30))
        for i in range(r):
            found_ref[j, i, :] = jnp.where((row == i)[:, None], found, 0.0).sum(axis=0)
            weight_ref[j, i] = jnp.where(row == i, weight, 0.0).sum()


def _block(length: int, most: int) -> int:
    """The largest power of two that divides a length, at most `most`."""
    return min(most, length & -length)


def _call(kernel: Any, out_shape: Any, *, interpret: bool, name: str, **arguments: Any) -> Any:
    with warnings.catch_warnings():  # JAX announces that Triton will have a new front door
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton

        parameters = None if interpret else triton.CompilerParams(
            num_warps=4, num_stages=3)
        return pl.pallas_call(kernel, out_shape=out_shape, interpret=interpret, name=name,
                              compiler_params=parameters, **arguments)
