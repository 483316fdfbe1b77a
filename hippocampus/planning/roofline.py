"""The least time that a step can take, from what it computes and moves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a step takes at the vendor's figures; None = not known.

    They overlap at best, so the largest is a lower bound of the step's time. It is no estimate:
    matrix units are seldom busy, memory is read in pieces, and collectives wait for each other.
    """

    compute: float | None
    memory: float | None
    links: float | None

    @property
    def seconds(self) -> float | None:
        """The bound."""
        known = [part for part in (self.compute, self.memory, self.links) if part is not None]
        return max(known) if known else None

    @property
    def bound_by(self) -> str:
        """The part that makes it."""
        parts = {"compute": self.compute, "memory": self.memory, "links": self.links}
        known = {name: value for name, value in parts.items() if value is not None}
        return max(known, key=lambda name: known[name]) if known else ""


def roofline(flops: float, memory_bytes: float | None, sent_bytes: float | None, *,
             peak_flops: float, memory_bandwidth: float, link_bandwidth: float) -> Roofline:
    """The roofline of one device.

    Args:
      flops: of this device in a step.
      memory_bytes: read and written by it; None = not known.
      sent_bytes: to its neighbours; None = not known.
      peak_flops: FLOP/s; 0 = not known.
      memory_bandwidth: bytes/s.
      link_bandwidth: of all its links together, in one direction, bytes/s; 0 = no links.

    Source: Williams et al. 2009, Roofline: an insightful visual performance model.
    """
    return Roofline(
        flops / peak_flops if peak_flops else None,
        memory_bytes / memory_bandwidth if memory_bytes is not None else None,
        sent_bytes / link_bandwidth if sent_bytes is not None and link_bandwidth else None)


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Share of the peak that `flops` of one device in `seconds` are."""
    return flops / seconds / peak_flops
