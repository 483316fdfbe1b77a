"""The rules of writing into a memory, one entry (k, v) after the other.

    ring         the slot written longest ago becomes (k, v)
    gated        v_i <- (1 - w_i e) v_i + w_i a,   w = g softmax(beta k_i.k)
    delta        v_i <- v_i + eta w_i (v - v^),    w = softmax(beta k_i.k),  v^ = sum_i w_i v_i
    consolidate  where rho < max cos(k_i, k), that slot:
                     (k_i, v_i) <- (c_i (k_i, v_i) + (k, v)) / (c_i + 1),   c_i <- c_i + 1
                 else the slot of the least c_i / (1 + age_i) becomes (k, v), with c_i = 1

Slots that are not valid go first wherever a rule replaces one. `gated` and `delta` work on the
slots that are there: while one is free, a key that is like none (max cos <= rho) opens it, which
is the same rule with all weight on a slot of value 0. c is `strength`; `decay` takes its share of
strength, and of the values of `gated` and `delta`, before each write. What is added to a slot again
and again could grow without end, so these two keep a value within `LARGEST_VALUE` of a head.

Source: ring, Wu et al. 2022 (arXiv:2203.08913); gated, Graves et al. 2014 (arXiv:1410.5401),
equations 3-4; delta, Schlag et al. 2021 (arXiv:2102.11174), and with decay Yang et al. 2024
(arXiv:2412.06464); consolidate, after He et al. 2024 (arXiv:2402.13449).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops.memory_read import PRECISION
from hippocampus.ops.memory_state import MemoryState, choose_users

LARGEST_VALUE = 4.0
"""Longest value of a head under `gated` and `delta`, in roots of its width: an entry has 1."""
_OLDEST = 2**30
"""Where ages stop."""


class Entries(NamedTuple):
    """What a chunk writes: m entries a row, those that count first.

    Attributes:
      key_BmHd: of unit length per head.
      value_BmHd: v, or a.
      active_Bm: entries that are written; the others change nothing.
      position_Bm, source_Bmn: where they come from, see `MemoryState`.
      erase_BmHd: e in (0, 1), for `gated`.
      gate_Bm: g in (0, 1), for `gated`.

    A single rule gets one entry a row: the same arrays without the axis m.
    """

    key_BmHd: Float[Array, "B m H d"]
    value_BmHd: Float[Array, "B m H d"]
    active_Bm: Bool[Array, "B m"]
    position_Bm: Int[Array, "B m"]
    source_Bmn: Int[Array, "B m n"]
    erase_BmHd: Float[Array, "B m H d"] | None = None
    gate_Bm: Float[Array, "B m"] | None = None


def write(
    state: MemoryState, entries: Entries, strategy: str, *, beta_H: Float[Array, " H"],
    similarity: float = 0.9, eta: float = 1.0, decay: float = 0.0,
) -> MemoryState:
    """The memory after the entries of a chunk.

    Args:
      state: the memory of B users.
      entries: m <= S of each; rows are written independently.
      strategy: "ring" or "standard", "gated", "delta", "consolidate".
      beta_H: inverse temperature per head (gated, delta).
      similarity: rho.
      eta: rate of `delta`, in (0, 1].
      decay: share that a write takes of what was before, in [0, 1).

    Raises:
      ValueError: an unknown strategy, or more entries than slots.
    """
    if entries.active_Bm.shape[1] > state.age_BS.shape[1]:
        raise ValueError(f"{entries.active_Bm.shape[1]} entries for {state.age_BS.shape[1]} slots")
    if strategy in ("ring", "standard"):
        return _ring(state, entries, decay)
    rules: dict[str, Callable[[MemoryState, Entries], MemoryState]] = {
        "gated": lambda s, e: _gated(s, e, beta_H, similarity, decay),
        "delta": lambda s, e: _delta(s, e, beta_H, similarity, eta, decay),
        "consolidate": lambda s, e: _consolidate(s, e, similarity, decay)}
    if strategy not in rules:
        raise ValueError(f"no strategy {strategy!r}")
    rule = rules[strategy]

    def step(state: MemoryState, entry: Entries) -> tuple[MemoryState, None]:
        return choose_users(entry.active_Bm, rule(state, entry), state), None

    # One entry at a time leaves m memories for the gradient; computing a step again leaves no more.
    in_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), entries)
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state, in_time)[0]


def _ring(state: MemoryState, entries: Entries, decay: float) -> MemoryState:
    """All entries at once: the i-th takes the i-th oldest slot."""
    m = entries.active_Bm.shape[1]
    n_B1 = entries.active_Bm.sum(-1, keepdims=True)
    waiting_BS = jnp.where(state.valid_BS, state.age_BS, _OLDEST + 1)
    turn_BS = jnp.argsort(jnp.argsort(-waiting_BS, axis=1, stable=True), axis=1)
    written_BS = turn_BS < n_B1
    entry_BS = jnp.minimum(turn_BS, m - 1)

    def put(new: Array, old: Array) -> Array:
        shape = (*entry_BS.shape, *[1] * (old.ndim - 2))
        taken = jnp.take_along_axis(new, entry_BS.reshape(shape), axis=1).astype(old.dtype)
        return jnp.where(written_BS.reshape(shape), taken, old)

    age_BS = jnp.where(written_BS, n_B1 - 1 - turn_BS, _older(state.age_BS, n_B1))
    strength = jnp.where(written_BS, (1 - decay) ** age_BS, state.strength_BS * (1 - decay) ** n_B1)
    return state.replace(
        keys_BSHd=put(entries.key_BmHd, state.keys_BSHd),
        values_BSHd=put(entries.value_BmHd, state.values_BSHd), age_BS=age_BS,
        usage_BS=jnp.where(written_BS, 0.0, state.usage_BS), strength_BS=strength,
        valid_BS=state.valid_BS | written_BS,
        position_BS=put(entries.position_Bm, state.position_BS),
        source_BSn=put(entries.source_Bmn, state.source_BSn),
        writes_B=state.writes_B + n_B1[:, 0])


def _consolidate(state: MemoryState, entry: Entries, similarity: float,
                 decay: float) -> MemoryState:
    cosine_BS = _cosines(state, entry.key_BmHd)
    near_B = cosine_BS.max(-1) > similarity
    count_BS = state.strength_BS * (1 - decay)
    worth_BS = jnp.where(state.valid_BS, count_BS / (1 + state.age_BS), -1.0)
    slot_B = jnp.where(near_B, cosine_BS.argmax(-1), worth_BS.argmin(-1))
    here_BS = _one_hot(slot_B, state)
    count_B = jnp.where(near_B, (here_BS * count_BS).sum(-1), 0.0)

    def join(old: Array, new_BHd: Array) -> Array:
        c = count_B[:, None, None, None]
        kept = jnp.where(near_B[:, None, None, None], c * old, 0.0)
        return jnp.where(here_BS[..., None, None], (kept + new_BHd[:, None]) / (c + 1), old)

    replaced_BS = here_BS & ~near_B[:, None]
    return _mark(state, entry, here_BS).replace(
        keys_BSHd=join(state.keys_BSHd, entry.key_BmHd),
        values_BSHd=join(state.values_BSHd, entry.value_BmHd),
        usage_BS=jnp.where(replaced_BS, 0.0, state.usage_BS),
        strength_BS=jnp.where(here_BS, count_B[:, None] + 1, count_BS))


def _delta(state: MemoryState, entry: Entries, beta_H: Array, similarity: float, eta: float,
           decay: float) -> MemoryState:
    state, w_BSH = _address(state, entry.key_BmHd, beta_H, similarity, decay)
    values = state.values_BSHd
    found_BHd = jnp.einsum("bsh,bshd->bhd", w_BSH, values, precision=PRECISION)
    values = values + eta * w_BSH[..., None] * (entry.value_BmHd - found_BHd)[:, None]
    return _written(state, entry, values, eta * w_BSH)


def _gated(state: MemoryState, entry: Entries, beta_H: Array, similarity: float,
           decay: float) -> MemoryState:
    assert entry.gate_Bm is not None and entry.erase_BmHd is not None
    state, w_BSH = _address(state, entry.key_BmHd, beta_H, similarity, decay)
    w_BSH = w_BSH * entry.gate_Bm[:, None, None]
    w = w_BSH[..., None]
    values = (1 - w * entry.erase_BmHd[:, None]) * state.values_BSHd + w * entry.value_BmHd[:, None]
    return _written(state, entry, values, w_BSH)


def _address(state: MemoryState, key_BHd: Array, beta_H: Array, similarity: float,
             decay: float) -> tuple[MemoryState, Array]:
    """The memory, decayed and with a slot opened where there is need, and the weights on it."""
    free_BS = ~state.valid_BS
    opens_B = free_BS.any(-1) & (_cosines(state, key_BHd).max(-1) <= similarity)
    new_BS = _one_hot(free_BS.argmax(-1), state) & opens_B[:, None]
    scores = jnp.einsum("bshd,bhd->bsh", state.keys_BSHd, key_BHd * beta_H[:, None],
                        precision=PRECISION)
    soft = jax.nn.softmax(jnp.where(state.valid_BS[..., None], scores, -1e30), axis=1)
    w_BSH = jnp.where(opens_B[:, None, None], new_BS[..., None].astype(jnp.float32), soft)
    new = new_BS[..., None, None]
    return state.replace(
        keys_BSHd=jnp.where(new, key_BHd[:, None], state.keys_BSHd),
        values_BSHd=jnp.where(new, 0.0, (1 - decay) * state.values_BSHd),
        strength_BS=jnp.where(new_BS, 0.0, (1 - decay) * state.strength_BS),
        usage_BS=jnp.where(new_BS, 0.0, state.usage_BS), valid_BS=state.valid_BS | new_BS), w_BSH


def _written(state: MemoryState, entry: Entries, values_BSHd: Array, w_BSH: Array) -> MemoryState:
    """The new values, shortened where need be, and what else a slot knows of a write."""
    square = (values_BSHd * values_BSHd).sum(-1, keepdims=True)
    limit = LARGEST_VALUE**2 * values_BSHd.shape[-1]
    shorter = jnp.where(square > limit, jax.lax.rsqrt(jnp.maximum(square, limit) / limit), 1.0)
    weight_BS = jax.lax.stop_gradient(w_BSH.mean(-1))
    return _mark(state, entry, _one_hot(weight_BS.argmax(-1), state)).replace(
        values_BSHd=values_BSHd * shorter, strength_BS=state.strength_BS + weight_BS)


def _mark(state: MemoryState, entry: Entries, here_BS: Array) -> MemoryState:
    return state.replace(
        age_BS=jnp.where(here_BS, 0, _older(state.age_BS, 1)), valid_BS=state.valid_BS | here_BS,
        position_BS=jnp.where(here_BS, entry.position_Bm[:, None], state.position_BS),
        source_BSn=jnp.where(here_BS[..., None], entry.source_Bmn[:, None], state.source_BSn),
        writes_B=state.writes_B + 1)


def _cosines(state: MemoryState, key_BHd: Array) -> Array:
    """Of a key with those of the slots, over all heads; -2 where a slot is not valid."""
    keys, key = jax.lax.stop_gradient((state.keys_BSHd, key_BHd))
    product = jnp.einsum("bshd,bhd->bs", keys, key, precision=PRECISION)
    squares = (keys * keys).sum((-1, -2)) * (key * key).sum((-1, -2))[:, None]
    return jnp.where(state.valid_BS, product * jax.lax.rsqrt(squares + 1e-12), -2.0)


def _one_hot(slot_B: Array, state: MemoryState) -> Array:
    return jnp.arange(state.age_BS.shape[1]) == slot_B[:, None]


def _older(age_BS: Array, writes: int | Array) -> Array:
    return jnp.minimum(age_BS + writes, _OLDEST)
