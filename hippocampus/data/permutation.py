"""A shuffled order that is computed, not kept: `permute` says where one index goes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, Integer, UInt64

FEISTEL_ROUNDS = 6
MIN_HALF_BITS = 2  # a network on fewer than 16 points reaches few of their permutations


def permute(
    index: Integer[np.ndarray, "*shape"], size: int, key: UInt64[np.ndarray, "*shape"] | int
) -> Int64[np.ndarray, "*shape"]:
    """Send indices through a keyed pseudo-random permutation of 0 .. size-1, in O(1) memory.

    A Feistel network permutes the smallest square power-of-two domain that holds `size`; an
    output beyond `size` goes through again until it falls inside ("cycle walking"), which
    restricts the permutation to the first `size` points. From 5 points on that takes fewer than
    four passes on average.

    Args:
        index: integers in [0, size), of any shape.
        size: how many points are permuted, at most 2**62.
        key: which permutation, in [0, 2**64): one for all indices or one for each.

    Returns:
        The image of each index, in the broadcast shape of `index` and `key`.

    Raises:
        ValueError: an index is outside [0, size).

    Source:
        Black & Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002): the cycle-walking
        cipher over a Feistel network.
    """
    index = np.asarray(index)
    if ((index < 0) | (index >= size)).any():  # such a walk might never come back inside
        raise ValueError(f"indices must be at least 0 and below {size}")
    half = np.uint64(max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2))
    index, key = np.broadcast_arrays(index.astype(np.uint64), np.asarray(key, np.uint64))
    image, keys = _feistel(index.ravel(), key.ravel(), half), key.ravel()
    while (outside := np.flatnonzero(image >= size)).size:
        image[outside] = _feistel(image[outside], keys[outside], half)
    return image.astype(np.int64).reshape(index.shape)


def _feistel(x: np.ndarray, key: np.ndarray, half: np.uint64) -> np.ndarray:
    """Permute the 2**(2 * half) integers; invertible because each round only adds to one half."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for _ in range(FEISTEL_ROUNDS):
        key = mix(key)
        left, right = right, left ^ (mix(key ^ right) & mask)
    return (left << half) | right


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """Scramble 64 bits, one to one (the splitmix64 generator; Steele, Lea & Flood, 2014)."""
    with np.errstate(over="ignore"):  # numpy warns of the wanted wrap-around for scalars only
        z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
