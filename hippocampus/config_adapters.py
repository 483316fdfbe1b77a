"""The fields of adapters beside attention (hippocampus.layers.gated_adapter)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hippocampus.config_fields import count, group, setting
from hippocampus.config_hybrid import SSMConfig
from hippocampus.errors import ConfigError

MIXES = ("residual", "interpolate")
"""How an adapter joins attention: added to it, at first nothing, or in place of a share."""
CLOSED = -9.0
"""First bias of an interpolating gate: sigmoid(-9) = 0.0001."""


@dataclass(frozen=True)
class SlotMemoryConfig:
    """Learned slots that every token reads (hippocampus.layers.slot_memory)."""

    slots: int = count(256, "slots S, each a key and a value", high=1_000_000)
    heads: int = count(4, "heads H that retrieve on their own; they divide the width", high=1024)
    width: int = count(0, "width of a key, and of a value; 0 = a quarter of d_model", low=0,
                       high=65_536)
    top_k: int = count(0, "slots that a token reads, those of the largest weights; 0 = all", low=0)
    beta: float = setting(0.0, "first inverse temperature of retrieval, then learned per head; "
                          "0 = the root of a head's width", low=0, high=1000)


@dataclass(frozen=True)
class AdaptersConfig:
    """A state-space branch and a memory branch behind the attention of some layers."""

    layers: tuple[int, ...] = setting((), "numbers of the layers that have an adapter; empty = the "
                                      "last `count`", low=0, high=1023)
    ssm: SSMConfig = group(lambda: SSMConfig(expansion=0.5))
    memory: SlotMemoryConfig = group(SlotMemoryConfig)
    mix: str = setting("residual", "residual: added to attention, at first nothing; interpolate: "
                       "(1 - g) attention + g adapter", choices=MIXES)
    gate_bias: float = setting(CLOSED, "first bias of the gate g with mix = interpolate; with "
                               "residual g starts at 1/2", low=-100, high=100)
    gate_width: str = setting("token", "a gate per token, or per token and channel",
                              choices=("token", "channel"))
    count: int = setting(4, "how many of the last layers have an adapter (num_hybrid_layers), "
                         "where `layers` is empty; 0 = none", low=0, high=1024)


def adapted_layers(adapters: AdaptersConfig, n_layers: int) -> tuple[int, ...]:
    """The numbers of the layers that have an adapter, in order.

    The last ones, where the fields do not say: nothing below them needs a gradient.

    Args:
      adapters: the fields.
      n_layers: of the decoder.

    Raises:
      ConfigError: a layer that is not there, or one named twice.
    """
    if not adapters.layers:
        if adapters.count > n_layers:
            raise ConfigError(f"model.adapters.count = {adapters.count} of {n_layers} layers",
                              f"the decoder has {n_layers}")
        return tuple(range(n_layers - adapters.count, n_layers))
    check_named_once(adapters.layers)
    if max(adapters.layers) >= n_layers:
        raise ConfigError(f"model.adapters.layers names layer {max(adapters.layers)}",
                          f"the decoder has layers 0 to {n_layers - 1}")
    return tuple(sorted(adapters.layers))


def check_named_once(layers: Sequence[int]) -> None:
    """Refuses a layer that is named twice.

    Raises:
      ConfigError: with its number.
    """
    if twice := [i for i in layers if list(layers).count(i) > 1]:
        raise ConfigError(f"model.adapters.layers names layer {twice[0]} twice",
                          "a layer has one adapter")


def check_adapters(adapters: AdaptersConfig, d_model: int, n_blocks: int) -> None:
    """Refuses widths of adapters that do not come out whole.

    Args:
      adapters: the fields.
      d_model: width D of the decoder.
      n_blocks: blocks of the gates of a gated state-space layer.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    memory, inner = adapters.memory, round(adapters.ssm.expansion * d_model)
    width = memory_width(memory, d_model)
    if width % memory.heads or not width:
        raise ConfigError(f"model.adapters.memory.heads = {memory.heads} does not divide the width "
                          f"{width}", "change model.adapters.memory.heads or .width")
    if memory.top_k > memory.slots:
        raise ConfigError(f"model.adapters.memory.top_k = {memory.top_k} of "
                          f"model.adapters.memory.slots = {memory.slots}", "0 reads all of them")
    blocks = {"gated": n_blocks, "ssd": adapters.ssm.head_width}.get(adapters.ssm.kind, 1)
    if not inner or inner % blocks:
        what = "blocks" if adapters.ssm.kind == "gated" else "channels a head"
        raise ConfigError(f"model.adapters.ssm.expansion = {adapters.ssm.expansion:g} makes "
                          f"{inner} channels of {d_model}, and the gates have {blocks} {what}",
                          "choose an expansion that makes a multiple")


def memory_width(memory: SlotMemoryConfig, d_model: int) -> int:
    """Width of a key, and of a value."""
    return memory.width or d_model // 4
