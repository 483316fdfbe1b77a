"""MambaBlock: a state-space layer on the residual stream, x = x + mixer(rms(x))."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import SSMConfig
from hippocampus.layers.dropout import Dropout
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.norms import RMSNorm
from hippocampus.layers.state_space import state_space


class MambaBlock(nn.Module):
    """One layer in front of the equilibrium; any kind of state-space layer."""

    ssm: SSMConfig
    n_heads: int
    dropout: float = 0.0
    norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
        positions_BT: Int[Array, "B T"], *, train: bool = False,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Runs the block.

        Args:
          x_BTD: residual stream.
          document_ids_BT: document of each token; None = one a row.
          positions_BT: position of each token in its document.
          train: dropout on (random stream "dropout").

        Returns:
          x_BTD, and `out`: the layer's names behind "mixer.", and "residual".
        """
        u_BTD = RMSNorm(self.norm_epsilon, self.dtype, name="norm")(x_BTD)
        y_BTD, part = self._mixer()(u_BTD, document_ids_BT, positions_BT)
        out = {f"mixer.{name}": value for name, value in part.items()}
        x_BTD = x_BTD + Dropout(self.dropout, deterministic=not train)(y_BTD)
        out["residual"] = x_BTD = self.edit("residual", x_BTD)
        return x_BTD, out

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, d_model: int) -> Any:
        """The cache before the first token."""
        return self._mixer(parent=None).init_cache(batch, max_length, d_model)

    @nn.compact
    def extend(
        self, x_BnD: Float[Array, "B n D"], positions_Bn: Int[Array, "B n"], cache: Any,
        valid_Bn: Bool[Array, "B n"],
    ) -> tuple[Float[Array, "B n D"], Any]:
        """Reads further tokens of every row; arguments as for the layers."""
        u_BnD = RMSNorm(self.norm_epsilon, self.dtype, name="norm")(x_BnD)
        y_BnD, cache = self._mixer().extend(u_BnD, positions_Bn, cache, valid_Bn)
        return x_BnD + y_BnD, cache

    def _mixer(self, **parent: None) -> Any:
        return state_space(self.ssm, self.n_heads, self.norm_epsilon, dtype=self.dtype,
                           edit=scoped(self.edit, "mixer."), name="mixer", **parent)
