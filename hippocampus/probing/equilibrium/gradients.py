"""How far one gradient is from another, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class GradientError(NamedTuple):
    """One part of a gradient against its reference.

    Attributes:
      size: norm of the reference.
      relative: norm of the difference over `size`.
      cosine: between the two; NaN where one is 0.
    """

    size: float
    relative: float
    cosine: float


def compare(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, GradientError]:
    """Compares gradients, part by part and "all" together, in float64.

    Args:
      found: name -> tree of arrays.
      reference: the same names and shapes.
    """
    flat = {name: (_flat(found[name]), _flat(reference[name])) for name in reference}
    if len(flat) > 1:
        found_all, reference_all = zip(*flat.values(), strict=True)
        flat["all"] = np.concatenate(found_all), np.concatenate(reference_all)
    return {name: _error(a, b) for name, (a, b) in flat.items()}


def _flat(tree: Any) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _error(found: np.ndarray, reference: np.ndarray) -> GradientError:
    size, own = float(np.linalg.norm(reference)), float(np.linalg.norm(found))
    off = float(np.linalg.norm(found - reference))
    relative = off / size if size else (0.0 if off == 0 else np.inf)
    cosine = float(found @ reference) / (size * own) if size * own else np.nan
    return GradientError(size, relative, cosine)
