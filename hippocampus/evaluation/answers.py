"""How near a written answer is to those that people gave: `score_answer`, `by_story`.

    F1       of the words that both have:  2 P R / (P + R)             Rajpurkar et al. 2016
    exact    1 if nothing differs
    ROUGE-L  F1 of the longest common subsequence of words             Lin 2004

F1 and exact match leave out case, punctuation and articles, as SQuAD does; ROUGE-L reads runs of
ASCII letters and digits in lower case, unstemmed, as the `rouge-score` package does. Each is the
largest over the answers that people gave.
"""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class AnswerScore:
    """Of one answer, or a mean of several; each from 0 to 1.

    Attributes:
      exact_match: whether it is one of the references.
      f1: of its words.
      rouge_l: of its words in order.
    """

    exact_match: float
    f1: float
    rouge_l: float


def score_answer(prediction: str, references: Sequence[str]) -> AnswerScore:
    """Compares an answer with all that people gave; each score is its largest.

    Args:
      prediction: what was written.
      references: at least one.
    """
    return AnswerScore(*(max(score(prediction, reference) for reference in references)
                         for score in (exact_match, token_f1, rouge_l)))


def by_story(scores: Iterable[tuple[str, AnswerScore]]) -> dict[str, AnswerScore]:
    """The mean over the questions of each story.

    Questions about one story are no independent samples, stories are: compare these.

    Args:
      scores: the story and the score of every question.

    Returns:
      Story -> mean, in the order in which the stories come first.
    """
    grouped: dict[str, list[AnswerScore]] = {}
    for story, score in scores:
        grouped.setdefault(story, []).append(score)
    return {story: AnswerScore(*(statistics.fmean(getattr(one, name) for one in found)
                                 for name in ("exact_match", "f1", "rouge_l")))
            for story, found in grouped.items()}


def normalized(text: str) -> str:
    """A text without case, punctuation, articles and surplus white space.

    Source: SQuAD's evaluation script, version 1.1, normalize_answer.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same once normalized, else 0."""
    return float(normalized(prediction) == normalized(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the normalized words, in any order; 1 where both have none.

    Source: SQuAD's evaluation script, version 2.0, compute_f1.
    """
    ours, theirs = normalized(prediction).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 where there is no word.

    Source: Lin (2004), ROUGE: A package for automatic evaluation of summaries, section 3;
      rouge-score 0.1.2 without a stemmer.
    """
    ours, theirs = _ROUGE_WORD.findall(prediction.lower()), _ROUGE_WORD.findall(reference.lower())
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def _f1(shared: int, ours: int, theirs: int) -> float:
    """2 P R / (P + R) with P = shared / ours and R = shared / theirs."""
    return 2 * shared / (ours + theirs) if shared else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest one, row by row of the usual table."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
