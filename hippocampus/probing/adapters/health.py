"""Whether the adapters of a Buu are in order: `judge`, `health_report`.

Five checks, each of which fails the model:

    finite       parameters of the adapters and hidden states are finite
    identity     with every adapter switched off the model is the decoder: the largest difference of
                 its last hidden states, over the largest of these, is within rounding
    gates        no layer has more than 99 % of its gates saturated
    slots        no layer has fewer effective slots than 5 % of all
    base text    bits per byte of general text are no more than 5 % above the decoder's

and a score from 0 to 100, a weighted mean of shares that are 1 where nothing is amiss (`WEIGHTS`):
gates that still learn, effective slots of half of all (an even use is no aim in itself), slots
that are not dead, slots that are not duplicates, and how much of the 5 % of base text is left. The
first four are means over layers. The weights are a convention, made before any model was looked at;
what adapters are good for the controls say (`python -m hippocampus.probe --suite=buu`).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hippocampus.data.batches import Batch
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.errors import DataError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.adapter_statistics import GateSummary
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.probing.adapters.controls import adapters_of, bare, controls
from hippocampus.probing.adapters.monitors import ROWS, MemoryUsage, Observed, observe

MOST_SATURATED = 0.99
FEWEST_EFFECTIVE = 0.05
MOST_REGRESSION = 0.05
IDENTITY = {"float32": 1e-5, "bfloat16": 2.0**-5}
"""Relative difference up to which hidden states count as equal, by compute dtype: programs that
hold different operations may be rounded differently."""

WEIGHTS = {"gates": 0.25, "slots in use": 0.25, "live slots": 0.15, "distinct slots": 0.15,
           "base text": 0.2}
"""Of the parts of the score; they sum to 1."""

BASE_CHARACTERS = 20_000
"""Of general text that is read where none is given."""


@dataclass(frozen=True)
class Vitals:
    """What is judged.

    Attributes:
      finite: whether every parameter of the adapters, and every hidden state, is.
      identity: relative difference to the decoder with every adapter switched off.
      compute_dtype: in which that was found.
      gates: of each layer.
      memories: of each layer.
      base_bits, adapted_bits: bits per byte of general text, of the decoder and of the model.
    """

    finite: bool
    identity: float
    compute_dtype: str
    gates: Mapping[int, GateSummary]
    memories: Mapping[int, MemoryUsage]
    base_bits: float
    adapted_bits: float

    @property
    def regression(self) -> float:
        """By what share general text costs more bits than with the decoder alone."""
        return self.adapted_bits / self.base_bits - 1


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
      name: one of those of the module's docstring.
      value: what was found.
      limit: what it is compared with.
      passed: whether it holds.
      told: both in words.
    """

    name: str
    value: float
    limit: float
    passed: bool
    told: str


@dataclass(frozen=True)
class HealthReport:
    """The verdict.

    Attributes:
      checks: all of them.
      parts: name -> share between 0 and 1, weighted by `WEIGHTS`.
      vitals: what was judged.
    """

    checks: tuple[Check, ...]
    parts: Mapping[str, float]
    vitals: Vitals

    @property
    def healthy(self) -> bool:
        """Whether every check is passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that are not."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def score(self) -> float:
        """From 0 to 100; says nothing where a check failed."""
        return 100 * sum(WEIGHTS[name] * share for name, share in self.parts.items())

    def __str__(self) -> str:
        """A line for the verdict, and one for every check and part."""
        verdict = "healthy" if self.healthy else (
            "unhealthy: " + ", ".join(check.name for check in self.failures))
        return "\n".join([
            f"{verdict}; score {self.score:.0f} of 100",
            *(f"  {'ok  ' if check.passed else 'FAIL'} {check.name:<10} {check.told}"
              for check in self.checks),
            *(f"  {share:4.0%} {name} (weight {WEIGHTS[name]:g})"
              for name, share in self.parts.items())])


def judge(vitals: Vitals) -> HealthReport:
    """Checks and score of what was found; what is no number fails."""
    tolerance = IDENTITY.get(vitals.compute_dtype, IDENTITY["bfloat16"])
    gate = max(vitals.gates, key=lambda i: _or(vitals.gates[i].saturated, math.inf))
    slot = min(vitals.memories,
               key=lambda i: _or(vitals.memories[i].slots.effective_share, -math.inf))
    saturated = vitals.gates[gate].saturated
    few = vitals.memories[slot].slots.effective_share
    checks = (
        Check("finite", float(vitals.finite), 1.0, vitals.finite, "every number is finite"
              if vitals.finite else "parameters or hidden states are not finite"),
        Check("identity", vitals.identity, tolerance, vitals.identity <= tolerance,
              f"switched off, the adapters change hidden states by {vitals.identity:.2g} of the "
              f"largest (at most {tolerance:.2g} in {vitals.compute_dtype})"),
        Check("gates", saturated, MOST_SATURATED, saturated <= MOST_SATURATED,
              f"{saturated:.1%} saturated in layer {gate}, the most of all (at most "
              f"{MOST_SATURATED:.0%})"),
        Check("slots", few, FEWEST_EFFECTIVE, few >= FEWEST_EFFECTIVE,
              f"{few:.1%} of the slots are effective in layer {slot}, the fewest of all (at least "
              f"{FEWEST_EFFECTIVE:.0%})"),
        Check("base text", vitals.regression, MOST_REGRESSION,
              vitals.regression <= MOST_REGRESSION,
              f"{vitals.adapted_bits:.4f} bits per byte of general text, {vitals.base_bits:.4f} "
              f"without adapters: {vitals.regression:+.2%} (at most {MOST_REGRESSION:+.0%})"))
    return HealthReport(checks, _parts(vitals), vitals)


def health_report(lm: LanguageModel, base_text: str | None = None,
                  seen: Observed | None = None) -> HealthReport:
    """Examines a model, see `LanguageModel.health_report`.

    Args:
      lm: a Buu.
      base_text: general text; None = some of the documentation that comes with Python.
      seen: what `observe` found already; None = it is called.

    Raises:
      ConfigError: a model without adapters.
      DataError: a text shorter than two tokens.
    """
    model, layers = adapters_of(lm)
    ids = lm.tokenizer.encode(general_text() if base_text is None else base_text)
    if len(ids) < 2:
        raise DataError("the base text is shorter than two tokens", "there is nothing to predict")
    seen = seen or observe(lm)
    context = min(lm.config.data.context, len(ids) - 1)
    windows = EvaluationWindows(ids, context, min(ROWS, -(-(len(ids) - 1) // context)))
    given, base = controls(lm), bare(lm)
    apart: list[float] = []
    nats: list[tuple[float, float]] = []
    finite = _finite(lm.params["adapters"])
    for batch in windows:
        theirs = _read(base.model, base.params, batch, None)
        off = _read(model, lm.params, batch, given["base"])
        ours = _read(model, lm.params, batch, given["adapters"])
        apart.append(float(_difference(off["hidden"], theirs["hidden"])))
        nats.append((float(theirs["nll"]), float(ours["nll"])))
        finite &= bool(ours["finite"])
    in_bits = 1 / math.log(2) / max(lm.tokenizer.count_bytes(ids[1:]), 1)
    return judge(Vitals(
        finite, float(np.max(apart)), model.compute_dtype, seen.gates.layers,
        {i: seen.memory(lm, i) for i in layers},
        *(in_bits * math.fsum(own) for own in zip(*nats, strict=True))))


def general_text(characters: int = BASE_CHARACTERS) -> str:
    """Some of the documentation of the language that comes with Python.

    Args:
      characters: how much.

    Raises:
      DataError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without its documentation",
                        "give a general text") from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))[:characters]


def _parts(vitals: Vitals) -> dict[str, float]:
    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(min(max(_or(value, 0.0), 0.0), 1.0) for value in values)

    gates, memories = list(vitals.gates.values()), list(vitals.memories.values())
    return {
        "gates": mean([1 - gate.saturated for gate in gates]),
        "slots in use": mean([2 * one.slots.effective_share for one in memories]),
        "live slots": mean([1 - one.slots.dead / one.slots.slots for one in memories]),
        "distinct slots": mean([1 - one.duplicates / one.slots.slots for one in memories]),
        "base text": mean([1 - vitals.regression / MOST_REGRESSION])}


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _finite(params: Any) -> bool:
    return all(bool(np.isfinite(np.asarray(leaf, np.float32)).all())
               for leaf in jax.tree.leaves(params))


@jax.jit
def _difference(ours_BTD: Array, theirs_BTD: Array) -> Array:
    """The largest difference, over the largest of theirs."""
    ours, theirs = ours_BTD.astype(jnp.float32), theirs_BTD.astype(jnp.float32)
    return jnp.abs(ours - theirs).max() / jnp.maximum(jnp.abs(theirs).max(), 1e-30)


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Any, params: Any, batch: Batch, given: Any) -> dict[str, Array]:
    hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward",
                                   interventions=given)
    nll_BT = token_nll(hidden_BTD, model.head(params), batch.targets_BT)
    return {"nll": (nll_BT * batch.loss_weight_BT).sum(),
            "finite": jnp.isfinite(hidden_BTD).all(), "hidden": hidden_BTD}
