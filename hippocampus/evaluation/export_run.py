"""A run folder to an exported one, with what its storage costs: `python -m hippocampus.export`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax

from hippocampus.config_files import read_json
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.evaluate import evaluate
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.stand_alone import held_out_split
from hippocampus.evaluation.story_scores import StoryText, score_stories
from hippocampus.exports.folder import (
    CARD,
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    ExportRecord,
    check_free,
    config_text,
    is_export,
    new_export,
)
from hippocampus.exports.model_card import Card, StorageCost
from hippocampus.exports.parameters import write_parameters
from hippocampus.exports.run_records import RunRecords
from hippocampus.files import write_atomically
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load
from hippocampus.models.build_model import count_parameters
from hippocampus.models.halves import merged
from hippocampus.runs.run_folder import RunFolder, environment


@dataclass(frozen=True)
class Request:
    """What to export, and how.

    Attributes:
      weights: "ema" or "raw".
      step: a saved step; None = the best one.
      storage: of the matrices: "float32", "bfloat16" or "int8".
      overwrite: an earlier export in the place may be replaced.
    """

    weights: str = "ema"
    step: int | None = None
    storage: str = "float32"
    overwrite: bool = False


def export_run(path: str | Path, out: str | Path, request: Request) -> Card:
    """Writes an exported folder, whole or not at all.

    Args:
      path: the run folder.
      out: the folder to make.
      request: what to export.

    Returns:
      What the model card says.

    Raises:
      ConfigError: `out` is taken or cannot be written, or the run keeps no average.
      DataError: no run folder.
      CheckpointError: no such step, or weights that are not finite.
    """
    folder, out = RunFolder.at(path), Path(out)
    if is_export(folder.path):
        raise ConfigError(f"{folder.path} is an exported model already", "copy it, or export the "
                          "run that it came from")
    check_free(out, request.overwrite)
    lm = load(folder.path, weights=request.weights, step=request.step)
    config, automatic = read_json(folder.config)
    if request.weights == "ema" and not config.ema.decay:
        raise ConfigError(f"{folder.path} keeps no average of its weights (ema.decay = 0)",
                          "--weights=raw")
    records = RunRecords.of(folder)
    text = records.data.get("sha256")
    record = ExportRecord(lm.step or 0, request.weights, request.storage, lm.tokenizer.digest,
                          text if isinstance(text, str) else None,
                          environment()["packages"].get("hippocampus", "unknown"))
    try:
        with new_export(out, request.overwrite) as partial:
            write_atomically(partial / TOKENIZER, lm.tokenizer.to_json())
            write_atomically(partial / CONFIG, config_text(config, automatic, record))
            write_parameters(partial / WEIGHTS, merged(lm.params), record)
            card = Card(out.resolve().name, config, record, records, count_parameters(lm.model),
                        _storage_cost(folder, lm, partial, record))
            write_atomically(partial / CARD, card.render())
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}", "choose another --out"
                          ) from None
    return card


def _storage_cost(folder: RunFolder, before: LanguageModel, export: Path,
                  record: ExportRecord) -> StorageCost:
    """Scores the run's own validation split with the weights before and as they are stored."""
    cost = StorageCost(sum(leaf.nbytes for leaf in jax.tree.leaves(before.params)),
                       (export / WEIGHTS).stat().st_size, None, None, "")
    if record.storage == "float32":
        return cost
    try:
        text = held_out_split(folder, before.tokenizer, "validation")
    except DataError as error:
        return dataclasses.replace(
            cost, note="Bits per byte were not measured: the training text was not at hand.",
            reason=str(error))
    cut = Windows.of(before.config)
    windows = text.windows(cut.context, cut.stride, cut.batch_size)
    bits = [(score_stories(lm.model, lm.params, windows, text) if isinstance(text, StoryText) else
             evaluate(lm.model, lm.params, windows, text.bytes_per_token)).bits_per_byte
            for lm in (before, load(export, weights=record.weights))]
    note = (f"Measured by the export on the whole validation split, context {cut.context}, stride "
            f"{cut.stride or cut.context}.")
    return dataclasses.replace(cost, bits_before=bits[0], bits_after=bits[1], note=note)
