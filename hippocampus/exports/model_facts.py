"""What a model is made of, in words for a page: of each family, from its config alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from hippocampus.config import (
    BuuConfig,
    CHopTConfig,
    EquilibriumConfig,
    HybridConfig,
    depth,
    layer_paths,
)

Rows = tuple[tuple[str, str], ...]

_NAMES = {"ssm": "state space", "hopfield": "Hopfield memory", "attention": "attention",
          "mlp": "MLP"}
_TAGS = {"ssm": "state-space-model", "hopfield": "modern-hopfield-network",
         "attention": "attention"}


@dataclass(frozen=True)
class ModelFacts:
    """What is said of a model.

    Attributes:
      rows: (name, value) of a table.
      tags: of the Hugging Face hub.
      outline: half a line, such as "ssm + hopfield; 4 layers of width 256".
    """

    rows: Rows
    tags: tuple[str, ...]
    outline: str


def facts_of(model: HybridConfig | EquilibriumConfig) -> ModelFacts:
    """The facts of a model's config."""
    return _FAMILIES[model.family](model)


def _hybrid(model: HybridConfig) -> ModelFacts:
    paths = {path for layer in layer_paths(model) for path in layer}
    kinds = dict.fromkeys("+".join(layer) for layer in layer_paths(model))
    return ModelFacts(
        (("layers", f"{model.n_layers} of width {model.d_model}, {model.n_heads} heads"),
         ("paths", "; ".join(_layers(model))),
         ("reasoning passes", f"{model.segments.train}")),
        tuple(tag for path, tag in _TAGS.items() if path in paths),
        f"{', '.join(kinds).replace('+', ' + ')}; {_count(model.n_layers, 'layer')} of width "
        f"{model.d_model}")


def _layers(model: HybridConfig) -> Iterator[str]:
    """Layers with the same paths and retrieval depth together."""
    own = [(paths, depth(model, i) if "hopfield" in paths else 0)
           for i, paths in enumerate(layer_paths(model))]
    first = 0
    for (paths, steps), group in groupby(own):
        last = first + len(list(group)) - 1
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        names = " + ".join(_NAMES[path] for path in paths)
        yield f"{where}: {names}" + (f" (retrieval depth {steps})" if steps else "")
        first = last + 1


def _equilibrium(model: EquilibriumConfig) -> ModelFacts:
    cell, solver, memory = model.cell, model.solver, model.hopfield
    parts = " + ".join(_NAMES[part] for part in cell.parts)
    layers = f"{_count(model.n_layers, 'Mamba layer')} ({model.ssm.kind})"
    rows = [("layers", f"{layers} of width {model.d_model}")]
    if not model.is_explicit:
        rows.append(("equilibrium", f"the fixed point of a cell of {parts}: {solver.method}, "
                                    f"{solver.schedule}, at most {solver.max_iterations} sweeps, "
                                    f"tolerance {solver.tol_fixedpoint:g}"))
        after = f"the fixed point of a cell of {parts}"
    elif cell.copies:
        rows.append(("cells", f"{cell.copies} of {parts}, each with its own weights and applied "
                              "once"))
        after = f"{_count(cell.copies, 'cell')} of {parts}"
    else:
        after = ""
    has_memory = "hopfield" in cell.parts and bool(after)
    if has_memory:
        slots = f"{memory.n_slots:,} learned patterns"
        what = {"slots": slots, "context": "the causal context",
                "both": f"{slots} and the causal context"}[memory.patterns]
        rows.append(("memory", f"{what}, {model.n_heads} heads"))
    tags = (_TAGS["ssm"], "mamba", *((_TAGS["hopfield"],) if has_memory else ()),
            *(() if model.is_explicit else ("deep-equilibrium-model",)))
    outline = ", ".join(filter(None, (layers if model.n_layers else "", after)))
    return ModelFacts(tuple(rows), tags, f"{outline}; width {model.d_model}")


def _chopt(model: CHopTConfig) -> ModelFacts:
    memory, (name, trained) = model.memory, _decoder(model)
    heads = f"{memory.n_heads} head{'s' * (memory.n_heads > 1)}"
    of = {"hidden": "", "next_token": " of next tokens"}[memory.values]
    slots = f"{memory.n_slots:,} slots{of}, {memory.strategy}, {heads}"
    return ModelFacts(
        (("decoder", f"{name}, {trained}"),
         ("memory", f"{slots}, at most {memory.n_writes} writes from {memory.select} a chunk")),
        (_TAGS["hopfield"],), f"{name}, {trained}; a memory of {slots}")


def _buu(model: BuuConfig) -> ModelFacts:
    adapters, (name, trained) = model.adapters, _decoder(model)
    n = len(adapters.layers) or adapters.count
    if not n:
        return ModelFacts((("decoder", f"{name}, {trained}"),), (), f"{name}, {trained}")
    memory = adapters.memory
    where = f"layers {', '.join(map(str, sorted(adapters.layers)))}" if adapters.layers else (
        f"the last {_count(n, 'layer')}")
    branches = f"{adapters.ssm.kind} state space and {memory.slots:,} slots, {adapters.mix}"
    return ModelFacts(
        (("decoder", f"{name}, {trained}"), ("adapters", f"in {where}: {branches}")),
        (_TAGS["ssm"], _TAGS["hopfield"], "adapter"),
        f"{name}, {trained}; {_count(n, 'gated adapter')} of {branches}")


def _decoder(model: CHopTConfig | BuuConfig) -> tuple[str, str]:
    """Name of a pretrained decoder, and what is trained of it."""
    trained = {"none": "not trained", "lora": f"with trained adapters of rank {model.lora.rank}",
               "full": "trained"}[model.backbone.train]
    return Path(model.backbone.path).name or "a pretrained decoder", trained


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


_FAMILIES: dict[str, Callable[[Any], ModelFacts]] = {
    "hybrid": _hybrid, "equilibrium": _equilibrium, "chopt": _chopt, "buu": _buu}
