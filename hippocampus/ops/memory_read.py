"""Retrieval from the slots of a user's memory: K steps over the keys, then the values.

    xi^0 = q,   xi^j = (1 - alpha) xi^{j-1} + alpha sum_s p^j_s k_s,   j = 1..K
    r    = sum_s p^K_s v_s,                   p^j = softmax_s(beta k_s.xi^{j-1})

over the valid slots alone. Each step descends the energy of `hopfield`, because it moves over keys;
the values are read once, with the weights of the last step. A memory without a valid slot gives
exactly 0 and moves no query. All of it is float32, with products in full precision.

Source: Ramsauer et al. 2020 (arXiv:2008.02217), equations 2-3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

PRECISION = jax.lax.Precision.HIGHEST
"""Of products in a memory: a weight of 1 has to give the very value."""
_HIDDEN = -1e30
"""Score of a slot that is not valid: finite, so that a row without any gives no NaN."""


class Recalled(NamedTuple):
    """What a memory says to queries.

    Attributes:
      value_BTHd: r.
      weights_BTHS: p^K; all 0 where no slot is valid.
      states_KBTHd: xi^1 .. xi^K.
      energy_jBTH: of the query and after each step (j = 0..K); 0 where no slot is valid.
    """

    value_BTHd: Float32[Array, "B T H d"]
    weights_BTHS: Float32[Array, "B T H S"]
    states_KBTHd: Float32[Array, "K B T H d"]
    energy_jBTH: Float32[Array, "j B T H"]


def recall(
    query_BTHd: Float[Array, "B T H d"], keys_BSHd: Float[Array, "B S H d"],
    values_BSHd: Float[Array, "B S H d"], valid_BS: Bool[Array, "B S"],
    beta_H: Float[Array, " H"], *, steps: int, alpha: float = 1.0,
) -> Recalled:
    """Retrieves for every query of every user, each from the user's own slots.

    Args:
      query_BTHd: q.
      keys_BSHd, values_BSHd: the slots.
      valid_BS: which of them count.
      beta_H: inverse temperature per head, > 0.
      steps: K >= 1.
      alpha: step size, in (0, 1].
    """
    keys = jnp.asarray(keys_BSHd, jnp.float32)
    valid_B11S = valid_BS[:, None, None]
    squares_BSH = jnp.where(valid_BS[..., None], (keys * keys).sum(-1), 0.0)
    offset_BH = (jnp.log(jnp.maximum(valid_BS.sum(-1), 1))[:, None] / beta_H
                 + 0.5 * squares_BSH.max(1))

    def look(xi: Array) -> tuple[Array, Array]:
        scores = jnp.einsum("bthd,bshd->bths", xi * beta_H[:, None], keys, precision=PRECISION)
        scores = jnp.where(valid_B11S, scores, _HIDDEN)
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        energy = -log_sum / beta_H + 0.5 * (xi * xi).sum(-1) + offset_BH[:, None]
        weights = jnp.where(valid_B11S, jax.nn.softmax(scores, axis=-1), 0.0)
        return weights, jnp.where(valid_BS.any(-1)[:, None, None], energy, 0.0)

    xi = query_BTHd.astype(jnp.float32)
    states, energies = [], []
    for _ in range(steps):
        weights, energy = look(xi)
        new = jnp.einsum("bths,bshd->bthd", weights, keys, precision=PRECISION)
        xi = jnp.where(valid_BS.any(-1)[:, None, None, None], (1 - alpha) * xi + alpha * new, xi)
        states.append(xi)
        energies.append(energy)
    energies.append(look(xi)[1])
    value = jnp.einsum("bths,bshd->bthd", weights, values_BSHd.astype(jnp.float32),
                       precision=PRECISION)
    return Recalled(value, weights, jnp.stack(states), jnp.stack(energies))
