"""Attention of pretrained decoders: grouped heads of any width, normalised per head and rotated.

    q, k, v = u W_q, u W_k, u W_v          H query heads, G key/value heads, of width d
    q, k    = rotate(norm(q)), rotate(norm(k))        norms where the family has them
    y       = softmax(c q k^T) v W_o                  c = 1/sqrt(d), or what the family says

In a Gemma-3n values are normalised too, without a learned scale, and later layers read the keys
and values of an earlier one instead of making their own.

Source: Grattafiori et al. 2024 (arXiv:2407.21783); Yang et al. 2025 (arXiv:2505.09388) for Qwen3;
Gemma Team 2025 (arXiv:2503.19786) for Gemma 3; the published code of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.lora import Linear
from hippocampus.layers.norms import RMSNorm, rms_normalize
from hippocampus.layers.self_attention import AttentionCache
from hippocampus.ops import key_cache
from hippocampus.ops.attention import attention
from hippocampus.ops.rotary import rotate_at


class Memory(NamedTuple):
    """Keys and values that a layer reads, of its own or of another one.

    Attributes:
      key, value: of a whole sequence B,T,G,d; of a cache and what follows it B,G,S,d.
      visible_BnS: which entries of a cache each new token sees; None for a whole sequence.
    """

    key: Array
    value: Array
    visible_BnS: Bool[Array, "B n S"] | None = None


class DecoderAttention(nn.Module):
    """The attention of one layer; see the module's docstring for the maths."""

    config: Architecture
    spec: LayerSpec
    dtype: jnp.dtype = jnp.float32
    backend: str = "xla"
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, u_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], *,
        document_ids_BT: Int[Array, "B T"] | None = None, source: Memory | None = None,
        cache: AttentionCache | None = None, valid_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], AttentionCache | None, Memory]:
        """Attends within documents, or goes on from a cache.

        Args:
          u_BTD: normalised inputs.
          positions_BT: position of each token in its document.
          document_ids_BT: document of each token; None = one a row.
          source: what another layer read, for a layer without keys of its own.
          cache: of the tokens before these; None = there are none.
          valid_BT: with a cache: a row's valid tokens come first, the others are not kept.

        Returns:
          y_BTD; `out` ("query", "key", "value", "heads" before W_o, "out"); the new cache; and the
          memory that was read.
        """
        B, T, D = u_BTD.shape
        H, d, window = self.config.n_heads, self.config.head_width, self.spec.window
        scale = self.config.query_scale
        out = {"query": self._project("query", u_BTD, H, positions_BT)}
        if source is None:
            G = self.config.n_kv_heads
            out["key"] = self._project("key", u_BTD, G, positions_BT)
            out["value"] = self._project("value", u_BTD, G, positions_BT)
            memory = Memory(out["key"], out["value"])
            if cache is not None and valid_BT is not None:
                (keys, values), visible, written = key_cache.recall(
                    (cache.key_BGCd, cache.value_BGCd), memory[:2], positions_BT, valid_BT, window)
                cache, memory = AttentionCache(*written), Memory(keys, values, visible)
        else:
            memory = source
        if memory.visible_BnS is None:
            o_BTHd = attention(out["query"], memory.key, memory.value, window=window, scale=scale,
                               document_ids=document_ids_BT, backend=self.backend)
        else:
            o_BTHd = key_cache.attend(out["query"], memory.key, memory.value, memory.visible_BnS,
                                      scale)
        out["heads"] = o_BTHd = self.edit("heads", o_BTHd)
        y_BTD = Linear(D, use_bias=False, dtype=self.dtype, name="out")(
            o_BTHd.reshape(B, T, H * d))
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out, cache, memory

    def init_cache(self, batch: int, max_length: int) -> AttentionCache:
        """The cache before the first token.

        Args:
          batch: rows.
          max_length: tokens that are kept; with a window no more than that.
        """
        window = self.spec.window
        capacity = min(window, max_length) if window else max_length
        empty = jnp.zeros((batch, self.config.n_kv_heads, capacity, self.config.head_width),
                          self.dtype)
        return AttentionCache(empty, empty)

    def _project(self, name: str, u_BTD: Array, heads: int, positions_BT: Array) -> Array:
        cfg, d = self.config, self.config.head_width
        x: Any = Linear(heads * d, use_bias=False, dtype=self.dtype, name=name)(u_BTD)
        x = x.reshape(*u_BTD.shape[:2], heads, d)
        if name == "value":
            if cfg.altup:
                x = rms_normalize(x, cfg.norm_epsilon).astype(self.dtype)
            return self.edit(name, x)
        if cfg.qk_norm:
            x = RMSNorm(cfg.norm_epsilon, self.dtype, offset=cfg.norm_offset,
                        name=f"{name}_norm")(x)
        frequency = jnp.asarray(self.spec.rope.frequencies(d))
        return self.edit(name, rotate_at(x, positions_BT, frequency))
