"""`train --check`: what a config would train, without reading data or compiling anything."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from hippocampus.config import Config
from hippocampus.devices import resolve
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.models.flops import training_flops_per_token
from hippocampus.models.trained_share import trained_share
from hippocampus.training import sharding
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.step import sharded_init


def describe(config: Config) -> str:
    """Parameters, the memory of the train state per device, and FLOPs, as text.

    Raises:
      ConfigError: what training would refuse before it reads data.
    """
    config, _ = resolve(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.train.batch_size, "train.batch_size",
                         config.train.grad_accumulation)
    model = build_model(config)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    _, like, _ = sharded_init(model, optimizer, config, mesh)
    per_device = sum(device_bytes(leaf) for leaf in jax.tree.leaves(like))
    tokens = config.train.batch_size * config.data.context
    return (
        f"{config.name}: the config is good\n"
        f"parameters            {count_parameters(model):,} (vocabulary {config.model.vocab_size}; "
        "training takes the tokenizer's)\n"
        f"{_trained(model, config)}"
        f"train state           {per_device / 2**20:,.1f} MiB per device, of {mesh.size}; "
        "activations come on top\n"
        f"tokens                {tokens:,} per step, {_in_all(config, tokens)}\n"
        f"FLOPs                 {training_flops_per_token(config):.3g} per token, "
        f"{training_flops_per_token(config) * tokens:.3g} per step\n"
        f"compute dtype         {config.model.compute_dtype}\n"
        f"mesh                  {dict(mesh.shape)}\n")


def _trained(model: Any, config: Config) -> str:
    share = trained_share(model, config)
    return f"trained               {share}\n" if share else ""


def _in_all(config: Config, tokens_per_step: int) -> str:
    if config.train.epochs:
        return f"until the text is read {config.train.epochs:g} times"
    return f"{tokens_per_step * config.train.steps:,} in all"


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one device's share of an array."""
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # two 32-bit words
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * (8 if key else leaf.dtype.itemsize)
