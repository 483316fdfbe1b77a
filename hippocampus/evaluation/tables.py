"""Tables in which a column has one unit: `Measurement`, `MetricTable`.

Nats per token and perplexity per token depend on what a token is, so a table whose rows have more
than one tokenizer has no such columns, and says so. Bits per byte and perplexity per word compare
between tokenizers; where one of them replaces rare words by `<unk>`, its numbers are starred.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hippocampus.evaluation.metrics import TokenLoss

DIGEST_SHOWN = 12
"""Hexadecimal digits of a digest that a table prints."""


@dataclass(frozen=True)
class Measurement(TokenLoss):
    """How well one model predicts one text.

    Attributes:
      name: of the row.
      nats_per_token: mean -log p over the predictions.
      bytes_per_token: UTF-8 bytes of the text per prediction; None for what is not a text.
      words_per_token: words of the text per prediction; None where nobody counted them.
      tokenizer: digest of the tokenizer.
      text: digest and split of the text.
      context: tokens in a window; None for a model without windows.
      stride: tokens from one window to the next; None for a model without windows.
      unknown_rate: share of the ids that are `<unk>`.
      kind: "model", or "line" for a count-based one.
      weights: "ema" or "raw"; None for a line.
      skip_nats_per_token: see `hippocampus.evaluation.evaluate.Evaluation`.
    """

    name: str
    nats_per_token: float
    bytes_per_token: float | None
    words_per_token: float | None
    tokenizer: str
    text: str
    context: int | None = None
    stride: int | None = None
    unknown_rate: float = 0.0
    kind: str = "model"
    weights: str | None = None
    skip_nats_per_token: float | None = None


@dataclass(frozen=True)
class MetricTable:
    """Measurements side by side, in columns that compare.

    Attributes:
      rows: in the order of printing.
    """

    rows: tuple[Measurement, ...]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Digests of the tokenizers, each once."""
        return tuple(dict.fromkeys(row.tokenizer for row in self.rows))

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns: per token where all rows have one tokenizer, per byte for texts."""
        per_token = ("nats/token", "ppl/token") if len(self.tokenizers) == 1 else ()
        return ("model", *per_token, *(("bits/byte", "ppl/word") if self._is_text else ()))

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text, one list per row."""
        cells = []
        for row in self.rows:
            star = "*" if row.unknown_rate else ""
            per_token = [number(row.nats_per_token, 4), number(row.perplexity, 2)]
            per_byte = [number(row.bits_per_byte, 4) + star, number(row.word_perplexity, 2) + star]
            cells.append([row.name, *(per_token if len(self.tokenizers) == 1 else []),
                          *(per_byte if self._is_text else [])])
        return cells

    @property
    def _is_text(self) -> bool:
        return any(row.bytes_per_token is not None for row in self.rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know before comparing rows."""
        notes = []
        if len(self.tokenizers) > 1:
            shown = ", ".join(digest[:DIGEST_SHOWN] for digest in self.tokenizers)
            notes.append(f"no columns per token: {len(self.tokenizers)} tokenizers ({shown}); bits "
                         "per byte and perplexity per word compare")
        texts = {row.text for row in self.rows}
        if len(texts) > 1:
            notes.append(f"the rows are of {len(texts)} different texts: their numbers do not "
                         "compare")
        windows = {(row.context, row.stride) for row in self.rows if row.kind == "model"}
        if len(windows) > 1:
            notes.append("context and stride differ between rows: more context in front of a "
                         "prediction lowers every number")
        rates = sorted({row.unknown_rate for row in self.rows if row.unknown_rate})
        if rates:
            shown = " to ".join(f"{rate:.2%}" for rate in dict.fromkeys((rates[0], rates[-1])))
            notes.append(f"* {shown} of the tokens are <unk>, which is easier than the word it "
                         "stands for: not comparable with an open vocabulary, nor with another "
                         "share of <unk>")
        return (*notes, *self._broken())

    def _broken(self) -> list[str]:
        """A note for every model that counting words would beat."""
        return [f"! {row.name} is worse than the unigram line: broken, or hardly trained"
                for row in self.rows if self.worse_than_unigram(row)]

    def worse_than_unigram(self, row: Measurement) -> bool | None:
        """Whether counting tokens predicts better; None for lines and where it was not counted."""
        unigram = {(r.text, r.tokenizer): r.nats_per_token for r in self.rows
                   if r.kind == "line" and r.name == "unigram"}.get((row.text, row.tokenizer))
        if row.kind != "model" or unigram is None:
            return None
        return not row.nats_per_token <= unigram  # a model of NaN is worse too


def render(title: str, header: Sequence[str], cells: Sequence[Sequence[str]],
           notes: Sequence[str] = ()) -> Group:
    """A table for a terminal or a pipe: first column left, numbers right, notes below.

    Args:
      title: lines above the table.
      header: names of the columns.
      cells: rows of text, as wide as the header.
      notes: lines below.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    return Group(Text(title), Text(), table, *(Text(note) for note in notes))


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV file with a header; other keys of the rows are left out, None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def number(value: float | None, digits: int) -> str:
    """A number of a table: fixed digits, a power of ten from a million on (a whole number keeps
    all of its own), "-" for None.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1e6:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2e}"
