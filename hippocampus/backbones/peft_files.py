"""Adapter folders as PEFT writes them, read and written.

    adapter_config.json         which layers, r, lora_alpha, …
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in)
                                base_model.model.<module>.lora_B.weight (out, r)

A module has the name that it has in transformers. What PEFT can do and is not done here is refused
by the name of its field; names and shapes of all tensors are checked before one is read.

Source: PEFT 0.21 (`LoraConfig`, `check_target_module_exists`), https://github.com/huggingface/peft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from hippocampus.backbones.architecture import Architecture
from hippocampus.backbones.decoder import Decoder
from hippocampus.backbones.huggingface import new_folder
from hippocampus.backbones.names import hub_name, is_left_out, plain_name
from hippocampus.backbones.parameters import parameter_shapes
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.exports.storage import TensorSpec
from hippocampus.exports.weights_file import open_tensors, read_header, write_weights
from hippocampus.files import expand, read_object
from hippocampus.layers.lora import A, B, LoRA, adapted_layers, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
# Fields that say nothing of what the adapter computes.
_IGNORED = ("task_type", "base_model_name_or_path", "inference_mode", "revision", "peft_version",
            "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "eva_config")
# Other fields must be absent, null, false or empty, but these may also be as listed. Ways to draw
# the first A and B count no longer, unless they change the base model.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
_FLOATS = ("float32", "bfloat16", "float16")
_PREFIX, _ALL = "base_model.model.", "all-linear"
_SIDES = {"lora_A.weight": A, "lora_B.weight": B}
_LONGEST_PATTERN = 1000
_HINT = "see docs/backbones.md for the adapters that are supported"
_BELONG = "adapter and model must belong together, and both files be complete"


def read_adapters(folder: str | Path, model: Decoder) -> tuple[LoRA, Any]:
    """Reads an adapter; all of it is good, or nothing is returned.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: that it is for.

    Returns:
      Its kind, and the tree of adapters in float32, for `hippocampus.layers.lora`.

    Raises:
      DataError: no adapter_config.json, or one that is damaged or asks for what is not done here.
      CheckpointError: a tensor is missing, surplus, of another shape, or not finite, or the file is
        damaged.
    """
    place = expand(folder)
    path = place / CONFIG
    content = read_object(path, "give a folder with adapter_config.json and "
                          "adapter_model.safetensors")
    rank, values = _read_config(path, content)
    layers = {_module(name, model.config): name for name in linear_layers(parameter_shapes(model))}
    wanted = _targeted(path, content.get("target_modules"), layers)
    file = place / WEIGHTS
    tensors = _check(file, model, layers, wanted, rank)
    tree: dict[tuple[str, ...], Any] = {}
    with open_tensors(file) as read:
        for there, (layer, side) in tensors.items():
            weight = read(there).astype(np.float32)
            if not np.isfinite(weight).all():
                raise CheckpointError(f"{file}: {there} has weights that are not finite",
                                      "this adapter cannot be used; get the file again")
            tree[(*layer.split("."), side)] = jnp.asarray(weight.T)
    found = dict.fromkeys(layer for layer, _ in tensors.values())
    return LoRA(rank, *values, targets=_globs(found, layers.values())), unflatten_dict(tree)


def write_adapters(folder: str | Path, model: Decoder, adapters: Any, lora: LoRA, *,
                   base: str = "") -> None:
    """Writes an adapter as PEFT reads it; the folder appears whole or not at all.

    Args:
      folder: the folder to make.
      model: that the adapter is for.
      adapters: the tree that was trained.
      lora: its kind.
      base: name or path of the pretrained model, for whoever looks for it.

    Raises:
      ConfigError: an adapter of a layer that the model has not or of another size, none at all, or
        a place that cannot be written.
      CheckpointError: a weight is not finite.
    """
    shapes = linear_layers(parameter_shapes(model))
    pairs = adapted_layers(adapters)
    if not pairs:
        raise ConfigError("there is no adapter to write", "init_adapters makes some")
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b) in pairs.items():
        m, n = shapes.get(name, (0, 0))
        if a.shape != (m, lora.rank) or b.shape != (lora.rank, n):
            raise ConfigError(f"the model has no linear layer {name} for an adapter of "
                              f"{list(a.shape)} and {list(b.shape)}",
                              "model, adapters and rank must belong together")
        for (ending, _), leaf in zip(_SIDES.items(), (a, b), strict=True):
            weight = np.asarray(leaf)
            if not np.isfinite(weight.astype(np.float32)).all():
                raise CheckpointError(f"the adapter of {name} has weights that are not finite",
                                      "the training diverged; take an earlier step")
            there = f"{_PREFIX}{_module(name, model.config)}.{ending}"
            tensors[there] = np.ascontiguousarray(weight.T)
    whole = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None,
        "r": lora.rank, "lora_alpha": whole, "lora_dropout": lora.dropout, "bias": "none",
        "target_modules": _suffixes({_module(name, model.config) for name in pairs},
                                    {_module(name, model.config) for name in shapes}),
        "use_rslora": lora.rslora, "fan_in_fan_out": False, "inference_mode": True}
    with new_folder(expand(folder)) as place:
        write_weights(place / WEIGHTS, tensors, {"format": "pt"})
        (place / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _read_config(path: Path, content: Mapping[str, Any]) -> tuple[int, tuple[float, float, bool]]:
    """r, and alpha, dropout and rslora, after every field was looked at."""
    if content.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type = {_shown(content.get('peft_type'))} is not supported",
                        "it must be LORA")
    for name, value in content.items():
        empty = value is None or value is False or value in ("", [], {})
        if name in _READ or name in _IGNORED or empty or any(
                value == one and type(value) is type(one) for one in _HARMLESS.get(name, ())):
            continue
        raise DataError(f"{path}: {_shown(name)[1:-1]} = {_shown(value)} is not supported", _HINT)

    def number(name: str, default: float, good: Any, wanted: str, kinds: Any = int | float) -> Any:
        value = content.get(name, default)
        if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds) or not (
                good(value)):
            raise DataError(f"{path}: {name} is {_shown(value)}", f"it must be {wanted}")
        return value

    rank = number("r", 8, lambda r: 0 < r < 2**16, "a whole number above 0", int)
    alpha = number("lora_alpha", 8, lambda a: 0 < a < float("inf"), "a number above 0")
    dropout = number("lora_dropout", 0.0, lambda d: 0 <= d < 1, "at least 0 and below 1")
    rslora = number("use_rslora", False, lambda _: True, "true or false", bool)
    return rank, (float(alpha), float(dropout), rslora)


def _targeted(path: Path, target: Any, modules: Collection[str]) -> set[str]:
    """The modules of the model that `target_modules` means.

    A list names modules by how they end, a text is a regular expression for a whole name.
    """
    if isinstance(target, list) and target and all(isinstance(one, str) for one in target):
        endings = tuple(f".{one}" for one in target)
        found = {module for module in modules
                 if any(f".{name}".endswith(endings) for name in _spellings(module))}
    elif target == _ALL:
        found = set(modules)
    elif isinstance(target, str) and 0 < len(target) <= _LONGEST_PATTERN:
        try:
            pattern = re.compile(target)
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(f"{path}: target_modules is {_shown(target)}: {error}",
                            "it must be a regular expression") from None
        found = {module for module in modules
                 if any(pattern.fullmatch(name) for name in _spellings(module))}
    else:
        raise DataError(f"{path}: target_modules is {_shown(target)}", "it must be a list of names,"
                        f" a regular expression, or {_ALL}")
    if not found:
        raise DataError(f"{path}: target_modules = {_shown(target)} names no linear layer of the "
                        "model", "adapter and model must belong together")
    return found


def _check(file: Path, model: Decoder, layers: Mapping[str, str], wanted: set[str],
           rank: int) -> dict[str, tuple[str, str]]:
    """Tensor -> (layer, side) of what is to be read, after all names and shapes were checked."""
    shapes, sizes = read_header(file).tensors, linear_layers(parameter_shapes(model))
    found: dict[str, tuple[str, str]] = {}
    seen: set[tuple[str, str]] = set()
    for there, spec in shapes.items():
        module, side = _parse(there)
        layer = layers.get(module)
        if layer is None or side is None:
            if side and module != "lm_head" and is_left_out(f"{module}.weight", model.config):
                continue  # of what sees or hears, or of keys that nothing reads
            raise CheckpointError(f"{file} has a tensor that is no adapter of a linear layer of "
                                  f"the model: {there[:120]}", _BELONG)
        if module not in wanted or (layer, side) in seen:
            raise CheckpointError(f"{file} has the tensor {there[:120]}, which {CONFIG} does not "
                                  "ask for", _BELONG)
        m, n = sizes[layer]
        _check_spec(file, there, spec, (rank, m) if side == A else (n, rank))
        found[there] = layer, side
        seen.add((layer, side))
    for module in sorted(wanted):
        for ending, side in _SIDES.items():
            if (layers[module], side) not in seen:
                raise CheckpointError(f"{file} lacks the tensor {_PREFIX}{module}.{ending}",
                                      _BELONG)
    return found


def _check_spec(file: Path, there: str, spec: TensorSpec, wanted: tuple[int, int]) -> None:
    if spec.shape != wanted:
        raise CheckpointError(f"{file}: {there} has the shape {list(spec.shape)}; model and r need "
                              f"{list(wanted)}", _BELONG)
    if spec.dtype not in _FLOATS:
        raise CheckpointError(f"{file}: {there} is {spec.dtype}",
                              f"it must be one of {', '.join(_FLOATS)}")


def _parse(there: str) -> tuple[str, str | None]:
    """The module of a tensor, as a decoder alone would name it, and the side of the adapter."""
    for ending, side in _SIDES.items():
        if there.startswith(_PREFIX) and there.endswith(f".{ending}"):
            return plain_name(there[len(_PREFIX):-len(ending) - 1] + ".")[:-1], side
    return there, None


def _spellings(module: str) -> tuple[str, ...]:
    """A module's names in a decoder alone, and in one that sees or hears."""
    rest = module.removeprefix("model.")
    return module, f"model.language_model.{rest}", f"language_model.model.{rest}"


def _module(name: str, architecture: Architecture) -> str:
    """The module of transformers that a linear layer here is."""
    return hub_name(f"{name}.kernel", architecture).removesuffix(".weight")


def _suffixes(adapted: set[str], modules: set[str]) -> list[str]:
    """The shortest list of endings that names the adapted modules and no others."""
    last = {module.rpartition(".")[2] for module in adapted}
    # A number is the end of a module of a list, and PEFT takes it for the number of a layer too.
    if not any(name.isdigit() for name in last) and adapted == {
            module for module in modules if module.rpartition(".")[2] in last}:
        return sorted(last)
    return sorted(adapted)


def _globs(found: Collection[str], layers: Collection[str]) -> tuple[str, ...]:
    """The names of layers, with a star in place of the number where all of a kind are found."""
    kinds: dict[str, set[str]] = {}
    for name in layers:
        kinds.setdefault(re.sub(r"^(layers|streams_in|streams_out)_\d+", r"\1_*", name),
                         set()).add(name)
    chosen: list[str] = []
    for kind, names in kinds.items():
        chosen += [kind] if names <= set(found) else sorted(names & set(found))
    return tuple(chosen)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
