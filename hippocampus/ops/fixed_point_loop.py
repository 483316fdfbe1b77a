"""The loop around a fixed-point method: residuals, when a token freezes, the best iterate.

A frozen token keeps its state bit for bit. In a causal system a token freezes only when all earlier
tokens of its document have: until then what it depends on moves, and so must it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops.fixed_point_methods import Method, Units

Freeze = Callable[[Bool[Array, "*units"]], Bool[Array, "*units"]]


class Rules(NamedTuple):
    """When to stop, and how that is measured."""

    units: Units
    freeze: Freeze
    tol: Float[Array, ""]
    limit: Int[Array, ""]
    done: Callable[[Array, Array], Bool[Array, "*tokens"]] | None
    earliest: Int[Array, "*tokens"] | None
    epsilon: float


class Carry(NamedTuple):
    """Where the iteration stands after `k` evaluations."""

    k: Int[Array, ""]
    z: Float[Array, "*tokens D"]
    best: Float[Array, "*tokens D"]
    best_residual: Float[Array, "*units"]
    frozen: Bool[Array, "*units"]
    iterations: Int[Array, "*units"]
    residual: Float[Array, "*units"]
    memory: Any
    trace: Float[Array, "K ..."] | None
    iterates: Float[Array, "K *tokens D"] | None


def each(ok: Bool[Array, "*units"]) -> Bool[Array, "*units"]:
    """Freezes every unit that has converged."""
    return ok


def rows(ok: Bool[Array, "*units"]) -> Bool[Array, "*units"]:
    """Freezes rows all of whose tokens have converged."""
    return jnp.broadcast_to(ok.all(-1, keepdims=True), ok.shape) if ok.ndim else ok


def prefixes(document_ids: Int[Array, "*tokens"] | None) -> Freeze:
    """Freezes tokens that have converged behind converged tokens of their document only."""
    begin = 0 if document_ids is None else _begins(jnp.asarray(document_ids))

    def freeze(ok: Array) -> Array:
        if not ok.ndim:
            return ok
        last_open = lax.cummax(jnp.where(ok, -1, _positions(ok)), axis=ok.ndim - 1)
        return last_open < begin

    return freeze


def _begins(ids: Array) -> Array:
    """Where in its row the document of each token begins."""
    first = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], -1)
    return lax.cummax(jnp.where(first, _positions(ids), 0), axis=ids.ndim - 1)


def _positions(a: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, a.shape, a.ndim - 1)


def solve(f: Callable[[Array, Array], Array], z0: Float[Array, "*tokens D"], method: Method,
          rules: Rules, max_iterations: int, *, trace: bool = True, record: bool = False,
          unroll: bool = False, remat: bool = False) -> Carry:
    """Iterates z <- step(f(z, k)) from z0 until all units are frozen or `rules.limit` is reached.

    Args:
      f: of the states and the number of the evaluation.
      z0: finite states.
      trace: keep the residual of every evaluation.
      record: keep the states of every evaluation.
      unroll: a scan over `max_iterations` that gradients go through, not a while loop.
      remat: recompute each step of that scan in the backward pass.

    Returns:
      The last carry, `best` being the result.
    """
    carry = _start(z0, method, rules, max_iterations, trace, record)

    def step(carry: Carry) -> Carry:
        return _step(f, method, rules, carry)

    if not unroll:
        return _fill(lax.while_loop(
            lambda carry: (carry.k < rules.limit) & ~carry.frozen.all(), step, carry))

    def scanned(carry: Carry, _: None) -> tuple[Carry, None]:
        return step(carry), None

    body = jax.checkpoint(scanned, prevent_cse=False) if remat else scanned
    return _fill(lax.scan(body, carry, None, length=max_iterations)[0])


def _start(z: Array, method: Method, rules: Rules, K: int, trace: bool, record: bool) -> Carry:
    shape, wide = rules.units.shape(z), _wide(z)
    infinite = jnp.full(shape, jnp.inf, jnp.float32)
    return Carry(
        k=jnp.zeros((), jnp.int32), z=z, best=z, best_residual=infinite,
        frozen=jnp.zeros(shape, bool), iterations=jnp.zeros(shape, jnp.int32), residual=infinite,
        memory=method.init(z.astype(wide)),
        trace=jnp.full((K, *shape), jnp.inf, jnp.float32) if trace else None,
        iterates=jnp.zeros((K, *z.shape), z.dtype) if record else None)


def _step(f: Callable[[Array, Array], Array], method: Method, rules: Rules, at: Carry) -> Carry:
    fz, wide, units = f(at.z, at.k), _wide(at.z), rules.units
    z, g = at.z.astype(wide), fz.astype(wide) - at.z.astype(wide)
    residual, finite = _residual(rules, lax.stop_gradient(g), lax.stop_gradient(fz.astype(wide)))
    ok = finite & (residual <= rules.tol)
    if rules.done is not None:
        ok &= units.all(rules.done(at.z, fz)[..., None])
    if rules.earliest is not None:
        ok &= units.all((at.k + 1 >= rules.earliest)[..., None])
    moving = ~at.frozen & (at.k < rules.limit)
    frozen = rules.freeze(at.frozen | (moving & ok))
    # What a token freezes at is its result: an earlier iterate with a smaller residual met other
    # states before it.
    better = moving & finite & ((residual < at.best_residual) | frozen)
    best = jnp.where(better[..., None], at.z, at.best)

    g = jnp.where(finite[..., None], g, 0)
    new, memory = method.step(at.memory, at.k, z, g, finite)
    new = new.astype(at.z.dtype)
    sound = finite & units.all(jnp.isfinite(new))
    new = jnp.where(sound[..., None], new, best)
    residual = jnp.where(moving, residual, at.residual)
    return Carry(
        k=at.k + moving.any(), best=best,
        z=jnp.where((moving & ~frozen)[..., None], new, at.z),
        best_residual=jnp.where(better, residual, at.best_residual), frozen=frozen,
        iterations=at.iterations + moving, residual=residual, memory=memory,
        trace=None if at.trace is None else _write(at.trace, residual, at.k),
        iterates=None if at.iterates is None else _write(at.iterates, at.z, at.k))


def _residual(rules: Rules, g: Array, fz: Array) -> tuple[Array, Array]:
    """|g| / (|f| + epsilon), infinite where f is not finite, and whether it is."""
    size = jnp.sqrt(rules.units.dot(fz, fz))
    residual = (jnp.sqrt(rules.units.dot(g, g)) / (size + rules.epsilon)).astype(jnp.float32)
    finite = jnp.isfinite(residual) & jnp.isfinite(size)
    return jnp.where(finite, residual, jnp.inf), finite


def _fill(end: Carry) -> Carry:
    """Repeats the last residuals and states in the places of evaluations that were not made."""
    def filled(ring: Array | None, last: Array) -> Array | None:
        if ring is None:
            return None
        made = (jnp.arange(len(ring)) < end.k).reshape(-1, *(1,) * last.ndim)
        return jnp.where(made, ring, last)

    if end.iterates is None:
        return end._replace(trace=filled(end.trace, end.residual))
    last = lax.dynamic_index_in_dim(end.iterates, jnp.maximum(end.k - 1, 0), keepdims=False)
    last = jnp.where(end.k > 0, last, end.z)
    return end._replace(trace=filled(end.trace, end.residual),
                        iterates=filled(end.iterates, last))


def _wide(z: Array) -> Any:
    return jnp.promote_types(z.dtype, jnp.float32)


def _write(ring: Array, value: Array, k: Array) -> Array:
    return lax.dynamic_update_index_in_dim(ring, value, k, 0)
