"""Mamba (S6) and Mamba-2 (SSD): selective state spaces whose step, input and output are read.

S6, N states for each of E channels:

    x, z     = u W_in                                                D -> E each
    c_t      = silu(b + sum_{j<w} w_j * x_{t-j})                     within the document
    s, B, C  = c W_select                                            E -> R, N, N
    delta    = softplus(s W_step + step_bias),  A = -exp(log_decay)
    h_t      = exp(delta_t A) h_{t-1} + delta_t c_t B_t              h = 0 before a document
    y_t      = (C_t h_t + skip * c_t) * silu(z_t) W_out

SSD, one decay for each of H heads of P = `head_width` channels, and B and C of G groups of heads:

    z, x, B, C, s = u W_in                                           D -> E, E, G N, G N, H
    c, B, C  = silu(conv(x, B, C)),  delta = softplus(s + step_bias)
    h_t      = exp(delta_t A) h_{t-1} + delta_t c_t B_t^T            P x N for a head
    y_t      = norm((h_t C_t + skip * c_t) * silu(z_t)) W_out        RMS over each group's channels

Step sizes, decays and states are float32.

Source: Gu & Dao 2023 (arXiv:2312.00752), section 3; Dao & Gu 2024 (arXiv:2405.21060), section 7;
first values as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import SSMConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.modern_ssm import conv_init
from hippocampus.layers.norms import rms_normalize
from hippocampus.layers.temporal_layer import TemporalLayer
from hippocampus.ops.activations import halves
from hippocampus.ops.causal_conv import causal_conv, last_inputs
from hippocampus.ops.selective_scan import selective_scan
from hippocampus.ops.ssd import ssd

STEP_RANGE = (1e-3, 1e-1)
"""Of the step sizes at initialisation, where a token asks for nothing else."""
SSD_RATES = (1.0, 16.0)
"""Of SSD's rates -A at initialisation."""
_MOST_LOG_RATE = 10.0
"""Above it no state outlives a token; it keeps 0 * A from being 0 * infinity."""


@struct.dataclass
class MambaCache:
    """What a row has read, in a size that does not grow: the last inputs and the states."""

    conv_BwC: Float[Array, "B w C"]
    """The last d_conv - 1 inputs of the convolution (S6: C = E; SSD: C = E + 2 G N)."""
    state: Float[Array, "B *channels N"]
    """The states, float32 (S6: B,E,N; SSD: B,H,P,N)."""


class _Mamba(TemporalLayer):
    """What S6 and SSD share: the call, the convolution and the projections."""

    config: SSMConfig
    norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    def __call__(
        self, u_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
        positions_BT: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Reads a sequence.

        Args:
          u_BTD: normalised inputs.
          document_ids_BT: document of each token; None = one a row.
          positions_BT: position of each token in its document; the state restarts at 0.

        Returns:
          y_BTD, and {"delta", "decay", "write", "read", "scan", "out"}: step sizes (float32; S6:
          B,T,E; SSD: B,T,H), the decays exp(delta A) that follow from them (S6: B,T,E N), B and C
          (B,T,N; B,T,G N), what the scan gave (B,T,E), and y again. All but the decays can be
          edited. The states themselves are nowhere kept.
        """
        y_BTD, out, _ = self._run(u_BTD, positions_BT, document_ids_BT=document_ids_BT)
        return y_BTD, out

    def _project(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, use_bias=self.config.projection_bias, dtype=self.dtype, name=name)

    def _conv(self, x_BTC: Array, document_ids_BT: Array | None, cache: MambaCache | None,
              valid_BT: Any) -> tuple[Array, Array | None]:
        """silu of the convolution, and the cache's inputs after it."""
        cfg, C = self.config, x_BTC.shape[-1]
        kernel_WC = self.param("conv_kernel", conv_init, (cfg.d_conv, C)).astype(self.dtype)
        bias_C = (self.param("conv_bias", nn.initializers.zeros, (C,)) if cfg.conv_bias
                  else jnp.zeros((C,))).astype(self.dtype)
        if cache is None:
            y_BTC = causal_conv(x_BTC, kernel_WC, bias_C, document_ids_BT=document_ids_BT)
            return jax.nn.silu(y_BTC), None
        y_BTC = causal_conv(x_BTC, kernel_WC, bias_C, before_BwE=cache.conv_BwC)
        return jax.nn.silu(y_BTC), last_inputs(cache.conv_BwC, x_BTC, valid_BT)

    def _step(self, s: Float[Array, "B T K"], valid_BT: Array | None) -> Float[Array, "B T K"]:
        """Step sizes; a token that does not count has 0, which leaves the states as they are."""
        bias_K = self.param("step_bias", _step_init, s.shape[-1:])
        delta = self.edit("delta", jax.nn.softplus(s.astype(jnp.float32) + bias_K))
        return delta if valid_BT is None else jnp.where(valid_BT[..., None], delta, 0.0)

    def _rates(self, init: Callable[..., Array], shape: tuple[int, ...]) -> Float[Array, ...]:
        log_decay = self.param("log_decay", init, shape)
        return -jnp.exp(jnp.minimum(log_decay, _MOST_LOG_RATE))


class MambaS6(_Mamba):
    """The block of Mamba; see the module's docstring for the maths."""

    def init_cache(self, batch: int, max_length: int, d_model: int) -> MambaCache:
        """The cache before the first token.

        Args:
          batch: rows.
          max_length: without meaning here: the state has the same size after any number of tokens.
          d_model: width D.
        """
        cfg, E = self.config, round(self.config.expansion * d_model)
        return MambaCache(jnp.zeros((batch, cfg.d_conv - 1, E), self.dtype),
                          jnp.zeros((batch, E, cfg.d_state), jnp.float32))

    @nn.compact
    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None) -> tuple[Array, dict[str, Array], Any]:
        (B, T, D), cfg = u_BTD.shape, self.config
        E, N, R = round(cfg.expansion * D), cfg.d_state, cfg.dt_rank or -(-D // 16)
        x_BTE, z_BTE = halves(self._project(2 * E, "in")(u_BTD))
        c_BTE, inputs_BwE = self._conv(x_BTE, document_ids_BT, cache, valid_BT)
        s_BTR, B_BTN, C_BTN = jnp.split(
            nn.Dense(R + 2 * N, use_bias=False, dtype=self.dtype, name="select")(c_BTE),
            [R, R + N], axis=-1)
        delta_BTE = self._step(nn.Dense(
            E, use_bias=False, dtype=self.dtype, kernel_init=_step_kernel_init, name="step",
        )(s_BTR), valid_BT)
        A_EN = self._rates(_one_to_n, (E, N))
        B_BTN, C_BTN = self.edit("write", B_BTN), self.edit("read", C_BTN)
        y_BTE, state_BEN = selective_scan(
            c_BTE, delta_BTE, A_EN, B_BTN, C_BTN, self.param("skip", nn.initializers.ones, (E,)),
            h0_BEN=None if cache is None else cache.state,
            reset_BT=_first(positions_BT, (B, T), valid_BT), backend=cfg.backend)
        y_BTE = self.edit("scan", y_BTE)
        y_BTD = self._project(D, "out")(y_BTE * jax.nn.silu(z_BTE))
        decay = jnp.exp(delta_BTE[..., None] * A_EN).reshape(B, T, E * N)
        out = {"delta": delta_BTE, "decay": decay, "write": B_BTN, "read": C_BTN, "scan": y_BTE}
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out, None if inputs_BwE is None else MambaCache(inputs_BwE, state_BEN)


class MambaSSD(_Mamba):
    """The block of Mamba-2; see the module's docstring for the maths."""

    def init_cache(self, batch: int, max_length: int, d_model: int) -> MambaCache:
        """The cache before the first token; arguments as for `MambaS6`."""
        cfg, E = self.config, round(self.config.expansion * d_model)
        channels = E + 2 * cfg.n_groups * cfg.d_state
        state = (batch, E // cfg.head_width, cfg.head_width, cfg.d_state)
        return MambaCache(jnp.zeros((batch, cfg.d_conv - 1, channels), self.dtype),
                          jnp.zeros(state, jnp.float32))

    @nn.compact
    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None) -> tuple[Array, dict[str, Array], Any]:
        (B, T, D), cfg = u_BTD.shape, self.config
        E, N, G, P = round(cfg.expansion * D), cfg.d_state, cfg.n_groups, cfg.head_width
        H = E // P
        z_BTE, mixed, s_BTH = jnp.split(
            self._project(2 * (E + G * N) + H, "in")(u_BTD), [E, 2 * (E + G * N)], axis=-1)
        mixed, inputs_BwC = self._conv(mixed, document_ids_BT, cache, valid_BT)
        c_BTE, B_BTM, C_BTM = jnp.split(mixed, [E, E + G * N], axis=-1)
        delta_BTH = self._step(s_BTH, valid_BT)
        A_H = self._rates(_log_uniform_rates, (H,))
        B_BTM, C_BTM = self.edit("write", B_BTM), self.edit("read", C_BTM)
        y, state = ssd(
            c_BTE.reshape(B, T, H, P), delta_BTH, A_H, B_BTM.reshape(B, T, G, N),
            C_BTM.reshape(B, T, G, N), self.param("skip", nn.initializers.ones, (H,)),
            h0_BHPN=None if cache is None else cache.state,
            reset_BT=_first(positions_BT, (B, T), valid_BT), backend=cfg.backend)
        y_BTE = self.edit("scan", y.reshape(B, T, E))
        gated = y_BTE.astype(jnp.float32) * jax.nn.silu(z_BTE.astype(jnp.float32))
        normed = rms_normalize(gated.reshape(B, T, G, E // G), self.norm_epsilon)
        scale_E = self.param("norm_scale", nn.initializers.ones, (E,))
        y_BTD = self._project(D, "out")(
            (normed.reshape(B, T, E) * scale_E).astype(self.dtype))
        out = {"delta": delta_BTH, "decay": jnp.exp(delta_BTH * A_H), "write": B_BTM,
               "read": C_BTM, "scan": y_BTE}
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out, None if inputs_BwC is None else MambaCache(inputs_BwC, state)


def _first(positions_BT: Array, shape: tuple[int, int],
           valid_BT: Array | None) -> Bool[Array, "B T"]:
    first_BT = jnp.broadcast_to(positions_BT == 0, shape)
    return first_BT if valid_BT is None else first_BT & valid_BT


def _step_init(key: Array, shape: tuple[int, ...]) -> Array:
    """softplus of it is log-uniform in `STEP_RANGE`."""
    low, high = map(math.log, STEP_RANGE)
    step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))


def _step_kernel_init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _one_to_n(key: Array, shape: tuple[int, int]) -> Array:
    """log of 1, 2, …, N in every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)


def _log_uniform_rates(key: Array, shape: tuple[int, ...]) -> Array:
    low, high = SSD_RATES
    return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))
