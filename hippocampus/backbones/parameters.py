"""Parameters of a decoder from named tensors and back, one tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from hippocampus.backbones.architecture import Architecture
from hippocampus.backbones.decoder import Decoder
from hippocampus.backbones.names import hub_name, is_left_out, is_transposed, plain_name
from hippocampus.backbones.tensors import TensorSource
from hippocampus.errors import CheckpointError, ConfigError

Shardings = jax.sharding.Sharding | Callable[[Any], Any] | None
"""Where parameters go: all alike, or a function of their shapes that gives a tree; None = whole, to
this process's first device."""

_TABLES = ("embedding", "head")
"""Parameters with rows beyond the vocabulary."""
_FLOATS = ("float32", "bfloat16", "float16")


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: Decoder) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def count_parameters(model: Decoder) -> int:
    """Parameters of the model; the padding of its tables does not count."""
    cfg, shapes = model.config, parameter_shapes(model)
    padding = shapes["embedding"].shape[0] - cfg.vocab_size
    tables = 1 if cfg.tie_embeddings else 2
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) - tables * padding * cfg.d_model


def read_parameters(source: TensorSource, model: Decoder, *, dtype: str | None = None,
                    sharding: Shardings = None) -> Any:
    """The parameter tree; the host holds one tensor at a time besides what lies on its devices.

    Args:
      source: of tensors, under the names of the Hugging Face form.
      model: that they are for.
      dtype: of the parameters; None = of each tensor as it lies.
      sharding: where they go.

    Raises:
      CheckpointError: a tensor is missing, surplus, of another shape, or not finite. All names and
        shapes are checked before anything is read.
    """
    shapes = parameter_shapes(model)
    found = _check(source, model.config, shapes)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = sharding(shapes) if callable(sharding) else jax.tree.map(lambda _: sharding, shapes)

    def load(entries: Any, leaf: jax.ShapeDtypeStruct, place: Any) -> jax.Array:
        name = _name(entries)
        weight = source.read(found[name])
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{source.place}: {found[name]} has weights that are not finite",
                                  "this model cannot be used; get the file again")
        if is_transposed(name):
            weight = weight.T
        if len(weight) < leaf.shape[0]:
            weight = np.pad(weight, ((0, leaf.shape[0] - len(weight)), (0, 0)))
        kind = jnp.dtype(dtype or weight.dtype)
        return jax.make_array_from_callback(
            leaf.shape, place, lambda index: weight[index].astype(kind, copy=False))

    return jax.tree_util.tree_map_with_path(load, shapes, places)


def named_tensors(params: Any, architecture: Architecture, dtype: str | None = None,
                  ) -> Iterator[tuple[str, Shaped[np.ndarray, "*sizes"]]]:
    """The tensors of a parameter tree under the names of the Hugging Face form, one by one.

    Args:
      params: of a decoder.
      architecture: of it.
      dtype: of the tensors; None = as the parameters are.

    Raises:
      CheckpointError: a weight is not finite.
      ConfigError: an adapter lies beside a matrix.
    """
    for entries, leaf in jax.tree.leaves_with_path(params):
        name, weight = _name(entries), np.asarray(leaf)
        if ".lora_" in name:
            raise ConfigError(f"{name} is an adapter, which a model's files have no place for",
                              "merge the adapters, or write them with write_adapters")
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{name} has weights that are not finite",
                                  "the training diverged; take an earlier step")
        if is_transposed(name):
            weight = weight.T
        if name in _TABLES:
            weight = weight[:architecture.vocab_size]
        yield hub_name(name, architecture), weight.astype(jnp.dtype(dtype or weight.dtype))


def _check(source: TensorSource, cfg: Architecture, shapes: Any) -> dict[str, str]:
    """The name in the source of every parameter, after all of them were checked."""
    hint = "config.json and the tensors must be of the same model, and complete"
    plain = {plain_name(name): name for name in source.specs}
    found = {}
    for entries, leaf in jax.tree.leaves_with_path(shapes):
        name = _name(entries)
        there = hub_name(name, cfg)
        if there not in plain:
            raise CheckpointError(f"{source.place} lacks the tensor {there}", hint)
        spec = source.specs[plain[there]]
        wanted = leaf.shape[::-1] if is_transposed(name) else leaf.shape
        if name in _TABLES:
            wanted = (cfg.vocab_size, cfg.d_model)
        if spec.shape != wanted:
            raise CheckpointError(f"{source.place}: {there} has the shape {list(spec.shape)}; the "
                                  f"model needs {list(wanted)}", hint)
        if spec.dtype not in _FLOATS:
            raise CheckpointError(f"{source.place}: {there} is {spec.dtype}",
                                  f"it must be one of {', '.join(_FLOATS)}")
        found[name] = plain.pop(there)
    surplus = sorted(name for name in plain if not is_left_out(name, cfg))
    if surplus:
        raise CheckpointError(f"{source.place} has a tensor that a {cfg.family} has not: "
                              f"{surplus[0][:80]}", "it may be a variant that is not supported; "
                              "see docs/backbones.md")
    return found


def _name(entries: Any) -> str:
    return jax.tree_util.keystr(entries, simple=True, separator=".")
