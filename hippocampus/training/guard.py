"""What keeps one bad step from ruining a run: it is skipped on the device, and counted.

The decision is part of the jitted step and is made from global values, so every process makes the
same one and nothing travels to the host for it. What a step skips is decided in this order:

    broken     loss or gradient norm not finite, a loss weight not finite or negative, an id that
               is not in the vocabulary
    spike      (with `guard.spike_sigmas`) loss or gradient norm > mean + sigmas sd of the window
    latched    `guard.patience` steps before this one were skipped in a row

The latch lets the host, which sees metrics some steps late, roll back before anything was
trained on what broke the run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hippocampus.config import GuardConfig
from hippocampus.data.batches import Batch
from hippocampus.training.sharding import path_name

Guard = dict[str, Array]
"""skipped, in_a_row: int32; with the spike rule window: float32 [2, W] of loss and gradient norm
of accepted steps, a ring, and accepted: int32, how many there were."""

_ROUNDING = 1e-5
"""Least sd of the window, of its mean: after equal values the last bit would be a spike."""


def first_guard(config: GuardConfig) -> Guard:
    """The guard before the first step."""
    guard = {"skipped": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)}
    if config.spike_sigmas:
        guard["window"] = jnp.zeros((2, config.spike_window), jnp.float32)
        guard["accepted"] = jnp.zeros((), jnp.int32)
    return guard


def zeros_like(guard: Any) -> Any:
    """Zeros where a guard, or its abstract form, lies: as committed to its devices as it is."""
    def zeros(leaf: Any) -> Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index])

    return jax.tree.map(zeros, guard)


def released(guard: Guard) -> Guard:
    """The guard without its latch, for the host to train on with after a roll-back."""
    return {**guard, "in_a_row": zeros_like(guard["in_a_row"])}


def broken_tokens(batch: Batch, vocab_size: int) -> Float[Array, ""]:
    """How many tokens of a batch have an id or a weight that nothing can be learned from.

    Args:
      batch: B,T tokens.
      vocab_size: ids are below it.

    Returns:
      A float32 sum, so that devices add it up together with the sums of the loss.
    """
    weight_BT = batch.loss_weight_BT
    good_BT = jnp.isfinite(weight_BT) & (weight_BT >= 0)
    for ids_BT in (batch.tokens_BT, batch.targets_BT):
        good_BT &= (ids_BT >= 0) & (ids_BT < vocab_size)
    return (~good_BT).sum(dtype=jnp.float32)


def judge(guard: Guard, config: GuardConfig, loss: Float[Array, ""], norm: Float[Array, ""],
          broken: Bool[Array, ""]) -> tuple[Bool[Array, ""], Guard]:
    """Whether a step is skipped, and the guard after it.

    Args:
      guard: before the step.
      config: the rules.
      loss: mean loss of the step.
      norm: global norm of its gradient.
      broken: whether anything else is wrong with it.
    """
    seen = jnp.stack([loss, norm]).astype(jnp.float32)
    bad = broken | ~jnp.isfinite(seen).all()
    if config.spike_sigmas:
        bad |= _spike(guard, config.spike_sigmas, seen)
    skip = bad | (guard["in_a_row"] >= config.patience)
    after = {"skipped": guard["skipped"] + skip, "in_a_row": jnp.where(
        skip, guard["in_a_row"] + 1, 0)}
    if config.spike_sigmas:
        place = guard["accepted"] % guard["window"].shape[1]
        after["window"] = jnp.where(skip, guard["window"], guard["window"].at[:, place].set(seen))
        after["accepted"] = guard["accepted"] + ~skip
    return skip, after


def _spike(guard: Guard, sigmas: float, seen: Float[Array, " n"]) -> Bool[Array, ""]:
    """Whether loss or norm is far above what the window holds; never before it is half full."""
    window, accepted = guard["window"], guard["accepted"]
    size = window.shape[1]
    filled = jnp.arange(size) < accepted
    n = jnp.clip(accepted, 1, size)
    mean = window.sum(1, where=filled) / n
    sd = jnp.sqrt(((window - mean[:, None]) ** 2).sum(1, where=filled) / n)
    limit = mean + sigmas * jnp.maximum(sd, _ROUNDING * jnp.abs(mean))
    return (2 * accepted >= size) & (seen > limit).any()


def unless(skip: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree, or all bits of the old one if the step is skipped."""
    return jax.tree.map(lambda a, b: jnp.where(skip, b, a), new, old)


def statistics_of(tree: Any) -> dict[str, dict[str, float]]:
    """What a person wants to know of parameters (or moments) that went wrong.

    Args:
      tree: arrays of numbers. Where they lie on several processes, all of them must call this.

    Returns:
      Per path, such as "layers_0/mlp/up/kernel": "largest", the largest finite magnitude, and
      "not_finite", how many values are NaN or infinite.
    """
    found = jax.device_get(_statistics(tree))
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): {"largest": float(largest), "not_finite": int(count)}
            for (path, _), (largest, count) in zip(leaves, found, strict=True)}


@jax.jit
def _statistics(tree: Any) -> list[tuple[Array, Array]]:
    def of(leaf: Array) -> tuple[Array, Array]:
        finite = jnp.isfinite(leaf)
        return jnp.abs(leaf).max(where=finite, initial=0), (~finite).sum()

    return [of(leaf) for leaf in jax.tree.leaves(tree)]
