"""What a probe may change at evaluation, as arrays: a whole suite then compiles once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import PATHS
from hippocampus.errors import ConfigError

Values = Array | np.ndarray
"""Of JAX, or of NumPy."""

CONTROLLER_NORMAL, CONTROLLER_ZERO, CONTROLLER_MOVED, CONTROLLER_RANDOM = range(4)
"""Values of `Interventions.controller`."""


class Interventions(struct.PyTreeNode):
    """Array arguments of a forward pass. None = not there; neutral values give the same bits.

    That is so on the CPU in float32, as far as XLA's own kernels compute: where its CPU library
    fuses whole chains (xla_cpu_experimental_ynn_fusion_type), the chains differ and the results
    agree up to rounding, about 1e-6.

    Attributes:
      path_mask_LP: 1 keeps a path of a layer, 0 removes it. Neutral: ones.
      renormalize: the gates of the paths that are kept sum to 1 again; False = they keep the
        values they had. Neutral: true, as None.
      gate_override_LP: a gate to use instead of the learned one, masked or not. Neutral: -1.
      depth_L: the steps k that Hopfield retrieval makes, more or fewer than the model was trained
        with (see MoRHopfield). Neutral: 0.
      shuffle_LP: 1 lets the mixer read this path's output at `source_PBT`. Neutral: zeros.
      source_PBT: flat index b * T + t of the token to read, per path. Neutral: each token itself.
      controller: what the controller's bias becomes: 0 itself, 1 zero, 2 that of the token at
        `controller_source_BT`, 3 random: `controller_noise_BTC` brought to the mean and covariance
        that the bias has over the tokens of the batch that count. Neutral: 0.
      controller_source_BT: as `source_PBT`. Neutral: each token itself.
      controller_noise_BTC: standard normal, C = L * P (layer first). Neutral: anything.
      segments: the pass r (1, 2, …) whose result counts. Neutral: `segments.train`. Given, the
        model can run `segments.eval` passes and selects one, so r may be traced.
    """

    path_mask_LP: Float[Values, "L P"] | None = None
    renormalize: Bool[Values, ""] | bool | None = None
    gate_override_LP: Float[Values, "L P"] | None = None
    depth_L: Int[Values, " L"] | None = None
    shuffle_LP: Float[Values, "L P"] | None = None
    source_PBT: Int[Values, "P B T"] | None = None
    controller: Int[Values, ""] | int | None = None
    controller_source_BT: Int[Values, "B T"] | None = None
    controller_noise_BTC: Float[Values, "B T C"] | None = None
    segments: Int[Values, ""] | int | None = None

    @classmethod
    def neutral(cls, n_layers: int, B: int, T: int, segments: int) -> Interventions:
        """Every array present, and none of them changes anything.

        A function that is compiled for these is compiled for all that have the same shapes.

        Args:
          n_layers: L.
          B, T: shape of the batch.
          segments: `segments.train` of the model.
        """
        LP = (n_layers, len(PATHS))
        own_BT = np.arange(B * T, dtype=np.int32).reshape(B, T)
        # From NumPy, because every new shape of jnp.ones is a program to compile.
        arrays = jax.device_put({
            "path_mask_LP": np.ones(LP, np.float32), "renormalize": np.bool_(True),
            "gate_override_LP": -np.ones(LP, np.float32),
            "depth_L": np.zeros(n_layers, np.int32), "shuffle_LP": np.zeros(LP, np.float32),
            "source_PBT": np.stack([own_BT] * len(PATHS)),
            "controller": np.int32(CONTROLLER_NORMAL), "controller_source_BT": own_BT,
            "controller_noise_BTC": np.zeros((B, T, LP[0] * LP[1]), np.float32),
            "segments": np.int32(segments)})
        return cls(**arrays)

    def of_layers(self) -> LayerInterventions:
        """What every layer gets a slice of, along a leading L axis; without what all share."""
        arrays: Any = (self.path_mask_LP, self.gate_override_LP, self.depth_L, self.shuffle_LP)
        return LayerInterventions(*arrays)

    def shared(self, layer: LayerInterventions) -> LayerInterventions:
        """A layer's slice with what all layers share."""
        return layer.replace(renormalize=self.renormalize, source_PBT=self.source_PBT)


class LayerInterventions(struct.PyTreeNode):
    """The part of `Interventions` that one layer reads, in the same units."""

    path_mask_P: Float[Array, " P"] | None = None
    gate_override_P: Float[Array, " P"] | None = None
    depth: Int[Array, ""] | None = None
    shuffle_P: Float[Array, " P"] | None = None
    renormalize: Bool[Array, ""] | bool | None = None
    source_PBT: Int[Array, "P B T"] | None = None

    def move(self, path: int, y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """A path's output as the mixer reads it.

        Args:
          path: its place in `PATHS`.
          y_BTD: the output.

        Raises:
          ConfigError: a shuffle that does not say from where.
        """
        if self.shuffle_P is None:
            return y_BTD
        if self.source_PBT is None:
            raise ConfigError("shuffle_LP needs source_PBT", "start from Interventions.neutral")
        source_BT = self.source_PBT[path]
        return jax.lax.cond(self.shuffle_P[path] > 0, lambda y: _read(y, source_BT),
                            lambda y: y, y_BTD)


NEUTRAL = Interventions()
NEUTRAL_LAYER = LayerInterventions()


def change_controller(
    bias_LBTP: Float[Array, "L B T P"], interventions: Interventions,
    weight_BT: Float[Array, "B T"],
) -> Float[Array, "L B T P"]:
    """The controller's bias after an intervention.

    Args:
      bias_LBTP: what the controller said.
      interventions: see `Interventions.controller`.
      weight_BT: how much each token counts in the moments of the random bias.

    Raises:
      ConfigError: `controller` without its source or its noise.
    """
    source_BT: Any = interventions.controller_source_BT
    noise_BTC: Any = interventions.controller_noise_BTC
    if interventions.controller is None:
        return bias_LBTP
    if source_BT is None or noise_BTC is None:
        raise ConfigError("controller needs controller_source_BT and controller_noise_BTC",
                          "start from Interventions.neutral")
    moved: list = [
        lambda bias: bias,
        jnp.zeros_like,
        lambda bias: jax.vmap(_read, (0, None))(bias, source_BT),
        lambda bias: _with_moments_of(bias, noise_BTC, weight_BT)]
    return jax.lax.switch(jnp.asarray(interventions.controller), moved, bias_LBTP)


def _read(x_BTD: Array, source_BT: Array) -> Array:
    """x at flat indices b * T + t."""
    return x_BTD.reshape(-1, x_BTD.shape[-1])[source_BT]


def _with_moments_of(bias_LBTP: Array, noise_BTC: Array, weight_BT: Array) -> Array:
    """Noise with the mean and the covariance, over all gates together, of the bias."""
    L, B, T, P = bias_LBTP.shape
    bias_BTC = jnp.moveaxis(bias_LBTP, 0, 2).reshape(B, T, L * P)
    share_BT = weight_BT / jnp.maximum(weight_BT.sum(), 1e-9)
    mean_C = jnp.einsum("bt,btc->c", share_BT, bias_BTC)
    centred = bias_BTC - mean_C
    covariance = jnp.einsum("bt,btc,bte->ce", share_BT, centred, centred)
    # Not Cholesky: a softmax ignores what all gates share, so the covariance may be singular.
    values, vectors = jnp.linalg.eigh(covariance)
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T
    random = (mean_C + noise_BTC @ root).reshape(B, T, L, P)
    return jnp.moveaxis(random, 2, 0)
