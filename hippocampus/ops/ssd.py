"""SSD (Mamba-2): a selective state space with one decay a head, as matrix products of chunks.

With l_t = dt_t A and s_t its sum over the tokens of a chunk and document up to t, h_0 the state in
front of the chunk:

    y_i = sum_{j <= i} exp(s_i - s_j) (C_i B_j) dt_j x_j + exp(s_i) C_i h_0
    h'  = exp(s_last) h_0 + sum_j exp(s_last - s_j) B_j (dt_j x_j)^T

Heads need products of their own only from token to token. What goes into states and comes out of
them is, as a group's heads share B and C, one product for all of them: of rows of H/G P channels as
x has them, which leaves x in its order and scales it instead of a copy of B or C for every head.

The gradient of s is summed over pairs of different tokens. The shorter g_i y_i - z_i dz_i, where
z = dt x, is the same on paper, but holds every token's pair with itself twice; where decays are
strong nothing else is left, and what rounding in bfloat16 leaves of the difference can be larger
than the result.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from hippocampus.errors import ConfigError

CHUNK = 128
"""Tokens of a chunk where nothing else is said."""
_UNROLLED = 16
"""Chunks whose states are carried on without a loop; a step of a loop costs GPUs a launch."""


def ssd(
    x_BTHP: Float[Array, "B T H P"], dt_BTH: Float[Array, "B T H"], A_H: Float[Array, " H"],
    B_BTGN: Float[Array, "B T G N"], C_BTGN: Float[Array, "B T G N"],
    D_H: Float[Array, " H"] | None = None, *, chunk: int = CHUNK,
    h0_BHPN: Float[Array, "B H P N"] | None = None, reset_BT: Bool[Array, "B T"] | None = None,
    backend: str = "chunked",
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """SSD: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, then y_t = h_t C_t + D x_t, in each head.

    Args:
      x_BTHP: inputs; their dtype is that of the matrix products, which sum in float32.
      dt_BTH: step sizes, positive (after softplus).
      A_H: rates, negative; one for each head.
      B_BTGN: how the states take a token in; each of G groups for H / G heads in a row.
      C_BTGN: how they are read.
      D_H: of what passes by the states; None = nothing does.
      chunk: tokens of a chunk ("chunked" only).
      h0_BHPN: states before the first token; None = zeros.
      reset_BT: True where a document begins: the states before that token do not count.
      backend: "chunked" (matrix products) or "sequential" (one step after the other, float32).

    Returns:
      y_BTHP in the dtype of `x_BTHP`, and the states after the last token (B,H,P,N) in float32.
      Handed on as `h0_BHPN` they continue the scan.

    Raises:
      ConfigError: an unknown backend, or heads that groups do not divide.

    Source: Dao & Gu 2024 (arXiv:2405.21060), section 6, listing 1.
    """
    (B, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
    if backend not in ("chunked", "sequential"):
        raise ConfigError(f"ssd backend is {backend!r}", "known: chunked, sequential")
    if H % G:
        raise ConfigError(f"{H} heads do not share {G} groups", "H must be a multiple of G")
    f32 = jnp.float32
    dt = dt_BTH.astype(f32)
    logs = dt * A_H.astype(f32)
    h0 = jnp.zeros((B, H, P, N), f32) if h0_BHPN is None else h0_BHPN.astype(f32)
    reset = None if reset_BT is None else jnp.asarray(reset_BT)
    if backend == "sequential" or T == 1:
        y, h = _sequential(x_BTHP, dt, logs, B_BTGN, C_BTGN, h0, reset)
    else:
        y, h = _chunked(min(chunk, T), x_BTHP, dt, logs, B_BTGN, C_BTGN, h0, reset)
    if D_H is not None:
        y = y + D_H[:, None].astype(f32) * x_BTHP
    return y.astype(x_BTHP.dtype), h


def _sequential(x: Array, dt: Array, logs: Array, B: Array, C: Array, h0: Array,
                reset: Array | None) -> tuple[Array, Array]:
    heads = x.shape[2] // B.shape[2]
    decay = jnp.exp(logs)
    if reset is not None:
        decay = jnp.where(reset[..., None], 0.0, decay)

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dt, decay, B, C = (part.astype(jnp.float32) for part in token)
        B, C = jnp.repeat(B, heads, 1), jnp.repeat(C, heads, 1)
        h = decay[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None]
        return h, (h * C[:, :, None]).sum(-1)

    h, y = lax.scan(step, h0, tuple(jnp.swapaxes(v, 0, 1) for v in (x, dt, decay, B, C)))
    return jnp.swapaxes(y, 0, 1), h


def _chunked(size: int, x: Array, dt: Array, logs: Array, B: Array, C: Array, h0: Array,
             reset: Array | None) -> tuple[Array, Array]:
    T = x.shape[1]

    def padded(v: Array) -> Array:  # tokens of step size 0 leave the states as they are
        return jnp.pad(v, ((0, 0), (0, -T % size)) + ((0, 0),) * (v.ndim - 2))

    grouped = h0.reshape(h0.shape[0], B.shape[2], -1, *h0.shape[2:])
    y, h = _chunks(size, *map(padded, (x, dt, logs, B, C)), jnp.moveaxis(grouped, -1, 2),
                   None if reset is None else padded(reset))
    return y[:, :T], jnp.moveaxis(h, 2, -1).reshape(h0.shape)


class _Decays(NamedTuple):
    """exp of sums of l: from token to token, from before the chunk, to its end, through it."""

    pairs: Array  # B,n,H,i,j; 0 for j > i
    into: Array  # B,n,H,C
    out: Array  # B,n,H,C
    whole: Array  # B,n,H
    within: Array  # B,n,1,i,j; j <= i of the same document


def _decays(size: int, logs: Array, reset: Array | None) -> _Decays:
    within = jnp.tril(jnp.ones((1, 1, 1, size, size), bool))
    if reset is not None:
        document = jnp.cumsum(reset.reshape(reset.shape[0], -1, 1, size), -1)
        within = within & (document[..., :, None] == document[..., None, :])
    # One sum over the chunk would round a document's part by what the one before it added up to.
    s = _sums(within, _swap(_split(size, logs)))
    into, out = jnp.exp(s), jnp.exp(s[..., -1:] - s)
    if reset is not None:
        into = jnp.where(document == 0, into, 0.0)
        out = jnp.where(document == document[..., -1:], out, 0.0)
    # The mask comes before exp, which overflows above the diagonal.
    pairs = jnp.exp(jnp.where(within, s[..., :, None] - s[..., None, :], -jnp.inf))
    return _Decays(pairs, into, out, into[..., -1], within)


def _sums(mask: Array, v: Array) -> Array:
    """Sums over the tokens j of a chunk that a row i of the mask has: B,n,H,j -> B,n,H,i."""
    mask = jnp.broadcast_to(mask[:, :, 0], (*v.shape[:2], *mask.shape[-2:])).astype(v.dtype)
    return jnp.einsum("bnij,bnhj->bnhi", mask, v, precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(size: int, *arrays: Any) -> tuple[Array, Array]:
    return _chunks_forward(size, *arrays)[0]


def _chunks_forward(size: int, x: Array, dt: Array, logs: Array, B: Array, C: Array, h0: Array,
                    reset: Array | None) -> tuple[tuple[Array, Array], tuple]:
    decays = _decays(size, logs, reset)
    z, Bn, Cn, scores = _chunk_operands(size, x, dt, B, C)
    ends = _into_states(Bn, _scaled(decays.out, z))
    starts, last = _carry(h0, decays.whole, ends, x.dtype)
    y = _einsum("bnhij,bnhjp->bnhip", _each_head(decays.pairs, scores, x), _swap(z))
    y = _swap(y) + _swap(decays.into)[..., None] * _out_of_states(Cn, starts)
    return (y.reshape(x.shape), last), (x, dt, logs, B, C, reset, starts)


def _chunks_backward(size: int, saved: tuple,
                     cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    x, dt, logs, B, C, reset, starts = saved
    g, g_last = cotangents
    decays = _decays(size, logs, reset)
    z, Bn, Cn, scores = _chunk_operands(size, x, dt, B, C)
    g = _split(size, g.astype(x.dtype))
    g_into, z_out = _scaled(decays.into, g), _scaled(decays.out, z)
    behind, dh0 = _carry(g_last, decays.whole, _into_states(Cn, g_into), x.dtype, reverse=True)
    from_behind = _out_of_states(Bn, behind)
    dz = _einsum("bnhij,bnhip->bnhjp", _each_head(decays.pairs, scores, x), _swap(g))
    dz = _swap(dz) + _swap(decays.out)[..., None] * from_behind

    pairs = jnp.einsum("bnhip,bnhjp->bnhij", _swap(g), _swap(z)) * decays.pairs
    shape = (*pairs.shape[:2], B.shape[2], -1, size, size)
    dscores = pairs.reshape(shape).sum(3).astype(x.dtype)  # over the heads of each group
    dC = _einsum("bngij,bnjgs->bnigs", dscores, Bn) + _over_heads(g_into, starts, Bn)
    dB = _einsum("bngij,bnigs->bnjgs", dscores, Cn) + _over_heads(z_out, behind, Bn)

    of_pairs = jnp.tril(pairs * _of_heads(scores, x), -1)
    of_start = decays.into * _swap((_out_of_states(Cn, starts).astype(jnp.float32) * g).sum(-1))
    of_end = decays.out * _swap((from_behind.astype(jnp.float32) * z).sum(-1))
    ds = of_pairs.sum(-1) - of_pairs.sum(-2) + of_start - of_end
    # XLA would make it one sum with that over channels, and copies in another order for it.
    both = lax.optimization_barrier((starts.astype(jnp.float32) * behind).sum(3))
    through = of_end.sum(-1) + decays.whole * both.reshape(*decays.whole.shape, -1).sum(-1)
    dlogs = (_sums(_transpose(decays.within), ds)
             + through[..., None] * decays.within[..., -1, :])
    dlogs = _swap(dlogs).reshape(dt.shape)
    if reset is not None:
        dlogs = jnp.where(reset[..., None], 0.0, dlogs)
    dz = dz.reshape(x.shape)
    return ((dz * dt[..., None]).astype(x.dtype), (dz * x).sum(-1), dlogs,
            dB.reshape(B.shape).astype(B.dtype), dC.reshape(C.shape).astype(C.dtype), dh0, None)


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _chunk_operands(size: int, x: Array, dt: Array, B: Array, C: Array) -> tuple[Array, ...]:
    """z = dt x, B and C of all chunks, and C B^T (B,n,G,i,j)."""
    z, Bn, Cn = (_split(size, v.astype(x.dtype)) for v in (x * dt[..., None], B, C))
    return z, Bn, Cn, _einsum("bnigs,bnjgs->bngij", Cn, Bn)


def _carry(first: Array, whole: Array, ends: Array, dtype: jnp.dtype, *,
           reverse: bool = False) -> tuple[Array, Array]:
    """The state in front of every chunk (behind it, if reversed), and the one after all."""
    def step(h: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        return chunk[0] * h + chunk[1], h.astype(dtype)

    whole = whole.reshape(*ends.shape[:3], 1, -1, 1)
    chunks = (jnp.swapaxes(whole, 0, 1), jnp.swapaxes(ends, 0, 1))
    last, states = lax.scan(step, first, chunks, reverse=reverse, unroll=_UNROLLED)
    return jnp.swapaxes(states, 0, 1), last


def _into_states(shared: Array, v: Array) -> Array:
    """Sums over tokens of shared v^T: B,n,C,G,N and B,n,C,H,P -> B,n,G,N,R,P."""
    states = _einsum("bngcs,bngck->bngsk", _apart(_swap(shared)), _grouped(v, shared))
    return states.reshape(*states.shape[:4], -1, v.shape[-1])


def _out_of_states(shared: Array, states: Array) -> Array:
    """What tokens read: B,n,C,G,N and B,n,G,N,R,P -> B,n,C,H,P."""
    v = _swap(jnp.einsum("bngcs,bngsk->bngck", _apart(_swap(shared)), _flat(states)))
    return v.reshape(*v.shape[:3], -1, states.shape[-1])


def _over_heads(v: Array, states: Array, shared: Array) -> Array:
    """Sums over channels and heads of a group: B,n,C,H,P and B,n,G,N,R,P -> B,n,C,G,N."""
    return _swap(_einsum("bngck,bngsk->bngcs", _grouped(v, shared), _flat(states)))


def _apart(v: Array) -> Array:
    """v, as XLA does not know it: products that share v it makes one, and copies the results."""
    return lax.optimization_barrier(v)


def _grouped(v: Array, shared: Array) -> Array:  # B,n,C,H,P -> B,n,G,C,(R P)
    return _swap(v.reshape(*shared.shape[:4], -1))


def _flat(states: Array) -> Array:  # B,n,G,N,R,P -> B,n,G,N,(R P)
    return states.reshape(*states.shape[:4], -1)


def _scaled(decay: Array, v: Array) -> Array:  # B,n,H,C and B,n,C,H,P
    return (_swap(decay)[..., None] * v).astype(v.dtype)


def _each_head(decay: Array, shared: Array, like: Array) -> Array:
    """What a group's heads share (B,n,G,i,j), times the decays of each head (B,n,H,i,j)."""
    return (decay * _of_heads(shared, like)).astype(like.dtype)


def _of_heads(shared: Array, x: Array) -> Array:  # B,n,G,… -> B,n,H,…
    return jnp.repeat(shared, x.shape[2] // shared.shape[2], 2)


def _split(size: int, v: Array) -> Array:  # B,(n C),… -> B,n,C,…
    return v.reshape(v.shape[0], -1, size, *v.shape[2:])


def _swap(v: Array) -> Array:  # B,n,C,H,… <-> B,n,H,C,…
    return jnp.swapaxes(v, 2, 3)


def _transpose(v: Array) -> Array:
    return jnp.swapaxes(v, -1, -2)


def _einsum(formula: str, *arrays: Array) -> Array:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)
