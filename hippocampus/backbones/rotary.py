"""Rotary frequencies of pretrained decoders, stretched for contexts longer than the first ones.

    f_j = theta^(-2j/d),  j = 0 .. d/2 - 1
    linear:  f_j / s
    llama3:  with the wavelength w = 2 pi / f and the first context C,
             w < C / high: f;   w > C / low: f / s;   between them a f + (1 - a) f / s,
             a = (C / w - low) / (high - low)

Source: Su et al. 2021 (arXiv:2104.09864); Chen et al. 2023 (arXiv:2306.15595), section 2, for
linear; Grattafiori et al. 2024 (arXiv:2407.21783) and its published code for llama3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
      theta: base of the frequencies.
      kind: "default", "linear" or "llama3".
      factor: s, how much longer the context became.
      low, high: bounds of the llama3 bands, in waves per first context.
      first_length: C, the first context.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    first_length: int = 0

    def frequencies(self, head_width: int) -> Float32[np.ndarray, " half"]:
        """Radians per position of every pair of a head; `head_width` is even."""
        # In float32 step by step, as the weights were trained with.
        exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
        f = (np.float32(1.0) / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return f / np.float32(self.factor)
        if self.kind == "llama3":
            waves = self.first_length * f / np.float32(2 * math.pi)
            a = np.clip((waves - self.low) / (self.high - self.low), 0, 1).astype(np.float32)
            return a * f + (1 - a) * f / np.float32(self.factor)
        return f
