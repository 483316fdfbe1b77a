"""The forms that stories come in, told by their fields: `Story`, `Question`, `form_of`.

NarrativeQA has a row for every question, which repeats the whole document; FairytaleQA one for
every story. Of either, texts are read a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hippocampus.data.story_text import clean_text
from hippocampus.errors import DataError

NARRATIVEQA = ("document", "question", "answers")
FAIRYTALEQA = ("story", "sections", "qa")

_ROWS_PER_READ, _TEXTS_PER_READ = 1000, 16


@dataclass(frozen=True)
class Question:
    """A question about a story.

    Attributes:
        text: of the question.
        answers: as people gave them, at least one.
        kind: as the data set calls it, such as "feeling"; "" where it does not.
    """

    text: str
    answers: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Story:
    """A text and what is asked about it.

    Attributes:
        name: what tells it from the others.
        text: never blank.
        questions: those that have an answer.
    """

    name: str
    text: str
    questions: tuple[Question, ...]


class Rows(Protocol):
    """Rows of one of the splits of a source."""

    def fields(self) -> Sequence[str]:
        """Names of the columns."""
        ...

    def read(self, fields: Sequence[str], rows_per_read: int) -> Iterator[tuple[Any, ...]]:
        """Some fields of every row; dots lead into an object."""
        ...


class Form(Protocol):
    """A split in one of the known forms."""

    def stories(self) -> Iterator[Story]:
        """Every story once."""
        ...

    def names(self) -> Sequence[str]:
        """Their names, those without text too."""
        ...


def form_of(source: str, rows: Rows, text: str, streaming: bool) -> Form:
    """What the fields say the rows are."""
    fields = rows.fields()
    if set(NARRATIVEQA) <= set(fields):
        field = "document.text" if text == "document" else "document.summary.text"
        return (_StreamedNarratives if streaming else _Narratives)(source, rows, field)
    if set(FAIRYTALEQA) <= set(fields):
        return _Fairytales(source, rows)
    raise DataError(
        f"data.corpus: {source} has the fields {', '.join(fields) or 'none'}, which are of no "
        "known form", f"stories have {', '.join(NARRATIVEQA)} (NarrativeQA), or "
        f"{', '.join(FAIRYTALEQA)} (FairytaleQA)")


@dataclass(frozen=True)
class _Narratives:
    """NarrativeQA: a row is a question, and repeats the whole document."""

    source: str
    rows: Rows
    text: str

    def stories(self) -> Iterator[Story]:
        """Reads the questions first, so that rows may come in any order and texts need not stay."""
        waiting = self._questions()
        for name, text in self.rows.read(("document.id", self.text), _TEXTS_PER_READ):
            if (questions := waiting.pop(str(name), None)) is not None:
                yield Story(str(name), self._clean(text), tuple(questions))

    def names(self) -> Sequence[str]:
        found = self.rows.read(("document.id",), _ROWS_PER_READ)
        return list(dict.fromkeys(str(name) for name, in found))

    def _questions(self) -> dict[str, list[Question]]:
        found: dict[str, list[Question]] = {}
        fields = ("document.id", "question.text", "answers")
        for name, question, answers in self.rows.read(fields, _ROWS_PER_READ):
            found.setdefault(str(name), []).extend(self._question(question, answers))
        return found

    def _question(self, question: Any, answers: Any) -> list[Question]:
        try:
            return _questions([(question, [answer["text"] for answer in answers], "")])
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"data.corpus: a question of {self.source} is not NarrativeQA's",
                            "question is {text, …}, and answers a list of them") from None

    def _clean(self, text: Any) -> str:
        return clean_text(text) if isinstance(text, str) else ""


class _StreamedNarratives(_Narratives):
    """NarrativeQA read in one pass."""

    def stories(self) -> Iterator[Story]:
        """Takes rows of one story that follow each other for all that there are."""
        done: set[str] = set()
        current, body, questions = "", "", list[Question]()
        fields = ("document.id", "question.text", "answers", self.text)
        for name, question, answers, text in self.rows.read(fields, _TEXTS_PER_READ):
            if str(name) != current:
                if questions or body:
                    yield Story(current, body, tuple(questions))
                done.add(current)
                current, body, questions = str(name), self._clean(text), []
                if current in done:
                    raise DataError(
                        f"data.corpus: the rows of story {current!r} of {self.source} do not "
                        "follow each other", "read it with --config.data.streaming=False")
            questions += self._question(question, answers)
        if questions or body:
            yield Story(current, body, tuple(questions))


@dataclass(frozen=True)
class _Fairytales:
    """FairytaleQA: a row is a story in sections with all its questions."""

    source: str
    rows: Rows

    def stories(self) -> Iterator[Story]:
        seen: set[str] = set()
        for key, sections, asked in self.rows.read(FAIRYTALEQA, _TEXTS_PER_READ):
            name = str(key)
            if name in seen:
                raise DataError(f"data.corpus: the story {name!r} of {self.source} comes twice",
                                "remove one of them")
            seen.add(name)
            try:
                text = "\n\n".join(_texts(sections)).strip()
                questions = _questions((one["q"], one["a"], one.get("kind") or "")
                                       for one in asked)
            except (TypeError, KeyError, AttributeError):
                raise DataError(
                    f"data.corpus: the story {name!r} of {self.source} is not FairytaleQA's",
                    "sections is a list of texts, and qa one of {q, a: [text], …}") from None
            yield Story(name, text, tuple(questions))

    def names(self) -> Sequence[str]:
        return [str(name) for name, in self.rows.read(("story",), _TEXTS_PER_READ)]


def _questions(asked: Any) -> list[Question]:
    """Those that have an answer, without white space around them."""
    found = [Question(text.strip(), tuple(filter(None, map(str.strip, _texts(answers)))), kind)
             for text, answers, kind in asked]
    return [question for question in found if question.text and question.answers]


def _texts(texts: Any) -> Any:
    """What is a list, and not a text whose characters would be taken for one."""
    if isinstance(texts, str):
        raise TypeError
    return texts
