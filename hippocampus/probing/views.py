"""What the mechanisms of a forward pass did, as small arrays: pure functions for the view suites.

Everything here runs inside one compiled function of a suite. Arrays of T^2 or V numbers per token
are made for a few windows at a time (`by_rows`) and reduced where they are made; what comes out
has a leading axis of windows, so that means have standard errors over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hippocampus.data.batches import Batch
from hippocampus.models.hybrid_block import BlockSpec
from hippocampus.ops.attention import same_document
from hippocampus.ops.cross_entropy import token_nll

MOST_FLOATS = 2**24
"""Numbers of one intermediate array that a view holds at once: 64 MiB in float32."""

FEWEST_PATTERNS = 4
"""A retrieval from fewer patterns than this is no evidence of a regime, and is not counted."""

Out = dict[str, Array]
View = Callable[[Batch], dict[str, Array]]


def by_rows(view: View, batch: Batch, floats_per_token: int) -> dict[str, Array]:
    """`view` of a batch, computed for as many rows at a time as `MOST_FLOATS` allows.

    Args:
      view: batch -> arrays with a leading axis of rows.
      batch: B rows.
      floats_per_token: numbers of its largest intermediate array, per token.
    """
    B, T = batch.tokens_BT.shape
    most = max(1, MOST_FLOATS // (T * floats_per_token))
    rows = max(n for n in range(1, B + 1) if B % n == 0 and n <= most)
    if rows == B:
        return view(batch)
    parts = jax.tree.map(lambda a: a.reshape(B // rows, rows, *a.shape[1:]), batch)
    return jax.tree.map(lambda a: a.reshape(B, *a.shape[2:]), jax.lax.map(view, parts))


def positions(batch: Batch) -> Int[Array, "B T"]:
    """Position of each token in its document, as the model reads it."""
    if batch.positions_BT is not None:
        return batch.positions_BT
    return jnp.broadcast_to(jnp.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)


def real_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """Which tokens are not padding; one that predicts nothing that counts is real too."""
    if batch.document_ids_BT is None:
        return jnp.ones(batch.tokens_BT.shape, bool)
    return batch.document_ids_BT > 0


def token_sum(value: Float[Array, "B T ..."],
              weight_BT: Float[Array, "B T"]) -> Float[Array, "B ..."]:
    """Sum over a row's tokens, each times its weight (float32)."""
    value = jnp.where(weight_BT.reshape(*weight_BT.shape, *[1] * (value.ndim - 2)) > 0, value, 0)
    return jnp.einsum("bt,bt...->b...", weight_BT, value.astype(jnp.float32))


def attention_weights(
    query_BTHd: Float[Array, "B T H d"], key_BTGd: Float[Array, "B T G d"],
    document_ids_BT: Int[Array, "B T"] | None, window: int = 0,
) -> Float[Array, "B H T T"]:
    """The weights of `hippocampus.layers.self_attention`, from its "query" and "key" (float32).

    Args:
      query_BTHd, key_BTGd: as the layer names them; G divides H.
      document_ids_BT: document of each token; None = one a row.
      window: tokens that a token sees, itself included; 0 = all of its document before it.
    """
    (B, T, H, d), G = query_BTHd.shape, key_BTGd.shape[2]
    key_BTHd = jnp.repeat(key_BTGd, H // G, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query_BTHd.astype(jnp.float32),
                        key_BTHd.astype(jnp.float32)) * d**-0.5
    return jax.nn.softmax(jnp.where(visible(B, T, document_ids_BT, window)[:, None], scores,
                                    -jnp.inf), axis=-1)


def visible(B: int, T: int, document_ids_BT: Int[Array, "B T"] | None,
            window: int = 0) -> Bool[Array, "B T T"]:
    """Whether token t (second axis) sees token s (last axis)."""
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    seen = (s <= t) & (s > t - window if window else True)
    return jnp.broadcast_to(seen, (B, T, T)) & (
        True if document_ids_BT is None else same_document(document_ids_BT))


def attention_view(p_BHTT: Float[Array, "B H T T"], positions_BT: Int[Array, "B T"],
                   weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, "B H"]]:
    """Sums over the tokens of a row of what attention weights look like.

    Args:
      p_BHTT: weights of token t (third axis) on token s (last axis); rows sum to 1.
      positions_BT: position of each token in its document.
      weight_BT: weight per token.

    Returns:
      "entropy" (nats), "distance" (mean t - s, tokens), "first" (weight on the first token of the
      document) and "self" (on t). The first token of a document, which sees nothing but itself,
      is not counted: divide by the tokens with a position above 0 (`counted_later`).
    """
    T = p_BHTT.shape[-1]
    t, s = jnp.arange(T)[:, None], jnp.arange(T)
    first_BTT = (t - s) == positions_BT[..., None]
    values = {
        "entropy": entropy(p_BHTT),
        "distance": (p_BHTT * (t - s)).sum(-1),
        "first": jnp.where(first_BTT[:, None], p_BHTT, 0).sum(-1),
        "self": jnp.diagonal(p_BHTT, axis1=2, axis2=3)}
    later_BT = counted_later(positions_BT, weight_BT)
    return {name: token_sum(jnp.moveaxis(value, 1, 2), later_BT) for name, value in values.items()}


def counted_later(positions_BT: Int[Array, "B T"],
                  weight_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The weights of tokens that have another one before them in their document, 0 elsewhere."""
    return jnp.where(positions_BT > 0, weight_BT, 0.0)


def entropy(p: Float[Array, "... n"]) -> Float[Array, ...]:
    """-sum p log p in nats."""
    return -(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny))).sum(-1)


def retrieval_view(out: Out, layer: int, weight_BT: Float[Array, "B T"]) -> dict[str, Array]:
    """Sums over the tokens of a row of what a layer's retrieval looks like.

    Args:
      out: intermediates of a forward pass.
      layer: one with a Hopfield path.
      weight_BT: weight per token.

    Returns:
      "depth_gates" (B,K) over all tokens; over those with `FEWEST_PATTERNS` patterns or more,
      whose weights sum to "counted" (B): "entropy" (nats), "effective", "patterns" (B,H) and
      "regime" (B,H,3: single, metastable, global).
    """
    part = {name: out[f"layers.{layer}.hopfield.{name}"] for name in (
        "depth_gates", "entropy", "effective_patterns", "n_patterns", "regime")}
    counted_BT = jnp.where(part["n_patterns"][..., 0] >= FEWEST_PATTERNS, weight_BT, 0.0)
    return {
        "depth_gates": token_sum(part["depth_gates"], weight_BT),
        "counted": counted_BT.sum(1),
        "entropy": token_sum(part["entropy"], counted_BT),
        "effective": token_sum(part["effective_patterns"], counted_BT),
        "patterns": token_sum(part["n_patterns"], counted_BT),
        "regime": token_sum(jax.nn.one_hot(part["regime"], 3), counted_BT)}


def energy_view(energy_JBTH: Float[Array, "J B T H"], weight_BT: Float[Array, "B T"],
                tolerance: float) -> dict[str, Array]:
    """Sums over the tokens and heads of a row of the energies along a retrieval.

    Args:
      energy_JBTH: of the query and after each step; J = K + 1.
      weight_BT: weight per token.
      tolerance: what rounding explains, relative to the largest energy of the batch.

    Returns:
      "energy" and "square" (B,J: of E and E^2), "fell" and "rose" (B,J-1: how many token-heads
      went down, and up by more than rounding explains) and "largest_rise" (B,J-1).
    """
    energy_BTHJ = jnp.moveaxis(energy_JBTH, 0, -1)
    change = jnp.diff(energy_BTHJ, axis=-1)
    slack = tolerance * jnp.abs(energy_JBTH).max()
    counted = (weight_BT > 0)[..., None, None]
    return {
        "energy": token_sum(energy_BTHJ, weight_BT).sum(1),
        "square": token_sum(energy_BTHJ**2, weight_BT).sum(1),
        "fell": token_sum(change < -slack, weight_BT).sum(1),
        "rose": token_sum(change > slack, weight_BT).sum(1),
        "largest_rise": jnp.where(counted, change, -jnp.inf).max((1, 2))}


def decay_view(decay_BTE: Float[Array, "B T E"], positions_BT: Int[Array, "B T"],
               weight_BT: Float[Array, "B T"]) -> dict[str, Array]:
    """Sums over the tokens of a row of -log a and its square, per channel.

    Args:
      decay_BTE: what share of the state a token keeps, in [0, 1].
      positions_BT: position of each token; a document's first token keeps nothing, whatever its
        decay says, and is not counted.
      weight_BT: weight per token.

    Returns:
      "rate" and "square" (B,E), and "counted" (B).
    """
    later_BT = counted_later(positions_BT, weight_BT)
    rate_BTE = -jnp.log(jnp.maximum(decay_BTE, jnp.finfo(jnp.float32).tiny))
    return {"rate": token_sum(rate_BTE, later_BT), "square": token_sum(rate_BTE**2, later_BT),
            "counted": later_BT.sum(1)}


def lens_view(model: Any, params: Any, states_JBTD: Float[Array, "J B T D"],
              final_BTD: Float[Array, "B T D"], batch: Batch) -> dict[str, Float[Array, "B J"]]:
    """What the output layer would say of intermediate states: the logit lens.

    Args:
      model, params: an unbound model and its parameters.
      states_JBTD: residual streams.
      final_BTD: normalised final states.
      batch: tokens, targets and weights.

    Returns:
      Sums over the tokens of a row: "nll" (nats), "agrees" (whether the likeliest token is that
      of the final state) and "divergence" (KL of the lens from the final prediction, nats).

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    head, weight_BT = model.head(params), batch.loss_weight_BT
    final = jax.nn.log_softmax(head.logits(final_BTD)[..., :model.config.vocab_size])

    def read(state_BTD: Array) -> dict[str, Array]:
        hidden = normalize_out(model, params, state_BTD)
        log_p = jax.nn.log_softmax(head.logits(hidden)[..., :model.config.vocab_size])
        agrees = log_p.argmax(-1) == final.argmax(-1)
        return {"nll": token_sum(token_nll(hidden, head, batch.targets_BT), weight_BT),
                "agrees": token_sum(agrees, weight_BT),
                "divergence": token_sum((jnp.exp(final) * (final - log_p)).sum(-1), weight_BT)}

    return {name: jnp.moveaxis(value, 0, 1)
            for name, value in jax.lax.map(read, states_JBTD).items()}


def normalize_out(model: Any, params: Any, state_BTD: Float[Array, "B T D"]) -> Array:
    """A residual stream as the output layer reads it."""
    return model.apply({"params": params}, state_BTD,
                       method=lambda module, state: module.norm_out(state))


def residual_states(out: Out, n_layers: int, prefix: str = "") -> list[Float[Array, "B T D"]]:
    """h_0 (embeddings) to h_L of a pass; `prefix` as of its names ("segments.0." or "")."""
    return [out["embedding"], *(out[f"{prefix}layers.{i}.residual"] for i in range(n_layers))]


def straightness_view(states: Sequence[Float[Array, "B T D"]],
                      weight_BT: Float[Array, "B T"]) -> dict[str, Array]:
    """Sums over the tokens of a row of how straight the way of the states is.

    Args:
      states: h_0 to h_L.
      weight_BT: weight per token.

    Returns:
      "ratio" (B: |h_L - h_0| / sum of the steps' lengths, 1 = straight), "growth" (B: |h_L - h_0|
      / |h_0|), "length" (B,L: each step's, over |h_L - h_0|) and "cosine" (B,L: of each step with
      h_L - h_0).
    """
    h = jnp.stack([state.astype(jnp.float32) for state in states])
    step, whole = jnp.diff(h, axis=0), h[-1] - h[0]
    length, distance = jnp.linalg.norm(step, axis=-1), jnp.linalg.norm(whole, axis=-1)
    least = 1e-12
    cosine = (step * whole).sum(-1) / jnp.maximum(length * distance, least)
    values = {"ratio": distance / jnp.maximum(length.sum(0), least),
              "growth": distance / jnp.maximum(jnp.linalg.norm(h[0], axis=-1), least),
              "length": jnp.moveaxis(length / jnp.maximum(distance, least), 0, -1),
              "cosine": jnp.moveaxis(cosine, 0, -1)}
    return {name: token_sum(value, weight_BT) for name, value in values.items()}


def layers_with(path: str, specs: Sequence[BlockSpec]) -> list[int]:
    """The layers that have a path."""
    return [i for i, spec in enumerate(specs) if path in spec.paths]


def memory_length(rate: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """Tokens after which a channel keeps 1/e of what it held: 1 / mean(-log a).

    A product of decays falls below 1/e where their -log sum to 1, which at the mean rate is after
    so many tokens. 0.5 at every token gives 1.44; a channel that never forgets, infinity.

    Args:
      rate: mean -log a per token, from `decay_view`.
    """
    with np.errstate(divide="ignore"):
        return 1.0 / np.asarray(rate, np.float64)


def window_mean(sums: Float[np.ndarray, "W ..."], weight_W: Float[np.ndarray, " W"],
                ) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """The mean over all tokens of all windows, and its standard error over windows.

    Args:
      sums: of each window's tokens.
      weight_W: weight of each window's tokens.

    Returns:
      The ratio of the sums, and the error of that ratio (Cochran's; NaN for one window): windows,
      other than tokens, are almost independent of each other.
    """
    sums, weight = np.asarray(sums, np.float64), np.asarray(weight_W, np.float64)
    weight = weight.reshape(-1, *[1] * (sums.ndim - 1))
    total, n = weight.sum(), len(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums.sum(0) / total
        off = ((sums - mean * weight) ** 2).sum(0)
        error = np.sqrt(off * n / np.float64(n - 1)) / total
    return mean, error


def over_windows(probe: Any, view: Callable[[Any, Any, Batch], dict[str, Array]],
                 ) -> dict[str, np.ndarray]:
    """What a view finds on every batch of a probe, windows first; compiles once per batch shape.

    Args:
      probe: from `hippocampus.probing.probe.open_probe`.
      view: (model, params, batch) -> arrays with a leading axis of the batch's rows.
    """
    found: dict[str, np.ndarray] = probe.map(view)
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}


def known(rows: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Rows of a table in which what cannot be known, such as the error of one window, is None."""
    return tuple({key: None if isinstance(value, float) and math.isnan(value) else value
                  for key, value in row.items()} for row in rows)
