"""The diagonal linear recurrence h_t = a_t h_{t-1} + x_t, by several algorithms with one gradient.

"pallas" stands for the kernels of the platform that a computation is lowered for. A kernel module
has three functions of whole local arrays: `supports(shape, dtype)`, `scan(a, x)` from a state of
zero, and `scan_backward(a, h, g)`, which gives (da, dx). Where a kernel does not fit, XLA's forms
take over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hippocampus.errors import ConfigError
from hippocampus.ops import placement
from hippocampus.ops.kernels import scan_hopper, scan_tpu
from hippocampus.ops.kernels.dispatch import by_platform
from hippocampus.ops.placement import SEQUENCE


def linear_scan(
    a_BTE: Float[Array, "B T E"], x_BTE: Float[Array, "B T E"],
    h0_BE: Float[Array, "B E"] | None = None, reset_BT: Bool[Array, "B T"] | None = None,
    *, backend: str = "associative",
) -> Float[Array, "B T E"]:
    """Every state of h_t = a_t h_{t-1} + x_t; the last one is the state to carry on with.

    Args:
      a_BTE: decays, in float32 (a decay of 0.999 is 1.0 in bfloat16).
      x_BTE: inputs, in float32.
      h0_BE: state before the first token; None = zeros.
      reset_BT: True where a document begins: the state before that token does not count.
      backend: "sequential" (one step after the other), "associative" (log-depth,
        `jax.lax.associative_scan`), "chunked" (chunks side by side, then a carry over them;
        the fastest on CPUs) or "pallas" (a kernel where there is one for the device and the shape,
        else "associative" on a GPU and "chunked" elsewhere).

    Returns:
      h_BTE in the dtype of `x_BTE`. The gradient is the same recurrence run backwards, with the
      same backend, so memory does not grow with the depth of the algorithm. Under a mesh that cuts
      the time axis every device scans its own tokens, from a state that it works out from the
      last states and decay products of the devices before it.

    Raises:
      ConfigError: an unknown backend.

    Source: Martin & Cundy 2018 (arXiv:1709.04057), section 2; Blelloch 1990 for the scan.
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"linear_scan backend is {backend!r}", f"known: {', '.join(_BACKENDS)}")
    a_BTE, x_BTE = jnp.asarray(a_BTE), jnp.asarray(x_BTE)
    if reset_BT is not None:
        a_BTE = jnp.where(reset_BT[..., None], 0.0, a_BTE)
    if placement.shards(SEQUENCE, x_BTE.shape[1]) > 1:
        if h0_BE is not None:
            x_BTE = _add_first(x_BTE, a_BTE[:, 0] * h0_BE)
        return placement.map_shards(functools.partial(_scan_of_shards, backend),
                                    (a_BTE, x_BTE), (_LIES, _LIES), _LIES)
    if x_BTE.shape[1] == 1:
        return x_BTE if h0_BE is None else a_BTE * h0_BE[:, None] + x_BTE
    return _scan(backend, a_BTE, x_BTE, h0_BE)


def scan_gradients(
    a_BTE: Float[Array, "B T E"], h_BTE: Float[Array, "B T E"], g_BTE: Float[Array, "B T E"],
    *, backend: str = "associative",
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """The gradient of `linear_scan` from a state of zero, for a caller that has its states.

    Args:
      a_BTE: decays, 0 where a document begins.
      h_BTE: what `linear_scan` found.
      g_BTE: gradient of every state.
      backend: as for `linear_scan`.

    Returns:
      da_BTE and dx_BTE. The gradient of a decay that a reset put to 0 does not count.

    Raises:
      ConfigError: an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"linear_scan backend is {backend!r}", f"known: {', '.join(_BACKENDS)}")
    if placement.shards(SEQUENCE, h_BTE.shape[1]) > 1:
        return placement.map_shards(functools.partial(_gradients_of_shards, backend),
                                    (a_BTE, h_BTE, g_BTE), (_LIES,) * 3, _LIES)
    return _gradients(backend, a_BTE, h_BTE, g_BTE)


def _add_first(x: Array, first: Array) -> Array:
    """Adds to x[:, 0]; `at[].add` would be a scatter."""
    return jax.lax.dynamic_update_slice_in_dim(x, (x[:, 0] + first)[:, None], 0, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(backend: str, a: Array, x: Array, h0: Array | None) -> Array:
    # The first input absorbs the initial state; every algorithm then starts from zero.
    if h0 is not None:
        x = _add_first(x, a[:, 0] * h0)
    return _BACKENDS[backend](a, x)


def _scan_forward(backend: str, a: Array, x: Array, h0: Array | None) -> tuple[Array, tuple]:
    h = _scan(backend, a, x, h0)
    return h, (a, h, h0)


def _scan_backward(backend: str, saved: tuple, g: Array) -> tuple[Array, Array, Array | None]:
    """With l_t = g_t + a_{t+1} l_{t+1}: dx_t = l_t, da_t = l_t h_{t-1}, dh_0 = a_1 l_1."""
    a, h, h0 = saved
    da, dx = _gradients(backend, a, h, g)
    if h0 is None:
        return da, dx, None
    return _add_first(da, dx[:, 0] * h0), dx, a[:, 0] * dx[:, 0]


_scan.defvjp(_scan_forward, _scan_backward)


def _gradients(backend: str, a: Array, h: Array, g: Array) -> tuple[Array, Array]:
    """(da, dx) of a scan from zero."""
    if backend == "pallas":
        return placement.map_local(_kernel_gradients, (a, h, g), (_LIES,) * 3, _LIES)
    return _open_gradients(backend, a, h, g)


def _open_gradients(backend: str, a: Array, h: Array, g: Array) -> tuple[Array, Array]:
    next_a = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
    adjoint = jnp.flip(_scan(backend, jnp.flip(next_a, 1), jnp.flip(g, 1), None), 1)
    previous_h = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    return adjoint * previous_h, adjoint


@jax.custom_vjp
def _kernel_gradients(a: Array, h: Array, g: Array) -> tuple[Array, Array]:
    return _by_platform("scan_backward", _open_gradients, a, h, g)


# A gradient of the gradient is rare, and no kernel is written for it.
_kernel_gradients.defvjp(
    lambda a, h, g: (_kernel_gradients(a, h, g), (a, h, g)),
    lambda saved, g: jax.vjp(functools.partial(_open_gradients, "pallas"), *saved)[1](g))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_of_shards(backend: str, a: Array, x: Array) -> Array:
    return _scan_of_shards_forward(backend, a, x)[0]


def _scan_of_shards_forward(backend: str, a: Array, x: Array) -> tuple[Array, tuple]:
    h0 = _state_before(backend, a, x)
    h = _scan(backend, a, x, h0)
    return h, (a, h, h0)


def _scan_of_shards_backward(backend: str, saved: tuple, g: Array) -> tuple[Array, Array]:
    """As `_scan_backward`, with time and the order of the devices reversed."""
    a, h, h0 = saved
    n = jax.lax.axis_size(SEQUENCE)
    # The decay behind this shard's last token is the next one's first; the last device gets 0.
    behind = jax.lax.ppermute(a[:, :1], SEQUENCE, [(i + 1, i) for i in range(n - 1)])
    next_a = jnp.flip(jnp.concatenate([a[:, 1:], behind], axis=1), 1)
    g = jnp.flip(g, 1)
    adjoint = jnp.flip(_scan(backend, next_a, g, _state_before(
        backend, next_a, g, reverse=True)), 1)
    previous_h = jnp.concatenate([h0[:, None], h[:, :-1]], axis=1)
    return adjoint * previous_h, adjoint


_scan_of_shards.defvjp(_scan_of_shards_forward, _scan_of_shards_backward)


def _gradients_of_shards(backend: str, a: Array, h: Array, g: Array) -> tuple[Array, Array]:
    n = jax.lax.axis_size(SEQUENCE)
    h0 = jax.lax.ppermute(h[:, -1], SEQUENCE, [(i, i + 1) for i in range(n - 1)])
    return _scan_of_shards_backward(backend, (a, h, h0), g)


def _state_before(backend: str, a: Array, x: Array, *, reverse: bool = False) -> Array:
    """The state that this device's first token finds, from all devices before it (B,E)."""
    last = _BACKENDS[backend](a, x)[:, -1]
    shards = jax.lax.all_gather((jnp.prod(a, axis=1), last), SEQUENCE)

    def across(h0: Array, shard: tuple[Array, Array]) -> tuple[Array, Array]:
        return shard[0] * h0 + shard[1], h0

    _, h0 = jax.lax.scan(across, jnp.zeros_like(last), shards, reverse=reverse)
    return h0[jax.lax.axis_index(SEQUENCE)]


def _sequential(a: Array, x: Array) -> Array:
    def step(h: Array, ax: tuple[Array, Array]) -> tuple[Array, Array]:
        h = ax[0] * h + ax[1]
        return h, h

    time_major = (jnp.swapaxes(a, 0, 1), jnp.swapaxes(x, 0, 1))
    _, h = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), time_major)
    return jnp.swapaxes(h, 0, 1)


def _associative(a: Array, x: Array) -> Array:
    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, x), axis=1)[1]


def _chunked(a: Array, x: Array) -> Array:
    """About sqrt(T) steps over all chunks at once, then one carry per chunk."""
    B, T, E = x.shape
    size = max(1, round(T**0.5))
    n = -(-T // size)
    pad = ((0, 0), (0, n * size - T), (0, 0))

    def steps_first(array: Array) -> Array:  # B,(n size),E -> size,B,n,E
        return jnp.moveaxis(jnp.pad(array, pad).reshape(B, n, size, E), 2, 0)

    def within(carry: tuple[Array, Array], ax: tuple[Array, Array]) -> tuple[tuple, tuple]:
        product, h = carry
        carry = (ax[0] * product, ax[0] * h + ax[1])
        return carry, carry

    zeros = jnp.zeros((B, n, E), x.dtype)
    (last_product, last_h), (product, h) = jax.lax.scan(
        within, (zeros + 1, zeros), (steps_first(a), steps_first(x)))

    def across(h0: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        return chunk[0] * h0 + chunk[1], h0

    chunks = (jnp.swapaxes(last_product, 0, 1), jnp.swapaxes(last_h, 0, 1))
    _, h0 = jax.lax.scan(across, zeros[:, 0], chunks)  # n,B,E: the state each chunk starts from
    h = h + product * jnp.swapaxes(h0, 0, 1)
    return jnp.moveaxis(h, 0, 2).reshape(B, n * size, E)[:, :T]


def _pallas(a: Array, x: Array) -> Array:
    def local(a: Array, x: Array) -> Array:
        return _by_platform("scan", lambda backend, a, x: _BACKENDS[backend](a, x), a, x)

    return placement.map_local(local, (a, x), (_LIES, _LIES), _LIES)


def _by_platform(name: str, instead: Callable, *arrays: Array) -> Any:
    return by_platform(
        arrays, arrays[-1], instead,
        cuda=(scan_hopper.supports, getattr(scan_hopper, name)),
        tpu=(scan_tpu.supports, getattr(scan_tpu, name)))


_LIES = ("batch", SEQUENCE, "tensor")
_BACKENDS: dict[str, Callable[[Array, Array], Array]] = {
    "sequential": _sequential, "associative": _associative, "chunked": _chunked,
    "pallas": _pallas}
