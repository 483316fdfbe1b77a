"""Flax Linen modules, one idea a file. Temporal layers share one call:

`layer(u_BTD, document_ids_BT, positions_BT) -> (y_BTD, out)`, with `out` a flat dict of named
intermediates. `document_ids_BT` is None when every row is one document.
"""
