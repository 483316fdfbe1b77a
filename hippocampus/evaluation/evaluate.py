"""The plain cross-entropy of a model on held-out text."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hippocampus.data.batches import Batch
from hippocampus.evaluation.metrics import TokenLoss
from hippocampus.ops.cross_entropy import token_hits, token_nll

_IN_FLIGHT = 8  # batches that the device may have waiting: more only fill its memory


@dataclass(frozen=True)
class Evaluation(TokenLoss):
    """Cross-entropy without smoothing or z-loss, averaged over every prediction.

    Attributes:
      nats_per_token: mean -log p of the predicted ids.
      tokens: how many were predicted.
      bytes_per_token: UTF-8 bytes of the text per prediction; None for what is not a text.
      words_per_token: words of the text per prediction; None where nobody counted them.
      skip_nats_per_token: that of one pass and one step of the segment flow instead of all
        passes; None for a model without the flow.
      accuracy: share of the predictions whose most likely id is the right one; None where it was
        not asked for.
      parts: the scores of each part of the windows.
    """

    nats_per_token: float
    tokens: int
    bytes_per_token: float | None
    skip_nats_per_token: float | None = None
    words_per_token: float | None = None
    accuracy: float | None = None
    parts: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How well a part of the predictions came out.

    Attributes:
      nats_per_token: mean -log p of the predicted ids.
      accuracy: share of the predictions whose most likely id is the right one.
      tokens: how many were predicted.
    """

    nats_per_token: float
    accuracy: float
    tokens: int


def evaluate(model: Any, params: Any, windows: Iterable[Batch], bytes_per_token: float | None,
             place: Callable[[Batch], Batch] = lambda batch: batch,
             words_per_token: float | None = None, parts: Sequence[str] = ()) -> Evaluation:
    """Scores every window; a token sees what stands before it in its window.

    Args:
      model: an unbound model.
      params: its parameters.
      windows: the batches of an `EvaluationWindows`.
      bytes_per_token: of the same text.
      place: puts a batch onto devices.
      words_per_token: of the same text.
      parts: the name of the part that each batch belongs to, for a score of each and accuracies;
        empty = none.
    """
    # Sums stay on the device for a few batches, so that it never waits for the host.
    pending: deque[dict[str, Array]] = deque()
    rows: list[dict[str, Any]] = []
    for batch in windows:
        pending.append(_sums(model, bool(parts), params, place(batch)))
        if len(pending) > _IN_FLIGHT:
            rows.append(jax.device_get(pending.popleft()))
    rows += jax.device_get(list(pending))
    total = _total(rows)
    skip = total["skip"] / total["weight"] if "skip" in total else None
    scores = {name: _score(_total([row for row, part in zip(rows, parts, strict=True)
                                   if part == name])) for name in dict.fromkeys(parts)}
    return Evaluation(total["nll"] / total["weight"], round(total["weight"]), bytes_per_token, skip,
                      words_per_token, _score(total).accuracy if parts else None, scores)


def _total(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    rows = list(rows)
    return {name: math.fsum(float(row[name]) for row in rows) for name in rows[0]}


def _score(total: Mapping[str, float]) -> Score:
    return Score(total["nll"] / total["weight"], total["hits"] / total["weight"],
                 round(total["weight"]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model: Any, accuracy: bool, params: Any, batch: Batch) -> dict[str, Array]:
    hidden_BTD, out, _ = model.apply({"params": params}, batch, method="forward")
    states = {"nll": hidden_BTD}
    if "flow.skip_hidden" in out:
        states["skip"] = out["flow.skip_hidden"]
    weight_BT = batch.loss_weight_BT
    sums = {name: (token_nll(state, model.head(params), batch.targets_BT) * weight_BT).sum()
            for name, state in states.items()}
    if accuracy:
        hits_BT = token_hits(hidden_BTD, model.head(params), batch.targets_BT)
        sums["hits"] = (hits_BT * weight_BT).sum()
    return {**sums, "weight": jnp.sum(weight_BT)}
