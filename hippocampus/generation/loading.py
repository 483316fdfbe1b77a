"""From a folder to a `LanguageModel`."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.backbones.loading import is_backbone
from hippocampus.config import Config
from hippocampus.config_files import read_json
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.devices import resolve
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.exports.folder import CONFIG, TOKENIZER, WEIGHTS, is_export, open_export
from hippocampus.exports.parameters import read_parameters
from hippocampus.files import read_object
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.pretrained import load_pretrained
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.models.halves import check_backbone, read_frozen, trained_shapes, whole
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import RunFolder


def load(path: str | Path, *, weights: str = "ema", step: int | None = None,
         sharding: jax.sharding.Sharding | None = None) -> LanguageModel:
    """Opens a run folder, what `python -m hippocampus.export` made of one, or a pretrained decoder.

    Args:
      path: the folder; or a `.gguf` or llama2.c `.bin` (see `hippocampus.backbones.loading`).
      weights: "ema" (the running average; raw where there is none) or "raw".
      step: a saved step; default: the best one that is not damaged, or the one that was exported.
      sharding: where every parameter goes; default: whole, to this process's first device.

    Raises:
      DataError: no such folder, or a config or tokenizer that is damaged or does not belong to it.
      CheckpointError: nothing saved yet, no such step, or weights that are damaged, not finite or
        another model's.
      ConfigError: unknown `weights`, or `weights` or a step that an exported folder has not.
    """
    folder = RunFolder.at(path)
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights is {weights!r}", "it must be ema or raw")
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if is_backbone(folder.path):
        if weights == "raw" or step is not None:
            raise ConfigError(f"{path} is a pretrained model: it has no steps and no raw weights",
                              "leave out step and weights")
        return load_pretrained(folder.path, sharding=sharding)
    if is_export(folder.path):
        return _load_export(folder.path, weights, step, sharding)
    return _load_run(folder, weights, step, sharding)


def _load_run(folder: RunFolder, weights: str, step: int | None,
              sharding: jax.sharding.Sharding) -> LanguageModel:
    if not folder.is_run():
        raise DataError(f"no run folder at {folder.path}", "train one with python -m "
                        "hippocampus.train --config=configs/quickstart.py")
    config, automatic = read_json(folder.config)
    config, _ = resolve(config, automatic=automatic)
    tokenizer = load_tokenizer(folder.tokenizer, config)
    saved = (read_object(folder.data, "restore it from a copy") if folder.data.exists() else {})
    _check_tokenizer(folder.tokenizer, tokenizer, str(saved.get("tokenizer", tokenizer.digest)),
                     config)
    model = build_model(config)
    check_backbone(config, folder.backbone)
    if not folder.steps.is_dir():
        raise CheckpointError(f"{folder.path} has no checkpoint yet", "let it train a little")
    def warn(line: str) -> None:
        warnings.warn(line, stacklevel=4)

    with Checkpoints(folder.steps, say=warn) as checkpoints:
        # Both kinds of weights are checked, so that a caller of both gets the same step of both.
        chosen = checkpoints.best_good(step, trees=("params", "ema"))
        if chosen is None:
            raise CheckpointError(f"{folder.path} has no checkpoint yet", "let it train a little")
        name = "ema" if weights == "ema" and config.ema.decay else "params"
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
                            trained_shapes(model))
        trained = checkpoints.restore(chosen, {name: like})[name]
    params = whole(model, trained, read_frozen(model, config, sharding))
    return LanguageModel(model, params, tokenizer, config, chosen)


def _load_export(folder: Path, weights: str, step: int | None,
                 sharding: jax.sharding.Sharding) -> LanguageModel:
    """Every file is checked as if it came from a stranger; see docs/export.md."""
    config, automatic, record = open_export(folder)
    if weights == "raw" != record.weights:
        raise ConfigError(f"{folder} has no raw weights: it is an export of the average",
                          "--weights=raw when the run is exported")
    if step is not None and step != record.step:
        raise ConfigError(f"{folder} has no step {step}: it is an export of step {record.step}",
                          f"--step={step} when the run is exported")
    try:
        config, _ = resolve(config, automatic=automatic)
        model = build_model(config)
    except ConfigError as error:
        raise DataError(f"{folder / CONFIG}: {error.message}", error.hint) from None
    tokenizer = load_tokenizer(folder / TOKENIZER, config)
    _check_tokenizer(folder / TOKENIZER, tokenizer, record.tokenizer, config)
    params = read_parameters(folder / WEIGHTS, parameter_shapes(model), record, sharding)
    return LanguageModel(model, params, tokenizer, config, record.step)


def load_tokenizer(path: Path, config: Config) -> Tokenizer:
    """A folder's tokenizer; that of a pretrained decoder begins and ends texts in its own way.

    Args:
      path: the file.
      config: of the run.

    Raises:
      DataError: it is missing, unreadable or not a tokenizer.
    """
    if hasattr(config.model, "backbone"):
        return HubTokenizer.load(path, config.model.backbone.end_ids)
    return Tokenizer.load(path)


def _check_tokenizer(path: Path, tokenizer: Tokenizer, then: str, config: Config) -> None:
    """Refuses a tokenizer that is not the one that the run was trained with."""
    if then != tokenizer.digest or tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{path} is not the tokenizer that the run was trained with "
            f"({then[:12]}… of {config.model.vocab_size} ids then, {tokenizer.digest[:12]}… of "
            f"{tokenizer.vocab_size} now)", "restore it from a copy")
