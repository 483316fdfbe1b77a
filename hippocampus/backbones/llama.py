"""One layer of Llama, Qwen3 or Gemma 3: attention, then a gated MLP.

    x = x + attention(norm(x))
    x = x + (act(h W_g) * h W_u) W_d,   h = norm(x)

with act = silu; in a Gemma gelu, and both terms are normalised once more before they are added.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.backbones.attention import DecoderAttention
from hippocampus.backbones.insertion import AfterAttention
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.lora import Linear
from hippocampus.layers.norms import RMSNorm


class GatedMLP(nn.Module):
    """(act(h W_g) * h W_u) W_d, with the units of the gate that are low cut off where it is sparse.

    g = relu(g - (mean(g) + std(g) Phi^-1(s))) keeps about a share 1 - s of normal units.

    Source: Shazeer 2020 (arXiv:2002.05202), equation 6; You et al. 2025 (arXiv:2506.06644),
    section 3, for the statistical top-k.
    """

    config: Architecture
    spec: LayerSpec
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns y_BTD."""
        def dense(name: str, width: int) -> Linear:
            return Linear(width, use_bias=False, dtype=self.dtype, name=name)

        gate = dense("gate", self.spec.mlp_width)(h_BTD)
        if self.spec.sparsity:
            g = gate.astype(jnp.float32)
            cut = g.std(-1, keepdims=True) * NormalDist().inv_cdf(self.spec.sparsity)
            gate = jax.nn.relu(g - (g.mean(-1, keepdims=True) + cut)).astype(self.dtype)
        act = jax.nn.gelu if self.config.is_gemma else jax.nn.silu
        hidden = act(gate) * dense("up", self.spec.mlp_width)(h_BTD)
        y_BTD: Array = dense("down", self.config.d_model)(hidden)
        return y_BTD


class LlamaLayer(nn.Module):
    """One layer; see the module's docstring for the maths."""

    config: Architecture
    spec: LayerSpec
    dtype: jnp.dtype = jnp.float32
    backend: str = "xla"
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"],
        per_layer_BTP: None = None, after_attention: AfterAttention | None = None,
        **memory: Any,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Any, Any]:
        """Runs the layer.

        Args:
          x_BTD: residual stream.
          positions_BT: position of each token in its document.
          per_layer_BTP: nothing in these families.
          after_attention: what is inserted between attention and what it is added to.
          memory: further arguments of `DecoderAttention`.

        Returns:
          x_BTD; `out` ("attention.<name>", "mlp.out", "residual", and "adapter.<name>" of what is
          inserted); the new cache; and the memory that attention read.
        """
        cfg = self.config

        def norm(name: str, x: Array) -> Array:
            y: Array = RMSNorm(cfg.norm_epsilon, self.dtype, offset=cfg.norm_offset, name=name)(x)
            return y

        h_BTD = norm("norm_attention", x_BTD)
        y_BTD, parts, cache, read = DecoderAttention(
            cfg, self.spec, self.dtype, self.backend, scoped(self.edit, "attention."),
            name="attention")(h_BTD, positions_BT, **memory)
        out = {f"attention.{name}": value for name, value in parts.items()}
        if after_attention is not None:
            y_BTD, parts = after_attention(h_BTD, y_BTD, scoped(self.edit, "adapter."))
            out |= {f"adapter.{name}": value for name, value in parts.items()}
        x_BTD = x_BTD + (norm("norm_attention_out", y_BTD) if cfg.is_gemma else y_BTD)
        y_BTD = GatedMLP(cfg, self.spec, self.dtype, name="mlp")(norm("norm_mlp", x_BTD))
        out["mlp.out"] = y_BTD = self.edit("mlp.out", y_BTD)
        x_BTD = x_BTD + (norm("norm_mlp_out", y_BTD) if cfg.is_gemma else y_BTD)
        out["residual"] = x_BTD = self.edit("residual", x_BTD)
        return x_BTD, out, cache, read
