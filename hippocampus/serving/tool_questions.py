"""Does a model choose the right tool, and is its answer right? Questions that are generated.

    arithmetic   "What is 482 * 37 - 95?"                        wants calculate
    look-up      "In which year was the mill of Torvale built?"   wants search or retrieve

Nobody can know the answers to the second kind: places and years are made up with the documents
that hold them. An answer is right if it is the only thing asked for that the text ends with: the
last number in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hippocampus.errors import ConfigError
from hippocampus.serving.calculator import calculate

_FIRST = ("Tor", "Mel", "Gar", "Ess", "Hol", "Brin", "Cald", "Wex", "Pell", "Ost", "Dun", "Ravn")
_LAST = ("vale", "mouth", "stead", "wick", "holm", "ford", "by", "combe", "ness", "thorpe")
_THINGS = ("mill", "harbour", "lighthouse", "bridge", "school", "library", "market hall", "tower")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      kind: "arithmetic" or "look-up".
      text: what is asked.
      answer: a number.
      tools: the names of which the first call should be one.
    """

    kind: str
    text: str
    answer: str
    tools: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions of a kind.

    Attributes:
      n: questions.
      answered: share whose answer is right.
      selected: share whose first call is of the right tool.
      exact: share of the calls of `calculate` whose answer is the value of their expression, or
        the refusal that this expression gets; NaN without a call.
    """

    n: int
    answered: float
    selected: float
    exact: float


def questions(n: int, seed: int = 0) -> tuple[list[Question], dict[str, str]]:
    """n questions of each kind, and the documents by name that answer the second.

    Args:
      n: at most 900.
      seed: the same seed gives the same ones.
    """
    rng = random.Random(seed)
    found = [_arithmetic(rng) for _ in range(n)]
    places = [first + last for first in _FIRST for last in _LAST]
    pairs = rng.sample([(place, thing) for place in places for thing in _THINGS], n)
    documents: dict[str, str] = {}
    for place, thing in pairs:
        year = str(rng.randrange(1500, 1990))
        documents[f"{place.lower()}.txt"] = (documents.get(f"{place.lower()}.txt", "")
                                             + f"The {thing} of {place} was built in {year}.\n")
        found.append(Question("look-up", f"In which year was the {thing} of {place} built?", year,
                              ("search", "retrieve")))
    return found, documents


def score(asked: Sequence[Question], texts: Sequence[str],
          results: Sequence[Any] | None = None) -> dict[str, Accuracy]:
    """How good answers are, by kind.

    Args:
      asked: the questions.
      texts: what the model wrote to each.
      results: a `ToolText` each, or None where there were no tools.
    """
    found = {}
    made: Sequence[Any] = results or ()
    for kind in dict.fromkeys(one.kind for one in asked):
        rows = [i for i, one in enumerate(asked) if one.kind == kind]
        right = [_last_number(texts[i]) == asked[i].answer for i in rows]
        chosen = [bool(made and made[i].tool_calls)
                  and made[i].tool_calls[0].name in asked[i].tools for i in rows]
        pairs = [pair for i in (rows if made else ())
                 for pair in zip(made[i].tool_calls, made[i].tool_responses, strict=True)]
        exact = [_is_exact(call, answer) for call, answer in pairs
                 if call.name == "calculate" and answer.failure in ("", "tool")]
        found[kind] = Accuracy(len(rows), sum(right) / len(rows), sum(chosen) / len(rows),
                               sum(exact) / len(exact) if exact else float("nan"))
    return found


def _arithmetic(rng: random.Random) -> Question:
    text = str(rng.randrange(11, 1000))
    for _ in range(rng.randrange(1, 4)):
        text += f" {rng.choice('+-*')} {rng.randrange(11, 1000)}"
    return Question("arithmetic", f"What is {text}?", calculate(text), ("calculate",))


def _last_number(text: str) -> str:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def _is_exact(call: Any, answer: Any) -> bool:
    try:
        value = calculate(call.arguments.get("expression", ""))
    except ConfigError:
        return not answer.ok
    return bool(answer.ok) and answer.output == value
