"""The fields of a pretrained decoder, how it is trained, and what every model around it has."""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_fields import count, group, setting

TRAINED = ("none", "lora", "full")
"""What of a decoder is trained: nothing, adapters beside its matrices, or all of it."""


@dataclass(frozen=True)
class BackboneConfig:
    """A pretrained decoder."""

    path: str = setting("", "its files: a folder with config.json and safetensors, a .gguf, or a "
                        "llama2.c .bin")
    architecture: str = setting("", "what it is without its weights, as JSON; empty = as its files "
                                "say")
    end_ids: tuple[int, ...] = setting((), "ids that end a text; empty = as its files say", low=0,
                                       high=2**31 - 1)
    train: str = setting("none", "none: as it is; lora: adapters beside its matrices; full: all of "
                         "it", choices=TRAINED)
    dtype: str = setting("auto", "of its parameters while they are not trained; trained ones are "
                         "float32", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (hippocampus.layers.lora), with `backbone.train` = lora."""

    rank: int = count(8, "rank r of an adapter", high=65_536)
    alpha: float = setting(16.0, "the term is scaled by alpha / r", above=0, high=1e6)
    dropout: float = setting(0.0, "chance that an input of the term is zeroed while training",
                             low=0, below=1)
    rslora: bool = setting(False, "scale by alpha / sqrt(r) instead")
    targets: tuple[str, ...] = setting(
        ("layers_*.attention.*", "layers_*.mlp.*"), "globs over the names of linear layers that "
        "get an adapter; a star stands for dots too")


@dataclass(frozen=True)
class DecoderModelConfig:
    """What every model around a pretrained decoder has."""

    vocab_size: int = count(256, "token ids; training replaces it by the tokenizer's size",
                            low=2, high=16_777_216)
    compute_dtype: str = setting("auto", "dtype of matrix products; parameters stay as they are",
                                 choices=("auto", "float32", "bfloat16"))
    backbone: BackboneConfig = group(BackboneConfig)
    lora: LoRAConfig = group(LoRAConfig)
    backend: str = setting("auto", "attention backend",
                           choices=("auto", "xla", "cudnn", "flash"))
    remat: str = setting("none", "what the backward pass computes again: nothing, all but matrix "
                         "products, or all", choices=("none", "dots", "full"))

    @property
    def passes(self) -> int:
        """Reasoning passes: one."""
        return 1

    def longest_row(self, context: int) -> int | None:
        """Tokens that a row can have: any number."""
        return None
