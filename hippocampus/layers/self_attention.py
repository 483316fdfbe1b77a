"""Causal multi-head self-attention with grouped queries, rotary positions and QK-norm.

    q, k, v = u W_q, u W_k, u W_v      H query heads, G key/value heads
    q, k    = rotate(rms(q)), rotate(rms(k))
    y       = softmax(q k^T / sqrt(d)) v W_o

Source: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245) for groups;
Dehghani et al. 2023 (arXiv:2302.05442) for QK-norm.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hippocampus.config import AttentionConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.norms import RMSNorm
from hippocampus.ops.attention import attention
from hippocampus.ops.rotary import rotate


class SelfAttention(nn.Module):
    """The attention path; see the module's docstring for the maths."""

    config: AttentionConfig
    n_heads: int
    rope_theta: float = 0.0
    """Base of the rotary frequencies; 0 = no rotation."""
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, u_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
        positions_BT: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Attends within documents.

        Args:
          u_BTD: normalised inputs.
          document_ids_BT: document of each token; None = one a row.
          positions_BT: position of each token in its document.

        Returns:
          y_BTD, and `out`: "query" (B,T,H,d), "key" and "value" (B,T,G,d), "out".
        """
        (B, T, D), H = u_BTD.shape, self.n_heads
        G, d = self.config.n_kv_heads or H, D // H

        def project(name: str, heads: int, normalized: bool) -> Array:
            x = nn.Dense(heads * d, use_bias=False, dtype=self.dtype, name=name)(u_BTD)
            x = x.reshape(B, T, heads, d)
            if normalized and self.config.qk_norm:
                x = RMSNorm(dtype=self.dtype, name=f"{name}_norm")(x)
            if normalized and self.rope_theta:
                x = rotate(x, positions_BT, self.rope_theta)
            return self.edit(name, x)

        out = {"query": project("query", H, True), "key": project("key", G, True),
               "value": project("value", G, False)}
        o_BTHd = attention(out["query"], out["key"], out["value"], document_ids=document_ids_BT,
                           window=self.config.window, backend=self.config.backend)
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out")(o_BTHd.reshape(B, T, D))
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out
