"""The fields of CHopT: a pretrained decoder and the memory behind it."""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_decoder import DecoderModelConfig
from hippocampus.config_fields import count, group, setting
from hippocampus.config_memory import MemoryConfig


@dataclass(frozen=True)
class CHopTConfig(DecoderModelConfig):
    """A pretrained decoder with a Hopfield memory after its last block."""

    family: str = setting("chopt", "model family", choices=("chopt",))
    memory: MemoryConfig = group(MemoryConfig)
    chunk: int = count(0, "tokens that attention sees at once, after which the memory is written; "
                       "gradients run through the chunks of data.context; 0 = data.context", low=0,
                       high=16_777_216)
    scan_layers: bool = setting(True, "compile equal layers once")
