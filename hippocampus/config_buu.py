"""The fields of Buu: a pretrained decoder with gated adapters in some of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_adapters import AdaptersConfig
from hippocampus.config_decoder import DecoderModelConfig
from hippocampus.config_fields import count, group, setting


@dataclass(frozen=True)
class BuuConfig(DecoderModelConfig):
    """A pretrained decoder with a state-space and a memory branch behind attention."""

    family: str = setting("buu", "model family", choices=("buu",))
    adapters: AdaptersConfig = group(AdaptersConfig)
    checkpoint_parameters: int = count(
        0, "parameters of the whole checkpoint, where the decoder is a part of it, for the share "
        "of them that is trained; 0 = the decoder's", low=0, high=10**13)
    scan_layers: bool = setting(False, "compile equal layers once; that stacks their weights, a "
                                "second copy of them for the time of a step")
