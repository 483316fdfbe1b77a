"""What a persistent memory holds, as arrays that go into every call and come out of it.

The first axis of every array is the user's row B. Nothing here, and no rule of `memory_write`,
lets one row see another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int32

NO_SOURCE = -1
"""In place of a token id or a position where there is none."""


class MemoryState(struct.PyTreeNode):
    """S slots of each of B users, in H heads of width d.

    Attributes:
      keys_BSHd: what a slot is found by; of at most unit length per head.
      values_BSHd: what a slot gives.
      age_BS: writes of this user since the slot was last written.
      usage_BS: weight that reads have put on the slot since it was last replaced.
      strength_BS: weight that writes have put on it since then, less what decayed.
      valid_BS: whether there is anything in it; other slots are never read.
      position_BS: place of its last source in the user's stream of tokens; -1 = none.
      source_BSn: the last n token ids up to there, -1 in front where there are fewer.
      writes_B: writes so far.
      tokens_B: tokens so far, padding apart, in the chunks that were written from.
    """

    keys_BSHd: Float32[Array, "B S H d"]
    values_BSHd: Float32[Array, "B S H d"]
    age_BS: Int32[Array, "B S"]
    usage_BS: Float32[Array, "B S"]
    strength_BS: Float32[Array, "B S"]
    valid_BS: Bool[Array, "B S"]
    position_BS: Int32[Array, "B S"]
    source_BSn: Int32[Array, "B S n"]
    writes_B: Int32[Array, " B"]
    tokens_B: Int32[Array, " B"]

    def arrays(self) -> dict[str, Any]:
        """The arrays by their names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def empty_state(users: int, slots: int, heads: int, head_width: int,
                source_tokens: int) -> MemoryState:
    """A memory in which nothing is.

    Args:
      users: B.
      slots: S.
      heads: H.
      head_width: d.
      source_tokens: n.
    """
    def full(value: int, *sizes: int) -> Array:
        return jnp.full((users, *sizes), value, jnp.int32)

    patterns, number = (users, slots, heads, head_width), jnp.zeros((users, slots), jnp.float32)
    return MemoryState(
        keys_BSHd=jnp.zeros(patterns, jnp.float32), values_BSHd=jnp.zeros(patterns, jnp.float32),
        age_BS=full(0, slots), usage_BS=number, strength_BS=number,
        valid_BS=jnp.zeros((users, slots), bool), position_BS=full(NO_SOURCE, slots),
        source_BSn=full(NO_SOURCE, slots, source_tokens), writes_B=full(0), tokens_B=full(0))


def choose_users(rows_B: Bool[Array, " B"], new: MemoryState, old: MemoryState) -> MemoryState:
    """The new memory of the users that are marked, and of the others the old one, bit for bit."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def take_users(state: MemoryState, users: Sequence[int] | Int[Array, " b"]) -> MemoryState:
    """The memories of some users, in the order that is asked for."""
    index = users if isinstance(users, jax.Array) else np.asarray(users)
    return jax.tree.map(lambda a: a[index], state)


def join_users(states: Sequence[MemoryState]) -> MemoryState:
    """The users of several memories behind each other, such as those of one file each."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)
