"""Causal multi-head self-attention with grouped queries, rotary positions and QK-norm.

    q, k, v = u W_q, u W_k, u W_v      H query heads, G key/value heads
    q, k    = rotate(rms(q)), rotate(rms(k))
    y       = softmax(q k^T / sqrt(d)) v W_o

Source: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245) for groups;
Dehghani et al. 2023 (arXiv:2302.05442) for QK-norm.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from hippocampus.config import AttentionConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.norms import RMSNorm
from hippocampus.layers.temporal_layer import TemporalLayer
from hippocampus.ops import key_cache
from hippocampus.ops.attention import attention
from hippocampus.ops.rotary import rotate


@struct.dataclass
class AttentionCache:
    """Keys and values of the last C tokens of each row, in a ring (`hippocampus.ops.key_cache`)."""

    key_BGCd: Float[Array, "B G C d"]
    value_BGCd: Float[Array, "B G C d"]


class SelfAttention(TemporalLayer):
    """The attention path; see the module's docstring for the maths."""

    config: AttentionConfig
    n_heads: int
    rope_theta: float = 0.0
    """Base of the rotary frequencies; 0 = no rotation."""
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

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
          y_BTD, and `out`: "query" (B,T,H,d), "key" and "value" (B,T,G,d), "heads" (B,T,H,d: what
          each head read, before W_o) and "out".
        """
        y_BTD, out, _ = self._run(u_BTD, positions_BT, document_ids_BT=document_ids_BT)
        return y_BTD, out

    def init_cache(self, batch: int, max_length: int, d_model: int) -> AttentionCache:
        """The cache before the first token.

        Args:
          batch: rows.
          max_length: tokens that are kept; beyond them a token sees the last `max_length`, itself
            included. With a window the cache is no longer than that.
          d_model: width D.
        """
        G, window = self.config.n_kv_heads or self.n_heads, self.config.window
        capacity = min(window, max_length) if window else max_length
        empty = jnp.zeros((batch, G, capacity, d_model // self.n_heads), self.dtype)
        return AttentionCache(empty, empty)

    @nn.compact
    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None) -> tuple[Array, dict[str, Array], Any]:
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
        if cache is None:
            o_BTHd = attention(out["query"], out["key"], out["value"], document_ids=document_ids_BT,
                               window=self.config.window, backend=self.config.backend)
        else:
            (keys, values), visible, written = key_cache.recall(
                (cache.key_BGCd, cache.value_BGCd), (out["key"], out["value"]), positions_BT,
                valid_BT, self.config.window)
            cache = AttentionCache(*written)
            o_BTHd = key_cache.attend(out["query"], keys, values, visible, d**-0.5)
        out["heads"] = o_BTHd = self.edit("heads", o_BTHd)
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out")(o_BTHd.reshape(B, T, D))
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out, cache
