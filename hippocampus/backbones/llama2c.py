"""llama2.c's first form of a Llama: one `.bin` of float32, and its tokenizer beside it.

    7 int32: width, MLP width, layers, heads, key heads, vocabulary (below 0: the output has a table
             of its own), context
    float32: embedding; per kind, of all layers: norm, q, k, v, o, norm, gate, down, up; last norm;
             two tables of rotary factors that nothing reads; the output's own table

    tokenizer: int32 longest piece; per id float32 score, int32 length, bytes

Its rotary pairs are neighbours (2i, 2i + 1) and those here lie half a head apart, so that rows of q
and k change places.

Source: https://github.com/karpathy/llama2.c, export.py (version 0) and tokenizer.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.backbones.hub_tokenizer import HubTokenizer, scored_pieces
from hippocampus.backbones.loading import Backbone, build_decoder
from hippocampus.backbones.parameters import Shardings, read_parameters
from hippocampus.backbones.rotary import Rope
from hippocampus.backbones.tensors import TensorSource, half_split_rows
from hippocampus.errors import CheckpointError, DataError
from hippocampus.exports.storage import TensorSpec

_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")
_BEGIN, _END = 1, 2
_SPECIALS = {0: "<unk>", _BEGIN: "<s>", _END: "</s>"}
_MOST = 2**24
_PER_LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
              "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj",
              "mlp.up_proj")


def load_llama2c(path: Path, dtype: str | None, sharding: Shardings,
                 settings: dict[str, Any], weights: bool = True) -> Backbone:
    """Reads a `.bin`; a `tok*.bin` of as many pieces in the same folder is its tokenizer.

    Args:
      path: the file.
      dtype: of the parameters; None = float32.
      sharding: where they go.
      settings: further attributes of `Decoder`.
      weights: False = no parameters are read.

    Raises:
      DataError, CheckpointError: it is not of this form, or its size is not what it says.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from None
    if len(head) < _HEADER.size or head[:2] in (b"PK", b"\x80\x02"):
        raise CheckpointError(f"{path} is not of llama2.c's form", "PyTorch's own files are never "
                              "read: they can run code when they are opened; ask for safetensors")
    cfg = _architecture(path, _HEADER.unpack(head))
    model = build_decoder(cfg, **settings)
    source = _source(path, cfg)  # which checks the file's size
    params = None
    if weights:
        params = read_parameters(source, model, dtype=dtype, sharding=sharding)
    return Backbone(model, params, _find_tokenizer(path, cfg.vocab_size))


def read_tokenizer_bin(path: Path) -> HubTokenizer:
    """The tokenizer of llama2.c's form.

    Raises:
      DataError: it is not of that form.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path") from None
    pieces, scores, at = [], [], 4
    while at < len(content):
        if at + _PIECE.size > len(content):
            raise _no_tokenizer(path)
        score, length = _PIECE.unpack_from(content, at)
        at += _PIECE.size
        if length < 0 or at + length > len(content) or not math.isfinite(score):
            raise _no_tokenizer(path)
        try:
            pieces.append(content[at:at + length].decode())
        except UnicodeDecodeError:
            raise _no_tokenizer(path) from None
        scores.append(score)
        at += length
    if len(pieces) <= _END:
        raise _no_tokenizer(path)
    document = scored_pieces(pieces, scores, _SPECIALS, space=" ", add_begin=_BEGIN)
    return HubTokenizer(document, (_END, _BEGIN))  # a text ends where the next one begins


def _architecture(path: Path, header: tuple[int, ...]) -> Architecture:
    width, mlp_width, layers, heads, kv_heads, vocabulary, context = header
    sizes = (width, mlp_width, layers, heads, kv_heads, abs(vocabulary), context)
    if not (all(0 < size < _MOST for size in sizes) and layers <= 1024 and width % heads == 0
            and heads % kv_heads == 0 and (width // heads) % 2 == 0):
        raise CheckpointError(f"{path} is not of llama2.c's form: its header says "
                              f"{', '.join(map(str, header))}", "is it another kind of .bin?")
    return Architecture(
        family="llama", vocab_size=abs(vocabulary), d_model=width, n_heads=heads,
        n_kv_heads=kv_heads, head_width=width // heads, max_length=context,
        layers=(LayerSpec(mlp_width, Rope(1e4)),) * layers, norm_epsilon=1e-5,
        query_scale=(width // heads)**-0.5, tie_embeddings=vocabulary > 0)


def _places(cfg: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file; None of the names is of what nothing reads."""
    D, H, G, d, F = (cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_width,
                     cfg.layers[0].mlp_width)
    yield "model.embed_tokens", (cfg.vocab_size, D)
    shapes = ((D,), (H * d, D), (G * d, D), (G * d, D), (D, H * d), (D,), (F, D), (D, F), (F, D))
    for name, shape in zip(_PER_LAYER, shapes, strict=True):
        for i in range(cfg.n_layers):
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm", (D,)
    yield "", (2, cfg.max_length, d // 2)
    if not cfg.tie_embeddings:
        yield "lm_head", (cfg.vocab_size, D)


def _source(path: Path, cfg: Architecture) -> TensorSource:
    specs, starts, at = {}, {}, _HEADER.size
    for name, shape in _places(cfg):
        if name:
            specs[f"{name}.weight"] = TensorSpec("float32", shape)
            starts[f"{name}.weight"] = at
        at += 4 * math.prod(shape)
    size = path.stat().st_size
    if size != at:
        raise CheckpointError(f"{path} has {size:,} bytes; its header asks for {at:,}",
                              "copy or download it again")

    def read(name: str) -> np.ndarray:
        shape = specs[name].shape
        weight = np.fromfile(path, "<f4", math.prod(shape), offset=starts[name]).reshape(shape)
        for kind, heads in (("q_proj", cfg.n_heads), ("k_proj", cfg.n_kv_heads)):
            if f".{kind}." in name:
                return half_split_rows(weight, heads)
        return weight

    return TensorSource(str(path), specs, read)


def _find_tokenizer(path: Path, vocab_size: int) -> HubTokenizer | None:
    for file in sorted(path.parent.glob("tok*.bin")):
        if file != path:
            tokenizer = read_tokenizer_bin(file)
            if tokenizer.vocab_size == vocab_size:
                return tokenizer
    return None


def _no_tokenizer(path: Path) -> DataError:
    return DataError(f"{path} is not a tokenizer of llama2.c's form", "copy or download it again")
