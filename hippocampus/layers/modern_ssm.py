"""ModernSSM: a causal convolution, then a selective diagonal recurrence with an output gate.

    x, z     = u W_x, u W_z                                         D -> E each
    c_t      = silu(b + sum_{j<w} w_j * x_{t-j})                    within the document
    g_forget = sigmoid(c W_f + b_f),  g_in = sigmoid(c W_i + b_i)   block-diagonal, H blocks
    log a_t  = -8 softplus(log_decay) g_forget
    h_t      = a_t h_{t-1} + sqrt(1 - a_t^2) g_in s c_t             s: optional learned scale
    y_t      = (h_t * gelu(z_t)) W_o

The factor sqrt(1 - a^2) keeps the state's size independent of the decay; at a document's first
token a is 0 and the factor 1. `kind="diagonal"` replaces the gates by constants A, B, C, D with N
states per channel: h_t = A h_{t-1} + B c_t, y = C h + D c. Decay and state are float32.

Source: De et al. 2024 (arXiv:2402.19427), section 2.4 (RG-LRU); Gu et al. 2022
(arXiv:2206.11893) for the diagonal form.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from hippocampus.config import SSMConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.temporal_layer import TemporalLayer
from hippocampus.ops.activations import halves
from hippocampus.ops.causal_conv import causal_conv, last_inputs
from hippocampus.ops.gated_scan import SHARPNESS, decay_and_input, gated_scan, input_size
from hippocampus.ops.linear_scan import linear_scan

DECAY_RANGE = (0.2, 0.999)
"""Of the decays at initialisation."""


@struct.dataclass
class SSMCache:
    """What a row has read, in a size that does not grow: the last inputs and the state."""

    conv_BwE: Float[Array, "B w E"]
    """The last d_conv - 1 inputs of the convolution."""
    state_BE: Float[Array, "B E"]
    """The recurrence's state (float32; B,E N for the diagonal kind)."""


class ModernSSM(TemporalLayer):
    """The state-space path; see the module's docstring for the maths."""

    config: SSMConfig
    n_heads: int
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
          y_BTD, and {"decay", "state", "out"}: decays and states are float32, B,T,E (B,T,E N for
          the diagonal kind). The gated kind's states have the precision of `dtype` where no edit
          asks for them: so they are kept.
        """
        y_BTD, out, _ = self._run(u_BTD, positions_BT, document_ids_BT=document_ids_BT)
        return y_BTD, out

    def init_cache(self, batch: int, max_length: int, d_model: int) -> SSMCache:
        """The cache before the first token.

        Args:
          batch: rows.
          max_length: without meaning here: the state has the same size after any number of tokens.
          d_model: width D.
        """
        cfg = self.config
        E = round(cfg.expansion * d_model)
        n_states = E * (1 if cfg.kind == "gated" else cfg.d_state)
        return SSMCache(jnp.zeros((batch, cfg.d_conv - 1, E), self.dtype),
                        jnp.zeros((batch, n_states), jnp.float32))

    @nn.compact
    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None) -> tuple[Array, dict[str, Array], Any]:
        D, cfg = u_BTD.shape[-1], self.config
        E = round(cfg.expansion * D)
        x_BTE, z_BTE = halves(nn.Dense(2 * E, use_bias=False, dtype=self.dtype, name="in")(u_BTD))
        kernel_WE = self.param("conv_kernel", conv_init, (cfg.d_conv, E))
        bias_E = self.param("conv_bias", nn.initializers.zeros, (E,))
        c_BTE = jax.nn.silu(causal_conv(
            x_BTE, kernel_WE.astype(self.dtype), bias_E.astype(self.dtype),
            document_ids_BT=document_ids_BT,
            before_BwE=None if cache is None else cache.conv_BwE))
        if cfg.input_scale:
            scale_E = self.param("input_scale", nn.initializers.ones, (E,))
        else:
            scale_E = jnp.ones(())
        first_BT = jnp.broadcast_to(positions_BT == 0, u_BTD.shape[:2])
        recurrence = self._gated if cfg.kind == "gated" else self._diagonal
        h_BTE, out = recurrence(c_BTE, scale_E, first_BT, cache, valid_BT)
        if cache is not None:
            cache = SSMCache(last_inputs(cache.conv_BwE, x_BTE, valid_BT), out["state"][:, -1])
        y_BTE = h_BTE.astype(self.dtype) * jax.nn.gelu(z_BTE)
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out")(y_BTE)
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out, cache

    def _gated(self, c_BTE: Array, scale_E: Array, first_BT: Array, cache: SSMCache | None,
               valid_BT: Array | None) -> tuple[Array, dict]:
        E = c_BTE.shape[-1]
        gates = BlockDiagonal(self.n_heads, 2, dtype=self.dtype, name="gates")(c_BTE)
        g_forget, g_in = jax.nn.sigmoid(gates.astype(jnp.float32))
        log_decay_E = self.param("log_decay", _log_decay_init, (E,))
        a_BTE, size = decay_and_input(log_decay_E, g_forget, first_BT)
        out = {"decay": a_BTE, "gate_in": g_in, "gate_forget": g_forget}
        if cache is None and self.edit is no_edit:
            # Nothing comes between gates and state, and what is in `out` costs nothing unread.
            h_BTE = gated_scan(gates, c_BTE, log_decay_E, scale_E if scale_E.ndim else None,
                               first_BT, backend=self.config.backend)
            return h_BTE, {**out, "state": h_BTE.astype(jnp.float32)}
        a_BTE = self.edit("decay", a_BTE)
        h_BTE = self._scan(a_BTE, size * g_in * scale_E * c_BTE, first_BT, cache, valid_BT)
        h_BTE = self.edit("state", h_BTE)
        return h_BTE, {**out, "decay": a_BTE, "state": h_BTE}

    def _diagonal(self, c_BTE: Array, scale_E: Array, first_BT: Array, cache: SSMCache | None,
                  valid_BT: Array | None) -> tuple[Array, dict]:
        (B, T, E), N = c_BTE.shape, self.config.d_state
        # exp(-exp(log_decay)): time constants spread over 1 to 1000 tokens.
        log_decay_EN = self.param(
            "log_decay", lambda key, shape: -jax.random.uniform(key, shape) * jnp.log(1000.0),
            (E, N))
        B_EN = self.param("input_kernel", nn.initializers.ones, (E, N))
        C_EN = self.param("output_kernel", nn.initializers.normal(N**-0.5), (E, N))
        D_E = self.param("skip", nn.initializers.ones, (E,))
        c_BTE = c_BTE.astype(jnp.float32) * scale_E
        # Above 5 the decay is 0 in float32; the bound keeps the inner exponential finite.
        log_a_EN = -jnp.exp(jnp.minimum(log_decay_EN, 5.0))
        a_EN = jnp.exp(log_a_EN)
        x_BTEN = input_size(log_a_EN) * B_EN * c_BTE[..., None]
        a_BTEN = self.edit("decay", jnp.broadcast_to(a_EN.reshape(-1), (B, T, E * N)))
        h = self._scan(a_BTEN, x_BTEN.reshape(B, T, E * N), first_BT, cache, valid_BT)
        h = self.edit("state", h)
        y_BTE = (h.reshape(B, T, E, N) * C_EN).sum(-1) + D_E * c_BTE
        return y_BTE, {"decay": a_BTEN, "state": h}

    def _scan(self, a: Array, x: Array, first_BT: Array, cache: SSMCache | None,
              valid_BT: Any) -> Array:
        if cache is None:
            return linear_scan(a, x, reset_BT=first_BT, backend=self.config.backend)
        # A token that does not count leaves the state as it is: a = 1, x = 0, exactly.
        a, x = jnp.where(valid_BT[..., None], a, 1.0), jnp.where(valid_BT[..., None], x, 0.0)
        return linear_scan(a, x, cache.state_BE, first_BT & valid_BT, backend=self.config.backend)


class BlockDiagonal(nn.Module):
    """`n_outputs` linear maps whose matrices are block-diagonal with `n_blocks` blocks."""

    n_blocks: int
    n_outputs: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "P B T E"]:
        """Returns the maps stacked on a leading axis."""
        B, T, E = x_BTE.shape
        width = E // self.n_blocks
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=1, batch_axis=0),
                            (self.n_blocks, width, self.n_outputs * width))
        bias = self.param("bias", nn.initializers.zeros, (self.n_outputs, E))
        blocks = x_BTE.reshape(B, T, self.n_blocks, width)
        y = jnp.einsum("btgi,gio->btgo", blocks, kernel.astype(self.dtype))
        y = jnp.moveaxis(y.reshape(B, T, self.n_blocks, self.n_outputs, width), 3, 0)
        return y.reshape(self.n_outputs, B, T, E) + bias[:, None, None].astype(self.dtype)


def conv_init(key: Array, shape: tuple[int, int]) -> Float[Array, "W E"]:
    """Taps of a depthwise convolution, uniform in +-1 / sqrt(W)."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _log_decay_init(key: Array, shape: tuple[int]) -> Array:
    """A decay uniform in area on a ring at the gate's first value of 1/2.

    The paper's ring, [0.9, 0.999], has no channel that forgets within a few tokens; the wider one
    is better by 0.027 nats on Tiny Shakespeare (docs/experiments.md).
    """
    low, high = DECAY_RANGE
    ring = jnp.sqrt(jax.random.uniform(key, shape) * (high**2 - low**2) + low**2)
    softplus = -jnp.log(ring) / (SHARPNESS / 2)
    return jnp.log(jnp.expm1(softplus))
