"""Cross-entropy and its gradients from one pass over the logits of some tokens.

With l the logits of a token, t the target's, and r_v = exp(l_v - t) for every other id,

    S = sum_v r_v,   -log p_target = log(1 + S),   log Z = t + log(1 + S),   p_v = r_v / (1 + S).

The target's logit is one inner product, known beforehand. So the pass that sums r also writes it,
with no maximum to look for, and what a gradient needs beyond r belongs to the row:

    d loss / d l_v = s r_v - w eps / V,     s = w (1 + 2 z log Z) / (1 + S),
    r_target := (2 z log Z + eps - (1 - eps) S) / (1 + 2 z log Z),

for a token of weight w. Hence d hidden = s (r W) and d W = r^T (s hidden): r, rounded as every
gradient of a matrix product is, goes into both products as it is. S leaves the range of float32 at
a loss of 88 nats; a caller must look at it (`fits`) and have another way.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops.kernels import cross_entropy_hopper

if TYPE_CHECKING:
    from hippocampus.ops.cross_entropy import Head

_LARGEST_SUM = 1e26  # its inverse, times a small activation, is still a normal float32


class Statistics(NamedTuple):
    """Of every token: the target's logit, S, and their consequences."""

    target_BT: Float[Array, "B T"]
    sum_BT: Float[Array, "B T"]

    @property
    def nll_BT(self) -> Float[Array, "B T"]:
        """-log p_target."""
        return jnp.log1p(self.sum_BT)

    @property
    def log_z_BT(self) -> Float[Array, "B T"]:
        """The log-partition function."""
        return self.target_BT + self.nll_BT

    @property
    def fits(self) -> Bool[Array, ""]:
        """Whether every gradient below is right: not at losses above 60 nats, nor of NaN."""
        return self.sum_BT.max() < _LARGEST_SUM


class Gradients(NamedTuple):
    """Of the weighted loss of a chunk of tokens."""

    hidden_BTD: Float[Array, "B T D"]
    weight_VD: Float[Array, "V D"]
    bias_V: Float[Array, " V"] | None


def suit(head: Head, dtype: jnp.dtype, smoothing: float) -> bool:
    """Whether the formulas hold: a cap makes smoothing's part differ from id to id, and float16
    has no room for ratios."""
    return not (head.softcap and smoothing) and dtype != jnp.float16


def has_kernel(head: Head) -> bool:
    """Whether the fused kernel knows a head: no bias, no cap, the table whole on every device."""
    whole = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1
    rows, width = head.weight_VD.shape
    return (head.bias_V is None and not head.softcap and whole
            and cross_entropy_hopper.supports(rows, width, head.weight_VD.dtype))


def one_pass(
    head: Head, hidden_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"], *, n_ids: int, smoothing: float, z_weight: float, fused: bool,
) -> tuple[Statistics, Gradients]:
    """Statistics and gradients of some tokens; the head's still lack `even_part`.

    Args:
      head: the output layer, its table in the dtype of `hidden_BTD`.
      hidden_BTD, targets_BT, weight_BT: as in `cross_entropy`.
      n_ids: rows of the table that are ids.
      smoothing, z_weight: eps and z.
      fused: take the kernel for NVIDIA Hopper where the program is lowered for a GPU; only if
        `has_kernel`.
    """
    target_BT = _target_logits(head, hidden_BTD, targets_BT)
    ratio_BTV, sum_BT = _ratios(head, hidden_BTD, targets_BT, target_BT, n_ids, fused)
    found = Statistics(target_BT, sum_BT)

    z_part = 2 * z_weight * found.log_z_BT
    factor = 1 + z_part
    factor = jnp.where(factor == 0, jnp.finfo(jnp.float32).tiny, factor)
    row_BT = weight_BT * factor / (1 + sum_BT)
    at_target_BT = (z_part + smoothing - (1 - smoothing) * sum_BT) / factor
    if head.softcap:
        at_target_BT = at_target_BT * (1 - (target_BT / head.softcap) ** 2)
    ratio_BTV = _put(ratio_BTV, targets_BT, at_target_BT)

    dtype = hidden_BTD.dtype
    d_hidden = row_BT[..., None] * jnp.einsum("btv,vd->btd", ratio_BTV, head.weight_VD,
                                              preferred_element_type=jnp.float32)
    scaled = (row_BT[..., None] * hidden_BTD.astype(jnp.float32)).astype(dtype)
    d_weight = jnp.einsum("btv,btd->vd", ratio_BTV, scaled, preferred_element_type=jnp.float32)
    d_bias = None
    if head.bias_V is not None:
        d_bias = jnp.einsum("btv,bt->v", ratio_BTV.astype(jnp.float32), row_BT)
    if smoothing:
        even_D = smoothing / n_ids * _sum_of_ids(head.weight_VD, n_ids)
        d_hidden = d_hidden - weight_BT[..., None] * even_D
    return found, Gradients(d_hidden.astype(dtype), d_weight, d_bias)


def even_part(head: Head, hidden_BTD: Float[Array, "B T D"], weight_BT: Float[Array, "B T"], *,
              n_ids: int, smoothing: float) -> Head:
    """Smoothing's part in the gradient of a head, -w eps / V at every id: once for all tokens."""
    weight_BT, even = weight_BT.astype(jnp.float32), smoothing / n_ids
    real_V = (jnp.arange(len(head.weight_VD)) < n_ids).astype(jnp.float32)
    mean_D = even * jnp.einsum("btd,bt->d", hidden_BTD.astype(jnp.float32), weight_BT)
    d_bias = None if head.bias_V is None else -even * weight_BT.sum() * real_V
    return dataclasses.replace(head, weight_VD=-real_V[:, None] * mean_D, bias_V=d_bias)


def mean_logit(head: Head, hidden_BTD: Float[Array, "B T D"], n_ids: int) -> Float[Array, "B T"]:
    """The mean over ids of a token's logits, which without a cap needs no logits."""
    mean = hidden_BTD.astype(jnp.float32) @ (_sum_of_ids(head.weight_VD, n_ids) / n_ids)
    return mean if head.bias_V is None else mean + head.bias_V[:n_ids].mean()


def _sum_of_ids(weight_VD: Array, n_ids: int) -> Array:
    return weight_VD[:n_ids].sum(0, dtype=jnp.float32)


def _target_logits(head: Head, hidden: Array, targets: Array) -> Array:
    rows_BTD = jnp.take(head.weight_VD, targets, axis=0, mode="clip").astype(jnp.float32)
    logit = (hidden.astype(jnp.float32) * rows_BTD).sum(-1)
    if head.bias_V is not None:
        logit = logit + jnp.take(head.bias_V, targets, mode="clip")
    return head.softcap * jnp.tanh(logit / head.softcap) if head.softcap else logit


def _ratios(head: Head, hidden: Array, targets: Array, target_logits: Array, n_ids: int,
            fused: bool) -> tuple[Array, Array]:
    """r, 0 at the target and at rows that are no ids, in the dtype of `hidden`; and its sums."""
    def portable(hidden: Array, weight: Array, targets: Array, target_logits: Array) -> tuple:
        logits = dataclasses.replace(head, weight_VD=weight).logits(hidden)
        ids = jnp.arange(logits.shape[-1])
        other = (ids < n_ids) & (ids != targets[..., None])
        ratio = jnp.where(other, jnp.exp(logits - target_logits[..., None]), 0.0)
        total = ratio.sum(-1)
        if head.softcap:
            ratio = jnp.where(other, ratio * (1 - (logits / head.softcap) ** 2), 0.0)
        return ratio.astype(hidden.dtype), total

    def kernel(hidden: Array, weight: Array, targets: Array, target_logits: Array) -> tuple:
        ratio, total = cross_entropy_hopper.ratios(
            hidden.reshape(-1, hidden.shape[-1]), weight, target_logits.reshape(-1),
            targets.reshape(-1), n_ids)
        return ratio.reshape(*targets.shape, -1), total.reshape(targets.shape)

    arrays = (hidden, head.weight_VD, targets, target_logits)
    if fused and targets.size % cross_entropy_hopper.TILE_N == 0:
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=portable)
    return portable(*arrays)


def _put(ratio_BTV: Array, targets_BT: Array, value_BT: Array) -> Array:
    """Sets one entry of each row; written so that it happens in place, in any order."""
    B, T = targets_BT.shape
    return ratio_BTV.at[jnp.arange(B)[:, None], jnp.arange(T), targets_BT].set(
        value_BT.astype(ratio_BTV.dtype), unique_indices=True, indices_are_sorted=True,
        mode="promise_in_bounds")
