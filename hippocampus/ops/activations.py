"""The non-linearities of the feed-forward part, with gradients that read their input once.

Differentiated by JAX, swiglu keeps several arrays of the hidden width and writes the gradients of
its two halves before it joins them. Here the input is all that is kept, and the joined gradient is
one expression of it. Computed in float32 inside, whatever the dtype.
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
    return (jnp.concatenate([d_gate.astype(h.dtype), d_value.astype(h.dtype)], axis=-1),)


def _halves(h: Array) -> tuple[Array, Array]:
    gate, value = jnp.split(h, 2, axis=-1)
    return gate.astype(jnp.float32), value.astype(jnp.float32)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def gelu(h: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """h Phi(h) with the usual tanh for Phi, element by element.

    Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2.
    """
    return jax.nn.gelu(h.astype(jnp.float32)).astype(h.dtype)


def _gelu_forward(h: Array) -> tuple[Array, Array]:
    return gelu(h), h


def _gelu_backward(h: Array, dy: Array) -> tuple[Array]:
    x = h.astype(jnp.float32)
    t = jnp.tanh(_ROOT * (x + _CUBE * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _ROOT * (1 + 3 * _CUBE * x * x)
    return ((dy.astype(jnp.float32) * slope).astype(h.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
