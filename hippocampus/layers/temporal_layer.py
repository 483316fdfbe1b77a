"""What the paths have in common: each reads a sequence at once, or goes on from a cache."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int


class TemporalLayer(nn.Module):
    """A layer over time; a subclass has `__call__`, `init_cache` and `_run`."""

    def extend(
        self, u_BnD: Float[Array, "B n D"], positions_Bn: Int[Array, "B n"], cache: Any,
        valid_Bn: Bool[Array, "B n"],
    ) -> tuple[Float[Array, "B n D"], Any]:
        """Reads further tokens of every row; the law: in any chunks, what `__call__` gives at once.

        Args:
          u_BnD: normalised inputs of any number of tokens.
          positions_Bn: of each token; a row's valid ones follow on what the cache has read.
          cache: from `init_cache` or the last call.
          valid_Bn: a row's valid tokens come first; the others leave the cache as it is.
        """
        y_BnD, _, cache = self._run(u_BnD, positions_Bn, cache=cache, valid_BT=valid_Bn)
        return y_BnD, cache

    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None) -> tuple[Array, dict[str, Array], Any]:
        """Outputs, intermediates and the new cache; without a cache, of a whole sequence."""
        raise NotImplementedError
