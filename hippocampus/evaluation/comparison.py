"""Runs side by side: what `python -m hippocampus.compare` reads and writes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from hippocampus.config import Config
from hippocampus.config_files import fields, read_json
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation import metrics
from hippocampus.evaluation.tables import (
    DIGEST_SHOWN,
    Measurement,
    MetricTable,
    csv_text,
    number,
    render,
)
from hippocampus.files import write_atomically
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.runs.run_folder import RunFolder, environment, read_metrics

FORMAT = 1
"""Version of the JSON file."""

RUNS_TITLE = ("runs: best and last evaluation of the validation split; training is the mean of the "
              "last logged steps")

_LAST_ROWS = 10  # logged steps that the last training loss is a mean of


@dataclass(frozen=True, eq=False)
class RunSummary:
    """What a run folder says of a run.

    Attributes:
      label: what tells it from the others.
      path: the folder.
      config: as resolved in training.
      rows: of metrics.jsonl.
      vocabulary: ids of the tokenizer.
      tokenizer: its kind, or the name of its file.
      tokenizer_digest: of its contents.
      parameters: of the model.
      steps: done so far.
      tokens: of training text seen so far.
      tokens_per_second: the median; None for a run too short to say.
      train_nats: per token, mean of the last logged steps.
      train_bytes_per_token: of the training text; None for a run of a version that kept no count.
      best_step: the one that `best` was measured at.
      best: on the whole validation split at the best step if the run is finished, else the best
        evaluation while training; None before the first.
      last: the last evaluation while training; None before the first.
      finished: whether it has a final evaluation.
    """

    label: str
    path: Path
    config: Config
    rows: Sequence[Mapping[str, Any]]
    vocabulary: int
    tokenizer: str
    tokenizer_digest: str
    parameters: int
    steps: int
    tokens: int
    tokens_per_second: float | None
    train_nats: float | None
    train_bytes_per_token: float | None
    best_step: int | None
    best: Measurement | None
    last: Measurement | None
    finished: bool

    def train_loss(self, per_token: bool) -> float | None:
        """The last training loss in nats per token, or in bits per byte; None if unknown."""
        if per_token or self.train_nats is None:
            return self.train_nats
        if self.train_bytes_per_token is None:
            return None
        return metrics.bits_per_byte(self.train_nats, self.train_bytes_per_token)


def read_runs(paths: Sequence[str | Path]) -> tuple[RunSummary, ...]:
    """Reads run folders, finished or not.

    Raises:
      ConfigError: fewer than two, or one twice.
      DataError: no run folder there, or a damaged one.
    """
    folders = [RunFolder(Path(path)) for path in paths]
    if len(folders) < 2:
        raise ConfigError("one run has nothing to be compared with",
                          "python -m hippocampus.compare RUN RUN")
    for folder in folders:
        if not folder.is_run():
            raise DataError(f"no run folder at {folder.path}", "give folders that training wrote")
    resolved = [folder.path.resolve() for folder in folders]
    for path, folder in zip(resolved, folders, strict=True):
        if resolved.count(path) > 1:
            raise ConfigError(f"{folder.path} is named twice", "name different runs")
    return tuple(_read_run(folder, label) for folder, label in
                 zip(folders, _labels(resolved), strict=True))


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Config fields that are not the same in all runs, with each run's value (None: no such)."""
    values = [fields(run.config) for run in runs]
    names = dict.fromkeys(name for run in values for name in run)
    found = {name: [run.get(name) for run in values] for name in names if name != "name"}
    return {name: row for name, row in found.items() if any(v != row[0] for v in row)}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs with what differs between them.

    Attributes:
      runs: at least two.
    """

    runs: tuple[RunSummary, ...]

    @property
    def best(self) -> MetricTable:
        """The best evaluations, in columns that compare."""
        return MetricTable(tuple(run.best for run in self.runs if run.best is not None))

    @property
    def per_token(self) -> bool:
        """Whether nats per token of the runs compare: all have one tokenizer."""
        return len({run.tokenizer_digest for run in self.runs}) == 1

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know before comparing."""
        unfinished = [run.label for run in self.runs if not run.finished]
        notes = (f"not finished: {', '.join(unfinished)}",) if unfinished else ()
        return (*notes, *self.best.notes)

    def render(self) -> Group:
        """For a console: one table of numbers, one of settings."""
        labels = [run.label for run in self.runs]
        different = differences(self.runs)
        cells = [[name, *map(_short, row)] for name, row in different.items()]
        settings = (render("settings that differ", ["field", *labels], cells) if cells
                    else "no setting differs")
        return Group(render(RUNS_TITLE, ["", *labels], self._numbers(), self.notes), "", settings)

    def to_json(self) -> str:
        """The JSON file; what is not finite becomes null."""
        here = environment()
        content = {
            "format": FORMAT, "version": here["packages"].get("hippocampus"),
            "commit": here["commit"],
            "command": here["command"], "runs": [_record(run) for run in self.runs],
            "differences": differences(self.runs), "notes": list(self.notes)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """The CSV file: one row per run, settings that differ as columns `config.<field>`."""
        different = differences(self.runs)
        rows = [{**_record(run), **{f"config.{name}": row[i] for name, row in different.items()}}
                for i, run in enumerate(self.runs)]
        return csv_text(dict.fromkeys(name for row in rows for name in row), rows)

    def write(self, folder: Path) -> list[Path]:
        """Writes comparison.csv and comparison.json, each atomically; returns their paths."""
        written = [folder / "comparison.csv", folder / "comparison.json"]
        write_atomically(written[0], self.to_csv())
        write_atomically(written[1], self.to_json())
        return written

    def _numbers(self) -> list[list[str]]:
        runs = self.runs
        rows = [
            ["parameters", *(f"{run.parameters:,}" for run in runs)],
            ["tokenizer", *(run.tokenizer for run in runs)],
            ["tokenizer hash", *(run.tokenizer_digest[:DIGEST_SHOWN] for run in runs)],
            ["vocabulary", *(f"{run.vocabulary:,}" for run in runs)],
            ["steps", *(f"{run.steps:,}" for run in runs)],
            ["tokens seen", *(f"{run.tokens:,}" for run in runs)],
            ["tokens/s, median", *(number(run.tokens_per_second, 0) for run in runs)],
            ["best step", *(number(run.best_step, 0) for run in runs)]]
        measured = dict(zip([run.label for run in runs if run.best], self.best.cells, strict=True))
        for column, name in enumerate(self.best.header[1:], start=1):
            rows.append([f"best {name}", *(
                measured[run.label][column] if run.label in measured else "-" for run in runs)])
        unit = "nats/token" if self.per_token else "bits/byte"
        for name, values in (("last", [_in_unit(run.last, unit) for run in runs]),
                             ("training", [run.train_loss(self.per_token) for run in runs])):
            rows.append([f"{name} {unit}", *(
                number(value, 4) + ("*" if _starred(run, unit) else "")
                for run, value in zip(runs, values, strict=True))])
        return rows


def _read_run(folder: RunFolder, label: str) -> RunSummary:
    config, automatic = read_json(folder.config)
    data = _read_json(folder.data)
    results = _read_json(folder.results) if folder.results.exists() else {}
    rows = read_metrics(folder.metrics)
    trained = [row for row in rows if row.get("train/loss") is not None]
    evaluated = [row for row in rows if row.get("eval/loss") is not None]
    steps = max((row["step"] for row in rows), default=0)
    speeds = [row["train/tokens_per_second"] for row in trained
              if row.get("train/tokens_per_second")]
    kind, digest = Path(config.data.tokenizer).name, str(data.get("tokenizer", ""))
    if results:
        best_step, best = results.get("step"), _measured(label, results, "final", config, data)
    else:
        row = min(evaluated, key=lambda row: row["eval/loss"], default=None)
        best_step, best = (row["step"], _measured(label, row, "eval", config, data)) if row else (
            None, None)
    model = build_model(resolve(config, automatic=automatic)[0])
    return RunSummary(
        label, folder.path, config, rows, config.model.vocab_size,
        kind, digest, count_parameters(model), steps,
        steps * config.train.batch_size * config.data.context,
        statistics.median(speeds) if speeds else None,
        statistics.fmean(row["train/loss"] for row in trained[-_LAST_ROWS:]) if trained else None,
        data["train_bytes"] / data["train_tokens"] if data.get("train_bytes") else None,
        best_step, best,
        _measured(label, evaluated[-1], "eval", config, data) if evaluated else None,
        bool(results))


def _measured(label: str, row: Mapping[str, Any], prefix: str, config: Config,
              data: Mapping[str, Any]) -> Measurement | None:
    """The averaged weights (raw where there are none) of an evaluation that training wrote."""
    loss, bits = row.get(f"{prefix}/loss"), row.get(f"{prefix}/bits_per_byte")
    if loss is None:
        return None
    per_word = row.get(f"{prefix}/word_perplexity")
    context = row.get("context") or config.eval.context or config.data.context
    return Measurement(
        label, loss, bytes_per_token=loss / (math.log(2) * bits) if bits else None,
        words_per_token=loss / math.log(per_word) if per_word and per_word > 1 else None,
        tokenizer=str(data.get("tokenizer")), text=f"{data.get('sha256')}:validation",
        context=context, stride=row.get("stride") or config.eval.stride or context,
        unknown_rate=data.get("validation_unknown", 0) / max(1, data.get("validation_tokens", 1)))


def _record(run: RunSummary) -> dict[str, Any]:
    """A run of the JSON and CSV files."""
    record: dict[str, Any] = {
        "run": str(run.path), "label": run.label, "config": run.config.name,
        "finished": run.finished, "parameters": run.parameters, "tokenizer": run.tokenizer,
        "tokenizer_digest": run.tokenizer_digest,
        "vocabulary": run.vocabulary, "steps": run.steps, "tokens": run.tokens,
        "tokens_per_second": run.tokens_per_second, "train_nats_per_token": run.train_nats,
        "best_step": run.best_step}
    for name, found in (("best", run.best), ("last", run.last)):
        for unit in ("nats_per_token", "perplexity", "bits_per_byte", "word_perplexity"):
            value = getattr(found, unit, None)
            record[f"{name}_{unit}"] = value if value and math.isfinite(value) else None
    if run.best:
        record |= {"text_digest": run.best.text.partition(":")[0], "context": run.best.context,
                   "stride": run.best.stride, "unknown_rate": run.best.unknown_rate}
    return record


def _in_unit(found: Measurement | None, unit: str) -> float | None:
    if found is None:
        return None
    return found.nats_per_token if unit == "nats/token" else found.bits_per_byte


def _starred(run: RunSummary, unit: str) -> bool:
    return unit == "bits/byte" and run.last is not None and run.last.unknown_rate > 0


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many of the folders above as tell them apart."""
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels) or depth >= max(len(path.parts) for path in paths):
            return labels
        depth += 1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", "is this a run folder?") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object", "is this a run folder?")
    return content


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
