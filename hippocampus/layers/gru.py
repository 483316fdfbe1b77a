"""GRU: the classic recurrent memory, in the place of the state-space path (`model.ssm.kind="gru"`).

    r_t, z_t = sigmoid(u W_{r,z} + b_{r,z} + h_{t-1} V_{r,z})
    n_t      = tanh(u W_n + b_n + r_t * (h_{t-1} V_n + c_n))
    h_t      = z_t h_{t-1} + (1 - z_t) n_t                           within the document
    y_t      = h_t W_o

Its state h, of width E = `ssm.expansion` * D, depends on the state before by more than a product,
so tokens follow one another: it trains slowly on long contexts, and is there to compare memories
with. The state is float32.

Source: Cho et al. 2014 (arXiv:1406.1078), with the reset gate behind the matrix (version 3 of
that paper, and what GPU libraries compute).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import SSMConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.temporal_layer import TemporalLayer


@struct.dataclass
class GRUCache:
    """The state after the last token of each row."""

    state_BE: Float[Array, "B E"]


class GRU(TemporalLayer):
    """A gated recurrent unit as a path of a block; see the module's docstring for the maths."""

    config: SSMConfig
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    def __call__(
        self, u_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
        positions_BT: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Reads a sequence.

        Args:
          u_BTD: normalised inputs.
          document_ids_BT: without meaning here: positions say where documents begin.
          positions_BT: position of each token in its document; the state restarts at 0.

        Returns:
          y_BTD, and {"decay" (the update gate z), "state", "out"}: decay and state are float32,
          B,T,E.
        """
        y_BTD, out, _ = self._run(u_BTD, positions_BT)
        return y_BTD, out

    def init_cache(self, batch: int, max_length: int, d_model: int) -> GRUCache:
        """The cache before the first token.

        Args:
          batch: rows.
          max_length: without meaning here: the state has the same size after any number of tokens.
          d_model: width D.
        """
        return GRUCache(jnp.zeros((batch, round(self.config.expansion * d_model)), jnp.float32))

    @nn.compact
    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None) -> tuple[Array, dict[str, Array], Any]:
        (B, T, D), E = u_BTD.shape, round(self.config.expansion * u_BTD.shape[-1])
        inputs = nn.Dense(3 * E, dtype=self.dtype, name="in")(u_BTD)
        kernel = self.param("recurrent_kernel", nn.initializers.orthogonal(), (E, 3 * E))
        bias_E = self.param("recurrent_bias", nn.initializers.zeros, (E,))
        first_BT = jnp.broadcast_to(positions_BT == 0, (B, T))
        z_BTE, h_BTE = _recurrence(
            inputs, kernel.astype(self.dtype), bias_E, first_BT,
            jnp.ones((B, T), bool) if valid_BT is None else valid_BT,
            jnp.zeros((B, E), jnp.float32) if cache is None else cache.state_BE)
        out = {"decay": z_BTE, "state": self.edit("state", h_BTE)}
        if cache is not None:
            cache = GRUCache(out["state"][:, -1])
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out")(
            out["state"].astype(self.dtype))
        out["out"] = y_BTD = self.edit("out", y_BTD)
        return y_BTD, out, cache


def _recurrence(
    inputs: Float[Array, "B T E3"], kernel: Float[Array, "E E3"], bias_E: Float[Array, " E"],
    first_BT: Bool[Array, "B T"], valid_BT: Bool[Array, "B T"], h_BE: Float[Array, "B E"],
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """Update gates and states (float32), one token after the other."""
    def step(h: Array, token: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        i, first_B, valid_B = token
        before = jnp.where(first_B[:, None], 0.0, h)
        v = jnp.matmul(before.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
        i_r, i_z, i_n = jnp.split(i.astype(jnp.float32), 3, axis=-1)
        v_r, v_z, v_n = jnp.split(v, 3, axis=-1)
        r, z = jax.nn.sigmoid(i_r + v_r), jax.nn.sigmoid(i_z + v_z)
        new = z * before + (1 - z) * jnp.tanh(i_n + r * (v_n + bias_E))
        h = jnp.where(valid_B[:, None], new, h)  # a token that does not count leaves every bit
        return h, (z, h)

    over_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (inputs, first_BT, valid_BT))
    _, (z, h) = jax.lax.scan(step, h_BE, over_time)
    return jnp.swapaxes(z, 0, 1), jnp.swapaxes(h, 0, 1)
