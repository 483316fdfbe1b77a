"""Cross-entropy from hidden states, with label smoothing and z-loss folded in.

The chunked form never holds the logits of a whole batch. It forms the gradient in the same pass
(`_one_pass`): with p = softmax(logits) and the weight w of a token,

    d loss / d logits = w ((1 + 2 z log Z) p - (1 - eps) onehot(target) - eps / V)

needs nothing but the logits, so a chunk's three matrix products (logits, d hidden, d head) are
done together and only the two gradients are kept. They are taken from ratios to the target's
probability (`logit_ratios`), which one pass over the logits gives; should a token's loss be beyond
the range of a ratio, all is done again by the formula above (`_direct`), which has no such limit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from hippocampus.errors import ConfigError
from hippocampus.ops import logit_ratios

BACKENDS = ("full", "chunked", "fused")
_CHUNK_LOGITS = 2**27
"""Logits in a chunk on one device: 512 MiB in float32."""
_FUSED_LOGITS = 9 * 2**26
"""The same where a kernel keeps two bytes of each: 1.1 GiB."""
_FUSED_TOKENS = 8192
"""Most tokens of such a chunk; more are not faster."""
_TILE = 128
"""Tokens in a tile of a matrix product: a chunk has whole tiles where it has that many."""
_ROWS = ("data", "fsdp")
_SPREAD, _TENSOR = "fsdp", "tensor"
_TIME = "sequence"


@struct.dataclass
class Head:
    """A linear output layer over a padded vocabulary.

    `weight_VD` may have more rows than `vocab_size`: the surplus makes the table divide well and
    is masked out of every loss and sample. `softcap` c > 0 bounds logits by c tanh(logits / c).
    With `down_DE`, hidden states are first projected to the table's width E (a factorised table).
    """

    weight_VD: Array
    bias_V: Array | None = None
    softcap: float = struct.field(pytree_node=False, default=0.0)
    vocab_size: int = struct.field(pytree_node=False, default=0)
    down_DE: Array | None = None

    def narrow(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Hidden states in the width of the table, in their own dtype."""
        if self.down_DE is None:
            return hidden
        return hidden @ self.down_DE.astype(hidden.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits over the padded vocabulary; surplus ids get -inf."""
        hidden = self.narrow(hidden)
        logits = jax.lax.dot_general(
            hidden, self.weight_VD.astype(hidden.dtype),
            (((hidden.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if self.bias_V is not None:
            logits = logits + self.bias_V
        if self.softcap:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.vocab_size and self.vocab_size < self.weight_VD.shape[0]:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)
        return logits


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"], head: Head, targets_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"], *, smoothing: float = 0.0, z_weight: float = 0.0,
    backend: str = "full",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted *sums* over tokens of the training loss, and of its terms.

    loss = sum w [ (1 - eps) (-log p_target) + eps mean_v(-log p_v) + z_weight logsumexp^2 ].

    Args:
      hidden_BTD: final hidden states, in the compute dtype.
      head: the output layer.
      targets_BT: target ids below `head.vocab_size`.
      weight_BT: weight per token; 0 = not counted.
      smoothing: eps.
      z_weight: weight of the squared log-partition function.
      backend: "full" (all logits at once, differentiated by JAX), "chunked" (some time steps
        at a time, with the gradient formed in the same pass: memory does not grow with B T V) or
        "fused" (as chunked, and on NVIDIA Hopper a kernel keeps the logits on the chip; elsewhere,
        and for what the kernel does not know - a bias, a softcap, a table spread over devices -
        it is "chunked").

    Returns:
      The loss, differentiable once, and its terms {"nll", "smoothing", "z"}: unscaled sums of
      -log p_target, mean_v(-log p_v) and logsumexp^2, without gradient.

    Raises:
      ConfigError: an unknown backend.

    Source: Szegedy et al. 2015 (arXiv:1512.00567), section 7; Chowdhery et al. 2022
    (arXiv:2204.02311), section 5, for the z-loss.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"cross_entropy backend is {backend!r}", f"known: {', '.join(BACKENDS)}")
    hidden, head = head.narrow(hidden_BTD), dataclasses.replace(head, down_DE=None)
    if backend != "full":
        loss, terms_BT = _one_pass(Settings(smoothing, z_weight, backend == "fused"), head, hidden,
                                   targets_BT, weight_BT)
    else:
        loss_BT, terms_BT = _token_terms(head.logits(hidden), head, targets_BT, smoothing, z_weight)
        loss = (weight_BT * loss_BT).sum()
    terms = {name: (weight_BT * term).sum() for name, term in terms_BT.items()}
    terms.setdefault("smoothing", jnp.zeros(()))
    return loss, jax.lax.stop_gradient(terms)


def token_nll(hidden_BTD: Float[Array, "B T D"], head: Head,
              targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log p_target of every token, in nats (float32), a chunk of the logits at a time."""

    def chunk_nll(chunk: tuple[Array, Array]) -> Array:
        logits = head.logits(chunk[0])
        return jax.nn.logsumexp(logits, axis=-1) - _at(logits, chunk[1])

    chunks = _chunks(len(head.weight_VD), hidden_BTD, targets_BT)
    nll = jax.lax.map(jax.checkpoint(chunk_nll), chunks)
    return _joined(nll, targets_BT.shape[1])


def token_hits(hidden_BTD: Float[Array, "B T D"], head: Head,
               targets_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether the most likely id is the target, a chunk of the logits at a time."""
    chunks = _chunks(len(head.weight_VD), hidden_BTD, targets_BT)
    hits = jax.lax.map(lambda chunk: head.logits(chunk[0]).argmax(-1) == chunk[1], chunks)
    return _joined(hits, targets_BT.shape[1])


def _token_terms(logits: Array, head: Head, targets: Array, smoothing: float,
                 z_weight: float) -> tuple[Array, dict[str, Array]]:
    """The loss of every token, and its terms."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    terms = {"nll": log_z - _at(logits, targets), "z": log_z**2}
    loss = (1 - smoothing) * terms["nll"] + z_weight * terms["z"]
    if smoothing:
        terms["smoothing"] = log_z - logits[..., :_n_ids(head)].mean(-1)
        loss = loss + smoothing * terms["smoothing"]
    return loss, terms


class Settings(NamedTuple):
    """What of `cross_entropy` is fixed when it is compiled."""

    smoothing: float
    z_weight: float
    fused: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass(settings: Settings, head: Head, hidden: Array, targets: Array,
              weight: Array) -> tuple[Array, dict[str, Array]]:
    """The loss and, per token, its terms, in chunks along time."""
    def chunk_terms(chunk: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
        return _token_terms(head.logits(chunk[0]), head, chunk[1], settings.smoothing,
                            settings.z_weight)

    chunks = _chunks(len(head.weight_VD), hidden, targets)
    loss, terms = jax.tree.map(functools.partial(_joined, length=targets.shape[1]),
                               jax.lax.map(chunk_terms, chunks))
    return (weight * loss).sum(), terms


def _one_pass_forward(settings: Settings, head: Head, hidden: Array,
                      targets: Array, weight: Array) -> tuple[Any, tuple]:
    # Chunks mix nothing over batch and time, so every device works through its own tokens, and
    # the head's gradient crosses devices once instead of once a chunk.
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in (*_ROWS, _TIME) if mesh.shape.get(axis, 1) > 1)
    low = dataclasses.replace(head, weight_VD=head.weight_VD.astype(hidden.dtype))
    spread = _spread_dimension(head.weight_VD.shape, mesh) if _SPREAD in axes else None

    def summed(d_head: Head) -> Head:
        if spread is None:
            return jax.lax.psum(d_head, axes)
        part = jax.lax.psum_scatter(d_head.weight_VD, _SPREAD, scatter_dimension=spread, tiled=True)
        others = tuple(axis for axis in axes if axis != _SPREAD)
        rest = jax.lax.psum(dataclasses.replace(d_head, weight_VD=jnp.zeros(())), axes)
        return dataclasses.replace(rest, weight_VD=jax.lax.psum(part, others) if others else part)

    def own(head: Head, hidden: Array, targets: Array, weight: Array) -> tuple:
        per_token, d_hidden, d_head = _gradients(settings, head, hidden, targets, weight)
        return per_token, d_hidden, summed(d_head) if axes else d_head

    if axes:
        whole = PartitionSpec()
        tokens = PartitionSpec(tuple(axis for axis in _ROWS if axis in axes),
                               _TIME if _TIME in axes else None)
        gradients = dataclasses.replace(
            jax.tree.map(lambda _: whole, head),
            weight_VD=whole if spread is None else PartitionSpec(*(None,) * spread, _SPREAD))
        own = jax.shard_map(own, in_specs=(whole, tokens, tokens, tokens),
                            out_specs=(tokens, tokens, gradients),
                            axis_names=set(axes), check_vma=False)
    (loss, terms), d_hidden, d_head = own(low, hidden, targets, weight)
    d_head = jax.tree.map(lambda gradient, a: gradient.astype(a.dtype), d_head, head)
    return ((weight * loss).sum(), terms), (d_head, d_hidden, loss)


def _spread_dimension(shape: tuple[int, ...], mesh: Any) -> int | None:
    """The dimension over which the table is spread: each device needs the sum of its part alone.

    As in the default `mesh.rules`, of rows if they divide, else of columns.
    """
    ways = mesh.shape[_SPREAD]
    if shape[0] % (ways * mesh.shape.get(_TENSOR, 1)) == 0:
        return 0
    return 1 if shape[1] % ways == 0 else None


def _one_pass_backward(settings: Settings, saved: tuple, cotangents: tuple[Array, Any]) -> tuple:
    d_head, d_hidden, d_weight = saved
    g = cotangents[0]
    return (jax.tree.map(lambda a: g * a, d_head), (g * d_hidden).astype(d_hidden.dtype), None,
            g * d_weight)


_one_pass.defvjp(_one_pass_forward, _one_pass_backward)


def _gradients(settings: Settings, head: Head, hidden: Array, targets: Array, weight: Array,
               ) -> tuple[tuple[Array, dict], Array, Head]:
    """Loss and terms per token, and the gradients of the weighted loss."""
    arrays = (hidden, targets, weight)
    direct = functools.partial(_over_chunks, _direct, settings, head, *arrays)
    if not logit_ratios.suit(head, hidden.dtype, settings.smoothing):
        return direct()[:3]
    settings = settings._replace(fused=settings.fused and logit_ratios.has_kernel(head))
    per_token, d_hidden, d_head, fit = _over_chunks(_by_ratios, settings, head, *arrays)
    if settings.smoothing:
        even = logit_ratios.even_part(head, hidden, weight, n_ids=_n_ids(head),
                                      smoothing=settings.smoothing)
        d_head = jax.tree.map(jnp.add, d_head, even)
    # A loop of no turns or one, because a condition would keep the head's gradient twice.
    _, result = jax.lax.while_loop(lambda state: ~state[0],
                                   lambda _: (jnp.bool_(True), direct()[:3]),
                                   (fit.all(), (per_token, d_hidden, d_head)))
    return result


def _over_chunks(part: Callable, settings: Settings, head: Head, hidden: Array, targets: Array,
                 weight: Array) -> tuple[tuple[Array, dict], Array, Head, Array]:
    """Loss and terms per token, gradients, and whether these are right, a chunk at a time.

    Gradients of the logits are rounded to the compute dtype before the two matrix products, as
    every gradient of a matrix product is; the head's is summed over chunks in float32.
    """
    def step(total: Head, chunk: tuple[Array, ...]) -> tuple[Head, tuple]:
        per_token, d_hidden, d_head, fit = part(settings, head, *chunk)
        return jax.tree.map(jnp.add, total, d_head), (per_token, d_hidden, fit)

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
    chunks = _chunks(len(head.weight_VD), hidden, targets, weight,
                     fused=settings.fused and part is _by_ratios)
    d_head, (*per_chunk, fit) = jax.lax.scan(step, zero, chunks)
    per_token, d_hidden = jax.tree.map(
        functools.partial(_joined, length=targets.shape[1]), per_chunk)
    return per_token, d_hidden, d_head, fit


def _by_ratios(settings: Settings, head: Head, hidden: Array, targets: Array, weight: Array,
               ) -> tuple[tuple[Array, dict], Array, Head, Array]:
    """A chunk of `_over_chunks`: one pass over the logits."""
    n_ids, smoothing = _n_ids(head), settings.smoothing
    found, d = logit_ratios.one_pass(head, hidden, targets, weight, n_ids=n_ids,
                                     smoothing=smoothing, z_weight=settings.z_weight,
                                     fused=settings.fused)
    terms = {"nll": found.nll_BT, "z": found.log_z_BT**2}
    loss = (1 - smoothing) * terms["nll"] + settings.z_weight * terms["z"]
    if smoothing:
        terms["smoothing"] = found.log_z_BT - logit_ratios.mean_logit(head, hidden, n_ids)
        loss = loss + smoothing * terms["smoothing"]
    d_head = dataclasses.replace(head, weight_VD=d.weight_VD, bias_V=d.bias_V)
    return (loss, terms), d.hidden_BTD, d_head, found.fits


def _direct(settings: Settings, head: Head, hidden: Array, targets: Array, weight: Array,
            ) -> tuple[tuple[Array, dict], Array, Head, Array]:
    """A chunk of `_over_chunks`: from the whole softmax, whatever its range."""
    logits, (smoothing, z_weight, _) = head.logits(hidden), settings
    per_token = _token_terms(logits, head, targets, smoothing, z_weight)
    d_logits = _logit_gradient(logits, head, targets, weight, smoothing, z_weight)
    d_low = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("btv,vd->btd", d_low, head.weight_VD,
                          preferred_element_type=jnp.float32).astype(hidden.dtype)
    d_weight = jnp.einsum("btv,btd->vd", d_low, hidden, preferred_element_type=jnp.float32)
    d_bias = None if head.bias_V is None else d_logits.sum((0, 1))
    d_head = dataclasses.replace(head, weight_VD=d_weight, bias_V=d_bias)
    return per_token, d_hidden, d_head, jnp.bool_(True)


def _logit_gradient(logits: Array, head: Head, targets: Array, weight: Array, smoothing: float,
                    z_weight: float) -> Array:
    """d (weight * loss) / d (hidden W^T), the formula of this module; float32, 0 for padding."""
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1])
    d = (1 + 2 * z_weight * log_z) * jnp.exp(logits - log_z)
    d = d - (1 - smoothing) * (ids == targets[..., None]) - smoothing / _n_ids(head)
    if head.softcap:
        d = d * (1 - (logits / head.softcap) ** 2)
    return jnp.where(ids < _n_ids(head), weight[..., None] * d, 0.0)


def _n_ids(head: Head) -> int:
    return head.vocab_size or len(head.weight_VD)


def _at(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _chunks(rows: int, *arrays: Array, fused: bool = False) -> tuple[Array, ...]:
    """B,T,… as n,B,t,…: along time, not batch, so a batch-sharded array stays where it is."""
    B, T = arrays[0].shape[:2]
    tokens = min(_FUSED_TOKENS, _FUSED_LOGITS // rows) if fused else _CHUNK_LOGITS // rows
    most = max(1, min(T, tokens // B))
    unit = _TILE // math.gcd(B, _TILE)
    if unit <= most < T:
        most -= most % unit
    n = -(-T // most)
    size = -(-T // n)
    if n > 1 and most % unit == 0:
        size += -size % unit
        n = -(-T // size)

    def chunks_first(array: Array) -> Array:
        if n == 1:
            return array[None]
        padded = jnp.pad(array, ((0, 0), (0, n * size - T)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, n, size, *array.shape[2:]), 1, 0)

    return tuple(map(chunks_first, arrays))


def _joined(chunks: Array, length: int) -> Array:
    """What `_chunks` took apart, without its padding."""
    n, B, size = chunks.shape[:3]
    return jnp.moveaxis(chunks, 0, 1).reshape(B, n * size, *chunks.shape[3:])[:, :length]
