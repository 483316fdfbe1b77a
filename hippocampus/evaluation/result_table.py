"""Tables that say how their numbers came about: `Protocol`, `Column`, `ResultTable`.

Every table of a probe, an ablation or a report is one of these. A loss or perplexity per token
depends on what a token is, so a table with such a column and two tokenizers cannot be made; and
there is no table without a protocol, which is printed beside the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group

from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.evaluation.report import WEIGHTS, Windows
from hippocampus.evaluation.tables import DIGEST_SHOWN, csv_text, number, render

PER_TOKEN = ("nats/token", "ppl/token", "bits/token")
"""Units that depend on what a token is."""

FLAG = "flag"
"""Key of a row's mark, such as "!" for a model that counting words would beat."""


@dataclass(frozen=True)
class Protocol:
    """On what, and how, something was measured.

    Attributes:
      text: name of the corpus, task or file.
      text_digest: of its contents.
      split: "validation", "test", or "text" for a file.
      tokens: predictions that the numbers are means of.
      tokenizer: its kind.
      tokenizer_digest: of its contents.
      vocabulary: ids V of the tokenizer.
      context: T, tokens in a window.
      stride: tokens from one window to the next.
      documents: "joined" or "packed".
      weights: "ema" or "raw".
      step: of the checkpoint; None for several runs.
      unknown_rate: share of the ids that are `<unk>`.
      seeds: runs that a number is a mean of.
    """

    text: str
    text_digest: str
    split: str
    tokens: int
    tokenizer: str
    tokenizer_digest: str
    vocabulary: int
    context: int
    stride: int
    documents: str
    weights: str = "ema"
    step: int | None = None
    unknown_rate: float = 0.0
    seeds: int = 1

    @classmethod
    def of(cls, text: HeldOutText, windows: Windows, *, weights: str, step: int | None,
           tokens: int | None = None, seeds: int = 1) -> Protocol:
        """The protocol of a measurement on a held-out text.

        Args:
          text: what was predicted.
          windows: how it was cut.
          weights, step, seeds: see the attributes.
          tokens: predictions that counted; None = all of the text's.
        """
        return cls(text.name, text.digest, text.split,
                   text.predictions if tokens is None else tokens, text.tokenizer.kind,
                   text.tokenizer.digest, text.tokenizer.vocab_size, windows.context,
                   windows.stride or windows.context,
                   "joined" if text.document_starts is None else "packed", weights, step,
                   text.unknown_rate, seeds)

    def lines(self) -> tuple[str, ...]:
        """For people; what no reader needs is left out."""
        part = "" if self.split == "text" else f"{self.split} of "
        weights = f"{WEIGHTS.get(self.weights, self.weights)} weights"
        of = [weights] if self.step is None else [weights, f"step {self.step:,}"]
        if self.seeds > 1:
            of.append(f"{self.seeds} seeds")
        unknown = f", OOV {self.unknown_rate:.2%}" if self.unknown_rate else ""
        return (
            f"{part}{self.text} (sha256 {self.text_digest[:DIGEST_SHOWN]}), {self.tokens:,} tokens "
            f"predicted; {', '.join(of)}",
            f"tokenizer {self.tokenizer} {self.tokenizer_digest[:DIGEST_SHOWN]}, vocabulary "
            f"{self.vocabulary:,}{unknown}; context {self.context}, stride {self.stride}, "
            f"documents {self.documents}")

    def record(self) -> dict[str, Any]:
        """For JSON and CSV files."""
        return asdict(self)


@dataclass(frozen=True)
class Column:
    """A column of one quantity.

    Attributes:
      key: of its values in the rows.
      title: above it.
      unit: "nats/token", "bits/byte", "ppl/word", …; "" where there is none.
      digits: behind the point.
    """

    key: str
    title: str
    unit: str = ""
    digits: int = 4

    @property
    def header(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class ResultTable:
    """Rows of results with the protocol that they were measured by.

    Attributes:
      name: in file names and links; letters, digits and "_".
      title: one line.
      columns: the first one names the rows.
      rows: values by key: text, numbers, or None for what there is not. Other keys are kept.
      protocols: one for all rows, or all that occur.
      notes: what a reader has to know.

    Raises:
      ConfigError: a column per token although the rows have several tokenizers, or no protocol.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    protocols: tuple[Protocol, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.protocols:
            raise ConfigError(f"the table {self.title!r} has no protocol",
                              "numbers are printed with how they were measured")
        digests = dict.fromkeys(protocol.tokenizer_digest for protocol in self.protocols)
        for column in self.columns:
            if column.unit in PER_TOKEN and len(digests) > 1:
                shown = ", ".join(digest[:DIGEST_SHOWN] for digest in digests)
                raise ConfigError(
                    f"{column.header} does not compare between {len(digests)} tokenizers ({shown})",
                    "bits per byte and perplexity per word do")

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns with their units."""
        return tuple(column.header for column in self.columns)

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text; a flag stands behind the row's name."""
        return [[self._cell(row, i, column) for i, column in enumerate(self.columns)]
                for row in self.rows]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, what differs between the rows, and the protocol."""
        texts = {(p.text_digest, p.split) for p in self.protocols}
        notes = list(self.notes)
        if len(texts) > 1:
            notes.append(f"the rows are of {len(texts)} different texts: their numbers do not "
                         "compare")
        return (*notes, *(line for protocol in self.protocols for line in protocol.lines()))

    def render(self) -> Group:
        """For a console."""
        return render(self.title, self.header, self.cells, self.all_notes)

    def to_csv(self) -> str:
        """A CSV file: the columns, then the flag and the protocol in every row."""
        shared: dict[str, Any] = {}
        for name in self.protocols[0].record():
            values = dict.fromkeys(str(protocol.record()[name]) for protocol in self.protocols)
            shared[name] = " | ".join(values)
        columns = [*(column.key for column in self.columns), FLAG]
        return csv_text(dict.fromkeys([*columns, *shared]),
                        ({**shared, **row} for row in self.rows))

    def record(self) -> dict[str, Any]:
        """For a JSON file; `from_record` reads it."""
        return {"name": self.name, "title": self.title,
                "columns": [asdict(column) for column in self.columns],
                "rows": [dict(row) for row in self.rows],
                "protocols": [protocol.record() for protocol in self.protocols],
                "notes": list(self.notes)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ResultTable:
        """The table of a `record`.

        Raises:
          DataError: it is none.
        """
        try:
            return cls(str(record["name"]), str(record["title"]),
                       tuple(Column(**column) for column in record["columns"]),
                       tuple(dict(row) for row in record["rows"]),
                       tuple(Protocol(**protocol) for protocol in record["protocols"]),
                       tuple(map(str, record["notes"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is not a table of results: {error!r}",
                            "run the probe that wrote it again") from None

    def _cell(self, row: Mapping[str, Any], i: int, column: Column) -> str:
        value = row.get(column.key)
        if i == 0:
            return f"{value} {row[FLAG]}" if row.get(FLAG) else str(value)
        if isinstance(value, bool | str):
            return str(value)
        return number(value, 0 if isinstance(value, int) else column.digits)


def merged(protocols: Sequence[Protocol]) -> tuple[Protocol, ...]:
    """Each protocol once, in order."""
    return tuple(dict.fromkeys(protocols))
