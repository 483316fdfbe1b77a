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
    """Cross-entropy without smoothing or z-loss, float32, averaged over every prediction."""

    nats_per_token: float
    tokens: int
    bytes_per_token: float

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
    nats, tokens = (float(sum(column)) for column in zip(*jax.device_get(sums), strict=True))
    return Evaluation(nats / tokens, round(tokens), bytes_per_token)


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: Any, batch: Batch) -> tuple[Array, Array]:
    hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward")
    nll_BT = token_nll(hidden_BTD, model.head(params), batch.targets_BT)
    return (nll_BT * batch.loss_weight_BT).sum(), jnp.sum(batch.loss_weight_BT)
