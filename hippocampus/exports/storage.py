"""How the numbers of a matrix lie in a file: float32, bfloat16, or int8 with a scale per channel.

    scale_c = max |W_c| / 127,   Q = round(W / scale),   W ≈ scale Q

with one scale for all the weights that one output channel is summed over, so that the largest of a
channel costs only its own channel precision. Matrices alone are stored so: vectors, norms, decays
and convolution taps are small and stay float32, and so does every parameter that is not listed in
`_SUMMED_AXIS`.

Source: symmetric per-channel weight quantisation, Krishnamoorthi 2018 (arXiv:1806.08342), 2.2-2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int8, Shaped

STORAGES = ("float32", "bfloat16", "int8")

_LARGEST = 127

# Last part of a parameter's name -> the axis that an output channel is summed over.
_SUMMED_AXIS = {
    "kernel": -2,              # (in, out) of Dense; (block, in, out) of the block-diagonal gates
    "head_down": -2,           # (D, E): hidden states times it
    "embedding": -1,           # (V, E): a row is what a token is read as, and, tied, its output
    "position_embedding": -1,  # (T, D)
    "head": -1,                # (V, E): a row is a token's output
    "slots": -1,               # (S, H, d): a pattern of a head, multiplied with the query
}


class TensorSpec(NamedTuple):
    """Type and shape of a tensor of a file; the type by numpy's name, such as "bfloat16"."""

    dtype: str
    shape: tuple[int, ...]


def summed_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """The axis whose weights share a scale; None for what is never quantised.

    Args:
      name: of the parameter, parts joined by dots.
      shape: its own.
    """
    return _SUMMED_AXIS.get(name.rpartition(".")[2]) if len(shape) > 1 else None


def stored_specs(shapes: Mapping[str, tuple[int, ...]], storage: str) -> dict[str, TensorSpec]:
    """The tensors that a file has for parameters of these names and shapes.

    Args:
      shapes: of the parameters by their names.
      storage: one of `STORAGES`.
    """
    specs = {}
    for name, shape in shapes.items():
        axis = summed_axis(name, shape)
        dtype = "float32" if axis is None else storage
        specs[name] = TensorSpec(dtype, shape)
        if dtype == "int8" and axis is not None:
            channels = list(shape)
            channels[axis] = 1
            specs[scale_name(name)] = TensorSpec("float32", tuple(channels))
    return specs


def encode(name: str, weight: Float32[np.ndarray, "*shape"],
           storage: str) -> dict[str, Shaped[np.ndarray, "*sizes"]]:
    """The tensors that stand for one parameter.

    Args:
      name: of the parameter.
      weight: finite numbers.
      storage: one of `STORAGES`.

    Returns:
      `{name: tensor}`, and `name.scale` for int8, which multiplies it by broadcasting.
    """
    axis = summed_axis(name, weight.shape)
    if axis is None or storage == "float32":
        # Of no dimensions it would come back with one.
        return {name: np.ascontiguousarray(weight).reshape(weight.shape)}
    if storage == "bfloat16":
        return {name: weight.astype(ml_dtypes.bfloat16)}
    quantized, scale = quantize(weight, axis)
    return {name: quantized, scale_name(name): scale}


def decode(name: str, spec: TensorSpec, read: Callable[[str], Shaped[np.ndarray, "*sizes"]],
           ) -> Float[np.ndarray, "*sizes"]:
    """One parameter as float32.

    Args:
      name: of the parameter.
      spec: of the tensor of that name.
      read: a tensor by its name.
    """
    if spec.dtype == "int8":
        return dequantize(read(name), read(scale_name(name)))
    return read(name).astype(np.float32, copy=False)


def quantize(weight: Float32[np.ndarray, "*shape"], axis: int,
             ) -> tuple[Int8[np.ndarray, "*shape"], Float32[np.ndarray, "*sizes"]]:
    """Symmetric int8 with one scale for all weights along an axis.

    Args:
      weight: finite numbers.
      axis: that is summed over.

    Returns:
      Q, and its scale, of length 1 along `axis`; |scale Q - weight| <= scale / 2.
    """
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (largest / np.float32(_LARGEST)).astype(np.float32)
    # A channel of zeros, or of numbers so small that their scale has no digits left.
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    quantized = np.rint(weight / scale)
    return np.clip(quantized, -_LARGEST, _LARGEST).astype(np.int8), scale


def dequantize(quantized: Int8[np.ndarray, "*shape"],
               scale: Float32[np.ndarray, "*sizes"]) -> Float32[np.ndarray, "*shape"]:
    """scale Q."""
    return quantized.astype(np.float32) * scale


def scale_name(name: str) -> str:
    """Of the scale of an int8 tensor."""
    return f"{name}.scale"
