"""What the fields of a hybrid model must be to each other: `check_hybrid`."""

from __future__ import annotations

import math

from hippocampus.config import (
    PATHS,
    Config,
    EquilibriumLossConfig,
    HybridConfig,
    SSMConfig,
    layer_paths,
)
from hippocampus.config_refusals import check_divides, shown
from hippocampus.errors import ConfigError


def check_hybrid(config: Config, model: HybridConfig) -> None:
    """Refuses fields of a hybrid model that contradict each other or the rest of the config.

    Args:
      config: all of it.
      model: its model.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    _check_paths(model)
    if not model.hopfield.depth_schedule:
        raise ConfigError("model.hopfield.depth_schedule is empty", "give at least one number")
    if model.segments.train > 1 and model.segments.eval < model.segments.train:
        raise ConfigError(f"model.segments.eval = {model.segments.eval} is less than "
                          f"model.segments.train = {model.segments.train}",
                          "evaluation needs at least the passes of training")
    if not model.segments.weights or model.segments.weights[-1] <= 0:
        raise ConfigError("the last of model.segments.weights must be above 0",
                          "the last pass is the one that predicts")
    if config.loss.rectified_flow.segment_weight and model.segments.train < 2:
        raise ConfigError("loss.rectified_flow.segment_weight needs model.segments.train of at "
                          "least 2", "it is the flow from the first pass to the last")
    if config.loss.equilibrium != EquilibriumLossConfig():
        raise ConfigError("loss.equilibrium is set, and model.family is hybrid",
                          "its terms are of a fixed point: they belong to "
                          "model.family=equilibrium")
    if model.position == "learned" and 0 < model.max_length < config.data.context:
        raise ConfigError(f"model.max_length = {model.max_length} is less than data.context = "
                          f"{config.data.context}", "learned positions need a row per token")


def _check_paths(model: HybridConfig) -> None:
    if not model.paths or len(set(model.paths)) != len(model.paths):
        raise ConfigError(f"model.paths is {shown(model.paths)}",
                          f"name each of {', '.join(PATHS)} once")
    used = {path for paths in layer_paths(model) for path in paths}
    if "attention" in used and model.attention.n_kv_heads:
        check_divides("model.n_heads", model.n_heads, "model.attention.n_kv_heads",
                      model.attention.n_kv_heads)
    rotary = ("attention" in used and model.position == "rope") or (
        "hopfield" in used and model.hopfield.rope)
    if rotary and model.d_model // model.n_heads % 2:
        raise ConfigError(f"rotary positions need an even head width, not model.d_model / "
                          f"model.n_heads = {model.d_model // model.n_heads}",
                          "change model.n_heads, or take model.position=learned")
    if "ssm" in used:
        check_ssm("model.ssm", model.ssm, model.d_model, model.n_heads)


def check_ssm(name: str, ssm: SSMConfig, d_model: int, n_heads: int) -> None:
    """Refuses widths of a state-space layer that do not come out whole, and what a kind has not.

    Args:
      name: of the group of fields, such as "model.ssm".
      ssm: the group.
      d_model: width D of the model.
      n_heads: of its block-diagonal gates.

    Raises:
      ConfigError: with the fields or the numbers.
    """
    if ssm.input_scale and ssm.kind in ("s6", "ssd"):
        raise ConfigError(f"{name}.input_scale is True, and {name}.kind {ssm.kind}",
                          "only gated and diagonal have a scale; set it to False")
    if ssm.kind == "ssd" and ssm.backend in ("associative", "pallas"):
        raise ConfigError(f"{name}.backend is {ssm.backend}, and {name}.kind ssd",
                          "ssd has chunked and sequential; use auto")
    inner, inner_name = ssm.expansion * d_model, f"{name}.expansion * model.d_model"
    if not math.isclose(inner, round(inner)):
        raise ConfigError(f"{inner_name} = {inner:g} is not whole",
                          "choose an expansion such as 1, 1.5 or 2")
    if ssm.kind == "ssd":
        check_divides(inner_name, round(inner), f"{name}.head_width", ssm.head_width)
        heads = round(inner) // ssm.head_width
        if heads % ssm.n_groups:
            raise ConfigError(f"{name} has {heads} heads ({inner_name} / {name}.head_width), which "
                              f"{name}.n_groups = {ssm.n_groups} does not divide",
                              "1 group fits any number of heads")
    elif ssm.kind != "s6":
        check_divides(inner_name, round(inner), "model.n_heads", n_heads)
