"""What was found of adapters: losses of windows, answers to queries, and comparisons of both."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float64

from hippocampus.data.queries import CATEGORIES, WRITTEN
from hippocampus.evaluation.answers import AnswerScore
from hippocampus.evaluation.paired import (
    PairedComparison,
    compare_paired,
    effect_size,
    mean_interval,
)
from hippocampus.probing.adapters.health import HealthReport
from hippocampus.probing.adapters.monitors import GateReport, MemoryUsage

EXACT, F1, LOG_P = "exact match", "F1", "log p"
MEASURES = (EXACT, F1, LOG_P)
"""The last one in nats per token of the answer."""


@dataclass(frozen=True)
class Answer:
    """One query put to one system.

    Attributes:
      system: its name.
      number: of the query.
      category, kind, prompt, references: of the query.
      log_p: of the first reference behind the prompt, nats.
      tokens: of that reference.
      text: what was written greedily, up to the end of its first line; None = nothing was asked
        for, because there is no right answer.
      score: of `text`.
    """

    system: str
    number: int
    category: str
    kind: str
    prompt: str
    references: tuple[str, ...]
    log_p: float
    tokens: int
    text: str | None
    score: AnswerScore | None

    def measured(self, measure: str) -> float | None:
        """One of `MEASURES`; None where there is no such score."""
        if measure == LOG_P:
            return self.log_p / self.tokens
        if self.score is None:
            return None
        return self.score.exact_match if measure == EXACT else self.score.f1


@dataclass(frozen=True, eq=False)
class Losses:
    """Of a system, or of a set of layers, on the windows of the text.

    Attributes:
      nll_W: summed -log p of each window.
      weight_W: predictions of each.
    """

    nll_W: Float64[np.ndarray, " W"]
    weight_W: Float64[np.ndarray, " W"]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll_W.sum() / self.weight_W.sum())

    @property
    def by_window(self) -> dict[str, float]:
        """Nats per token of each window."""
        return {str(i): float(x) for i, x in enumerate(self.nll_W / self.weight_W)}


@dataclass(frozen=True)
class Stage:
    """The model with the adapters of some layers only.

    Attributes:
      name: of the row.
      kind: "up to" (all adapters from the first one to this layer's), or "only".
      layer: the last, or only, one; None = no adapter at all.
      losses: of the windows.
      log_p: nats per token of the queries' answers, by category.
    """

    name: str
    kind: str
    layer: int | None
    losses: Losses
    log_p: Mapping[str, float]


@dataclass(frozen=True)
class Findings:
    """All that was measured.

    Attributes:
      losses: system -> on the windows.
      trained: system -> parameters trained for it.
      answers: of every system in the same order of queries.
      stages: layers enabled one by one, and alone.
      gates: over queries and held-out text.
      memories: layer -> how it is read.
      health: the verdict.
      queries: how many, and where they come from.
      seed: of all that is drawn.
      notes: what is to be said of it.
    """

    losses: Mapping[str, Losses]
    trained: Mapping[str, int]
    answers: tuple[Answer, ...]
    stages: tuple[Stage, ...]
    gates: GateReport
    memories: Mapping[int, MemoryUsage]
    health: HealthReport
    queries: str
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def systems(self) -> tuple[str, ...]:
        """In the order of the tables."""
        return tuple(self.losses)

    @property
    def categories(self) -> tuple[str, ...]:
        """Those that have queries."""
        there = {answer.category for answer in self.answers}
        return tuple(name for name in CATEGORIES if name in there)

    def values(self, system: str, measure: str, category: str = "") -> dict[str, float]:
        """Query -> a measure, of one category or of all where it is known."""
        found = {str(a.number): a.measured(measure) for a in self.answers
                 if a.system == system and category in ("", a.category)}
        return {number: value for number, value in found.items() if value is not None}

    def interval(self, system: str, measure: str,
                 category: str = "") -> tuple[float, float, float] | None:
        """Mean and bounds of its 95 % interval; None where there is no such score."""
        values = list(self.values(system, measure, category).values())
        return (statistics.fmean(values), *mean_interval(values, self.seed)) if values else None

    def against_base(self, system: str, base: str, measure: str,
                     category: str = "") -> Comparison | None:
        """A system against another one, query by query; None where there is no such score."""
        ours, theirs = (self.values(name, measure, category) for name in (system, base))
        return Comparison.of(ours, theirs, self.seed) if ours else None

    def loss_against(self, losses: Losses, base: Losses) -> Comparison:
        """Losses against others, window by window, in nats per token: below 0 is better."""
        return Comparison.of(losses.by_window, base.by_window, self.seed)

    def lines(self) -> str:
        """A JSON object for every answer."""
        return "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n"
                       for answer in self.answers)


@dataclass(frozen=True)
class Comparison:
    """A paired comparison and its effect size.

    Attributes:
      paired: difference, interval and p-values.
      effect: mean over standard deviation of the differences; None where all are equal.
    """

    paired: PairedComparison
    effect: float | None

    @classmethod
    def of(cls, ours: Mapping[str, float], theirs: Mapping[str, float], seed: int) -> Comparison:
        """Compares numbers by query or window."""
        return cls(compare_paired(ours, theirs, seed), effect_size(ours, theirs))


def scored(category: str) -> bool:
    """Whether a category has right answers."""
    return category in WRITTEN
