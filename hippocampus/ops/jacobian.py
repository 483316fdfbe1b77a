"""How strongly a map of states answers to its states: contraction and size of J = df/dz.

Both are made of products J^T v alone, because functions with a backward pass of their own (scans,
attention kernels) have no forward-mode derivative. J and J^T have the same eigenvalues and norms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hippocampus.errors import ConfigError


def contraction(
    f: Callable[[Array, Any], Array], z: Float[Array, "*rows T D"], args: Any, key: Array, *,
    iterations: int = 3,
) -> Float[Array, "*rows"]:
    """How much J^T stretches a vector that power iterations have turned to where it stretches most.

    Below 1 repeated application of f converges near z; it tends to the largest |eigenvalue| as
    `iterations` grow. If J is far from normal, as it is where tokens depend on many earlier ones,
    a few iterations find more than that.

    Args:
      f: (z, args) -> new z.
      z: states; rows do not depend on each other.
      args: what f reads.
      key: of the first vector, which is normal noise.
      iterations: products with J^T, >= 1.

    Returns:
      |J^T v| / |v| of the last product, in float32. Gradients go through the last product only;
      v is a constant.

    Raises:
      ConfigError: no iterations.
    """
    if iterations < 1:
        raise ConfigError(f"contraction after {iterations} iterations", "at least 1")
    v = _unit(jax.random.normal(key, z.shape, jnp.float32))
    if iterations > 1:
        at, held = lax.stop_gradient((z, args))
        product = _transposed(f, at, held)
        v = lax.fori_loop(0, iterations - 1, lambda _, v: _unit(product(v)), v)
    return _norm(_transposed(f, z, args)(lax.stop_gradient(v)))[..., 0, 0]


def jacobian_norm(
    f: Callable[[Array, Any], Array], z: Float[Array, "*tokens D"], args: Any, key: Array,
) -> Float[Array, "*tokens"]:
    """An estimate, with one random vector, of the squared Frobenius norm of J, divided by D.

    Args:
      f: (z, args) -> new z.
      z: states.
      args: what f reads.
      key: of the normal noise v.

    Returns:
      |J^T v|^2 / D of every token, in float32: on average the squares of all derivatives with
      respect to that token's state. Gradients go through to `z` and `args`.

    Source: Bai et al. 2021 (arXiv:2106.14342), equation 5; Hutchinson 1989.
    """
    product = _transposed(f, z, args)(jax.random.normal(key, z.shape, jnp.float32))
    return (product * product).mean(-1)


def _transposed(f: Callable[[Array, Any], Array], z: Array, args: Any) -> Callable[[Array], Array]:
    _, pullback = jax.vjp(lambda z: f(z, args), z)
    return lambda v: pullback(v.astype(z.dtype))[0].astype(jnp.float32)


def _norm(v: Array) -> Array:
    """The length of every row; its gradient at 0 is 0."""
    square = (v * v).sum((-2, -1), keepdims=True)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _unit(v: Array) -> Array:
    length = _norm(v)
    return jnp.where(length > 0, v / jnp.where(length > 0, length, 1), 0)
