"""Kinds of state space at equal FLOPs, in the gated hybrid of configs/shakespeare.py:10m.

    :gated (the default)   the input decides a decay per channel, one state each
    :diagonal              constant A, B, C, D; 16 states a channel
    :s6                    Mamba: the input decides step, B and C; 16 states a channel
    :ssd                   Mamba-2: one decay a head of 64 channels, 64 states

All have the same layers, the same inner width, data and schedule. What a kind costs more or less
than the gated one is in the width of the feed-forward parts (69.4 million training FLOPs per
token, within 0.2 %; what a scan does element by element is counted for none). The recipe was tuned
with the gated kind.

Command:   python -m hippocampus.train --config=configs/ssm_kinds.py:s6
Hardware:  one GPU; written for an NVIDIA H100
Result:    gated 1.393, diagonal 1.400, s6 1.403, ssd 1.404 nats per character (two seeds):
           docs/experiments.md
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from
from hippocampus.errors import ConfigError

KINDS = ("gated", "diagonal", "s6", "ssd")
SETTINGS = {
    "model.ssm.d_state": (4,    16,   16,   64),
    "model.mlp.width":   (1152, 1192, 1168, 1080),
}


def get_config(arg: str = "gated") -> ConfigDict:
    """The experiment with one of `KINDS`."""
    if arg not in KINDS:
        raise ConfigError(f"configs/ssm_kinds.py has no kind {arg!r}",
                          f"known: {', '.join(KINDS)}")
    config = start_from("shakespeare.py", __file__, "10m")
    config.model.ssm.kind = arg
    config.update_from_flattened_dict(
        {field: values[KINDS.index(arg)] for field, values in SETTINGS.items()})
    return config
