"""The plain cross-entropy of a model on held-out text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hippocampus.data.batches import Batch, EvaluationWindows
from hippocampus.ops.cross_entropy import token_nll


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy without smoothing or z-loss, float32, averaged over every prediction.

    `skip_nats_per_token` is that of one pass and one step of the segment flow instead of all
    passes; None for a model without the flow.
    """

    nats_per_token: float
    tokens: int
    bytes_per_token: float
    skip_nats_per_token: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """nats per token / (ln 2 * bytes per token): comparable between tokenizers."""
        return self.nats_per_token / (math.log(2) * self.bytes_per_token)


def evaluate(model: Any, params: Any, windows: EvaluationWindows, bytes_per_token: float,
             place: Callable[[Batch], Batch] = lambda batch: batch) -> Evaluation:
    """Scores every window; a token sees what stands before it in its window.

    Args:
      model: an unbound model.
      params: its parameters.
      windows: of the validation ids.
      bytes_per_token: of the same text.
      place: puts a batch onto devices.
    """
    # Sums stay on the device until the end, so that it never waits for the host.
    sums = [_sums(model, params, place(batch)) for batch in windows]
    rows = jax.device_get(sums)
    total = {name: math.fsum(float(row[name]) for row in rows) for name in rows[0]}
    skip = total["skip"] / total["weight"] if "skip" in total else None
    return Evaluation(total["nll"] / total["weight"], round(total["weight"]), bytes_per_token, skip)


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: Any, batch: Batch) -> dict[str, Array]:
    hidden_BTD, out, _ = model.apply({"params": params}, batch, method="forward")
    states = {"nll": hidden_BTD}
    if "flow.skip_hidden" in out:
        states["skip"] = out["flow.skip_hidden"]
    weight_BT = batch.loss_weight_BT
    sums = {name: (token_nll(state, model.head(params), batch.targets_BT) * weight_BT).sum()
            for name, state in states.items()}
    return {**sums, "weight": jnp.sum(weight_BT)}
