"""The fields of Buu: a pretrained decoder with gated adapters in some of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_adapters import AdaptersConfig
from hippocampus.config_chopt import BackboneConfig, LoRAConfig
from hippocampus.config_fields import count, group, setting


@dataclass(frozen=True)
class BuuConfig:
    """A pretrained decoder with a state-space and a memory branch behind attention."""

    family: str = setting("buu", "model family", choices=("buu",))
    vocab_size: int = count(256, "token ids; training replaces it by the tokenizer's size",
                            low=2, high=16_777_216)
    compute_dtype: str = setting("auto", "dtype of matrix products; parameters stay as they are",
                                 choices=("auto", "float32", "bfloat16"))
    backbone: BackboneConfig = group(BackboneConfig)
    lora: LoRAConfig = group(LoRAConfig)
    adapters: AdaptersConfig = group(AdaptersConfig)
    checkpoint_parameters: int = count(
        0, "parameters of the whole checkpoint, where the decoder is a part of it, for the share "
        "of them that is trained; 0 = the decoder's", low=0, high=10**13)
    backend: str = setting("auto", "attention backend",
                           choices=("auto", "xla", "cudnn", "flash"))
    remat: str = setting("none", "what the backward pass computes again: nothing, all but matrix "
                         "products, or all", choices=("none", "dots", "full"))
    scan_layers: bool = setting(False, "compile equal layers once; that stacks their weights, a "
                                "second copy of them for the time of a step")

    @property
    def passes(self) -> int:
        """Reasoning passes: one."""
        return 1

    def longest_row(self, context: int) -> int | None:
        """Tokens that a row can have: any number."""
        return None
