"""One evaluation as people and programs read it: console, JSON and CSV (docs/evaluation.md)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from hippocampus.config import Config
from hippocampus.evaluation.evaluate import Evaluation
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.evaluation.tables import DIGEST_SHOWN, Measurement, MetricTable, csv_text, render
from hippocampus.files import write_atomically
from hippocampus.runs.run_folder import environment

FORMAT = 1
"""Version of the JSON file."""

CSV_COLUMNS = (
    "model", "kind", "weights", "config", "step", "corpus", "text_digest", "split", "tokens",
    "bytes", "words", "unknown_rate", "tokenizer", "tokenizer_digest", "vocabulary", "context",
    "stride", "documents", "nats_per_token", "perplexity", "bits_per_byte", "word_perplexity",
    "worse_than_unigram", "version", "command")
"""One row per model or line; each row says all that is needed to use it alone."""

WEIGHTS = {"raw": "raw", "ema": "average"}


@dataclass(frozen=True)
class Windows:
    """How a text is cut.

    Attributes:
      context: T, tokens in a window.
      stride: tokens from one window to the next; 0 = `context`.
      batch_size: windows at once.
    """

    context: int
    stride: int
    batch_size: int

    @classmethod
    def of(cls, config: Config) -> Windows:
        """The run's own."""
        return cls(config.eval.context or config.data.context, config.eval.stride,
                   config.eval.batch_size)


@dataclass(frozen=True)
class Report:
    """The measurements on one text, and all that is needed to repeat or to judge them.

    Attributes:
      about: the fields of the JSON file other than its rows and notes.
      table: the rows.
      notes: lines of a table that hold for all rows.
    """

    about: Mapping[str, Any]
    table: MetricTable
    notes: tuple[str, ...]

    def render(self) -> Group:
        """For a console."""
        text, tokenizer, windows = (self.about[part] for part in ("text", "tokenizer", "windows"))
        part = "" if text["split"] == "text" else f"{text['split']} of "
        title = [
            f"{part}{text['corpus']} (sha256 {text['digest'][:DIGEST_SHOWN]}), "
            f"{self.about['config']} step {self.about['step']}",
            f"{text['tokens']:,} tokens predicted"
            + (f", {text['bytes']:,} bytes, {text['words']:,} words" if text["bytes"] else ""),
            f"tokenizer {tokenizer['kind']} {tokenizer['digest'][:DIGEST_SHOWN]}, vocabulary "
            f"{tokenizer['vocabulary']:,}, OOV {text['unknown_rate']:.2%}",
            f"context {windows['context']}, stride {windows['stride']}, documents "
            f"{windows['documents']}"]
        return render("\n".join(title), self.table.header, self.table.cells,
                      (*self.notes, *self.table.notes))

    def to_json(self) -> str:
        """The JSON file; what is not finite becomes null."""
        rows = [{
            "model": row.name, "kind": row.kind, "weights": row.weights,
            "nats_per_token": _finite(row.nats_per_token), "perplexity": _finite(row.perplexity),
            "bits_per_byte": _finite(row.bits_per_byte),
            "word_perplexity": _finite(row.word_perplexity),
            "skip_nats_per_token": _finite(row.skip_nats_per_token),
            "worse_than_unigram": self.table.worse_than_unigram(row)} for row in self.table.rows]
        content = {**self.about, "rows": rows, "notes": [*self.notes, *self.table.notes]}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """The CSV file, with a header."""
        text, tokenizer, windows = (self.about[part] for part in ("text", "tokenizer", "windows"))
        common = {
            "config": self.about["config"], "step": self.about["step"], "corpus": text["corpus"],
            "text_digest": text["digest"], "tokenizer": tokenizer["kind"],
            "tokenizer_digest": tokenizer["digest"], "vocabulary": tokenizer["vocabulary"],
            **{name: text[name] for name in ("split", "tokens", "bytes", "words", "unknown_rate")},
            **{name: windows[name] for name in ("context", "stride", "documents")},
            "version": self.about["version"], "command": " ".join(self.about["command"])}
        return csv_text(CSV_COLUMNS, ({**common, **row} for row in json.loads(self.to_json())[
            "rows"]))

    def write(self, folder: Path) -> Path:
        """Writes `<name>.csv` and then `<name>.json`, each atomically.

        Returns:
          The JSON file.
        """
        write_atomically(folder / f"{self.file_name}.csv", self.to_csv())
        path = folder / f"{self.file_name}.json"
        write_atomically(path, self.to_json())
        return path

    @property
    def file_name(self) -> str:
        """Says what was evaluated, so that two evaluations of a run have two files."""
        text, windows = self.about["text"], self.about["windows"]
        name = text["split"]
        if name == "text":
            plain = re.sub(r"[^\w.-]+", "_", Path(text["corpus"]).stem)
            name = f"text-{plain}-{text['digest'][:8]}"
        weights = {row.weights for row in self.table.rows if row.weights}
        only = f"-{weights.pop()}" if len(weights) == 1 else ""
        return (f"{name}-step{self.about['step']}-c{windows['context']}-s{windows['stride']}"
                f"{only}")


def make_report(
    evaluations: Mapping[str, Evaluation], text: HeldOutText, windows: Windows,
    lines: Mapping[str, float], notes: tuple[str, ...], *, config: Config, step: int | None,
    run: Path,
) -> Report:
    """Puts the evaluations of one text beside the count-based lines.

    Args:
      evaluations: by weights, "raw" or "ema", or both.
      text: what was predicted.
      windows: how it was cut.
      lines: nats per token of the count-based models.
      notes: what was counted and smoothed how.
      config: of the run.
      step: that the weights are of.
      run: the run folder.
    """
    common: dict[str, Any] = {
        "bytes_per_token": text.bytes_per_token, "words_per_token": text.words_per_token,
        "tokenizer": text.tokenizer.digest, "text": f"{text.digest}:{text.split}",
        "unknown_rate": text.unknown_rate}
    rows = [Measurement(name, nats, kind="line", **common) for name, nats in lines.items()]
    rows += [Measurement(
        f"this model, {WEIGHTS[weights]} weights", found.nats_per_token, weights=weights,
        context=windows.context, stride=windows.stride or windows.context,
        skip_nats_per_token=found.skip_nats_per_token, **common)
        for weights, found in evaluations.items()]
    if windows.context > config.data.context:
        notes = (*notes, f"trained on windows of {config.data.context} tokens and evaluated on "
                 f"{windows.context}: beyond what it has seen")
    about = _about(text, windows, config, step, run)
    for weights, found in evaluations.items():
        if found.parts:
            about.setdefault("accuracy", {})[weights] = {
                "all": found.accuracy,
                **{name: score.accuracy for name, score in found.parts.items()}}
            notes = (*notes, f"right answers, {WEIGHTS[weights]} weights: {found.accuracy:.2%}; " +
                     ", ".join(f"{name} {score.accuracy:.2%}"
                               for name, score in found.parts.items()))
    return Report(about, MetricTable(tuple(rows)), notes)


def _about(text: HeldOutText, windows: Windows, config: Config, step: int | None,
           run: Path) -> dict[str, Any]:
    here = environment()
    return {
        "format": FORMAT, "version": here["packages"].get("hippocampus"), "commit": here["commit"],
        "command": here["command"], "devices": here["devices"], "run": str(run),
        "config": config.name, "step": step,
        "text": {"corpus": text.name, "digest": text.digest, "split": text.split,
                 "tokens": text.predictions, "bytes": text.n_bytes, "words": text.n_words,
                 "unknown": text.n_unknown, "unknown_rate": text.unknown_rate},
        "tokenizer": {"kind": text.tokenizer.kind, "digest": text.tokenizer.digest,
                      "vocabulary": text.tokenizer.vocab_size},
        "windows": {"context": windows.context, "stride": windows.stride or windows.context,
                    "batch_size": windows.batch_size,
                    "documents": "joined" if text.document_starts is None else "packed",
                    "trained_context": config.data.context},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
