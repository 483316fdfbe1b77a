"""Cross-entropy from hidden states, with label smoothing and z-loss folded in."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hippocampus.errors import ConfigError

BACKENDS = ("full", "chunked")
_CHUNK_TOKENS = 4096


@struct.dataclass
class Head:
    """A linear output layer over a padded vocabulary.

    `weight_VD` may have more rows than `vocab_size`: the surplus makes the table divide well and
    is masked out of every loss and sample. `softcap` c > 0 bounds logits by c tanh(logits / c).
    """

    weight_VD: Array
    bias_V: Array | None = None
    softcap: float = struct.field(pytree_node=False, default=0.0)
    vocab_size: int = struct.field(pytree_node=False, default=0)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits over the padded vocabulary; surplus ids get -inf."""
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
      backend: "full" (all logits at once) or "chunked" (a few thousand tokens at a time, logits
        computed again for the gradient: memory does not grow with B T V).

    Returns:
      The loss, differentiable, and its terms {"nll", "smoothing", "z"}: unscaled sums of
      -log p_target, mean_v(-log p_v) and logsumexp^2, without gradient.

    Raises:
      ConfigError: an unknown backend.

    Source: Szegedy et al. 2015 (arXiv:1512.00567), section 7; Chowdhery et al. 2022
    (arXiv:2204.02311), section 5, for the z-loss.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"cross_entropy backend is {backend!r}", f"known: {', '.join(BACKENDS)}")
    sums = functools.partial(_sums, with_uniform=smoothing > 0)
    if backend == "full":
        nll, uniform, z = sums(head, hidden_BTD, targets_BT, weight_BT)
    else:
        nll, uniform, z = _chunked(sums, head, hidden_BTD, targets_BT, weight_BT)
    loss = (1 - smoothing) * nll + z_weight * z
    if smoothing:
        loss = loss + smoothing * uniform
    terms = {"nll": nll, "smoothing": uniform, "z": z}
    return loss, jax.lax.stop_gradient(terms)


def token_nll(hidden_BTD: Float[Array, "B T D"], head: Head,
              targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """-log p_target of every token, in nats (float32)."""
    logits = head.logits(hidden_BTD)
    target = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def _sums(head: Head, hidden: Array, targets: Array, weight: Array, *,
          with_uniform: bool) -> tuple[Array, Array, Array]:
    logits = head.logits(hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    uniform = jnp.zeros(())
    if with_uniform:
        V = head.vocab_size or logits.shape[-1]
        uniform = (weight * (log_z - logits[..., :V].mean(-1))).sum()
    return (weight * (log_z - target)).sum(), uniform, (weight * log_z**2).sum()


def _chunked(sums: functools.partial, head: Head, hidden: Array, targets: Array,
             weight: Array) -> tuple[Array, Array, Array]:
    """Chunks along time, not batch: a batch-sharded array then stays where it is."""
    B, T = targets.shape
    size = max(1, min(T, _CHUNK_TOKENS // B))
    n = -(-T // size)
    pad = n * size - T

    def chunks_first(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, n, size, *array.shape[2:]), 1, 0)

    def add(total: tuple, chunk: tuple) -> tuple[tuple, None]:
        part = jax.checkpoint(sums)(head, *chunk)
        return jax.tree.map(jnp.add, total, part), None

    zero = (jnp.zeros(()),) * 3
    total, _ = jax.lax.scan(add, zero, tuple(map(chunks_first, (hidden, targets, weight))))
    return total
