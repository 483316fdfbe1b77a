"""From a config to a model: the one line per family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hippocampus.backbones.architecture import Architecture, parse_architecture
from hippocampus.backbones.loading import load_backbone
from hippocampus.config import BuuConfig, CHopTConfig, Config, LoRAConfig
from hippocampus.config_adapters import adapted_layers, check_adapters
from hippocampus.config_memory import check_memory
from hippocampus.devices import Device, resolve
from hippocampus.errors import ConfigError
from hippocampus.layers.lora import LoRA
from hippocampus.models.buu import Buu
from hippocampus.models.chopt import CHopT
from hippocampus.models.equilibrium_lm import EquilibriumLM
from hippocampus.models.hybrid_lm import HybridLM

LM = HybridLM | EquilibriumLM | CHopT | Buu
"""A model of any family."""

FAMILIES: dict[str, Callable[[Any], Any]] = {
    "hybrid": lambda config: HybridLM(config.model, _flow_width(config)),
    "equilibrium": lambda config: EquilibriumLM(config.model),
    "chopt": lambda config: _chopt(config.model, config.data.context),
    "buu": lambda config: _buu(config.model)}


def build_model(config: Config, device: Device | None = None) -> Any:
    """The Flax module of a config; reads no data and no weights.

    Of a pretrained decoder it reads what its files say of it, where the config does not.

    Args:
      config: from `load_config`; fields that are still "auto" are resolved for the device.
      device: default: the one that JAX sees first.

    Raises:
      ConfigError: a backend that this device does not have, or settings that do not fit a
        pretrained decoder.
      DataError: a pretrained decoder that is not there, or not supported.
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


def _chopt(model: CHopTConfig, context: int) -> CHopT:
    architecture = architecture_of(model)
    check_memory(model.memory, architecture.d_model)
    return CHopT(architecture, model.memory, model.chunk or context, model.compute_dtype,
                 model.scan_layers, model.remat, model.backend,
                 train_backbone=model.backbone.train, lora=_lora(model.lora))


def _buu(model: BuuConfig) -> Buu:
    architecture = architecture_of(model)
    if adapted_layers(model.adapters, architecture.n_layers):
        check_adapters(model.adapters, architecture.d_model, architecture.n_heads)
    return Buu(architecture, model.adapters, model.compute_dtype, model.scan_layers, model.remat,
               model.backend, train_backbone=model.backbone.train, lora=_lora(model.lora))


def _lora(lora: LoRAConfig) -> LoRA:
    return LoRA(lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.targets)


def architecture_of(model: CHopTConfig | BuuConfig) -> Architecture:
    """The pretrained decoder of a config: as it says itself, else as the decoder's files say.

    Raises:
      ConfigError: the config names none.
      DataError: it is not there, or not supported.
    """
    backbone = model.backbone
    if backbone.architecture:
        return parse_architecture(backbone.architecture)
    if not backbone.path:
        raise ConfigError("model.backbone.path is empty", "name the folder or file of a pretrained "
                          "decoder with --config.model.backbone.path")
    return load_backbone(backbone.path, weights=False).model.config
