"""GatedMixer: a small network decides, per token, how much each path counts.

    g = softmax((W_2 silu(W_1 u) + b_0 + b_control) / tau) over the P paths
    y = sum_p g_p scale_p rms(y_p)

W_2 is zero at first, so that all paths start with equal shares (or with the shares asked for).
Normalising every path makes its gate comparable; still, *contribution* |g_p scale_p rms(y_p)| is
what says how much a path matters.

Source: Dong et al. 2024 (arXiv:2411.13676), section 2, for the normalised mean of parallel paths.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from hippocampus.config import MixerConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.norms import RMSNorm
from hippocampus.ops.mixing import mix_normalized


class GatedMixer(nn.Module):
    """Mixes the paths of a block; see the module's docstring for the maths."""

    config: MixerConfig
    first_shares: tuple[float, ...]
    """Gate of each path at initialisation; they sum to 1."""
    scale_init: float = 1.0
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, u_BTD: Float[Array, "B T D"], paths: dict[str, Float[Array, "B T D"]],
        control_BTP: Float[Array, "B T P"] | None = None,
        path_mask_P: Float[Array, " P"] | None = None,
        gate_override_P: Float[Array, " P"] | None = None,
        sum_to_one: Bool[Array, ""] | bool | None = None, *, train: bool = False,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Mixes.

        Args:
          u_BTD: normalised input of the block.
          paths: output of each path, by name; the order is that of `first_shares`.
          control_BTP: added to the gates' logits (the controller's bias).
          path_mask_P: 1 keeps a path, 0 removes it.
          gate_override_P: a gate to use instead; negative = leave the learned one.
          sum_to_one: whether the gates of the paths that are kept are renormalised; None = yes.
          train: draw path dropout (random stream "dropout").

        Returns:
          y_BTD, and `out`: "gates" (B,T,P, float32), "terms" (B,T,P,D, float32: what each path
          adds), "contribution" (B,T,P: their norms), "entropy" (B,T, nats) and "out". Arrays that
          change nothing give the same bits as None.
        """
        P = len(paths)
        hidden = nn.Dense(self.config.width, dtype=self.dtype, name="hidden")(u_BTD)
        logits = nn.Dense(P, dtype=jnp.float32, kernel_init=nn.initializers.zeros,
                          bias_init=self._bias_init, name="gate")(jax.nn.silu(hidden))
        if control_BTP is not None:
            logits = logits + control_BTP.astype(jnp.float32)
        gates_BTP = jax.nn.softmax(logits / self.config.temperature, axis=-1)
        if P == 1:  # a softmax of one is 1 with no gradient; said so, the network is not run
            gates_BTP = jnp.ones_like(gates_BTP)
        if train and P > 1 and self.config.path_dropout:
            gates_BTP = renormalize(gates_BTP, self._dropout_mask(gates_BTP))
        if path_mask_P is not None:
            kept_BTP = renormalize(gates_BTP, path_mask_P)
            gates_BTP = kept_BTP if sum_to_one is None else jnp.where(
                sum_to_one, kept_BTP, gates_BTP * path_mask_P)
        if gate_override_P is not None:
            gates_BTP = jnp.where(gate_override_P >= 0, gate_override_P, gates_BTP)
        gates_BTP = self.edit("gates", gates_BTP)
        norms = [RMSNorm(self.epsilon, scale_init=self.scale_init, name=f"norm_{name}")
                 for name in paths]
        # For who reads them; the sum has a form of its own, and unread ones cost nothing.
        terms = [gates_BTP[..., p, None] * norm(y)
                 for p, (norm, y) in enumerate(zip(norms, paths.values(), strict=True))]
        scales: list[Array] = [norm.get_variable("params", "scale") for norm in norms]
        y_BTD = mix_normalized(gates_BTP, scales, list(paths.values()), self.epsilon)
        y_BTD = self.edit("out", y_BTD.astype(self.dtype))
        log_gates = jnp.log(jnp.maximum(gates_BTP, 1e-30))
        return y_BTD, {
            "gates": gates_BTP, "out": y_BTD, "entropy": -(gates_BTP * log_gates).sum(-1),
            "terms": jnp.stack(terms, axis=-2),
            "contribution": jnp.stack([jnp.linalg.norm(term, axis=-1) for term in terms], -1)}

    def _bias_init(self, key: Array, shape: tuple[int], dtype: jnp.dtype) -> Array:
        return self.config.temperature * jnp.log(jnp.asarray(self.first_shares, dtype))

    def _dropout_mask(self, gates_BTP: Array) -> Array:
        """Per sequence, with the chance asked for, one path chosen evenly is 0."""
        B, _, P = gates_BTP.shape
        key_drop, key_path = jax.random.split(self.make_rng("dropout"))
        dropped = jax.random.bernoulli(key_drop, self.config.path_dropout, (B, 1))
        chosen = jax.nn.one_hot(jax.random.randint(key_path, (B,), 0, P), P)
        return 1 - (dropped * chosen)[:, None]


def renormalize(gates: Float[Array, "... P"], mask: Float[Array, "... P"]) -> Float[Array, "... P"]:
    """gates * mask / sum(gates * mask); where the mask keeps all, exactly the gates."""
    masked = gates * mask
    total = jnp.maximum(masked.sum(-1, keepdims=True), 1e-9)
    return jnp.where(jnp.all(mask == 1, axis=-1, keepdims=True), gates, masked / total)
