"""Models of which a part stays as it was: what is trained, what is not, and the whole of both.

A model with a pretrained decoder says with `trained(params, key)` what of its parameters an
optimizer sees, with `frozen(params)` what stays, and with `whole(trained, frozen)` what it runs
with. Other models are trained whole. Checkpoints hold what is trained; what is not is read from the
decoder's own files again, whose digest a run keeps.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array

from hippocampus.backbones.loading import load_backbone, weights_digest
from hippocampus.backbones.parameters import Shardings
from hippocampus.config import Config
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.files import read_object
from hippocampus.layers.lora import absorb
from hippocampus.models.build_model import parameter_shapes


def trained_half(model: Any, params: Any, key: Array) -> Any:
    """What of a model's parameters is trained, and what is trained beside them.

    Args:
      model: of any family.
      params: all of its parameters.
      key: random key of what is drawn for training alone.
    """
    return model.trained(params, key) if hasattr(model, "trained") else params


def whole(model: Any, trained: Any, frozen: Any) -> Any:
    """The parameters that a model runs with; may be differentiated by `trained`.

    Args:
      model: of any family.
      trained: as `trained_half` gives it.
      frozen: the rest; {} where nothing is.
    """
    return model.whole(trained, frozen) if hasattr(model, "whole") else trained


def merged(params: Any) -> Any:
    """What `whole` gives, as float32 and of the shapes of `parameter_shapes`: adapters are added
    to their matrices. For what leaves a run.

    Args:
      params: all parameters.
    """
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), absorb(params))


@functools.lru_cache(maxsize=8)
def trained_shapes(model: Any) -> Any:
    """`trained_half` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(functools.partial(trained_half, model), parameter_shapes(model),
                          jax.random.key(0))


def frozen_shapes(model: Any, config: Config) -> Any:
    """What is not trained as `jax.ShapeDtypeStruct`s, in the dtype that it is kept in.

    Args:
      model: of any family.
      config: resolved.
    """
    if not hasattr(model, "frozen"):
        return {}
    dtype = jnp.dtype(config.model.backbone.dtype)  # type: ignore[attr-defined]
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype),
                        model.frozen(parameter_shapes(model)))


def read_frozen(model: Any, config: Config, sharding: Any) -> Any:
    """Reads what is not trained from the decoder's files.

    Args:
      model: of any family.
      config: resolved.
      sharding: where it goes: one for all, or a tree like `frozen_shapes`.

    Raises:
      DataError, CheckpointError: as `load_backbone`.
    """
    shapes = frozen_shapes(model, config)
    if not shapes:
        return {}
    place = sharding if isinstance(sharding, Sharding) else sharding["backbone"]
    return {"backbone": read_backbone(config, config.model.backbone.dtype,  # type: ignore[attr-defined]
                                      place)}


def read_backbone(config: Config, dtype: str, sharding: Any) -> Any:
    """Reads a model's pretrained decoder.

    Args:
      config: of the model.
      dtype: of the parameters.
      sharding: where they go: one for all, or a tree of them.

    Raises:
      DataError, CheckpointError: as `load_backbone`.
    """
    place: Shardings = sharding if isinstance(sharding, Sharding) else lambda shapes: sharding
    return load_backbone(backbone_path(config), dtype=dtype, sharding=place).params


def backbone_path(config: Config) -> Path:
    """Where a model's pretrained decoder lies.

    Raises:
      ConfigError: nowhere.
    """
    path = config.model.backbone.path  # type: ignore[attr-defined]
    if not path:
        raise ConfigError("model.backbone.path is empty", "name the folder or file of a pretrained "
                          "decoder with --config.model.backbone.path")
    return Path(path)


def backbone_record(config: Config) -> str:
    """What a run folder keeps to recognise its decoder by: JSON; "" for a model without one."""
    if not hasattr(config.model, "backbone"):
        return ""
    return json.dumps({"digest": weights_digest(backbone_path(config))}, indent=2) + "\n"


def check_backbone(config: Config, record: Path) -> None:
    """Refuses another decoder than the one that a run was trained with.

    Args:
      config: of the run.
      record: the file with what `backbone_record` said then.

    Raises:
      CheckpointError: it is another one.
      DataError: the record, or the decoder, is missing or damaged.
    """
    if not hasattr(config.model, "backbone"):
        return
    then = str(read_object(record, "restore it from a copy").get("digest"))
    try:
        now = weights_digest(backbone_path(config))
    except DataError as error:
        raise DataError(error.message, f"the run in {record.parent} needs the decoder that it was "
                        "trained with: put it back, or name its new place in config.json "
                        "(model.backbone.path)") from None
    if then != now:
        raise CheckpointError(f"{backbone_path(config)} is not the decoder that the run in "
                              f"{record.parent} was trained with ({then[:12]}… then, {now[:12]}… "
                              "now)", "restore it from a copy")
