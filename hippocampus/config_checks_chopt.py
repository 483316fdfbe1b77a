"""What the fields of a CHopT must be to each other: `check_chopt`."""

from __future__ import annotations

from hippocampus.config import CHopTConfig, Config
from hippocampus.config_checks_decoder import check_around_decoder
from hippocampus.config_refusals import check_divides
from hippocampus.errors import ConfigError


def check_chopt(config: Config, model: CHopTConfig) -> None:
    """Refuses fields of a CHopT that contradict each other or the rest of the config.

    What needs the decoder's files is checked when they are read.

    Args:
      config: all of it.
      model: its model.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    check_around_decoder(config, model)
    if model.chunk:
        check_divides("data.context", config.data.context, "model.chunk", model.chunk)
    if config.mesh.sequence > 1:
        raise ConfigError(f"mesh.sequence = {config.mesh.sequence} for model.family = chopt",
                          "chunks are read one after the other: share out rows, mesh.data or "
                          "mesh.fsdp")
    if config.eval.context not in (0, config.data.context):
        raise ConfigError(f"eval.context = {config.eval.context} for model.family = chopt",
                          "a memory is written as in training: leave it at 0")
