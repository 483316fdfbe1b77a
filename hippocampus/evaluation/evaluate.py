"""The plain cross-entropy of a model on held-out text."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hippocampus.data.batches import Batch
from hippocampus.evaluation.metrics import TokenLoss
from hippocampus.ops.cross_entropy import token_nll

_IN_FLIGHT = 8  # batches that the device may have waiting: more only fill its memory


@dataclass(frozen=True)
class Evaluation(TokenLoss):
    """Cross-entropy without smoothing or z-loss, averaged over every prediction.

    Attributes:
      nats_per_token: mean -log p of the predicted ids.
      tokens: how many were predicted.
      bytes_per_token: UTF-8 bytes of the text per prediction.
      words_per_token: words of the text per prediction; None where nobody counted them.
      skip_nats_per_token: that of one pass and one step of the segment flow instead of all
        passes; None for a model without the flow.
    """

    nats_per_token: float
    tokens: int
    bytes_per_token: float
    skip_nats_per_token: float | None = None
    words_per_token: float | None = None


def evaluate(model: Any, params: Any, windows: Iterable[Batch], bytes_per_token: float,
             place: Callable[[Batch], Batch] = lambda batch: batch,
             words_per_token: float | None = None) -> Evaluation:
    """Scores every window; a token sees what stands before it in its window.

    Args:
      model: an unbound model.
      params: its parameters.
      windows: the batches of an `EvaluationWindows`.
      bytes_per_token: of the same text.
      place: puts a batch onto devices.
      words_per_token: of the same text.
    """
    # Sums stay on the device for a few batches, so that it never waits for the host.
    pending: deque[dict[str, Array]] = deque()
    rows: list[dict[str, Any]] = []
    for batch in windows:
        pending.append(_sums(model, params, place(batch)))
        if len(pending) > _IN_FLIGHT:
            rows.append(jax.device_get(pending.popleft()))
    rows += jax.device_get(list(pending))
    total = {name: math.fsum(float(row[name]) for row in rows) for name in rows[0]}
    skip = total["skip"] / total["weight"] if "skip" in total else None
    return Evaluation(total["nll"] / total["weight"], round(total["weight"]), bytes_per_token, skip,
                      words_per_token)


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
