"""From a folder to a `LanguageModel`."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from hippocampus.config import Config
from hippocampus.config_files import read_json
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.devices import resolve
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import RunFolder


def load(path: str | Path, *, weights: str = "ema", step: int | None = None,
         sharding: jax.sharding.Sharding | None = None) -> LanguageModel:
    """Opens a run folder.

    Args:
      path: the folder that training wrote.
      weights: "ema" (the running average; raw if the run keeps none) or "raw".
      step: a saved step; default: the best one.
      sharding: where every parameter goes; default: whole, to this process's first device.

    Raises:
      DataError: no run folder there, or a tokenizer that does not belong to it.
      CheckpointError: nothing saved yet, no such step, or damaged files.
      ConfigError: unknown `weights`.
    """
    folder = RunFolder.at(path)
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights is {weights!r}", "it must be ema or raw")
    if not folder.is_run():
        raise DataError(f"no run folder at {folder.path}", "train one with python -m "
                        "hippocampus.train --config=configs/quickstart.py")
    config, automatic = read_json(folder.config)
    config, _ = resolve(config, automatic=automatic)
    tokenizer = Tokenizer.load(folder.tokenizer)
    _check_tokenizer(folder, tokenizer, config)
    model = build_model(config)
    if not folder.steps.is_dir():
        raise CheckpointError(f"{folder.path} has no checkpoint yet", "let it train a little")
    with Checkpoints(folder.steps) as checkpoints:
        chosen = checkpoints.best if step is None else step
        if chosen is None or chosen not in checkpoints.steps:
            raise CheckpointError(f"{folder.path} has no step {chosen}",
                                  f"saved: {', '.join(map(str, checkpoints.steps)) or 'none'}")
        name = "ema" if weights == "ema" and config.ema.decay else "params"
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
                            parameter_shapes(model))
        params = checkpoints.restore(chosen, {name: like})[name]
    return LanguageModel(model, params, tokenizer, config, chosen)


def _check_tokenizer(folder: RunFolder, tokenizer: Tokenizer, config: Config) -> None:
    """Refuses a tokenizer that is not the one that the run was trained with."""
    saved = json.loads(folder.data.read_text("utf-8")) if folder.data.exists() else {}
    then = str(saved.get("tokenizer", tokenizer.digest))
    if then != tokenizer.digest or tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{folder.tokenizer} is not the tokenizer that the run was trained with "
            f"({then[:12]}… of {config.model.vocab_size} ids then, {tokenizer.digest[:12]}… of "
            f"{tokenizer.vocab_size} now)", "restore it from a copy")
