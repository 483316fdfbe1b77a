"""Non-linearities and splits whose gradients are one pass over what they read.

Differentiated by JAX, swiglu keeps several arrays of the hidden width, and the gradients of two
halves are written before they are joined: XLA makes a copy of its own of a concatenation for each
of the two products that read it. Here the input is all that is kept, and a joined gradient is one
element-wise expression. Computed in float32 inside, whatever the dtype.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ROOT = (2 / math.pi) ** 0.5
_CUBE = 0.044715


@jax.custom_vjp
def swiglu(h: Float[Array, "... 2F"]) -> Float[Array, "... F"]:
    """silu(gate) * value, of an array that holds gate and value side by side.

    Source: Shazeer 2020 (arXiv:2002.05202), equation 5.
    """
    gate, value = _halves(h)
    return (jax.nn.silu(gate) * value).astype(h.dtype)


def _swiglu_forward(h: Array) -> tuple[Array, Array]:
    return swiglu(h), h


def _swiglu_backward(h: Array, dy: Array) -> tuple[Array]:
    gate, value = _halves(h)
    dy, sigmoid = dy.astype(jnp.float32), jax.nn.sigmoid(gate)
    d_gate = dy * value * sigmoid * (1 + gate * (1 - sigmoid))
    d_value = dy * gate * sigmoid
    return (_joined(d_gate, d_value, h.dtype),)


def _halves(h: Array) -> tuple[Array, Array]:
    gate, value = jnp.split(h, 2, axis=-1)
    return gate.astype(jnp.float32), value.astype(jnp.float32)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def halves(h: Float[Array, "... 2F"]) -> tuple[Float[Array, "... F"], Float[Array, "... F"]]:
    """The first and the second half of the last axis."""
    first, second = jnp.split(h, 2, axis=-1)
    return first, second


def _halves_forward(h: Array) -> tuple[tuple[Array, Array], None]:
    return halves(h), None


def _halves_backward(_: None, g: tuple[Array, Array]) -> tuple[Array]:
    return (_joined(*g, g[0].dtype),)


halves.defvjp(_halves_forward, _halves_backward)


def _joined(first: Array, second: Array, dtype: jnp.dtype) -> Array:
    """Side by side, as a choice between the two for every element."""
    is_first = jnp.arange(2)[:, None] == 0
    both = jnp.where(is_first, first[..., None, :], second[..., None, :])
    return both.astype(dtype).reshape(*first.shape[:-1], -1)


@jax.custom_vjp
def gelu(h: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """h Phi(h) with the usual tanh for Phi, element by element.

    Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2.
    """
    return jax.nn.gelu(h.astype(jnp.float32)).astype(h.dtype)


def _gelu_forward(h: Array) -> tuple[Array, Array]:
    return gelu(h), h


def _gelu_backward(h: Array, dy: Array) -> tuple[Array]:
    # Else XLA keeps the forward pass's tanh, in float32, instead of computing it again.
    x = jax.lax.optimization_barrier(h).astype(jnp.float32)
    t = jnp.tanh(_ROOT * (x + _CUBE * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _ROOT * (1 + 3 * _CUBE * x * x)
    return ((dy.astype(jnp.float32) * slope).astype(h.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
