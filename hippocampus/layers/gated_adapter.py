"""GatedAdapter: a state-space branch and a memory branch behind the attention of a frozen layer.

    u = norm(h),   s = W_out(SSM(u) + Mem(u)),   g = sigmoid(W_g u + b),   W_g = 0 at first
    residual:     y = o + tanh(a) g s,           W_out = 0, a = 1, b = 0 at first: y = o in every
                                                 bit
    interpolate:  y = (1 - g) o + g s',          b = -9 at first: g = 0.0001; s' has the root mean
                                                 square of o, token by token

h is what the layer's attention reads, o what it gives; Mem = W_m read(W_q u) (layers.slot_memory).
The gate is one per token, or one per token and channel. What an adapter remembers of a row is the
state of its state-space layer, whose size does not grow.

Source: De et al. 2024 (arXiv:2402.19427) for the state-space layer; Alayrac et al. 2022
(arXiv:2204.14198), 2.2, for tanh(a); Hu et al. 2021 (arXiv:2106.09685), 4.1, for W_out = 0; the
interpolating form is a highway, Srivastava et al. 2015 (arXiv:1505.00387), equation 3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config_adapters import AdaptersConfig
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.norms import RMSNorm, rms_normalize
from hippocampus.layers.slot_memory import SlotMemory
from hippocampus.layers.state_space import state_space
from hippocampus.layers.temporal_layer import TemporalLayer

_SMALLEST_POWER = 1e-5


class AdapterIntervention(struct.PyTreeNode):
    """What a probe changes in one adapter. None = not there; neutral values give the same bits.

    Attributes:
      enabled: 0 = the layer as it is without its adapter. Neutral: 1.
      memory_scale: what the memory branch is multiplied by. Neutral: 1.
      slot_order_S: slot s gives the value of slot order[s]. Neutral: 0, 1, 2, …
    """

    enabled: Float[Array, ""] | None = None
    memory_scale: Float[Array, ""] | None = None
    slot_order_S: Int[Array, " S"] | None = None


UNCHANGED = AdapterIntervention()


class GatedAdapter(nn.Module):
    """The adapter of one layer; see the module's docstring for the maths.

    Attributes:
      config: its settings.
      n_blocks: blocks of the gates of a gated state-space layer.
      norm_epsilon: added to the mean square in norms.
      dtype: of matrix products; gate, retrieval and state are float32.
      edit: of "ssm", "memory", "gate" and "out".
    """

    config: AdaptersConfig
    n_blocks: int
    norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, h_BTD: Float[Array, "B T D"], attended_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"], document_ids_BT: Int[Array, "B T"] | None = None, *,
        cache: Any = None, valid_BT: Bool[Array, "B T"] | None = None,
        intervention: AdapterIntervention = UNCHANGED,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Any]:
        """Joins the branches to what attention gives.

        Args:
          h_BTD: what attention reads.
          attended_BTD: o.
          positions_BT: position of each token in its document; the state restarts at 0.
          document_ids_BT: document of each token; None = one a row.
          cache: from `init_cache` or the last call: goes on with the rows; None = whole rows.
          valid_BT: with a cache, as for `TemporalLayer.extend`; None = all are valid.
          intervention: of a probe.

        Returns:
          y in the dtype of o; `out`: "gate" (B,T,1 or B,T,D), "ssm", "memory" (B,T,D, before the
          gate), "weights" (B,T,S), "beta" (H), "out" (B,T,D: y - o) and, of the residual form,
          "scale" (tanh a), all float32; and the new cache.
        """
        cfg, D = self.config, h_BTD.shape[-1]
        u_BTD = RMSNorm(self.norm_epsilon, self.dtype, name="norm")(h_BTD)
        ssm = self._ssm(name="ssm")
        if cache is None:
            ssm_BTD, _ = ssm(u_BTD, document_ids_BT, positions_BT)
        else:
            valid_BT = jnp.ones(h_BTD.shape[:2], bool) if valid_BT is None else valid_BT
            ssm_BTD, cache = ssm.extend(u_BTD, positions_BT, cache, valid_BT)
        memory_BTD, out = SlotMemory(cfg.memory, self.dtype, name="memory")(
            u_BTD, intervention.slot_order_S)
        out["ssm"] = ssm_BTD = self.edit("ssm", ssm_BTD.astype(jnp.float32))
        memory_BTD = memory_BTD.astype(jnp.float32)
        if intervention.memory_scale is not None:
            memory_BTD = intervention.memory_scale * memory_BTD
        out["memory"] = memory_BTD = self.edit("memory", memory_BTD)
        zero, drawn = nn.initializers.zeros, nn.initializers.lecun_normal()
        s_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out",
                         kernel_init=zero if cfg.mix == "residual" else drawn)(
                             ssm_BTD + memory_BTD)
        out["gate"] = gate = self.edit("gate", self._gate(u_BTD))
        s_BTD, o_BTD = s_BTD.astype(jnp.float32), attended_BTD.astype(jnp.float32)
        if cfg.mix == "residual":
            out["scale"] = scale = jnp.tanh(self.param("residual_scale", nn.initializers.ones, ()))
            added_BTD = scale * (gate * s_BTD)
        else:
            added_BTD = gate * (_like(s_BTD, o_BTD) - o_BTD)
        out["out"] = added_BTD = self.edit("out", added_BTD)
        y_BTD = o_BTD + added_BTD
        if intervention.enabled is not None:
            # Chosen after the sum, which a compiler may round once with the product in it.
            y_BTD = jnp.where(intervention.enabled > 0, y_BTD, o_BTD)
            out["out"] = jnp.where(intervention.enabled > 0, added_BTD, 0.0)
        return y_BTD.astype(attended_BTD.dtype), out, cache

    def init_cache(self, batch: int, max_length: int, d_model: int) -> Any:
        """The cache before the first token; needs no parameters.

        Args:
          batch: rows B.
          max_length: without meaning here: the state has the same size after any number of tokens.
          d_model: width D.
        """
        ssm: Any = self._ssm(parent=None)
        return ssm.init_cache(batch, max_length, d_model)

    def _ssm(self, **where: Any) -> TemporalLayer:
        return state_space(self.config.ssm, self.n_blocks, self.norm_epsilon, dtype=self.dtype,
                           edit=scoped(self.edit, "ssm."), **where)

    def _gate(self, u_BTD: Array) -> Array:
        cfg = self.config
        bias = cfg.gate_bias if cfg.mix == "interpolate" else 0.0
        gate = nn.Dense(1 if cfg.gate_width == "token" else u_BTD.shape[-1], dtype=self.dtype,
                        kernel_init=nn.initializers.zeros, name="gate",
                        bias_init=nn.initializers.constant(bias))(u_BTD)
        return jax.nn.sigmoid(gate.astype(jnp.float32))


def _like(s_BTD: Array, o_BTD: Array) -> Array:
    """s brought to the root mean square that o has, token by token."""
    power_BT1 = jnp.mean(o_BTD * o_BTD, axis=-1, keepdims=True)
    return rms_normalize(s_BTD, _SMALLEST_POWER) * jnp.sqrt(power_BT1 + 1e-12)
