"""What the answers are worth: means over stories, comparisons, and the verdict.

Stories are the unit of every interval and test: a story's number is the mean over its questions.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from hippocampus.evaluation.answers import AnswerScore
from hippocampus.evaluation.paired import (
    POWER,
    PairedComparison,
    compare_paired,
    mean_interval,
    smallest_effect,
)

LEVEL = 0.01
"""p below which a memory beats a control."""

MEASURES: Mapping[str, Callable[[Answer], float]] = {
    "log p": lambda answer: answer.log_p,
    "log p per token": lambda answer: answer.log_p / answer.tokens,
    "F1": lambda answer: answer.score.f1,
    "exact match": lambda answer: answer.score.exact_match,
    "ROUGE-L": lambda answer: answer.score.rouge_l}
"""Of an answer; all are better where larger."""

PAIRS = (("memory", "empty"), ("memory", "other"), ("memory", "snippet"), ("story", "memory"))
"""What is compared; the memory has to beat the first two."""


@dataclass(frozen=True)
class Answer:
    """One question under one condition.

    Attributes:
      condition: see `hippocampus.probing.memory.study`.
      story: name of it.
      number: of the question among all.
      question, references: as people put them.
      text: what the model wrote.
      log_p: of the first reference behind the prompt, in nats; no id that ends it is counted.
      tokens: of that reference.
      score: of `text`.
      context_bytes: of the text in front of the question.
      cut: not all of that text fitted.
    """

    condition: str
    story: str
    number: int
    question: str
    references: tuple[str, ...]
    text: str
    log_p: float
    tokens: int
    score: AnswerScore
    context_bytes: int
    cut: bool

    @property
    def key(self) -> tuple[str, int]:
        """The question, whatever the condition."""
        return self.story, self.number


@dataclass(frozen=True)
class CurvePoint:
    """The memory alone at one point of a curve.

    Attributes:
      kind, amount: of a `Point`.
      log_p: of every question's answer, by story and number.
    """

    kind: str
    amount: int
    log_p: Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Findings:
    """All that was asked.

    Attributes:
      answers: of every condition in the same order of questions.
      curves: the first one is of the memory as it is.
      memory_bytes: of each story's file.
      gate: tanh(a) of the memory.
      slots: of the memory as it is.
      row_tokens: story tokens of a row, the unit of a delay.
      seed: of what was drawn.
      notes: what is to be said of it.
    """

    answers: tuple[Answer, ...]
    curves: tuple[CurvePoint, ...]
    memory_bytes: tuple[int, ...]
    gate: float
    slots: int
    row_tokens: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def conditions(self) -> tuple[str, ...]:
        """In the order of asking."""
        return tuple(dict.fromkeys(answer.condition for answer in self.answers))

    @property
    def stories(self) -> int:
        """How many were asked about."""
        return len(self.memory_bytes)

    def of(self, condition: str) -> list[Answer]:
        """The answers under a condition."""
        return [answer for answer in self.answers if answer.condition == condition]

    def by_story(self, condition: str, measure: str) -> dict[str, float]:
        """A measure under a condition: story -> mean over its questions."""
        return _means((a.story, MEASURES[measure](a)) for a in self.of(condition))

    def compare(self, ours: str, theirs: str, measure: str) -> Comparison:
        """Two conditions, story by story."""
        return Comparison.of(self.by_story(ours, measure), self.by_story(theirs, measure),
                             self.seed)

    def gain(self, point: CurvePoint) -> dict[str, float]:
        """log p at a point of a curve over that of an empty memory, by story."""
        empty = {answer.key: answer.log_p for answer in self.of("empty")}
        return _means((key[0], log_p - empty[key]) for key, log_p in point.log_p.items())

    def curve(self, kind: str) -> tuple[CurvePoint, ...]:
        """The points of a kind with the memory as it is among them, in the order of amounts."""
        base = CurvePoint(kind, self.slots if kind == "slots" else 0, self.curves[0].log_p)
        own = [point for point in self.curves if point.kind == kind]
        return tuple(sorted([base, *own], key=lambda point: point.amount)) if own else ()

    def lines(self) -> str:
        """A JSON object for every answer."""
        return "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n"
                       for answer in self.answers)


@dataclass(frozen=True)
class Comparison:
    """A paired comparison, and what would have been found at `LEVEL`.

    Attributes:
      paired: interval and p-values.
      effect: mean difference that is found with a chance of `POWER` at p < `LEVEL`; None where
        all differences are equal, whose spread is not known.
    """

    paired: PairedComparison
    effect: float | None

    @classmethod
    def of(cls, ours: Mapping[str, float], theirs: Mapping[str, float], seed: int) -> Comparison:
        """Compares numbers by story."""
        differences = [ours[story] - theirs[story] for story in ours]
        n = len(differences)
        sd = statistics.stdev(differences) if n > 1 else 0.0
        return cls(compare_paired(ours, theirs, seed), smallest_effect(sd, n, LEVEL) or None)

    @property
    def beats(self) -> bool:
        """Whether ours is above theirs, at `LEVEL`."""
        return self.paired.difference > 0 and self.paired.p_flip < LEVEL


@dataclass(frozen=True)
class Verdict:
    """Whether the memory alone makes answers more likely.

    Attributes:
      passed: it beats an empty memory and another story's, both at `LEVEL`.
      lines: why, with the power of what was not found.
    """

    passed: bool
    lines: tuple[str, ...]


def judge(findings: Findings) -> Verdict:
    """The verdict of the log-probability of answers, in nats an answer."""
    controls = ("empty", "other")
    found = {theirs: findings.compare("memory", theirs, "log p") for theirs in controls}
    passed = all(one.beats for one in found.values())
    n, seed = findings.stories, findings.seed
    first = ("passed: with its own memory alone the answers are more likely than with an empty one "
             f"and with another story's, both p < {LEVEL:g}" if passed else
             f"null result: not both controls are beaten at p < {LEVEL:g}")
    first += f", over {n} stories (seed {seed})"
    lines = [first, *(f"memory - {theirs}: {_told(one, n)}" for theirs, one in found.items())]
    if not passed and 2.0 ** (1 - n) >= LEVEL:
        lines.append(f"with {n} stories no outcome has p below {2.0 ** (1 - n):.3g}: nothing could "
                     "have been found")
    if all(one.paired.better == one.paired.worse == 0 for one in found.values()):
        lines.append("every answer is as likely under all three, to the bit: the memory says "
                     f"nothing (its gate is {findings.gate:.3g})")
    return Verdict(passed, tuple(lines))


def interval(values: Mapping[str, float], seed: int) -> tuple[float, float, float]:
    """Mean over stories, and the bounds of its interval."""
    own = list(values.values())
    return (statistics.fmean(own), *mean_interval(own, seed))


def _told(one: Comparison, n: int) -> str:
    p = one.paired
    power = "" if one.effect is None else (
        f"; {n} stories show a mean difference of {one.effect:.3g} with a chance of {POWER:.0%} at "
        f"p < {LEVEL:g}")
    return (f"{p.difference:+.4g} nats an answer [{p.low:+.4g}, {p.high:+.4g}], p = {p.p_flip:.2g}"
            f"{power}")


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for story, value in pairs:
        grouped.setdefault(story, []).append(value)
    return {story: statistics.fmean(own) for story, own in grouped.items()}
