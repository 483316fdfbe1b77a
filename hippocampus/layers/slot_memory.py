"""SlotMemory: learned slots that every token reads, each by itself.

    q = unit(W_q u),   p = softmax_s(beta k_s.q),   y = W_m sum_s p_s v_s,   k_s = unit(slot)

per head, with beta learned per head. Keys and values are parameters: what a token finds there was
learned, and nothing is written. With `top_k` a token reads the slots of its k largest weights,
which then sum to 1. Retrieval is float32.

Source: retrieval, Ramsauer et al. 2020 (arXiv:2008.02217), equation 3 with one step; learned slots,
Lample et al. 2019 (arXiv:1907.05242), section 3.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hippocampus.config_adapters import SlotMemoryConfig, memory_width
from hippocampus.layers.mor_hopfield import inverse_temperature
from hippocampus.layers.norms import unit_normalize
from hippocampus.ops.hopfield import probabilities


class SlotMemory(nn.Module):
    """The memory of one layer; see the module's docstring for the maths.

    Attributes:
      config: its settings.
      dtype: of the products with W_q and W_m.
    """

    config: SlotMemoryConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, u_BTD: Float[Array, "B T D"], order_S: Int[Array, " S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Reads the slots.

        Args:
          u_BTD: normalised inputs.
          order_S: slot s gives the value of slot order[s]; None = each its own.

        Returns:
          y_BTD in `dtype`; and {"weights" (B,T,S, float32: a mean over heads; rows sum to 1),
          "beta" (H)}.
        """
        cfg, (B, T, D) = self.config, u_BTD.shape
        width = memory_width(cfg, D)
        H, d = cfg.heads, width // cfg.heads
        q_BTHd = nn.Dense(width, use_bias=False, dtype=self.dtype, name="query")(u_BTD)
        draw = nn.initializers.normal(d**-0.5)
        keys_SHd = self.param("key_slots", draw, (cfg.slots, H, d))
        values_SHd = self.param("value_slots", draw, (cfg.slots, H, d))
        first_beta = cfg.beta or d**0.5
        log_beta_H = self.param("log_beta", nn.initializers.constant(jnp.log(first_beta)), (H,))
        beta_H = inverse_temperature(log_beta_H)
        p_BHTS = probabilities(unit_normalize(q_BTHd.reshape(B, T, H, d)), None,
                               unit_normalize(keys_SHd), beta_H)[1]
        assert p_BHTS is not None
        if cfg.top_k:
            p_BHTS = largest(p_BHTS, cfg.top_k)
        values_SHd = values_SHd.astype(jnp.float32)
        if order_S is not None:
            values_SHd = values_SHd[order_S]
        read_BTHd = jnp.einsum("bhts,shd->bthd", p_BHTS, values_SHd)
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out")(
            read_BTHd.reshape(B, T, width).astype(self.dtype))
        return y_BTD, {"weights": p_BHTS.mean(1), "beta": beta_H}


def largest(p: Float[Array, "... S"], k: int) -> Float[Array, "... S"]:
    """The k largest weights, brought to the sum 1, and 0 for the others; equal ones count together.

    Args:
      p: weights >= 0.
      k: how many, from 1 to S.
    """
    least = jax.lax.top_k(p, k)[0][..., -1:]
    kept = jnp.where(p >= least, p, 0.0)
    return kept / kept.sum(-1, keepdims=True)
