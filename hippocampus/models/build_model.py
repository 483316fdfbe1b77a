"""From a config to a model: the one line per family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hippocampus.config import Config
from hippocampus.devices import Device, resolve
from hippocampus.models.equilibrium_lm import EquilibriumLM
from hippocampus.models.hybrid_lm import HybridLM

LM = HybridLM | EquilibriumLM
"""A model of any family."""

FAMILIES: dict[str, Callable[[Any], Any]] = {
    "hybrid": lambda config: HybridLM(config.model, _flow_width(config)),
    "equilibrium": lambda config: EquilibriumLM(config.model)}


def build_model(config: Config, device: Device | None = None) -> Any:
    """The Flax module of a config; reads no data and no weights.

    Args:
      config: from `load_config`; fields that are still "auto" are resolved for the device.
      device: default: the one that JAX sees first.

    Raises:
      ConfigError: a backend that this device does not have.
    """
    config, _ = resolve(config, device)
    return FAMILIES[config.model.family](config)


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: LM) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(initialise(model), jax.random.key(0))


@functools.lru_cache(maxsize=8)
def initialise(model: LM) -> Callable[[Array], Any]:
    """A function key -> the first parameters, which is traced once in a process."""
    def parameters(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    return jax.jit(parameters, inline=True)


def count_parameters(model: LM) -> int:
    """Parameters of the model; the padding of its tables does not count."""
    shapes = parameter_shapes(model)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    head = model.head(shapes).weight_VD
    tables = 1 if model.config.tie_embeddings else 2
    return total - tables * (head.shape[0] - model.config.vocab_size) * head.shape[1]


def _flow_width(config: Config) -> int:
    flow = config.loss.rectified_flow
    return flow.width if flow.segment_weight else 0
