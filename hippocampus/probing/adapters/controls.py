"""A Buu without what it is said to owe its results to: the controls of every table.

    bare(lm)                the decoder alone: no adapter is there
    zeroed(lm)              the memory branch of every adapter says nothing
    shuffled(lm, seed)      every slot gives the value of another one

They are models of their own, which generate and score as any other and share all parameters that
are not changed. `controls` says the same as `BuuInterventions`: arrays, for a program that is
compiled once. `enabled` gives those of single layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from jaxtyping import Int32

from hippocampus.errors import ConfigError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.buu import Buu, BuuInterventions


def adapters_of(lm: LanguageModel) -> tuple[Buu, tuple[int, ...]]:
    """A Buu, and the layers of its decoder that have an adapter.

    Raises:
      ConfigError: another model, or one without adapters.
    """
    model = lm.model
    if not isinstance(model, Buu) or not model.layers:
        raise ConfigError("the model has no adapters", "models of the family buu have them, with "
                          "model.adapters.count above 0")
    return model, model.layers


def bare(lm: LanguageModel) -> LanguageModel:
    """The decoder alone, with the parameters that it has in the model.

    Raises:
      ConfigError: a model without adapters.
    """
    model, _ = adapters_of(lm)
    without = dataclasses.replace(model.adapters, layers=(), count=0)
    return _like(lm, {"backbone": lm.params["backbone"]}, model.clone(adapters=without))


def zeroed(lm: LanguageModel) -> LanguageModel:
    """The model with a silent memory: what reads come to is multiplied by 0.

    Raises:
      ConfigError: a model without adapters.
    """
    def change(place: int, memory: dict[str, Any]) -> dict[str, Any]:
        kernel = memory["out"]["kernel"]
        return {**memory, "out": {**memory["out"], "kernel": 0 * kernel}}

    return _with_memories(lm, change)


def shuffled(lm: LanguageModel, seed: int = 0) -> LanguageModel:
    """The model with every slot's value at another slot's key.

    Args:
      lm: the model.
      seed: of the order, as for `controls`.

    Raises:
      ConfigError: a model without adapters.
    """
    model, layers = adapters_of(lm)
    order_LS = slot_orders(len(layers), model.adapters.memory.slots, seed)

    def change(place: int, memory: dict[str, Any]) -> dict[str, Any]:
        return {**memory, "value_slots": memory["value_slots"][order_LS[place]]}

    return _with_memories(lm, change)


def controls(lm: LanguageModel, seed: int = 0) -> dict[str, BuuInterventions]:
    """Name -> interventions: "base", "adapters", "memory zeroed" and "memory shuffled".

    Args:
      lm: a Buu.
      seed: of the shuffled slots.

    Raises:
      ConfigError: a model without adapters.
    """
    model, layers = adapters_of(lm)
    L, S = len(layers), model.adapters.memory.slots
    neutral = BuuInterventions.neutral(L, S)
    nothing = np.zeros(L, np.float32)
    return {"base": neutral.replace(enabled_L=nothing), "adapters": neutral,
            "memory zeroed": neutral.replace(memory_scale_L=nothing),
            "memory shuffled": neutral.replace(slot_order_LS=slot_orders(L, S, seed))}


def enabled(lm: LanguageModel, on: Collection[int]) -> BuuInterventions:
    """Interventions under which only some of the adapted layers have their adapter.

    Args:
      lm: a Buu.
      on: numbers of layers of the decoder.

    Raises:
      ConfigError: a model without adapters.
    """
    model, layers = adapters_of(lm)
    neutral = BuuInterventions.neutral(len(layers), model.adapters.memory.slots)
    return neutral.replace(enabled_L=np.asarray([i in on for i in layers], np.float32))


def slot_orders(L: int, S: int, seed: int = 0) -> Int32[np.ndarray, "L S"]:
    """An order of the slots of each layer in which none stays where it is, unless it is alone."""
    rng = np.random.default_rng(seed)
    orders = np.empty((L, S), np.int32)
    for order in orders:
        circle = rng.permutation(S)
        order[circle] = np.roll(circle, 1)
    return orders


def _with_memories(lm: LanguageModel,
                   change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> LanguageModel:
    model, layers = adapters_of(lm)
    adapters = dict(lm.params["adapters"])
    for place, i in enumerate(layers):
        own = adapters[f"layers_{i}"]
        adapters[f"layers_{i}"] = {**own, "memory": change(place, own["memory"])}
    return _like(lm, {**lm.params, "adapters": adapters}, model)


def _like(lm: LanguageModel, params: Any, model: Any) -> LanguageModel:
    return LanguageModel(model, params, lm.tokenizer, lm.config, lm.step)
