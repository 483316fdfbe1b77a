"""How much of a model with a frozen half is trained: `trained_share`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict

from hippocampus.config import Config
from hippocampus.models.build_model import count_parameters, parameter_shapes
from hippocampus.models.halves import frozen_shapes, trained_shapes

_MATRICES = ("kernel", "lora_a", "lora_b", "key_slots", "value_slots")


@dataclass(frozen=True)
class TrainedShare:
    """Parameters that are trained beside those that are not.

    Attributes:
      trained: all of them.
      matrices: of them, those in matrices and memory slots; the rest are convolutions, biases,
        norms, decays and scalars.
      frozen: parameters of the decoder, or of the whole checkpoint that it is a part of.
    """

    trained: int
    matrices: int
    frozen: int

    @property
    def share(self) -> float:
        """Matrices and slots over them and what is frozen."""
        return self.matrices / (self.matrices + self.frozen)

    def __str__(self) -> str:
        """A line for a person."""
        return (f"{self.trained:,} parameters, {self.matrices:,} of them in matrices and slots: "
                f"{self.share:.2%} beside {self.frozen:,} that stay as they are")


def trained_share(model: Any, config: Config) -> TrainedShare | None:
    """What is trained of a model; None for one that is trained whole.

    Args:
      model: of any family.
      config: resolved.
    """
    if not frozen_shapes(model, config):
        return None
    leaves = flatten_dict(trained_shapes(model))
    matrices = sum(leaf.size for path, leaf in leaves.items()
                   if path[-1] in _MATRICES and leaf.shape[-1] > 1)
    params = parameter_shapes(model)
    added = sum(leaf.size for path, leaf in flatten_dict(params).items() if path[0] != "backbone")
    whole = getattr(config.model, "checkpoint_parameters", 0)
    return TrainedShare(sum(leaf.size for leaf in leaves.values()), matrices,
                        whole or count_parameters(model) - added)
