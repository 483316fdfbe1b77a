"""What the fields of a CHopT must be to each other: `check_chopt`."""

from __future__ import annotations

from hippocampus.config import (
    CHopTConfig,
    Config,
    EquilibriumLossConfig,
    LoRAConfig,
    RectifiedFlowConfig,
)
from hippocampus.config_refusals import check_divides
from hippocampus.errors import ConfigError

BACKBONE = "backbone"
"""`data.tokenizer` of a model with a pretrained decoder: the decoder's own."""


def check_chopt(config: Config, model: CHopTConfig) -> None:
    """Refuses fields of a CHopT that contradict each other or the rest of the config.

    What needs the decoder's files is checked when they are read.

    Args:
      config: all of it.
      model: its model.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    loss = config.loss
    if loss.rectified_flow != RectifiedFlowConfig() or loss.equilibrium != EquilibriumLossConfig():
        raise ConfigError("loss.rectified_flow or loss.equilibrium is set, and model.family is "
                          "chopt", "their terms are of other families")
    if config.data.tokenizer != BACKBONE:
        raise ConfigError(f"data.tokenizer is {config.data.tokenizer[:60]!r} for model.family = "
                          "chopt", f"a pretrained decoder knows its own ids: "
                          f"data.tokenizer={BACKBONE}")
    if model.chunk:
        check_divides("data.context", config.data.context, "model.chunk", model.chunk)
    if config.mesh.sequence > 1:
        raise ConfigError(f"mesh.sequence = {config.mesh.sequence} for model.family = chopt",
                          "chunks are read one after the other: share out rows, mesh.data or "
                          "mesh.fsdp")
    if model.backbone.train != "lora" and model.lora != LoRAConfig():
        raise ConfigError(f"model.lora is set, and model.backbone.train is {model.backbone.train}",
                          "adapters are trained with model.backbone.train=lora")
    if config.eval.context not in (0, config.data.context):
        raise ConfigError(f"eval.context = {config.eval.context} for model.family = chopt",
                          "a memory is written as in training: leave it at 0")
