"""Do solvers agree, do starts matter, how fast is it, and does a token see the future?

A solver is a function from a first state to a result; states are arrays "*tokens S".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

Map = Callable[[Array], Array]


class Distances(NamedTuple):
    """How far two results lie apart, over the tokens at which both have converged.

    Attributes:
      tokens: how many those are.
      mean, largest: relative distance; NaN for no token.
      apart: share of these tokens that are further apart than allowed; NaN for no token.
    """

    tokens: int
    mean: float
    largest: float
    apart: float


class Leak(NamedTuple):
    """What a change at one token did.

    Attributes:
      limit: evaluations of the map.
      before: numbers in front of the token of which some bit differs; 0 in a causal system.
      after: share of the tokens from there on that differ.
    """

    limit: int
    before: int
    after: float


def relative_distance(a: Float[np.ndarray, "*tokens S"],
                      b: Float[np.ndarray, "*tokens S"]) -> Float[np.ndarray, "*tokens"]:
    """|a - b| over the larger of |a| and |b|, token by token; 0 where both are 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = np.maximum(np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1))
    return np.linalg.norm(a - b, axis=-1) / np.maximum(size, np.finfo(np.float64).tiny)


def distances(a: Float[np.ndarray, "*tokens S"], b: Float[np.ndarray, "*tokens S"],
              counted: Bool[np.ndarray, "*tokens"], allowed: float = np.inf) -> Distances:
    """Compares two results.

    Args:
      a, b: states.
      counted: tokens that are compared: those at which both have converged.
      allowed: relative distance above which two states are apart.
    """
    found = relative_distance(a, b)[np.asarray(counted)]
    if not found.size:
        return Distances(0, np.nan, np.nan, np.nan)
    return Distances(found.size, float(found.mean()), float(found.max()),
                     float((found > allowed).mean()))


def agreement(values: Sequence[Float[np.ndarray, "*tokens S"]],
              converged: Sequence[Bool[np.ndarray, "*tokens"]],
              ) -> tuple[Distances, Float[np.ndarray, "n n"]]:
    """Compares the results of n solvers with each other.

    Args:
      values: of each solver.
      converged: where each has.

    Returns:
      The mean and the largest distance over all pairs, with the tokens of all pairs; and the
      largest of each pair (NaN where no token converged in both, 0 on the diagonal).
    """
    largest_nn, parts = np.zeros((len(values), len(values))), []
    for i, j in itertools.combinations(range(len(values)), 2):
        found = relative_distance(values[i], values[j])[converged[i] & converged[j]]
        largest_nn[i, j] = largest_nn[j, i] = found.max() if found.size else np.nan
        parts.append(found)
    every = np.concatenate(parts) if parts else np.zeros(0)
    if not every.size:
        return Distances(0, np.nan, np.nan, np.nan), largest_nn
    return Distances(every.size, float(every.mean()), float(every.max()), 0.0), largest_nn


def picard(f: Map, z0: Float[Array, "B *tokens S"], n: int,
           ) -> tuple[Float[Array, "n B"], Float[Array, "B *tokens S"]]:
    """Plain iteration, without stopping.

    Args:
      f: the map.
      z0: first states.
      n: evaluations.

    Returns:
      |f(z) - z| over |f(z)| of every row, norms being over all axes but the first; the last state.
    """
    def size(z: Array) -> Array:
        return jnp.sqrt(jnp.square(z.astype(jnp.float32)).sum(range(1, z.ndim)))

    def step(z: Array, _: None) -> tuple[Array, Array]:
        new = f(z)
        return new, size(new - z) / jnp.maximum(size(new), jnp.finfo(jnp.float32).tiny)

    end, residuals_nB = lax.scan(step, z0, None, length=n)
    return residuals_nB, end


def observed_rate(residuals: Float[np.ndarray, "n B"],
                  floor: float = 3e-6) -> Float[np.ndarray, " B"]:
    """The factor by which residuals fall per evaluation, on the geometric mean of the late ones.

    Args:
      residuals: relative, of consecutive evaluations.
      floor: below it rounding is all there is; in float32 about 25 units in the last place.

    Returns:
      Of the second half of the evaluations before a row first meets the floor; NaN where those
      are fewer than four, or a residual is not finite. Above 1 the residual grows.
    """
    rates = []
    for row in np.asarray(residuals, np.float64).T:
        below = np.flatnonzero(~(row > floor))
        used = row[:below[0]] if below.size else row
        first = len(used) // 2
        usable = len(used) >= 4 and np.isfinite(used).all()
        rates.append((used[-1] / used[first]) ** (1 / (len(used) - 1 - first)) if usable
                     else np.nan)
    return np.asarray(rates)


def random_starts(like: Float[np.ndarray, "*tokens S"], n: int,
                  seed: int) -> list[Float[np.ndarray, "*tokens S"]]:
    """n states of normal noise, of the same root mean square over each token as `like`."""
    draw, like = np.random.default_rng(seed), np.asarray(like)
    rms = np.sqrt(np.square(like, dtype=np.float64).mean(-1, keepdims=True))
    return [(rms * draw.standard_normal(like.shape)).astype(like.dtype) for _ in range(n)]


def from_starts(solve: Callable[[np.ndarray], tuple[Any, Any]],
                starts: Sequence[Float[np.ndarray, "*tokens S"]],
                value: Float[np.ndarray, "*tokens S"], converged: Bool[np.ndarray, "*tokens"],
                allowed: float) -> list[tuple[float, Distances]]:
    """Whether the fixed point is the only one: other starts must end at it.

    Args:
      solve: first state -> (result, where it has converged).
      starts: first states.
      value, converged: what the usual start gives.
      allowed: relative distance up to which two results are the same.

    Returns:
      For each start the share of tokens that converged, and how far they ended from `value`.
    """
    found = []
    for start in starts:
        own, ok = jax.device_get(solve(start))
        found.append((float(ok.mean()), distances(own, value, ok & converged, allowed)))
    return found


def differing(a: Array | np.ndarray, b: Array | np.ndarray) -> Bool[np.ndarray, ...]:
    """Where the bits of two float32 arrays differ: 0 and -0 do, a NaN and itself do not."""
    words = [np.ascontiguousarray(np.asarray(x, np.float32)).view(np.uint32) for x in (a, b)]
    return words[0] != words[1]


def leaks(solve: Callable[[Any, int], Any], inputs: Any, changed: Any, token: int,
          limits: Sequence[int]) -> list[Leak]:
    """Whether a result in front of a token knows of the token, at finite numbers of evaluations.

    Args:
      solve: (inputs, evaluations) -> result "B T S", float32.
      inputs: of the solver.
      changed: the same, but for the token.
      token: t that was changed, on the axis T.
      limits: evaluations.
    """
    found = []
    for limit in limits:
        a, b = jax.device_get((solve(inputs, limit), solve(changed, limit)))
        off = differing(a, b)
        found.append(Leak(limit, int(off[:, :token].sum()),
                          float(off[:, token:].any(-1).mean())))
    return found
