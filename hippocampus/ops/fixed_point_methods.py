"""Steps of fixed-point iteration: Picard's, Anderson's and Broyden's, each unit by itself.

A unit is what has weights of its own: a token, or a whole sequence. `Units` sums over the elements
of a unit; the results have the leading axes of the states, with 1 in place of a time axis that was
summed over. What a method remembers lies in rings (m, *tokens, D) and in small arrays (m, *units).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_UNROLLED = 8
"""Largest system that is eliminated without a loop."""

_LEAST_PIVOT = 4.0
"""Times machine epsilon: a column that leaves less is a sum of those before it."""

_MOST_PENALTY = 1.0
"""Of anderson's least squares; where f does not contract, Picard's step alone would not help."""

_LEAST_TURN = 0.1
"""Broyden's updates keep s.By above this share of s.s, so the Jacobian stays regular (Powell)."""


class Units(NamedTuple):
    """The elements that are summed over, as axes of the states."""

    axes: tuple[int, ...]

    def shape(self, z: Array) -> tuple[int, ...]:
        """That of one number a unit."""
        return z.shape[:-1] if len(self.axes) == 1 else (*z.shape[:-2], 1)

    def dot(self, a: Array, b: Array) -> Array:
        """Sums of products; not a matrix product, which TPUs would round to bfloat16."""
        total = (a * b).sum(self.axes[-1])
        return total.sum(-1, keepdims=True) if len(self.axes) > 1 else total

    def all(self, a: Array) -> Array:
        """Whether all elements of each unit are true."""
        every = a.all(self.axes[-1])
        return every.all(-1, keepdims=True) if len(self.axes) > 1 else every


TOKEN = Units((-1,))
SEQUENCE = Units((-2, -1))


class Method(NamedTuple):
    """How the next state comes from earlier ones.

    `init(z)` is the memory before the first step; `step(memory, k, z, g, usable)` gives the next
    state and memory from step number k, the state z and g = f(z) - z, 0 in units not `usable`.
    Such a unit forgets what it has seen.
    """

    init: Callable[[Array], Any]
    step: Callable[[Any, Int[Array, ""], Array, Array, Bool[Array, "*units"]], tuple[Array, Any]]


def picard(units: Units, damping: float, memory: int, regularization: float) -> Method:
    """z + damping g."""
    del units, memory, regularization
    return Method(lambda z: (), lambda _, k, z, g, usable: (z + damping * g, ()))


class _Last(NamedTuple):
    """The step before."""

    z: Array
    g: Array
    square: Array  # |g|^2
    usable: Array

    @staticmethod
    def init(units: Units, z: Array) -> _Last:
        shape = units.shape(z)
        return _Last(jnp.zeros_like(z), jnp.zeros_like(z), jnp.zeros(shape, z.dtype),
                     jnp.zeros(shape, bool))

    def changes(self, z: Array, g: Array, usable: Array) -> tuple[Array, Array]:
        both = (usable & self.usable)[..., None]
        return jnp.where(both, z - self.z, 0), jnp.where(both, g - self.g, 0)


class _Trust(NamedTuple):
    """What the last mixing promised, and how far mixing is believed since."""

    promised: Array  # |g - sum gamma_i dg_i|^2
    spread: Array  # sum gamma_i^2 |dg_i|^2
    penalty: Array

    def after(self, square: Array, least: float) -> Array:
        """The penalty, in view of |g|^2 at the state that the mixing led to."""
        error = jnp.maximum(square - self.promised, 0)
        noise = jnp.where(self.spread > 0, error / jnp.where(self.spread > 0, self.spread, 1), 0)
        return jnp.clip(jnp.maximum(noise, self.penalty / 2), least, max(least, _MOST_PENALTY))


def anderson(units: Units, damping: float, memory: int, regularization: float) -> Method:
    """Anderson's mixing of type II, over the last `memory` changes of z and g.

    With dz_i, dg_i the changes: gamma = argmin |g - sum gamma_i dg_i|, and the next state is
    z + damping g - sum gamma_i (dz_i + damping dg_i). The normal equations are those of changes
    of unit length, so that `regularization` is a share of each one's square.

    While other tokens move, g changes for reasons that a token's own states do not explain. That
    is noise in dg_i: where |g| came out larger than promised, the penalty rises to what noise of
    that size calls for, and halves with every step that keeps its promise. Where |g| grew, all
    changes but the last are forgotten. Weights are constants where gradients go through the steps.

    Source: Walker & Ni 2011 (doi:10.1137/10078356X), equations 2.1-2.3.
    """
    def init(z: Array) -> tuple:
        ring = jnp.zeros((memory, *z.shape), z.dtype)
        none = jnp.zeros(units.shape(z), z.dtype)
        gram = jnp.zeros((memory, memory, *none.shape), z.dtype)
        return _Last.init(units, z), ring, ring, gram, _Trust(none, none, none)

    def step(state: tuple, k: Array, z: Array, g: Array, usable: Array) -> tuple[Array, tuple]:
        last, dgs, moves, gram, trust = state
        slot = (k - 1) % memory
        dz, dg = last.changes(z, g, usable)
        held = lax.stop_gradient(g)
        square = units.dot(held, held)
        dgs = _write(dgs, lax.stop_gradient(dg), slot)
        moves = _write(moves, dz + damping * dg, slot)
        kept = usable & (square <= last.square)
        gram = _update_gram(units, jnp.where(kept, gram, 0), dgs, slot)
        products = units.dot(dgs, held[None])
        penalty = trust.after(square, regularization)
        weights = _weights(gram, products, penalty)
        promised = square - 2 * (weights * products).sum(0) + (
            weights[:, None] * weights * gram).sum((0, 1))
        spread = (weights * weights * _diagonal(gram)).sum(0)
        new = z + damping * g - (weights[..., None] * moves).sum(0)
        return new, (_Last(z, g, square, usable), dgs, moves, gram,
                     _Trust(promised, spread, penalty))

    return Method(init, step)


def _update_gram(units: Units, gram: Array, dgs: Array, slot: Array) -> Array:
    """Products of the newest change with all; those a unit has forgotten have 0 on the diagonal."""
    m = dgs.shape[0]
    products = units.dot(dgs, lax.dynamic_index_in_dim(dgs, slot, keepdims=True))
    at_slot = (jnp.arange(m) == slot).reshape(m, *(1,) * (products.ndim - 1))
    products = jnp.where(at_slot | (_diagonal(gram) > 0), products, 0)
    gram = jnp.where(at_slot[None], products[:, None], gram)
    return jnp.where(at_slot[:, None], products[None], gram)


def _weights(gram: Array, products: Array, penalty: Array) -> Array:
    square = _diagonal(gram)
    kept = square > 0
    scale = jnp.where(kept, lax.rsqrt(jnp.where(kept, square, 1)), 0)
    system = jnp.where(_unit(gram), 1 + penalty, gram * scale[:, None] * scale[None])
    weights = scale * solve(system, scale * products)
    return jnp.where(jnp.isfinite(weights).all(0), weights, 0)


def broyden(units: Units, damping: float, memory: int, regularization: float) -> Method:
    """Broyden's good method for g(z) = 0 from the inverse Jacobian -1, of rank `memory` beyond it.

    B <- B + (s - B y) s^T B / (s^T B y) with s, y the changes of z and g. It begins again at -1
    when it is full, and where |g| grew. B is a constant where gradients go through the steps.

    Source: Broyden 1965 (doi:10.1090/S0025-5718-1965-0198670-6); Powell's damping as in More &
    Trangenstein 1976 (doi:10.1090/S0025-5718-1976-0418451-2).
    """
    del regularization

    def init(z: Array) -> tuple:
        ring = jnp.zeros((memory, *z.shape), z.dtype)
        kept = jnp.zeros((memory, *units.shape(z)), z.dtype)
        return _Last.init(units, z), ring, ring, kept

    def step(state: tuple, k: Array, z: Array, g: Array, usable: Array) -> tuple[Array, tuple]:
        last, us, vs, kept = state
        slot = (k - 1) % memory
        s, y = lax.stop_gradient(last.changes(z, g, usable))
        held = lax.stop_gradient(g)
        square = units.dot(held, held)
        at_slot = (jnp.arange(memory) == slot).reshape(memory, *(1,) * (kept.ndim - 1))
        again = ~usable | (square > last.square) | kept.all(0)
        kept = jnp.where(at_slot | again, 0, kept)
        u, v, useful = _update_pair(units, us, vs, kept, s, y)
        us, vs = _write(us, u, slot), _write(vs, v, slot)
        kept = jnp.where(at_slot, useful.astype(kept.dtype), kept)
        coefficients = kept * units.dot(vs, g[None])
        new = z + damping * (g - (coefficients[..., None] * us).sum(0))
        return new, (_Last(z, g, square, usable), us, vs, kept)

    return Method(init, step)


def _update_pair(units: Units, us: Array, vs: Array, kept: Array, s: Array,
                 y: Array) -> tuple[Array, Array, Array]:
    """u, v of the term u v^T that B gains; v has length 1."""
    By = (_expand(kept * units.dot(vs, y[None])) * us).sum(0) - y
    sB = (_expand(kept * units.dot(us, s[None])) * vs).sum(0) - s
    ss, turn, length = units.dot(s, s), units.dot(s, By), jnp.sqrt(units.dot(sB, sB))
    share = turn / ss
    theta = jnp.where(jnp.abs(share) >= _LEAST_TURN, 1,
                      (1 - jnp.where(share < 0, -_LEAST_TURN, _LEAST_TURN)) / (1 - share))
    factor = theta * length / (theta * turn + (1 - theta) * ss)
    useful = (ss > 0) & (length > 0) & jnp.isfinite(factor)
    u = _expand(jnp.where(useful, factor, 0)) * (s - By)
    v = _expand(jnp.where(useful, 1 / length, 0)) * sB
    return u, v, useful


METHODS: dict[str, Callable[[Units, float, int, float], Method]] = {
    "picard": picard, "anderson": anderson, "broyden": broyden}


def solve(system: Float[Array, "m m ..."],
          right: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
    """Solutions of many small symmetric systems with a positive diagonal, by elimination.

    Args:
      system: the matrices, with their own axes first.
      right: right-hand sides.

    Returns:
      Solutions; a column that depends on those before it gets 0.
    """
    return _eliminate(system, right) if len(right) <= _UNROLLED else _eliminate_loop(system, right)


def _inverse(pivot: Array) -> Array:
    large = pivot > _LEAST_PIVOT * jnp.finfo(pivot.dtype).eps
    return jnp.where(large, 1 / jnp.where(large, pivot, 1), 0)


def _eliminate(system: Array, right: Array) -> Array:
    m = len(right)
    a, b = [[system[i, j] for j in range(m)] for i in range(m)], list(right)
    inverse = []
    for p in range(m):
        inverse.append(_inverse(a[p][p]))
        for i in range(p + 1, m):
            factor = a[p][i] * inverse[p]
            b[i] = b[i] - factor * b[p]
            for j in range(i, m):
                a[i][j] = a[i][j] - factor * a[p][j]
    for p in reversed(range(m)):
        b[p] = inverse[p] * (b[p] - sum((a[p][j] * b[j] for j in range(p + 1, m)),
                                        jnp.zeros_like(b[p])))
    return jnp.stack(b)


def _eliminate_loop(system: Array, right: Array) -> Array:
    """Gauss-Jordan: one step a pivot, of all rows at once."""
    rows = jnp.concatenate([system, right[:, None]], 1)  # m,m+1,*units
    m = len(right)
    number = jnp.arange(m).reshape(m, *(1,) * (right.ndim - 1))

    def step(p: Array, rows: Array) -> Array:
        row = lax.dynamic_index_in_dim(rows, p, keepdims=False)
        column = lax.dynamic_index_in_dim(rows, p, 1, keepdims=False)
        row = row * _inverse(lax.dynamic_index_in_dim(row, p, keepdims=False))
        others = rows - jnp.where(number == p, 0, column)[:, None] * row[None]
        return jnp.where((number == p)[:, None], row[None], others)

    return lax.fori_loop(0, m, step, rows)[:, -1]


def _diagonal(gram: Array) -> Array:
    return jnp.where(_unit(gram), gram, 0).sum(0)


def _unit(gram: Array) -> Array:
    m = len(gram)
    return jnp.eye(m, dtype=bool).reshape(m, m, *(1,) * (gram.ndim - 2))


def _expand(a: Array) -> Array:
    return a[..., None]


def _write(ring: Array, value: Array, slot: Array) -> Array:
    return lax.dynamic_update_index_in_dim(ring, value, slot, 0)
