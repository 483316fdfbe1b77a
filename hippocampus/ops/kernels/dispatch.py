"""Which kernel runs, decided by the platform that a computation is lowered for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

Kernel = tuple[Callable[..., bool], Callable]
"""(supports(shape, dtype), function) of arrays of one device."""


def by_platform(arrays: tuple, like: Array, instead: Callable, *, cuda: Kernel,
                tpu: Kernel) -> Any:
    """Runs the platform's kernel, or XLA's form where it does not take such an array.

    Args:
      arrays: what a kernel is called with; all of one device.
      like: the array whose shape and dtype decide whether a kernel fits.
      instead: XLA's form, called with a backend of `linear_scan` and the arrays.
      cuda, tpu: the kernels.
    """
    def choose(kernel: Kernel, backend: str) -> Callable:
        supports, function = kernel
        if supports(like.shape, like.dtype):
            return function
        return functools.partial(instead, backend)

    return jax.lax.platform_dependent(
        *arrays, cuda=choose(cuda, "associative"), tpu=choose(tpu, "chunked"),
        rocm=functools.partial(instead, "associative"),
        default=functools.partial(instead, "chunked"))
