"""An ablation's folder without a training: every number in it is chosen by the test."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_run

from hippocampus.config_files import defaults, to_json
from hippocampus.probing.ablation.cells import Study, as_trained
from hippocampus.probing.ablation.grid import Grid, make_grid

EVERY, SECONDS = 4, 0.25
"""Steps between evaluations, and what a step takes."""

BYTES_PER_TOKEN = 2.0
TOKENS = 1000
DIGEST = "ab" * 32
LINES = {"uniform": math.log(256), "unigram": 3.0, "bigram": 2.5}


def grid(*over: str, seeds: int = 3, overrides: Mapping[str, Any] | None = None,
         **options: Any) -> Grid:
    """Of the tiny config with all three paths."""
    changes = {"model.paths": ("ssm", "hopfield", "attention"), "train.steps": 12,
               "eval.every_steps": EVERY, **(overrides or {})}
    return make_grid(defaults(), {**tiny_run.TINY, **changes}, over, seeds, **options)


def study(out: Path, made: Grid, losses: Mapping[str, Sequence[float | None]],
          curves: Mapping[str, Sequence[float]] | None = None,
          tokenizers: Mapping[str, str] | None = None) -> Study:
    """Writes the run folders of a grid.

    Args:
      out: of the ablation.
      made: the grid.
      losses: cell -> final loss of every seed; None = not finished. The raw weights are 0.5 worse.
      curves: cell -> what is added to that loss at steps 4, 8, 12.
      tokenizers: cell -> digest of its tokenizer.
    """
    made_study = Study(out, made)
    for cell in made.cells:
        for seed, loss in zip(made.seeds, losses[cell.name], strict=True):
            if loss is not None:
                _run(made_study, cell.name, seed, loss, (curves or {}).get(cell.name, (1, 0.5, 0)),
                     (tokenizers or {}).get(cell.name, "cd" * 32))
    return made_study


def _run(made: Study, cell: str, seed: int, loss: float, curve: Sequence[float],
         tokenizer: str) -> None:
    folder = made.folder(made.grid[cell], seed)
    (folder.path / "evaluations").mkdir(parents=True)
    config = as_trained(made.grid.config(made.grid[cell], seed), 256, 12)
    folder.config.write_text(to_json(config, ()))
    folder.environment.write_text(json.dumps({"commit": "abc123", "devices": ["cpu"]}))
    rows = [{"step": 1, "time/training": SECONDS, "time/data": 0.0, "time/compile": 50.0}]
    for step, more in zip((4, 8, 12), curve, strict=True):
        rows += [{"step": step, "time/training": SECONDS * step, "time/data": 0.0},
                 {"step": step, "eval/loss": loss + more,
                  "eval/bits_per_byte": (loss + more) / math.log(2) / BYTES_PER_TOKEN}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bits = 1 / math.log(2) / BYTES_PER_TOKEN
    folder.results.write_text(json.dumps({
        "step": 12, "final/loss": loss, "final/loss_raw": loss + 0.5,
        "final/bits_per_byte": loss * bits, "final/bits_per_byte_raw": (loss + 0.5) * bits,
        "context": 16, "stride": 16, "evaluation": "evaluations/validation.json"}))
    models = [{"model": f"this model, {name} weights", "kind": "model", "nats_per_token": value,
               "worse_than_unigram": value > LINES["unigram"]}
              for name, value in (("raw", loss + 0.5), ("average", loss))]
    (folder.path / "evaluations" / "validation.json").write_text(json.dumps({
        "text": {"corpus": "planted", "digest": DIGEST, "split": "validation", "tokens": TOKENS,
                 "bytes": round(TOKENS * BYTES_PER_TOKEN), "unknown_rate": 0.0},
        "tokenizer": {"kind": "bytes", "digest": tokenizer, "vocabulary": 256},
        "windows": {"context": 16, "stride": 16, "documents": "joined"},
        "rows": [*({"model": name, "kind": "line", "nats_per_token": value}
                   for name, value in LINES.items()), *models]}))
