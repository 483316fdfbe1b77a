"""What the gates of a model do on a batch, for histograms."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from hippocampus.config import PATHS
from hippocampus.data.batches import Batch
from hippocampus.models.hybrid_block import block_specs


def gate_histograms(model: Any, params: Any, batch: Batch) -> dict[str, np.ndarray]:
    """Series name -> values over all tokens: every layer's gates per path, and retrieval depth."""
    out = jax.device_get(_gates(model, params, batch))
    values: dict[str, np.ndarray] = {}
    for i, spec in enumerate(block_specs(model.config)):
        for p, path in enumerate(path for path in PATHS if path in spec.paths):
            values[f"mixer/gate/{path}/layer_{i}"] = out[f"layers.{i}.mixer.gates"][..., p].ravel()
        if "hopfield" in spec.paths:
            gates = out[f"layers.{i}.hopfield.depth_gates"]
            depth = (gates * np.arange(1, spec.depth + 1)).sum(-1)
            values[f"hopfield/depth/layer_{i}"] = depth.ravel()
    return values


@functools.partial(jax.jit, static_argnums=0)
def _gates(model: Any, params: Any, batch: Batch) -> dict[str, Array]:
    _, out, _ = model.apply({"params": params}, batch, method="forward")
    return {name: value for name, value in out.items()
            if name.startswith("layers.") and name.endswith(("mixer.gates", "depth_gates"))}
