"""The normalised mix of a block's paths, y = sum_p g_p s_p rms(y_p), with a gradient of its own.

With n_p = rms(y_p) = r_p y_p and r_p = 1 / sqrt(mean(y_p^2) + eps), and dy the gradient of y,

    dg_p = sum_D dy s_p n_p,   ds_p = sum_BT g_p dy n_p,   dy_p = g_p r_p (s_p dy - n_p dg_p / D).

The sum that the gradient of a norm needs is dg_p, so one reduction per path serves both. Kept for
the backward pass are the paths as they came and r_p, nothing in float32 of the size of a path.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mix_normalized(
    gates_BTP: Float[Array, "B T P"], scales: Sequence[Float[Array, " D"]],
    paths: Sequence[Float[Array, "B T D"]], epsilon: float = 1e-6,
) -> Float[Array, "B T D"]:
    """The sum over the paths of gate * scale * rms(path).

    Args:
      gates_BTP: weight of each path, per token (float32).
      scales: per path, a scale per channel (float32).
      paths: outputs of the paths, all of one dtype.
      epsilon: added to the mean square.

    Returns:
      y_BTD in the dtype of the paths; statistics and the sum are float32.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4, for the norm.
    """
    return _mix(epsilon, gates_BTP, tuple(scales), tuple(paths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(epsilon: float, gates: Array, scales: tuple[Array, ...],
         paths: tuple[Array, ...]) -> Array:
    return _mix_forward(epsilon, gates, scales, paths)[0]


def _mix_forward(epsilon: float, gates: Array, scales: tuple[Array, ...],
                 paths: tuple[Array, ...]) -> tuple[Array, tuple]:
    inverse = tuple(_inverse_rms(y, epsilon) for y in paths)
    terms = [(gates[..., p] * r)[..., None] * s * y.astype(jnp.float32)
             for p, (s, y, r) in enumerate(zip(scales, paths, inverse, strict=True))]
    return sum(terms[1:], terms[0]).astype(paths[0].dtype), (gates, scales, paths, inverse)


def _mix_backward(epsilon: float, saved: tuple, dy: Array) -> tuple[Array, tuple, tuple]:
    gates, scales, paths, inverse = saved
    dy = dy.astype(jnp.float32)
    d_gates, d_scales, d_paths = [], [], []
    for p, (s, y, r) in enumerate(zip(scales, paths, inverse, strict=True)):
        y32 = y.astype(jnp.float32)
        d_gate = r * (dy * y32 * s).sum(-1)
        weight = gates[..., p] * r
        # n_p dg_p / D = y_p (r_p dg_p / D): the two factors per token are formed first.
        pull = (weight * r * d_gate / y.shape[-1])[..., None]
        d_paths.append((weight[..., None] * s * dy - pull * y32).astype(y.dtype))
        d_scales.append((weight[..., None] * dy * y32).sum((0, 1)).astype(s.dtype))
        d_gates.append(d_gate)
    return jnp.stack(d_gates, -1).astype(gates.dtype), tuple(d_scales), tuple(d_paths)


def _inverse_rms(y: Array, epsilon: float) -> Array:
    y = y.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(y * y, axis=-1) + epsilon)


_mix.defvjp(_mix_forward, _mix_backward)
