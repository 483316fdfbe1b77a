"""What the adapters of a Buu did on a batch: numbers to log, and sums to make statistics of.

    saturated   g within 0.0001 of 0 or 1, where at most 0.04 % of a gate's largest gradient is
                left; a fresh interpolating gate, 0.00012, is not
    use of a slot        p_s, the mean weight of its reads over tokens; they sum to 1
    effective slots      exp(-sum_s p_s log p_s): S where all are read alike, 1 where one is
    dead                 p_s < 0.1 / S

Sums of batches are merged (`merge`), so that no batch is kept; means and variances by the rule of
Chan et al., which loses no digits however many batches there are. Percentiles are read out of a
histogram, to half of its `BIN`.

Source: effective number of a distribution, Hill 1973 (doi:10.2307/1934352), order 1; merged
variances, Chan, Golub & LeVeque 1979, equation 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

Out = Mapping[str, Array]

SATURATED = 1e-4
"""How near to 0 or 1 a gate counts as saturated."""

DEAD = 0.1
"""A slot that is read less than this share of even use is dead."""

SAME = 0.95
"""Cosine from which on two slots are duplicates."""

BIN = 1e-3
"""Width of a bin of the histograms of gates."""

PERCENTILES = (5, 25, 50, 75, 95)
_BINS = round(1 / BIN)


@dataclass(frozen=True)
class GateSummary:
    """The gates of a layer over many tokens; with a gate per channel, over tokens and channels.

    Attributes:
      tokens: how many.
      mean, sd: of the gate.
      percentiles: the 5th, 25th, 50th, 75th and 95th (`PERCENTILES`).
      closed, opened: shares that are within `SATURATED` of 0, and of 1.
      scale: tanh(a), by which the adapter is multiplied besides; None where it has none.
    """

    tokens: int
    mean: float
    sd: float
    percentiles: tuple[float, ...]
    closed: float
    opened: float
    scale: float | None = None

    @property
    def saturated(self) -> float:
        """Share of gates that no longer learn."""
        return self.closed + self.opened


@dataclass(frozen=True)
class SlotSummary:
    """How the slots of a layer are read.

    Attributes:
      tokens: that read.
      usage_S: mean weight of each slot; they sum to 1.
      read_entropy: of the weights of a token, mean, nats.
    """

    tokens: int
    usage_S: tuple[float, ...]
    read_entropy: float

    @property
    def slots(self) -> int:
        """S."""
        return len(self.usage_S)

    @property
    def effective(self) -> float:
        """exp(entropy of the use), between 1 and S."""
        return effective_slots(np.asarray(self.usage_S))

    @property
    def effective_share(self) -> float:
        """Effective slots of all slots."""
        return self.effective / self.slots

    @property
    def dead(self) -> int:
        """Slots that are read less than a tenth of even use."""
        return int((np.asarray(self.usage_S) < DEAD / self.slots).sum())

    def hottest(self, n: int) -> tuple[int, ...]:
        """The slots that are read most, the first one most."""
        return tuple(int(s) for s in np.argsort(-np.asarray(self.usage_S), kind="stable")[:n])


def layer_sums(out: Out, layer: int, weight_BT: Float[Array, "B T"]) -> dict[str, Array]:
    """Sums of one layer over the tokens of a batch; runs on the device.

    Args:
      out: of a forward pass of a Buu.
      layer: of the decoder.
      weight_BT: 1 for tokens that count, else 0.

    Returns:
      What `merge` takes: "tokens", the mean and the sum of squared deviations of the gate, its
      saturated shares and histogram, sums of use and of read entropy, and tanh(a) where there is.
    """
    gate_BTG = out[f"layers.{layer}.adapter.gate"].astype(jnp.float32)
    weights_BTS = out[f"layers.{layer}.adapter.weights"].astype(jnp.float32)
    tokens = weight_BT.sum()
    share_BTG = jnp.broadcast_to(weight_BT[..., None] / gate_BTG.shape[-1], gate_BTG.shape)
    # A gate that is no number counts in no bin, and makes the mean none.
    mean = (share_BTG * gate_BTG).sum() / jnp.maximum(tokens, 1.0)
    bins = jnp.clip(jnp.nan_to_num(gate_BTG / BIN).astype(jnp.int32), 0, _BINS - 1)
    found = {
        "tokens": tokens, "mean": mean, "deviation": (share_BTG * (gate_BTG - mean) ** 2).sum(),
        "closed": (share_BTG * (gate_BTG < SATURATED)).sum(),
        "opened": (share_BTG * (gate_BTG > 1 - SATURATED)).sum(),
        "histogram": jnp.zeros(_BINS).at[bins].add(share_BTG),
        "usage": jnp.einsum("bts,bt->s", weights_BTS, weight_BT),
        "entropy": (_entropy(weights_BTS) * weight_BT).sum()}
    if (scale := out.get(f"layers.{layer}.adapter.scale")) is not None:
        found["scale"] = jnp.mean(scale)  # scanned layers may give one a row; all are equal
    return jax.lax.stop_gradient(found)


def merge(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of several batches together, in float64.

    Args:
      sums: of `layer_sums`, at least one; fetched one by one, so that they may be a generator.
    """
    total: dict[str, Any] = {}
    for one in sums:
        new = {name: np.asarray(value, np.float64) for name, value in one.items()}
        if not total:
            total = new
            continue
        n, m = total["tokens"], new["tokens"]
        both, apart = max(n + m, 1.0), new["mean"] - total["mean"]
        merged = {name: total[name] + new[name] for name in total}
        merged["mean"] = total["mean"] + apart * m / both
        merged["deviation"] = merged["deviation"] + apart**2 * n * m / both
        if "scale" in total:
            merged["scale"] = total["scale"]
        total = merged
    if not total:
        raise ValueError("no batch to make statistics of")
    return total


def gate_summary(sums: Mapping[str, Any]) -> GateSummary:
    """The statistics of a layer's gate, from its sums."""
    n = max(float(sums["tokens"]), 1.0)
    scale = float(sums["scale"]) if "scale" in sums else None
    return GateSummary(
        round(float(sums["tokens"])), float(sums["mean"]), float(np.sqrt(sums["deviation"] / n)),
        percentiles(np.asarray(sums["histogram"])), float(sums["closed"]) / n,
        float(sums["opened"]) / n, scale)


def slot_summary(sums: Mapping[str, Any]) -> SlotSummary:
    """How a layer's slots are read, from its sums."""
    n = max(float(sums["tokens"]), 1.0)
    return SlotSummary(round(float(sums["tokens"])),
                       tuple(float(p) for p in np.asarray(sums["usage"]) / n),
                       float(sums["entropy"]) / n)


def percentiles(histogram_N: Float64[np.ndarray, " N"],
                wanted: Sequence[float] = PERCENTILES) -> tuple[float, ...]:
    """Percentiles of values in [0, 1], each in the middle of its bin.

    Args:
      histogram_N: how many values lie in each of N equal bins.
      wanted: in per cent.
    """
    below_N = np.cumsum(histogram_N)
    if not below_N[-1] > 0:
        return (float("nan"),) * len(wanted)
    # A little less, so that rounding in the sums does not push the last one out of its bin.
    places = np.searchsorted(below_N, np.asarray(wanted) / 100 * below_N[-1] * (1 - 1e-6))
    return tuple(float((place + 0.5) / len(histogram_N)) for place in places)


def effective_slots(usage_S: Float64[np.ndarray, " S"]) -> float:
    """exp(entropy) of how slots are used; NaN where that is no distribution."""
    usage = np.asarray(usage_S, np.float64)
    total = usage.sum()
    if not np.isfinite(total) or total <= 0 or (usage < 0).any():
        return float("nan")
    p = usage[usage > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def duplicates(slots_SHd: Float[np.ndarray, "S ..."]) -> int:
    """How many slots say what an earlier one says: the cosine to one of them is above `SAME`.

    Args:
      slots_SHd: keys or values of the slots; all axes but the first are one vector.
    """
    flat = np.asarray(slots_SHd, np.float64).reshape(len(slots_SHd), -1)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
    return int((np.tril(unit @ unit.T, -1) > SAME).any(1).sum())


def token_sums(layers: Sequence[int], out: Out,
               weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """What training logs, as sums over tokens: divided by their weight they are the batch's.

    Args:
      layers: of the decoder, that have an adapter.
      out: of a forward pass.
      weight_BT: weight per token.

    Returns:
      For each layer "adapters/gate/<i>", "adapters/saturated/<i>", "adapters/effective_slots/<i>",
      "adapters/dead_slots/<i>", "adapters/added/<i>" (root mean square of what it adds) and, where
      there is one, "adapters/scale/<i>".
    """
    sums: dict[str, Array] = {}
    weight = weight_BT.sum()
    for i in layers:
        found = layer_sums(out, i, weight_BT)
        usage_S = found["usage"] / jnp.maximum(weight, 1e-30)
        dead = (usage_S < DEAD / len(usage_S)).sum()
        added_BT = jnp.sqrt(jnp.square(out[f"layers.{i}.adapter.out"]).mean(-1))
        sums |= {f"adapters/gate/{i}": found["mean"] * weight,
                 f"adapters/saturated/{i}": found["closed"] + found["opened"],
                 f"adapters/effective_slots/{i}": jnp.exp(_entropy(usage_S)) * weight,
                 f"adapters/dead_slots/{i}": dead * weight,
                 f"adapters/added/{i}": (added_BT * weight_BT).sum()}
        if "scale" in found:
            sums[f"adapters/scale/{i}"] = found["scale"] * weight
    return jax.lax.stop_gradient(sums)


def distributions(layers: Sequence[int], out: Out) -> dict[str, Array]:
    """Series name -> values: every gate of each layer, and the use of each of its slots times S."""
    values: dict[str, Array] = {}
    for i in layers:
        values[f"adapters/gate/layer_{i}"] = out[f"layers.{i}.adapter.gate"]
        weights_BTS = out[f"layers.{i}.adapter.weights"]
        values[f"adapters/slot_use/layer_{i}"] = weights_BTS.mean((0, 1)) * weights_BTS.shape[-1]
    return values


def _entropy(p: Float[Array, "*B S"]) -> Float[Array, "*B"]:
    return -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)
