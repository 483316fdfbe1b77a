"""A plane through a fixed point: what lies on it, who crosses it, and from how far one comes back.

All of this is of one state with S numbers, or of many such states at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float


class Plane(NamedTuple):
    """Points origin + a first + b second.

    Attributes:
      origin: where a = b = 0.
      axes: two orthonormal directions.
      share: of the squared length of the paths from the origin, how much lies in the plane; NaN
        where the plane was not made from paths.
    """

    origin: Float[np.ndarray, " S"]
    axes: Float[np.ndarray, "2 S"]
    share: float

    def points(self, extent: float, n: int) -> Float[np.ndarray, "n n S"]:
        """A grid from -extent to extent both ways; the first axis of the grid is b."""
        at = np.linspace(-extent, extent, n)
        b, a = np.meshgrid(at, at, indexing="ij")
        return (self.origin + a[..., None] * self.axes[0] + b[..., None] * self.axes[1]).astype(
            self.origin.dtype)

    def project(self, states: Float[np.ndarray, "*n S"]) -> Float[np.ndarray, "*n 2"]:
        """The (a, b) of the points of the plane that are next to some states."""
        return (np.asarray(states, np.float64) - self.origin) @ self.axes.T


def principal_plane(paths: Float[np.ndarray, "n K S"], origin: Float[np.ndarray, " S"]) -> Plane:
    """The plane through a point in which paths move most.

    Args:
      paths: states on the way, of n starts.
      origin: such as the fixed point.
    """
    off = np.asarray(paths, np.float64).reshape(-1, paths.shape[-1]) - origin
    _, sizes, axes = np.linalg.svd(off, full_matrices=False)
    square = sizes**2
    return Plane(origin, _signed(axes[:2]), float(square[:2].sum() / max(square.sum(), 1e-300)))


def random_plane(origin: Float[np.ndarray, " S"], seed: int,
                 used: Bool[np.ndarray, " S"] | None = None) -> Plane:
    """A plane through a point in two directions drawn at random.

    Args:
      origin: the point.
      seed: of the directions.
      used: coordinates that may change; None = all.
    """
    noise = np.random.default_rng(seed).standard_normal((len(origin), 2))
    if used is not None:
        noise[~used] = 0
    return Plane(origin, np.linalg.qr(noise)[0].T, float("nan"))


def displaced(states: Float[np.ndarray, "*tokens S"], distance: float,
              seed: int) -> Float[np.ndarray, "*tokens S"]:
    """States moved by `distance` times their own length, each in a direction of its own."""
    states = np.asarray(states)
    noise = np.random.default_rng(seed).standard_normal(states.shape)
    size = np.linalg.norm(states.astype(np.float64), axis=-1, keepdims=True)
    moved = states + distance * size * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    return moved.astype(states.dtype)


def basin(solve: Callable[[np.ndarray], Any], value: Float[np.ndarray, "*tokens S"],
          counted: Bool[np.ndarray, "*tokens"], radii: Sequence[float], within: float,
          seed: int) -> list[float]:
    """The share of starts at each distance from a fixed point that come back to it.

    Args:
      solve: first state -> result.
      value: the fixed points.
      counted: tokens that are looked at.
      radii: distances, relative to the length of the state.
      within: relative distance at which a state has come back.
      seed: of the directions.
    """
    value = np.asarray(value)
    size = np.maximum(np.linalg.norm(value.astype(np.float64), axis=-1), 1e-300)
    shares = []
    for i, radius in enumerate(radii):
        found = np.asarray(jax.device_get(solve(displaced(value, radius, seed + i))), np.float64)
        back = np.linalg.norm(found - value, axis=-1) <= within * size
        shares.append(float(back[counted].mean()) if counted.any() else float("nan"))
    return shares


def _signed(axes: np.ndarray) -> np.ndarray:
    """Directions whose largest part is positive: a singular vector has no sign of its own."""
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return axes * np.where(largest < 0, -1.0, 1.0)
