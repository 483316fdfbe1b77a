"""How many patterns a memory holds, and from how much noise it recalls them.

Patterns and cues have unit length per head, which is no loss: a memory of other lengths r is one of
unit lengths with beta r^2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hippocampus.ops import hopfield

_PATTERNS, _SHUFFLE, _NOISE = range(3)
"""Random streams of a seed: noise that repeats the draws of the patterns would point at them."""

SHARP = 4.0
"""Times beta, of a memory that keeps more patterns apart."""

MOST_SCORES = 2**23
"""Of a block of cues with all patterns: 32 MiB in float32."""


class Dynamics(NamedTuple):
    """xi <- (1 - alpha) xi + alpha (retrieve(xi) + kappa q) / (1 + kappa), from the cue q.

    Attributes:
      beta_H: inverse temperature per head, for patterns of unit length.
      alpha: step size.
      kappa: weight of the anchor, which holds the query near the cue; 0 = free retrieval.
      steps: how many.
    """

    beta_H: np.ndarray
    alpha: float
    kappa: float
    steps: int


class Recall(NamedTuple):
    """Shares over cues and heads.

    Attributes:
      right: the pattern next to the result is the one that the cue was made from.
      within: the result is at most the tolerance away from that pattern.
    """

    right: float
    within: float


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors (last axis) brought to length 1, float32."""
    x = np.asarray(x, np.float64)
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def random_patterns(n: int, heads: int, width: int, seed: int) -> Float[np.ndarray, "S H d"]:
    """n patterns for each head, drawn evenly from the unit sphere."""
    return unit(np.random.default_rng([seed, _PATTERNS]).standard_normal((n, heads, width)))


def shuffled_patterns(patterns_SHd: Float[np.ndarray, "S H d"],
                      seed: int) -> Float[np.ndarray, "S H d"]:
    """Every coordinate drawn from another pattern's: the same values, without their belonging."""
    draw = np.random.default_rng([seed, _SHUFFLE])
    return unit(draw.permuted(np.asarray(patterns_SHd), axis=0))


def cues(patterns_SHd: Float[np.ndarray, "S H d"], noise: float, most: int, seed: int,
         ) -> tuple[Int[np.ndarray, " Q"], Float[np.ndarray, "Q H d"]]:
    """Patterns with noise added.

    Args:
      patterns_SHd: stored.
      noise: length of what is added, in a direction drawn at random; 1 leaves a cosine of 0.71.
      most: cues at most; they are of patterns evenly spaced over all.
      seed: of the noise.

    Returns:
      The number of each cue's pattern, and the cues, at unit length.
    """
    S = len(patterns_SHd)
    of_Q = np.unique(np.linspace(0, S - 1, min(S, most)).round().astype(np.int64))
    draw = np.random.default_rng([seed, _NOISE])
    off = unit(draw.standard_normal((len(of_Q), *patterns_SHd.shape[1:])))
    return of_Q, unit(patterns_SHd[of_Q] + noise * off)


def recall(patterns_SHd: Float[np.ndarray, "S H d"], dynamics: Dynamics, noise: float, *,
           most: int = 256, tolerance: float = 0.1, seed: int = 0) -> dict[str, Recall]:
    """Recalls patterns from noisy cues, by the memory and by what it must be compared with.

    Args:
      patterns_SHd: stored, of unit length.
      dynamics: of the memory.
      noise: see `cues`.
      most: cues at most.
      tolerance: distance at which a pattern counts as recalled.
      seed: of the noise.

    Returns:
      "memory": of `dynamics`; "free": the same without an anchor; "sharp": that with `SHARP` times
      the beta; "linear": as many steps of the linear memory xi <- sum_i k_i (k_i.xi), brought to
      unit length; "nearest": the cue itself.
    """
    of_Q, cue_QHd = cues(patterns_SHd, noise, most, seed)
    heads, S = patterns_SHd.shape[1], len(patterns_SHd)
    block = max(1, MOST_SCORES // (heads * S))
    found: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(of_Q), block):
        part = slice(first, first + block)
        for name, result in _results(cue_QHd[part], patterns_SHd, dynamics).items():
            found.setdefault(name, []).append(
                np.asarray(_judged(result, patterns_SHd, of_Q[part], tolerance)))
    means = {name: np.concatenate(parts, 1).mean((1, 2)) for name, parts in found.items()}
    return {name: Recall(float(right), float(within)) for name, (right, within) in means.items()}


def effective_patterns(patterns_SHd: Float[np.ndarray, "S H d"],
                       beta_H: Float[np.ndarray, " H"], most: int = 256,
                       ) -> Float[np.ndarray, " H"]:
    """The number of patterns that a retrieval from a stored one mixes, on average, per head."""
    _, cue_QHd = cues(patterns_SHd, 0.0, most, 0)
    return np.asarray(_effective(cue_QHd, patterns_SHd, beta_H))


@jax.jit
def _effective(cue_QHd: Array, patterns_SHd: Array, beta_H: Array) -> Float[Array, " H"]:
    return hopfield.effective_patterns(cue_QHd[None], None, patterns_SHd, beta_H)[0][0].mean(0)


def _results(cue_QHd: np.ndarray, patterns_SHd: np.ndarray,
             dynamics: Dynamics) -> Mapping[str, Array]:
    free = dynamics._replace(kappa=0.0)
    sharp = free._replace(beta_H=SHARP * dynamics.beta_H)
    return {"memory": _settle(cue_QHd, patterns_SHd, *dynamics),
            "free": _settle(cue_QHd, patterns_SHd, *free),
            "sharp": _settle(cue_QHd, patterns_SHd, *sharp),
            "linear": _linear(cue_QHd, patterns_SHd, dynamics.steps),
            "nearest": jnp.asarray(cue_QHd)}


def _repeat(step: Callable[[Array], Array], state: Array, steps: int) -> Array:
    result: Array = lax.fori_loop(0, steps, lambda _, xi: step(xi), state)
    return result


@functools.partial(jax.jit, static_argnums=5)
def _settle(cue_QHd: Array, patterns_SHd: Array, beta_H: Array, alpha: float, kappa: float,
            steps: int) -> Array:
    def step(xi_QHd: Array) -> Array:
        new = hopfield.retrieve(xi_QHd[None], None, patterns_SHd, beta_H)[0]
        return (1 - alpha) * xi_QHd + alpha * (new + kappa * cue_QHd) / (1 + kappa)

    return _repeat(step, cue_QHd, steps)


@functools.partial(jax.jit, static_argnums=2)
def _linear(cue_QHd: Array, patterns_SHd: Array, steps: int) -> Array:
    def step(xi_QHd: Array) -> Array:
        new = jnp.einsum("shd,qhs->qhd", patterns_SHd,
                         jnp.einsum("qhd,shd->qhs", xi_QHd, patterns_SHd))
        return new / jnp.maximum(jnp.linalg.norm(new, axis=-1, keepdims=True), 1e-12)

    return _repeat(step, cue_QHd, steps)


@jax.jit
def _judged(result_QHd: Array, patterns_SHd: Array, of_Q: Array,
            tolerance: float) -> Float[Array, "2 Q H"]:
    score_QHS = jnp.einsum("qhd,shd->qhs", result_QHd, patterns_SHd)
    right_QH = score_QHS.argmax(-1) == of_Q[:, None]
    off_QH = jnp.linalg.norm(result_QHd - patterns_SHd[of_Q], axis=-1)
    return jnp.stack([right_QH, off_QH <= tolerance]).astype(jnp.float32)
