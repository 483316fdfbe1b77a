"""GGUF files of the Llama family, as llama.cpp and its relatives use them (extra `gguf`).

One file holds the tensors, often quantised, the architecture, the tokenizer and the chat template.
Matrices are brought to float32 one at a time. In files of the architecture `llama` the rotary pairs
of queries and keys are neighbours, so that rows change places; those of `qwen3` lie as here.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.backbones.chat import ChatTemplate
from hippocampus.backbones.gguf_tokenizer import gguf_tokenizer
from hippocampus.backbones.loading import TOKENIZER, Backbone, build_decoder, read_tokenizer
from hippocampus.backbones.parameters import Shardings, read_parameters
from hippocampus.backbones.rotary import Rope
from hippocampus.backbones.tensors import TensorSource, half_split_rows
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.exports.storage import TensorSpec

_FAMILIES = ("llama", "qwen3")
_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
          "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj",
          "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
          "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
          "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_STRETCH = "rope_freqs.weight"
_HINT = "copy or download it again"


def load_gguf(path: Path, dtype: str | None, sharding: Shardings,
              settings: dict[str, Any], weights: bool = True) -> Backbone:
    """Reads a `.gguf`; a tokenizer.json in the same folder goes before the file's own tokenizer.

    Args:
      path: the file.
      dtype: of the parameters; None = float32.
      sharding: where they go.
      settings: further attributes of `Decoder`.
      weights: False = no parameters are read.

    Raises:
      ConfigError: the package `gguf` is not installed.
      DataError: an architecture or tokenizer that is not supported.
      CheckpointError: the file is damaged, or its tensors are not those of its architecture.
    """
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    cfg = _architecture(path, fields, tensors)
    model = build_decoder(cfg, **settings)
    if (path.parent / TOKENIZER).is_file():
        tokenizer = read_tokenizer(path.parent, cfg.vocab_size)
    else:
        tokenizer = gguf_tokenizer(path, fields)
    template = fields.get("tokenizer.chat_template")
    chat = None
    if isinstance(template, str):
        chat = ChatTemplate(template, tokenizer.special_tokens() if tokenizer else {})
    params = None
    if weights:
        params = read_parameters(_source(path, cfg, tensors), model, dtype=dtype,
                                 sharding=sharding)
    return Backbone(model, params, tokenizer, chat)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("reading GGUF files needs the package gguf",
                          "pip install 'hippocampus[gguf]'") from None
    if not path.is_file():
        raise DataError(f"there is no file {path}", "check the path")
    try:
        return GGUFReader(path)
    except Exception as error:  # whatever its parser stumbles over in a damaged file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no GGUF file: {text}", _HINT) from None


def _architecture(path: Path, fields: Mapping[str, Any],
                  tensors: Mapping[str, Any]) -> Architecture:
    family = fields.get("general.architecture")
    if family not in _FAMILIES:
        raise DataError(f"{path}: the architecture {str(family)[:60]!r} is not supported in GGUF "
                        "files", f"supported: {', '.join(_FAMILIES)}")

    def number(name: str, default: float | None = None) -> Any:
        value = fields.get(f"{family}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(f"{path}: {family}.{name} is {str(value)[:60]}", _HINT)
        # The decimal that was meant: numbers lie there as float32.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} lacks the tensor token_embd.weight", _HINT)
    width, heads = int(number("embedding_length")), int(number("attention.head_count"))
    head_width = int(number("attention.key_length", width // heads))
    kv_heads = int(number("attention.head_count_kv", heads))
    if heads % kv_heads or head_width % 2:
        raise CheckpointError(f"{path}: {heads} query heads over {kv_heads} key heads of width "
                              f"{head_width}", _HINT)
    rope = _rope(path, fields, family, float(number("rope.freq_base", 1e4)), head_width, tensors)
    layer = LayerSpec(int(number("feed_forward_length")), rope)
    return Architecture(
        family=family, vocab_size=_shape(tensors["token_embd.weight"])[0], d_model=width,
        n_heads=heads, n_kv_heads=kv_heads, head_width=head_width,
        max_length=int(number("context_length")),
        layers=(layer,) * min(1024, int(number("block_count"))),
        norm_epsilon=float(number("attention.layer_norm_rms_epsilon")),
        query_scale=head_width**-0.5, tie_embeddings="output.weight" not in tensors)


def _rope(path: Path, fields: Mapping[str, Any], family: str, theta: float, head_width: int,
          tensors: Mapping[str, Any]) -> Rope:
    """Frequencies; those of Llama 3 come as a tensor of what each one is divided by."""
    kind = fields.get(f"{family}.rope.scaling.type", "none")
    if kind == "linear":
        return Rope(theta, "linear", float(fields[f"{family}.rope.scaling.factor"]))
    if kind != "none":
        raise DataError(f"{path}: positions of the type {str(kind)[:60]!r} are not supported",
                        "supported: none, linear, and those of Llama 3")
    if _STRETCH not in tensors:
        return Rope(theta)
    divided = np.asarray(tensors[_STRETCH].data, np.float32)
    for length in (8192, int(fields.get(f"{family}.rope.scaling.original_context_length", 8192))):
        rope = Rope(theta, "llama3", float(divided.max()), 1.0, 4.0, length)
        wanted = Rope(theta).frequencies(head_width) / divided
        if np.allclose(rope.frequencies(head_width), wanted, rtol=1e-4):
            return rope
    raise DataError(f"{path}: {_STRETCH} is not Llama 3's", "convert the model from safetensors")


def _source(path: Path, cfg: Architecture, tensors: Mapping[str, Any]) -> TensorSource:
    from gguf.quants import dequantize

    names = {_hub_name(name): name for name in tensors if name != _STRETCH}

    def read(name: str) -> np.ndarray:
        tensor = tensors[names[name]]
        try:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: {names[name]} cannot be read: {error}",
                                  "is it quantised in a newer way?") from None
        weight = weight.reshape(_shape(tensor))
        for kind, heads in (("q_proj", cfg.n_heads), ("k_proj", cfg.n_kv_heads)):
            if cfg.family == "llama" and f".{kind}." in name:
                return half_split_rows(weight, heads)
        return weight

    return TensorSource(str(path), {name: TensorSpec("float32", _shape(tensors[own]))
                                    for name, own in names.items()}, read)


def _shape(tensor: Any) -> tuple[int, ...]:
    """Outermost first, as numpy has it."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _hub_name(name: str) -> str:
    """A tensor's name as in the Hugging Face form; an unknown one stays, to be refused by it."""
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        module = _LAYER.get(found[2])
        return f"model.layers.{found[1]}.{module}.weight" if module else name
    module = _TOP.get(name.removesuffix(".weight"))
    return f"{module}.weight" if module else name
