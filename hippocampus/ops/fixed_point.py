"""Fixed points z = f(z, args) of many tokens at once: solvers, stopping, and three gradients.

A stand-alone library: f is any function of states whose leading axes are tokens.

    def f(z_BTD, weights):
        return jnp.tanh(z_BTD @ weights["W"] + weights["b"])

    solution = fixed_point(f, jnp.zeros((B, T, D)), weights, causal=False)
    solution.value, solution.converged, solution.iterations, solution.residual

Every token has its own weights and its own stop, and nothing is shared between tokens but what f
shares. If no token of f looks ahead, no token of the result does, at any number of evaluations
(`causal=True`, the default); if f keeps rows apart, a row does not depend on its neighbours.

f is called once an iteration. The result of a token is the state that it froze at, or else the one
of least residual. It has been evaluated: n evaluations are at most n - 1 steps away from z0.

Where f does not contract, `converged` is False and `value` is finite all the same. A token at which
f gives nothing finite goes back to its best state and forgets what it has seen; its neighbours are
not touched. Elements of a gradient that are not finite count as 0.

Gradients flow to `args` and to what f closes over:

- "implicit": of the fixed point itself, u = J^T u + g at the result, by the same method. Memory
  does not grow with the iterations. Exact where tokens have converged.
- "phantom": of `phantom_steps` damped steps from the result, which they are part of.
- "unroll": of all iterations. Mixing weights and inverse Jacobians count as constants; this leaves
  picard's gradient exact, and that of all methods where they have converged.
- "none": no gradient.

Source: Bai et al. 2019 (arXiv:1909.01377) for the implicit gradient; Geng et al. 2021
(arXiv:2111.05177) for phantom gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hippocampus.errors import ConfigError
from hippocampus.ops import fixed_point_loop as loop
from hippocampus.ops.fixed_point_methods import METHODS, SEQUENCE, TOKEN, Method, Units

GRADIENTS = ("implicit", "phantom", "unroll", "none")

_EPSILON = 1e-8
_EPSILON_BACKWARD = 1e-30
"""Gradients have no size of their own: only their zeros are to be told apart."""


class Solution(NamedTuple):
    """What `fixed_point` found, token by token."""

    value: Float[Array, "*tokens D"]
    """The state each token froze at, else that of least residual, after the steps of "phantom" if
    that is the gradient; always finite."""
    converged: Bool[Array, "*tokens"]
    """Whether the token froze: it and all tokens before it that count have met `tol`."""
    iterations: Int[Array, "*tokens"]
    """Evaluations of f until the token froze."""
    residual: Float[Array, "*tokens"]
    """|f(z) - z| / (|f(z)| + 1e-8) at the result (before "phantom"), float32; infinite if f was
    never finite."""
    residual_trace: Float[Array, "K ..."]
    """That of every evaluation; when a token has frozen, its last one is repeated."""
    evaluations: Int[Array, ""]
    """Calls of f that were made, without those of the gradient."""
    iterates: Float[Array, "K *tokens D"] | None
    """The states that f was evaluated at, the last one repeated, if `record`."""


def fixed_point(
    f: Callable[..., Array], z0: Float[Array, "*tokens D"], args: Any = (), *,
    method: str = "anderson", max_iterations: int = 30, tol: float | Float[Array, ""] = 1e-3,
    limit: int | Int[Array, ""] | None = None, damping: float = 1.0, memory: int = 5,
    regularization: float = 1e-6, granularity: str = "token", causal: bool = True,
    document_ids: Int[Array, "*tokens"] | None = None,
    done: Callable[[Array, Array], Bool[Array, "*tokens"]] | None = None,
    gradient: str = "implicit", phantom_steps: int = 1, backward_iterations: int = 30,
    backward_tol: float = 1e-4, remat: bool = False, indexed: bool = False, record: bool = False,
    earliest: Int[Array, "*tokens"] | None = None,
) -> Solution:
    """Solves z = f(z, args) for every token, from z0.

    Args:
      f: (z, args) -> new z, of the same shape and dtype.
      z0: first states; norms are over the last axis, the axis before it is time. They get a
        gradient from "unroll" only. float32 is recommended: rounding in bfloat16 alone leaves
        residuals above 1e-3.
      args: any tree that f reads and gradients flow to.
      method: "picard" (z + damping (f - z)), "anderson" (mixes earlier steps) or "broyden".
      max_iterations: K, the most evaluations of f; shapes and compiled code depend on it.
      tol: relative residual at which a token has converged; may be traced.
      limit: evaluations at most in this call, <= K; may be traced. None = K.
      damping: share of a step that is taken, in (0, 1].
      memory: earlier steps that anderson and broyden use.
      regularization: of anderson's least squares, as a share of each change's square.
      granularity: "token", or "sequence": one set of weights and one stop for all tokens of the
        time axis, which lets them see each other.
      causal: the last token axis is time, and tokens depend on earlier ones only: a token freezes
        when all earlier ones of its document have. False: tokens freeze by themselves.
      document_ids: document of each token, in runs; None = one document a row.
      done: (z, f(z)) -> whether a token has converged in other respects too.
      gradient: "implicit", "phantom", "unroll" or "none"; see the module.
      phantom_steps: steps that "phantom" makes.
      backward_iterations: products with the Jacobian at most, for "implicit".
      backward_tol: relative residual at which a row's implicit gradient has converged.
      remat: "unroll" recomputes its steps in the backward pass.
      indexed: f is (z, args, k) with the number k of the evaluation, from 0; has no fixed point to
        differentiate, so "unroll" or "none" only.
      record: keep all states.
      earliest: evaluations before which a token does not freeze, for a decoder: those after which
        the tokens before it had frozen, and K + 1 if they never did. None = 0.

    Returns:
      The solution. Shapes do not depend on what happens; everything may be compiled.

    Raises:
      ConfigError: an unknown choice, a number out of range, choices that exclude each other, or f
        with another shape or dtype than z0.
    """
    z0 = lax.convert_element_type(z0, jnp.result_type(z0))  # a carry must not be weakly typed
    _check(method, granularity, gradient, causal, indexed, z0)
    _check_numbers(damping, max_iterations=max_iterations, memory=memory,
                   phantom_steps=phantom_steps, backward_iterations=backward_iterations)
    units = TOKEN if granularity == "token" else SEQUENCE
    z0 = jnp.where(jnp.isfinite(z0), z0, 0)
    f, inputs = _closed(f, z0, args, jnp.int32(0)) if indexed else _closed(f, z0, args)
    if gradient != "unroll":
        z0, held = lax.stop_gradient((z0, inputs))
    else:
        held = inputs
    if done is not None:
        done = _constant(done, z0)
    rules = loop.Rules(
        units=units, freeze=loop.prefixes(document_ids) if causal else loop.each,
        tol=jnp.asarray(tol, jnp.float32), done=done, earliest=earliest, epsilon=_EPSILON,
        limit=jnp.clip(max_iterations if limit is None else limit, 0, max_iterations))
    step = METHODS[method](units, damping, memory, regularization)

    def of_states(z: Array, k: Array) -> Array:
        z, guarded = _finite_gradient((z, held)) if gradient == "unroll" else (z, held)
        return f(guarded, z, k) if indexed else f(guarded, z)

    end = loop.solve(of_states, z0, step, rules, max_iterations, record=record,
                     unroll=gradient == "unroll", remat=remat)
    value, evaluations = end.best, end.k
    if gradient == "unroll":
        evaluations = jnp.full_like(evaluations, max_iterations)
    elif gradient == "phantom":
        value, evaluations = _phantom(f, value, inputs, damping, phantom_steps, evaluations)
    elif gradient == "implicit":
        # Tokens that depend on each other are solved for together, which takes fewer products.
        units = SEQUENCE if causal and z0.ndim > 1 else units
        value = _implicit(f, value, inputs, _Adjoint(
            units, METHODS[method](units, damping, memory, regularization), backward_iterations),
            backward_tol)
    return _solution(end, value, evaluations, z0.shape[:-1])


def _check(method: str, granularity: str, gradient: str, causal: bool, indexed: bool,
           z0: Array) -> None:
    for name, value, known in (("method", method, tuple(METHODS)),
                               ("granularity", granularity, ("token", "sequence")),
                               ("gradient", gradient, GRADIENTS)):
        if value not in known:
            raise ConfigError(f"fixed_point {name} is {value!r}", f"known: {', '.join(known)}")
    if granularity == "sequence" and (causal or z0.ndim < 2):
        raise ConfigError("granularity sequence lets tokens of the time axis see later ones",
                          "granularity='token', or causal=False and states with a time axis")
    if indexed and gradient not in ("unroll", "none"):
        raise ConfigError(f"an indexed function has no {gradient} gradient",
                          "gradient='unroll' or 'none'")
    if z0.ndim < 1 or not jnp.issubdtype(z0.dtype, jnp.floating):
        raise ConfigError(f"fixed_point z0 is {z0.dtype} of shape {z0.shape}",
                          "floating-point states, whose last axis is one state")


def _check_numbers(damping: float, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"fixed_point {name} is {count}", "at least 1")
    if not 0 < damping <= 1:
        raise ConfigError(f"fixed_point damping is {damping}", "above 0, at most 1")


def _closed(f: Callable[..., Array], z: Array, args: Any, *index: Array) -> tuple[Callable, Any]:
    """f as a function (inputs, z, *index) that closes over nothing, and its inputs.

    What f closed over may belong to a transformation that is over when the backward pass runs.
    """
    closed, out = jax.make_jaxpr(f, return_shape=True)(z, args, *index)
    if getattr(out, "shape", None) != z.shape or out.dtype != z.dtype:
        raise ConfigError(f"f gives {jax.tree.map(lambda a: (a.shape, str(a.dtype)), out)}",
                          f"it must give what it is given: {z.shape}, {z.dtype}")

    def call(inputs: tuple[list, list], z: Array, *index: Array) -> Array:
        consts, leaves = inputs
        function = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(closed.jaxpr, consts))
        return function(z, *leaves, *index)[0]

    return call, (list(closed.consts), [jnp.asarray(leaf) for leaf in jax.tree.leaves(args)])


def _constant(done: Callable[..., Array], z: Array) -> Callable[..., Array]:
    """`done` without gradients to what it closes over."""
    closed = jax.make_jaxpr(done)(z, z)
    consts = lax.stop_gradient(closed.consts)
    function = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(closed.jaxpr, consts))
    return lambda z, fz: function(*lax.stop_gradient((z, fz)))[0]


def _phantom(f: Callable[..., Array], z: Array, inputs: Any, damping: float, steps: int,
             evaluations: Array) -> tuple[Array, Array]:
    def step(z: Array, _: None) -> tuple[Array, None]:
        at, guarded = _finite_gradient((z, inputs))
        new = z + damping * (f(guarded, at) - z)
        return jnp.where(jnp.isfinite(new).all(-1, keepdims=True), new, z), None

    return lax.scan(step, z, None, length=steps)[0], evaluations + steps


class _Adjoint(NamedTuple):
    """How u = J^T u + g is solved."""

    units: Units
    method: Method
    iterations: int

    def solve(self, transposed: Callable[[Array], Array], g: Array, tol: Array) -> Array:
        """Rows freeze as wholes: a token's u depends on those of later tokens."""
        g = _zero_if_not_finite(g)
        wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        rules = loop.Rules(units=self.units, freeze=loop.rows, tol=tol, done=None, earliest=None,
                           limit=jnp.int32(self.iterations), epsilon=_EPSILON_BACKWARD)

        def of_states(u: Array, k: Array) -> Array:
            return transposed(u.astype(g.dtype)).astype(u.dtype) + wide

        return loop.solve(of_states, wide, self.method, rules, self.iterations,
                          trace=False).best.astype(g.dtype)


def _implicit(f: Callable[..., Array], value: Array, inputs: Any, adjoint: _Adjoint,
              tol: float) -> Array:
    """`value` with the gradient of the fixed point."""
    leaves, tree = jax.tree.flatten(inputs)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def join(floats: list, others: list) -> Any:
        sources = {True: iter(floats), False: iter(others)}
        return jax.tree.unflatten(tree, [next(sources[float_]) for float_ in is_float])

    @jax.custom_vjp
    def attach(value: Array, floats: list, others: list) -> Array:
        return value

    def forward(value: Array, floats: list, others: list) -> tuple[Array, tuple]:
        return value, (value, floats, others)

    def backward(saved: tuple, g: Array) -> tuple:
        value, floats, others = saved
        *others_, backward_tol = others
        _, transposed = jax.vjp(lambda z, floats: f(join(floats, others_), z), value, floats)
        u = adjoint.solve(lambda u: transposed(u)[0], g, backward_tol)
        of_floats = jax.tree.map(_zero_if_not_finite, transposed(u)[1])
        return jnp.zeros_like(value), of_floats, None

    attach.defvjp(forward, backward)
    floats = [leaf for leaf, float_ in zip(leaves, is_float, strict=True) if float_]
    others = [leaf for leaf, float_ in zip(leaves, is_float, strict=True) if not float_]
    return attach(value, floats, [*others, jnp.asarray(tol, jnp.float32)])


def _solution(end: loop.Carry, value: Array, evaluations: Array,
              tokens: tuple[int, ...]) -> Solution:
    assert end.trace is not None
    spread = functools.partial(jnp.broadcast_to, shape=tokens)
    found = Solution(
        value=value, converged=spread(end.frozen), iterations=spread(end.iterations),
        residual=spread(end.best_residual), evaluations=evaluations,
        residual_trace=jnp.broadcast_to(end.trace, (len(end.trace), *tokens)),
        iterates=end.iterates)
    return Solution(*lax.stop_gradient(found))._replace(value=value)


@jax.custom_vjp
def _finite_gradient(tree: Any) -> Any:
    """The tree itself, whose gradient counts as 0 where it is not finite."""
    return tree


def _zero_if_not_finite(g: Array) -> Array:
    if g.dtype == jax.dtypes.float0:
        return g
    return jnp.where(jnp.isfinite(g), g, 0)


_finite_gradient.defvjp(lambda tree: (tree, None),
                        lambda _, g: (jax.tree.map(_zero_if_not_finite, g),))
