"""Mamba and Mamba-2 checkpoints of the Hugging Face form, as pure Mamba models of the house.

    values, params = load_mamba(folder)
    config = load_config(defaults("equilibrium"), values)

The model is an equilibrium model without a cell (`solver.method="explicit"`, `cell.copies=0`):
embedding, n times x + mamba(rms(x)), norm and head. A matrix lies there as (out, in), and the taps
of a convolution from the oldest token to the newest; here it is the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from hippocampus.backbones.huggingface import CONFIG, open_folder
from hippocampus.backbones.tensors import TensorSource
from hippocampus.config import SSMConfig
from hippocampus.errors import CheckpointError, DataError
from hippocampus.files import read_object
from hippocampus.layers.mamba import MambaS6, MambaSSD
from hippocampus.ops.embedding import padded_vocabulary

_KINDS = {"mamba": "s6", "mamba2": "ssd"}
# What a config.json means by a field that it leaves out.
_COMMON = {"num_hidden_layers": 0, "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4,
           "use_bias": False, "use_conv_bias": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {**_COMMON, "time_step_rank": "auto", "state_size": 16, "tie_word_embeddings": True},
    "mamba2": {**_COMMON, "head_dim": 64, "num_heads": 128, "n_groups": 8, "state_size": 128,
               "tie_word_embeddings": False}}
# Fields with the values that they may have; others ask for what is not done here.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"), "quantization_config": (None,),
    "rms_norm": (None, True), "time_step_limit": (None, (0.0, math.inf))}

# Parameter of a layer here -> tensor of a layer there.
_LAYER = {
    "norm.scale": "norm.weight",
    "mixer.in.kernel": "mixer.in_proj.weight", "mixer.in.bias": "mixer.in_proj.bias",
    "mixer.out.kernel": "mixer.out_proj.weight", "mixer.out.bias": "mixer.out_proj.bias",
    "mixer.conv_kernel": "mixer.conv1d.weight", "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.log_decay": "mixer.A_log", "mixer.skip": "mixer.D"}
_NAMES = {
    "s6": {**_LAYER, "mixer.select.kernel": "mixer.x_proj.weight",
           "mixer.step.kernel": "mixer.dt_proj.weight", "mixer.step_bias": "mixer.dt_proj.bias"},
    "ssd": {**_LAYER, "mixer.step_bias": "mixer.dt_bias", "mixer.norm_scale": "mixer.norm.weight"}}
_EMBEDDING, _HEAD, _NORM = "backbone.embeddings.weight", "lm_head.weight", "backbone.norm_f.weight"
_FLOATS = ("float32", "bfloat16", "float16")
_MOST = {"num_hidden_layers": 1024, "vocab_size": 2**24, "hidden_size": 2**16, "state_size": 1024,
         "conv_kernel": 256, "expand": 16}


@dataclass(frozen=True)
class _Checkpoint:
    """What a config.json says."""

    ssm: SSMConfig
    vocab_size: int
    d_model: int
    n_layers: int
    tied: bool
    norm_epsilon: float

    def values(self) -> dict[str, Any]:
        """By the fields' dotted names."""
        plain = SSMConfig()
        own = {f.name: getattr(self.ssm, f.name) for f in fields(SSMConfig)
               if f.name in ("kind", "expansion", "d_state")
               or getattr(self.ssm, f.name) != getattr(plain, f.name)}
        return {
            "model.vocab_size": self.vocab_size, "model.d_model": self.d_model,
            "model.n_layers": self.n_layers, "model.n_heads": 1,
            "model.tie_embeddings": self.tied, "model.embedding_scale": False,
            "model.norm_epsilon": self.norm_epsilon, "model.solver.method": "explicit",
            "model.cell.copies": 0, **{f"model.ssm.{name}": value for name, value in own.items()}}


def load_mamba(folder: Path, sharding: jax.sharding.Sharding | None = None,
               ) -> tuple[dict[str, Any], Any]:
    """A checkpoint as fields and parameters of a model; float32, one tensor after the other.

    Args:
      folder: with config.json and model.safetensors, or an index and the files that it names.
      sharding: where every parameter goes; None = this process's first device.

    Returns:
      Values by the dotted names of an equilibrium model's fields, and the parameter tree.

    Raises:
      DataError: no config.json that can be read, or one that asks for what is not done here.
      CheckpointError: a tensor is missing, surplus, of another shape, or not finite. All names and
        shapes are checked before anything is read.
    """
    checkpoint = _read_config(folder / CONFIG)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with open_folder(folder) as source:
        source = _present_names(source)
        found = _check(source, checkpoint)

        def load(entries: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            there = found[_name(entries)]
            weight = _turned(_name(entries), source.read(there).astype(np.float32))
            if not np.isfinite(weight).all():
                raise CheckpointError(f"{source.place}: {there} has weights that are not finite",
                                      "this model cannot be used; get the file again")
            weight = np.pad(weight, [(0, n - m) for n, m in zip(leaf.shape, weight.shape,
                                                                strict=True)])
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: weight[index])

        params = jax.tree_util.tree_map_with_path(load, _shapes(checkpoint))
    return checkpoint.values(), params


def _read_config(path: Path) -> _Checkpoint:
    content = read_object(path, "give a folder with config.json and model.safetensors")
    family = content.get("model_type")
    if not isinstance(family, str) or family not in _KINDS:
        raise DataError(f"{path}: model_type is {_shown(family)}",
                        f"known: {', '.join(_KINDS)}, in the form that transformers reads")
    given = {**_DEFAULTS[family], **{k: v for k, v in content.items() if v is not None}}
    for name, allowed in _REFUSED.items():
        value = _limit(given.get(name)) if name == "time_step_limit" else given.get(name)
        if not any(value == one for one in allowed):
            raise DataError(f"{path}: {name} = {_shown(given[name])} is not supported",
                            f"supported: {_shown(allowed[-1])}")
    D, expand = _whole(path, given, "hidden_size"), _whole(path, given, "expand")
    settings: dict[str, Any] = {
        "kind": _KINDS[family], "expansion": float(expand),
        "d_conv": _whole(path, given, "conv_kernel"), "d_state": _whole(path, given, "state_size"),
        "conv_bias": _flag(path, given, "use_conv_bias"),
        "projection_bias": _flag(path, given, "use_bias")}
    if family == "mamba" and given["time_step_rank"] != "auto":
        settings["dt_rank"] = _whole(path, given, "time_step_rank")
    if family == "mamba2":
        heads, width = _whole(path, given, "num_heads"), _whole(path, given, "head_dim")
        groups = _whole(path, given, "n_groups")
        if heads * width != expand * D or heads % groups:
            raise DataError(
                f"{path}: num_heads = {heads}, head_dim = {width} and n_groups = {groups} do not "
                f"fit expand * hidden_size = {expand * D}",
                "num_heads * head_dim must be it, and n_groups divide num_heads")
        settings |= {"head_width": width, "n_groups": groups}
    epsilon = given["layer_norm_epsilon"]
    if not isinstance(epsilon, float) or not 1e-12 <= epsilon <= 1:
        raise _wrong(path, "layer_norm_epsilon", epsilon, "at least 1e-12 and at most 1")
    return _Checkpoint(
        SSMConfig(**settings), _whole(path, given, "vocab_size"), D,
        _whole(path, given, "num_hidden_layers"), _flag(path, given, "tie_word_embeddings"),
        epsilon)


def _limit(value: Any) -> Any:
    """Bounds of the step sizes; transformers 5 writes an infinity as an object."""
    if not isinstance(value, list):
        return value
    return tuple(math.inf if one == {"__float__": "Infinity"} else one for one in value)


def _whole(path: Path, values: Mapping[str, Any], name: str) -> int:
    value, most = values.get(name), _MOST.get(name, 2**20)
    if type(value) is not int or not 0 < value <= most:
        raise _wrong(path, name, value, f"a whole number above 0 and at most {most}")
    return value


def _flag(path: Path, values: Mapping[str, Any], name: str) -> bool:
    if type(values[name]) is not bool:
        raise _wrong(path, name, values[name], "true or false")
    return bool(values[name])


def _wrong(path: Path, name: str, value: Any, wanted: str) -> DataError:
    return DataError(f"{path}: {name} is {_shown(value)}", f"it must be {wanted}")


def _shown(value: Any) -> str:
    """What a stranger wrote, on one line and not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _present_names(source: TensorSource) -> TensorSource:
    """Tensors by today's names; the table of early checkpoints is called `embedding`."""
    early = {name.replace("backbone.embedding.", "backbone.embeddings."): name
             for name in source.specs}
    return TensorSource(source.place, {name: source.specs[old] for name, old in early.items()},
                        lambda name: source.read(early[name]))


def _shapes(checkpoint: _Checkpoint) -> dict[str, Any]:
    """The parameter tree; tables have the rows of a padded vocabulary."""
    D = checkpoint.d_model
    mixer = (MambaS6 if checkpoint.ssm.kind == "s6" else MambaSSD)(
        replace(checkpoint.ssm, backend="sequential"))  # any: nothing is computed
    mixer_shapes = jax.eval_shape(
        mixer.init, jax.random.key(0), jnp.zeros((1, 1, D)), None, jnp.zeros((1, 1), jnp.int32))
    norm = {"scale": jax.ShapeDtypeStruct((D,), jnp.float32)}
    table = jax.ShapeDtypeStruct((padded_vocabulary(checkpoint.vocab_size), D), jnp.float32)
    return {
        "embedding": table, "norm_out": norm, **({} if checkpoint.tied else {"head": table}),
        **{f"layers_{i}": {"norm": norm, "mixer": mixer_shapes["params"]}
           for i in range(checkpoint.n_layers)}}


def _check(source: TensorSource, checkpoint: _Checkpoint) -> dict[str, str]:
    """The tensor of every parameter, after all names and shapes were checked."""
    hint = "config.json and the tensors must be of the same model, and complete"
    names, found = _NAMES[checkpoint.ssm.kind], {}
    for entries, leaf in jax.tree.leaves_with_path(_shapes(checkpoint)):
        name = _name(entries)
        layer, _, part = name.partition(".")
        there = {"embedding": _EMBEDDING, "head": _HEAD, "norm_out": _NORM}.get(layer) or (
            f"backbone.layers.{layer.removeprefix('layers_')}.{names[part]}")
        if there not in source.specs:
            raise CheckpointError(f"{source.place} lacks the tensor {there}", hint)
        spec, wanted = source.specs[there], _shape_there(name, leaf.shape)
        if layer in ("embedding", "head"):
            wanted = (checkpoint.vocab_size, checkpoint.d_model)
        if spec.shape != wanted:
            raise CheckpointError(f"{source.place}: {there} has the shape {list(spec.shape)}; the "
                                  f"model needs {list(wanted)}", hint)
        if spec.dtype not in _FLOATS:
            raise CheckpointError(f"{source.place}: {there} is {spec.dtype}",
                                  f"it must be one of {', '.join(_FLOATS)}")
        found[name] = there
    surplus = source.specs.keys() - set(found.values()) - ({_HEAD} if checkpoint.tied else set())
    if surplus:
        raise CheckpointError(f"{source.place} has a tensor that a Mamba has not: "
                              f"{_shown(min(surplus))}", "it may be a variant that is not "
                              "supported")
    return found


def _shape_there(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith("conv_kernel"):
        return shape[1], 1, shape[0]
    return shape[::-1] if name.endswith(".kernel") else shape


def _turned(name: str, weight: Shaped[np.ndarray, "*sizes"]) -> Float[np.ndarray, "*shape"]:
    """A tensor as it lies here."""
    if name.endswith("conv_kernel"):
        return weight[:, 0, ::-1].T
    return weight.T if name.endswith(".kernel") else weight


def _name(entries: Any) -> str:
    return jax.tree_util.keystr(entries, simple=True, separator=".")
