"""What holds for every model around a pretrained decoder: `check_around_decoder`."""

from __future__ import annotations

from typing import Any

from hippocampus.config import Config, EquilibriumLossConfig, LoRAConfig, RectifiedFlowConfig
from hippocampus.errors import ConfigError

BACKBONE = "backbone"
"""`data.tokenizer` of a model with a pretrained decoder: the decoder's own."""


def check_around_decoder(config: Config, model: Any) -> None:
    """Refuses fields that contradict a pretrained decoder, or each other.

    What needs the decoder's files is checked when they are read.

    Args:
      config: all of it.
      model: its model, with `backbone` and `lora`.

    Raises:
      ConfigError: with the fields that do not fit.
    """
    loss = config.loss
    if loss.rectified_flow != RectifiedFlowConfig() or loss.equilibrium != EquilibriumLossConfig():
        raise ConfigError("loss.rectified_flow or loss.equilibrium is set, and model.family is "
                          f"{model.family}", "their terms are of other families")
    if config.data.tokenizer != BACKBONE:
        raise ConfigError(f"data.tokenizer is {config.data.tokenizer[:60]!r} for model.family = "
                          f"{model.family}", f"a pretrained decoder knows its own ids: "
                          f"data.tokenizer={BACKBONE}")
    if model.backbone.train != "lora" and model.lora != LoRAConfig():
        raise ConfigError(f"model.lora is set, and model.backbone.train is {model.backbone.train}",
                          "adapters are trained with model.backbone.train=lora")
