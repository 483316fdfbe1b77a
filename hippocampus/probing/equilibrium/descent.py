"""Does an energy fall along the steps that are said to descend it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


class Descent(NamedTuple):
    """What the energies along some steps did; a move is one step of one token.

    Attributes:
      moves: how many there are.
      rose: share of the moves in which the energy rose by more than rounding explains.
      fell: share in which it fell by more than that.
      largest_rise: the largest change upwards, 0 if there is none.
      slack: change that rounding explains.
    """

    moves: int
    rose: float
    fell: float
    largest_rise: float
    slack: float


def energies_along(step: Callable[[Array], Array], control: Callable[[Array], Array],
                   energy: Callable[[Array], Array], state: Float[Array, "*tokens S"], n: int,
                   ) -> Float[Array, "3 n ..."]:
    """The energy before each of n steps, after it, and after another step from the same state.

    Args:
      step: state -> state.
      control: the other step, which is not gone on from.
      energy: state -> one number a token.
      state: where to begin.
      n: steps.
    """
    def one(state: Array, _: None) -> tuple[Array, Array]:
        new = step(state)
        return new, jnp.stack([energy(state), energy(new), energy(control(state))])

    return jnp.moveaxis(lax.scan(one, state, None, length=n)[1], 1, 0)


def descent(before: Float[np.ndarray, "n ..."], after: Float[np.ndarray, "n ..."],
            tolerance: float) -> Descent:
    """Counts the rises.

    Args:
      before, after: the energies of each move.
      tolerance: what rounding explains, relative to the largest energy. A change that is not a
        number counts as a rise.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    change = after - before
    finite = before[np.isfinite(before)]
    slack = tolerance * float(np.abs(finite).max()) if finite.size else 0.0
    rises = np.where(np.isnan(change), np.inf, change)
    return Descent(change.size, float((rises > slack).mean()), float((change < -slack).mean()),
                   max(0.0, float(rises.max())), slack)


def astray(step: Callable[[Array], Array], key: Array) -> Callable[[Array], Array]:
    """A step as long as `step`'s, in a direction drawn at random: what no descent looks like.

    Args:
      step: state -> state "*tokens S".
      key: the same direction is taken from every state.
    """
    def wrong(state: Array) -> Array:
        length = jnp.linalg.norm(step(state) - state, axis=-1, keepdims=True)
        noise = jax.random.normal(key, state.shape, state.dtype)
        return state + length * noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)

    return wrong
