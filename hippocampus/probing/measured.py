"""What a forward pass under interventions costs, window by window: `Measured`, `Damage`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True)
class Damage:
    """How much a loss rose, in nats per token.

    Attributes:
      nats: the difference of the losses.
      standard_error: of the difference, paired over windows; NaN for a single window.
    """

    nats: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class Measured:
    """Losses of the windows of a probe.

    Attributes:
      nll_W: summed -log p of each window's predictions.
      weight_W: how many they are.
      norm_LP: mean over tokens of |g_p scale_p rms(y_p)|, what a path adds to the residual; 0
        where a layer has not the path.
      share_LP: mean over tokens of its share in the sum of the layer's paths.
    """

    nll_W: Float64[np.ndarray, " W"]
    weight_W: Float64[np.ndarray, " W"]
    norm_LP: Float64[np.ndarray, "L P"]
    share_LP: Float64[np.ndarray, "L P"]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return math.fsum(self.nll_W) / math.fsum(self.weight_W)

    def minus(self, baseline: Measured) -> Damage:
        """The damage against a baseline on the same windows.

        The standard error is that of a ratio of sums: windows are what is drawn, their
        differences and their lengths vary together.

        Source: Cochran 1977, Sampling Techniques, section 2.11.
        """
        difference_W = self.nll_W - baseline.nll_W
        nats = math.fsum(difference_W) / math.fsum(self.weight_W)
        n = len(difference_W)
        if n < 2:
            return Damage(nats, math.nan)
        residual_W = difference_W - nats * self.weight_W
        variance = math.fsum(residual_W**2) / (n - 1) / n
        return Damage(nats, math.sqrt(variance) / float(self.weight_W.mean()))
