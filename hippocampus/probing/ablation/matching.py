"""Baselines of one path that are as large, or cost as much, as the model with all paths.

A path that is taken away takes its parameters along; what is left may be worse for that alone. So
its feed-forward parts are widened until the count is the whole model's. For equal FLOPs it makes
one pass instead of R, and what the passes and the paths would have cost goes into the same place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from hippocampus.config import Config
from hippocampus.config_checks import check_together
from hippocampus.errors import ConfigError
from hippocampus.layers.mlp import mlp_width
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.models.flops import training_flops_per_token
from hippocampus.probing.ablation.grid import Cell, Grid

KINDS = ("parameters", "flops")
"""What can be matched."""

WORDS = {"parameters": "parameters", "flops": "training FLOPs per token"}
"""What is counted of each kind."""

TOLERANCE = 0.01
"""Largest share by which a matched number may miss its target."""

_EVEN = 8  # devices multiply matrices of such widths faster


def with_matched(grid: Grid, kinds: Sequence[str], vocab_size: int) -> Grid:
    """The grid with baselines after the cells of one path.

    Args:
      grid: with subsets of the paths.
      kinds: of `KINDS`.
      vocab_size: of the tokenizer; the tables of embeddings count.

    Raises:
      ConfigError: an unknown kind, no subsets, or a width that comes nowhere near.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"--match is {unknown[0]!r}", f"it must be one of {', '.join(KINDS)}")
    single = [cell for cell in grid.cells if cell.whole and len(cell.paths) == 1]
    if kinds and not single:
        raise ConfigError("--match has nothing to match: no cell has a single path",
                          "it goes with --paths")
    matched = [_matched(cell, grid[cell.whole].config, kind, vocab_size)
               for kind in dict.fromkeys(kinds) for cell in single]
    return dataclasses.replace(grid, cells=(*grid.cells, *matched))


def parameters(config: Config) -> int:
    """Parameters of a config's model."""
    return count_parameters(build_model(config))


def _matched(cell: Cell, whole: Config, kind: str, vocab_size: int) -> Cell:
    measure: Callable[[Config], float] = (
        parameters if kind == "parameters" else training_flops_per_token)
    start = cell.config if kind == "parameters" else one_pass(cell.config)
    target = measure(_with_vocabulary(whole, vocab_size))

    def at(width: int) -> float:
        return measure(_with_vocabulary(_with_width(start, width), vocab_size))

    # Both counts are linear in the width.
    first, second = at(1), at(2)
    exact = max(1.0, 1 + (target - first) / (second - first))
    width = max(_EVEN, round(exact / _EVEN) * _EVEN)
    if abs(at(width) / target - 1) > TOLERANCE / 4:
        width = round(exact)
    missed = at(width) / target - 1
    name, unit = f"{cell.name}_same_{kind}", WORDS[kind]
    if abs(missed) > TOLERANCE:
        raise ConfigError(
            f"{name}: with model.mlp.width = {width} it has {at(width):.4g} {unit} for "
            f"{target:.4g}, {missed:+.1%}", "leave this kind out of --match")
    passes = "" if start is cell.config else ", one pass"
    # A width of 0 means the usual one, which the whole model may have.
    usual = mlp_width(cell.config.model.mlp, cell.config.model.d_model)
    note = (f"{cell.name}, same {unit}: model.mlp.width = {width} instead of {usual}{passes}; "
            f"{at(width):,.0f} for {target:,.0f} ({missed:+.2%})")
    return dataclasses.replace(cell, name=name, config=_with_width(start, width), match=kind,
                               note=note)


def one_pass(config: Config) -> Config:
    """The same model with a single pass of the stack, and nothing that needs two."""
    segments = dataclasses.replace(config.model.segments, train=1)
    flow = dataclasses.replace(config.loss.rectified_flow, segment_weight=0.0)
    return check_together(dataclasses.replace(
        config, model=dataclasses.replace(config.model, segments=segments),
        loss=dataclasses.replace(config.loss, rectified_flow=flow)))


def _with_width(config: Config, width: int) -> Config:
    mlp = dataclasses.replace(config.model.mlp, width=width)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mlp=mlp))


def _with_vocabulary(config: Config, vocab_size: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(
        config.model, vocab_size=vocab_size))
