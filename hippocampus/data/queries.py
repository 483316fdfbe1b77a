"""Questions of five kinds with answers that are known: `Query`, `make_queries`, `read_queries`.

    mathematical  sums, differences, products, comparisons, a price times a number: computed
    factual       who lives where, what has which colour, on which day of the week a date falls:
                  looked up in sentences that the prompt gives, or counted on from them
    creative      the next sentence of a short tale: there is no right answer, only how likely the
                  tale's own one is
    memory        items, codes and lists that the prompt has given, asked for after other words
    sequential    numbers, letters, weekdays, months and patterns, continued

No answer rests on what anybody claims of the world: each is computed from its prompt. A query is a
pure function of (seed, category, number).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hippocampus.data.query_kinds import FACTUAL, MATHEMATICAL, MEMORY, SEQUENTIAL, Asked
from hippocampus.data.query_tales import NAMES, PLACES, TALES, THINGS
from hippocampus.errors import ConfigError, DataError
from hippocampus.files import expand

CATEGORIES = ("mathematical", "factual", "creative", "memory", "sequential")
"""In the order of showing."""

WRITTEN = tuple(name for name in CATEGORIES if name != "creative")
"""Categories whose answers are right or wrong."""

_KINDS = {"mathematical": MATHEMATICAL, "factual": FACTUAL, "memory": MEMORY,
          "sequential": SEQUENTIAL}
_TRIES = 1000
_FIELDS = "it needs category, prompt, and answer or answers"


@dataclass(frozen=True)
class Query:
    """A prompt and what should follow it.

    Attributes:
        category: one of `CATEGORIES`.
        kind: within the category; "" where it has none.
        prompt: without white space at its end.
        answers: right ones; the first is the one whose probability is asked for.
    """

    category: str
    kind: str
    prompt: str
    answers: tuple[str, ...]


def make_queries(n: int = 1000, seed: int = 0) -> tuple[Query, ...]:
    """Make queries, as many of every category as of the others, or one more.

    Every prompt is there once. One but of a tale begins with another question of its kind and the
    answer to it, so that a model that only continues texts can tell what is wanted.

    Args:
        n: how many, at least one of each category.
        seed: other seeds give other queries.

    Returns:
        Queries, the categories one after another.

    Raises:
        ConfigError: fewer than there are categories, or more than there are different ones.
    """
    if n < len(CATEGORIES):
        raise ConfigError(f"{n} queries", f"there are {len(CATEGORIES)} categories: ask for at "
                          "least one of each")
    found: list[Query] = []
    for place, category in enumerate(CATEGORIES):
        wanted = (n + len(CATEGORIES) - 1 - place) // len(CATEGORIES)
        found += _different(category, wanted, seed)
    return tuple(found)


def read_queries(path: str | Path) -> tuple[Query, ...]:
    """Read queries of one's own: a file of JSON objects, one a line.

    Args:
        path: of objects with "category", "prompt", and "answer" or "answers"; "kind" may be there.

    Raises:
        DataError: no such file, no query in it, or a line that is none.
    """
    place = expand(path)
    try:
        lines = place.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {place}: {error}", "name a file of JSON objects, one a line"
                        ) from None
    found = tuple(_query(line, f"{place}, line {number}")
                  for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise DataError(f"{place} has no query", f"an object a line: {_FIELDS}")
    return found


def cloze(texts: Iterable[str]) -> Iterator[Query]:
    """Ask for every sentence of texts but the first: what stood before it is the prompt.

    Args:
        texts: of a few sentences each; a sentence ends with ".", "!" or "?" and a space.
    """
    for text in texts:
        sentences = _sentences(text)
        for n in range(1, len(sentences)):
            yield Query("creative", "cloze", " ".join(sentences[:n]), (sentences[n],))


def digest(queries: Sequence[Query]) -> str:
    """Hex sha256 of queries: two results with the same rest on the same questions."""
    lines = (json.dumps([q.category, q.kind, q.prompt, *q.answers]) for q in queries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _different(category: str, wanted: int, seed: int) -> list[Query]:
    """So many of a category, no prompt twice."""
    found: dict[str, Query] = {}
    make = _tale if category == "creative" else _asked
    for number in range(wanted + _TRIES):
        if len(found) == wanted:
            break
        # Seeded by text, which gives the same numbers in all versions of Python.
        query = make(category, number, random.Random(f"{seed}/{category}/{number}"))
        found.setdefault(query.prompt, query)
    if len(found) < wanted:
        raise ConfigError(f"there are no {wanted} different {category} queries",
                          "ask for fewer, or supply your own")
    return list(found.values())


def _asked(category: str, number: int, draw: random.Random) -> Query:
    kinds: Mapping[str, Callable[[random.Random], Asked]] = _KINDS[category]
    kind = list(kinds)[number % len(kinds)]
    example, own = kinds[kind](draw), kinds[kind](draw)
    for _ in range(_TRIES):  # an example that gives the answer away would test copying alone
        if example != own:
            break
        example = kinds[kind](draw)
    prompt = (f"Question: {example.question}\nAnswer: {example.answers[0]}\n\n"
              f"Question: {own.question}\nAnswer:")
    return Query(category, kind, prompt, own.answers)


def _tale(category: str, number: int, draw: random.Random) -> Query:
    tale = TALES[number % len(TALES)].format(
        name=draw.choice(NAMES), place=draw.choice(PLACES), thing=draw.choice(THINGS))
    return draw.choice(list(cloze([tale])))


def _sentences(text: str) -> list[str]:
    marked = " ".join(text.split())
    for end in ".!?":
        marked = marked.replace(f"{end} ", f"{end}\n")
    return marked.split("\n")


def _query(line: str, where: str) -> Query:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}", _FIELDS) from None
    row = row if isinstance(row, dict) else {}
    answers = row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    prompt, kind = row.get("prompt"), row.get("kind", "")
    if row.get("category") not in CATEGORIES:
        raise DataError(f"{where}: the category is {row.get('category')!r}",
                        f"it must be one of {', '.join(CATEGORIES)}")
    if not (isinstance(prompt, str) and prompt.strip() and isinstance(kind, str)
            and isinstance(answers, list) and answers
            and all(isinstance(one, str) and one.strip() for one in answers)):
        raise DataError(f"{where} is no query", _FIELDS)
    return Query(row["category"], kind, prompt.rstrip(), tuple(one.strip() for one in answers))
