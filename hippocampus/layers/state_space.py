"""The state-space layers by the name of their kind: what `ssm.kind` stands for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from hippocampus.config import SSMConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.gru import GRU
from hippocampus.layers.mamba import MambaS6, MambaSSD
from hippocampus.layers.modern_ssm import ModernSSM
from hippocampus.layers.temporal_layer import TemporalLayer


def state_space(
    config: SSMConfig, n_heads: int, norm_epsilon: float, *, dtype: jnp.dtype = jnp.float32,
    edit: Edit = no_edit, name: str | None = None, **parent: None,
) -> TemporalLayer:
    """The layer of a kind.

    Args:
      config: its settings; `kind` chooses the layer.
      n_heads: H, of block-diagonal gates.
      norm_epsilon: added to the mean square in norms.
      dtype: of matrix products.
      edit: of its intermediates.
      name: in the parent's parameters.
      parent: `parent=None` for a layer that stands alone, as Flax has it.
    """
    common: dict[str, Any] = {"dtype": dtype, "edit": edit, "name": name, **parent}
    if config.kind == "gru":
        return GRU(config, **common)
    if config.kind == "s6":
        return MambaS6(config, norm_epsilon, **common)
    if config.kind == "ssd":
        return MambaSSD(config, norm_epsilon, **common)
    return ModernSSM(config, n_heads, **common)
