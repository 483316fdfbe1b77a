"""What the fields of a Buu must be to each other: `check_buu`."""

from __future__ import annotations

from hippocampus.config import BuuConfig, Config
from hippocampus.config_adapters import CLOSED, AdaptersConfig, check_named_once
from hippocampus.config_checks_decoder import check_around_decoder
from hippocampus.errors import ConfigError


def check_buu(config: Config, model: BuuConfig) -> None:
    """Refuses fields of a Buu that contradict each other or the rest of the config.

    What needs the decoder's widths is checked when they are known
    (`hippocampus.config_adapters.check_adapters`).

    Args:
      config: all of it.
      model: its model.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    check_around_decoder(config, model)
    adapters = model.adapters
    check_named_once(adapters.layers)
    if adapters.layers and adapters.count not in (len(adapters.layers), AdaptersConfig().count):
        raise ConfigError(f"model.adapters.count = {adapters.count}, and model.adapters.layers "
                          f"names {len(adapters.layers)}", "leave one of them out")
    if not adapters.layers and not adapters.count and model.backbone.train == "none":
        raise ConfigError("nothing is trained: model.adapters.count is 0, and "
                          "model.backbone.train is none", "model.backbone.train=lora trains "
                          "low-rank adapters instead")
    if adapters.mix == "residual" and adapters.gate_bias != CLOSED:
        raise ConfigError(f"model.adapters.gate_bias = {adapters.gate_bias:g}, and "
                          "model.adapters.mix is residual", "it says nothing at first without: the "
                          "bias belongs to model.adapters.mix=interpolate")
    if config.mesh.sequence > 1:
        raise ConfigError(f"mesh.sequence = {config.mesh.sequence} for model.family = buu",
                          "share out rows: mesh.data or mesh.fsdp")
    if config.data.form == "stories" and config.eval.context not in (0, config.data.context):
        raise ConfigError(f"eval.context = {config.eval.context} for data.form = stories",
                          "stories are read as in training: leave it at 0")
