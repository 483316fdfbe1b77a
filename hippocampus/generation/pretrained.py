"""From a pretrained decoder's files to a `LanguageModel`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hippocampus.backbones.loading import Backbone, load_backbone
from hippocampus.backbones.parameters import Shardings
from hippocampus.config import Config
from hippocampus.devices import choose, this_device
from hippocampus.errors import DataError
from hippocampus.generation.language_model import LanguageModel


def load_pretrained(path: str | Path, *, sharding: Shardings = None,
                    **settings: Any) -> LanguageModel:
    """Opens a pretrained decoder as `hippocampus.load` does a run folder.

    Args:
      path: a folder with config.json and safetensors, a `.gguf` file, or a llama2.c `.bin`.
      sharding: as for `load_backbone`.
      settings: as for `load_backbone`; what is left out of `compute_dtype` and `backend` is what
        suits this device.

    Raises:
      DataError, CheckpointError: as `load_backbone`, and where there is no tokenizer.
    """
    choice = choose(this_device())
    wanted = {"compute_dtype": choice.compute_dtype, "backend": choice.attention, **settings}
    return language_model(load_backbone(path, sharding=sharding, **wanted), Path(path))


def language_model(backbone: Backbone, path: Path) -> LanguageModel:
    """A backbone as a user holds it.

    Args:
      backbone: of which the model looks back as far as it was trained to.
      path: of its files, which gives the model its name.

    Raises:
      DataError: it has no tokenizer.
    """
    if backbone.tokenizer is None:
        raise DataError(f"there is no tokenizer beside {path}", "put the tokenizer.json of the "
                        "model there")
    plain, cfg = Config(), backbone.model.config
    config: Any = dataclasses.replace(
        plain, name=path.stem, model=cfg,  # type: ignore[arg-type]
        data=dataclasses.replace(plain.data, context=cfg.max_length))
    return LanguageModel(backbone.model, backbone.params, backbone.tokenizer, config)
