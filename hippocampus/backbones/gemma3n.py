"""Gemma-3n: four residual streams of which one is computed, and an input of its own per layer.

    S_0 = x;  S_j = match(x W_j)                        match: brought to the magnitude of x
    layer:  P_j = S_j + sum_i C_ji S_i                  predict, C from the first stream
            h = norm(P_0);  l = h + norm((h W_l) W_r)   learned residual beside attention
            u = (P_0 + norm(attention(h)) + l) / sqrt 2
            y = u + norm(mlp(norm(u)))
            S_j = P_j + c_j (y - P_0)                   correct, c from y
            S_j += norm((gelu(s S_0 W_g) * e) W_e)      for j >= 1, e the layer's own input
    x = mean_j(S_0, match(S_j V_j))

The last layers read keys and values of the last layer before them that is of their kind. While
training the published code clips the coefficients' weights to +-120; that is not done here.

Source: the published code of Gemma-3n (Google 2025); Baykal et al. 2023 (arXiv:2301.13310) for
the streams (AltUp); Menghani et al. 2024 (arXiv:2411.07501) for the learned residual (LAuReL).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hippocampus.backbones.architecture import AltUpSpec, Architecture, LayerSpec
from hippocampus.backbones.attention import DecoderAttention
from hippocampus.backbones.decoder import Decoder
from hippocampus.backbones.insertion import AfterAttention
from hippocampus.backbones.llama import GatedMLP
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.lora import Linear
from hippocampus.layers.norms import RMSNorm
from hippocampus.ops.embedding import embed

_SMALLEST_POWER = 1e-5


class AltUp(nn.Module):
    """Predicts the streams before a layer, and corrects them by what it computed in the first."""

    config: Architecture
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters."""
        cfg, A = self.config, _altup(self.config).streams
        self.router_norm = RMSNorm(cfg.norm_epsilon, self.dtype)
        self.router = Linear(A, use_bias=False, dtype=self.dtype)
        self.predict = Linear(A * A, use_bias=False, dtype=self.dtype)
        self.correct = Linear(A, use_bias=False, dtype=self.dtype)
        self.output_scale = self.param("output_scale", nn.initializers.ones, (cfg.d_model,))

    def predicted(self, streams_ABTD: Float[Array, "A B T D"]) -> Float[Array, "A B T D"]:
        """The streams as a layer shall find them."""
        A = len(streams_ABTD)
        mix = self.predict(self._modes(streams_ABTD[0]))
        mix_BTAA = mix.reshape(*mix.shape[:2], A, A)  # into stream j, from stream i
        return streams_ABTD + jnp.einsum("btji,ibtd->jbtd", mix_BTAA, streams_ABTD)

    def corrected(self, predicted_ABTD: Float[Array, "A B T D"],
                  y_BTD: Float[Array, "B T D"]) -> Float[Array, "A B T D"]:
        """The streams after a layer that made `y_BTD` of the first one."""
        share_BTA = self.correct(self._modes(y_BTD)) + 1
        change_BTD = y_BTD - predicted_ABTD[0]
        return predicted_ABTD + jnp.einsum("bta,btd->abtd", share_BTA, change_BTD)

    def scaled(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The first stream as the layer's own input is gated with it."""
        if not _altup(self.config).correct_scale:
            return x_BTD
        return x_BTD * self.output_scale.astype(self.dtype)

    def _modes(self, x_BTD: Array) -> Array:
        modes = self.router(self.router_norm(x_BTD) / self.config.d_model)
        return jnp.tanh(modes.astype(jnp.float32)).astype(self.dtype)


class LowRank(nn.Module):
    """(h W_l) W_r, normalised."""

    config: Architecture
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what is added to `h_BTD`."""
        cfg = self.config
        rank = _altup(cfg).laurel_rank
        low = Linear(rank, use_bias=False, dtype=self.dtype, name="left")(h_BTD)
        y = Linear(cfg.d_model, use_bias=False, dtype=self.dtype, name="right")(low)
        y_BTD: Array = RMSNorm(cfg.norm_epsilon, self.dtype, name="norm")(y)
        return y_BTD


class PerLayerInput(nn.Module):
    """norm((gelu(x W_g) * e) W_e), of a layer's own input e."""

    config: Architecture
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"],
                 own_BTP: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """Returns what is added to the streams but the first."""
        cfg = self.config
        gate = Linear(own_BTP.shape[-1], use_bias=False, dtype=self.dtype, name="gate")(x_BTD)
        y = Linear(cfg.d_model, use_bias=False, dtype=self.dtype, name="out")(
            jax.nn.gelu(gate) * own_BTP)
        y_BTD: Array = RMSNorm(cfg.norm_epsilon, self.dtype, name="norm")(y)
        return y_BTD


class Gemma3nLayer(nn.Module):
    """One layer; see the module's docstring for the maths."""

    config: Architecture
    spec: LayerSpec
    dtype: jnp.dtype = jnp.float32
    backend: str = "xla"
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, streams_ABTD: Float[Array, "A B T D"], positions_BT: Int[Array, "B T"],
        per_layer_BTP: Float[Array, "B T P"], after_attention: AfterAttention | None = None,
        **memory: Any,
    ) -> tuple[Float[Array, "A B T D"], dict[str, Array], Any, Any]:
        """Runs the layer.

        Args:
          streams_ABTD: residual streams.
          positions_BT: position of each token in its document.
          per_layer_BTP: the layer's own input.
          after_attention: what is inserted between attention and what it is added to.
          memory: further arguments of `DecoderAttention`.

        Returns:
          The streams; `out` ("attention.<name>", "mlp.out", the first stream as "residual", and
          "adapter.<name>" of what is inserted); the new cache; and the memory that attention read.
        """
        cfg = self.config

        def norm(name: str, x: Array) -> Array:
            y: Array = RMSNorm(cfg.norm_epsilon, self.dtype, name=name)(x)
            return y

        altup = AltUp(cfg, self.dtype, name="altup")
        predicted_ABTD = altup.predicted(streams_ABTD)
        h_BTD = norm("norm_attention", predicted_ABTD[0])
        laurel_BTD = h_BTD + LowRank(cfg, self.dtype, name="laurel")(h_BTD)
        y_BTD, parts, cache, read = DecoderAttention(
            cfg, self.spec, self.dtype, self.backend, scoped(self.edit, "attention."),
            name="attention")(h_BTD, positions_BT, **memory)
        out = {f"attention.{name}": value for name, value in parts.items()}
        if after_attention is not None:
            y_BTD, parts = after_attention(h_BTD, y_BTD, scoped(self.edit, "adapter."))
            out |= {f"adapter.{name}": value for name, value in parts.items()}
        u_BTD = predicted_ABTD[0] + norm("norm_attention_out", y_BTD) + laurel_BTD
        u_BTD = u_BTD * jnp.asarray(2**-0.5, self.dtype)
        y_BTD = GatedMLP(cfg, self.spec, self.dtype, name="mlp")(norm("norm_mlp", u_BTD))
        out["mlp.out"] = y_BTD = self.edit("mlp.out", y_BTD)
        y_BTD = u_BTD + norm("norm_mlp_out", y_BTD)
        streams_ABTD = altup.corrected(predicted_ABTD, y_BTD)
        out["residual"] = first_BTD = self.edit("residual", streams_ABTD[0])
        own_BTD = PerLayerInput(cfg, self.dtype, name="per_layer")(
            altup.scaled(first_BTD), per_layer_BTP)
        streams_ABTD = jnp.concatenate([first_BTD[None], streams_ABTD[1:] + own_BTD])
        return streams_ABTD, out, cache, read


class Gemma3nDecoder(Decoder):
    """A Gemma-3n, of its text alone."""

    layer_class: ClassVar[type[nn.Module]] = Gemma3nLayer

    def setup(self) -> None:
        """Creates the parameters of `Decoder`, and those around the streams."""
        super().setup()
        cfg, spec = self.config, _altup(self.config)
        width = cfg.n_layers * spec.per_layer_width
        self.per_layer_embedding_VE = self.param(
            "per_layer_embedding", nn.initializers.normal(spec.per_layer_width**-0.5),
            (spec.per_layer_vocabulary, width))
        self.per_layer_in = Linear(width, use_bias=False, dtype=self.dtype)
        self.per_layer_norm = RMSNorm(cfg.norm_epsilon, self.dtype)
        others = range(spec.streams - 1)
        self.streams_in = [Linear(cfg.d_model, use_bias=False, dtype=self.dtype) for _ in others]
        self.streams_out = [Linear(cfg.d_model, use_bias=False, dtype=self.dtype)
                            for _ in others]

    def _enter(self, tokens_BT: Array, x_BTD: Array, train: bool = False) -> tuple[Array, Array]:
        cfg, spec = self.config, _altup(self.config)
        known_BT = jnp.where(tokens_BT < spec.per_layer_vocabulary, tokens_BT, 0)
        shape = (*tokens_BT.shape, cfg.n_layers, spec.per_layer_width)
        rows = embed(self.per_layer_embedding_VE, known_BT, exchange_below=1.0).astype(self.dtype)
        rows = rows * jnp.asarray(spec.per_layer_width**0.5, self.dtype)
        own = self.per_layer_in(x_BTD, train) * jnp.asarray(cfg.d_model**-0.5, self.dtype)
        own = (self.per_layer_norm(own.reshape(shape)) + rows.reshape(shape)) * jnp.asarray(
            2**-0.5, self.dtype)
        streams = [x_BTD, *(_match(dense(x_BTD, train), x_BTD) for dense in self.streams_in)]
        return jnp.stack(streams), jnp.moveaxis(own, 2, 0)

    def _leave(self, x: Array, train: bool = False) -> Array:
        first_BTD = x[0]
        others = [_match(dense(x[j], train), first_BTD)
                  for j, dense in enumerate(self.streams_out, 1)]
        return jnp.stack([first_BTD, *others]).mean(0)


def _match(y_BTD: Array, like_BTD: Array) -> Array:
    """y brought to the root mean square that `like_BTD` has, token by token."""
    def power(x: Array) -> Array:
        return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)

    scale = jnp.sqrt(power(like_BTD)) / jnp.sqrt(jnp.maximum(power(y_BTD), _SMALLEST_POWER))
    return (y_BTD * scale).astype(y_BTD.dtype)


def _altup(config: Architecture) -> AltUpSpec:
    assert config.altup is not None, "a Gemma-3n has streams"
    return config.altup
