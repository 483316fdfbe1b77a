"""What another model puts into the layers of a decoder: behind attention, before it is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array, Float

from hippocampus.layers.edits import Edit

AfterAttention = Callable[[Float[Array, "B T D"], Float[Array, "B T D"], Edit],
                          tuple[Float[Array, "B T D"], dict[str, Any]]]
"""(what attention read, what it gave, edit) -> (what is used instead, named intermediates)."""


@dataclass(frozen=True)
class Insertion:
    """Parts after the attention of some layers.

    Attributes:
      apply: (arrays, h_BTD, attended_BTD, positions_BT, edit, **how) -> (y_BTD, out): a part as a
        pure function of its arrays. `how` is `document_ids_BT` of whole rows; or `cache` and
        `valid_BT` of rows that go on, and then out["cache"] is the new cache.
      arrays: what `apply` gets, by the number of the layer; equal in structure and shapes, so that
        neighbours are compiled once.
    """

    apply: Callable[..., tuple[Array, dict[str, Any]]] | None = None
    arrays: Mapping[int, Any] = field(default_factory=dict)

    def bound(self, arrays: Any, positions_BT: Array, **how: Any) -> AfterAttention | None:
        """The part of a layer, as the layer calls it; None where it has none.

        Args:
          arrays: of the layer, or None.
          positions_BT, how: as for `apply`.
        """
        apply = self.apply
        if arrays is None or apply is None:
            return None
        return lambda h_BTD, attended_BTD, edit: apply(
            arrays, h_BTD, attended_BTD, positions_BT, edit, **how)


NOTHING = Insertion()
