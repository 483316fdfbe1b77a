"""What a probe may change at evaluation, as arrays: a whole suite then compiles once."""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Interventions:
    """Array arguments of a forward pass. None = not there; neutral values give the same bits.

    Attributes:
      path_mask_LP: 1 keeps a path of a layer, 0 removes it (gates renormalised). Neutral: ones.
      gate_override_LP: a gate to use instead of the learned one. Neutral: negative.
      segments: the pass r (1, 2, …) whose result counts. Neutral: `segments.train`. Given, the
        model runs `segments.eval` passes and selects one, so r may be traced.
    """

    path_mask_LP: Float[Array, "L P"] | None = None
    gate_override_LP: Float[Array, "L P"] | None = None
    segments: Int[Array, ""] | int | None = None


NEUTRAL = Interventions()
