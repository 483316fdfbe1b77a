"""config.json of the Hugging Face form, of transformers 4 and 5, to an `Architecture` and back.

Read field by field: transformers itself is not needed, and what a decoder here does not do is
refused by the name of its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.backbones.architecture import AltUpSpec, Architecture, LayerSpec
from hippocampus.backbones.rotary import Rope
from hippocampus.errors import DataError
from hippocampus.files import read_object

# `model_type` -> family; those that read pictures too have the decoder's fields in `text_config`.
_FAMILIES = {"llama": "llama", "qwen3": "qwen3", "gemma3_text": "gemma3", "gemma3": "gemma3",
             "gemma3n_text": "gemma3n", "gemma3n": "gemma3n"}
_MODEL_TYPES = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3_text",
                "gemma3n": "gemma3n_text"}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
            "gemma3": "Gemma3ForCausalLM", "gemma3n": "Gemma3nForCausalLM"}

# What a family means by a field that its config.json leaves out.
_GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "num_attention_heads": 8,
          "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
          "tie_word_embeddings": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 2048,
              "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768,
              "rope_theta": 1e4, "tie_word_embeddings": False, "head_dim": 128,
              "max_window_layers": 28, "sliding_window": 4096},
    "gemma3": {**_GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 131072,
               "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
               "vocab_size": 262_208},
    "gemma3n": {**_GEMMA, "num_key_value_heads": 2, "max_position_embeddings": 32768,
                "sliding_window": 512, "sliding_window_pattern": 5, "vocab_size": 262_400,
                "final_logit_softcapping": 30.0, "altup_num_inputs": 4, "altup_active_idx": 0,
                "altup_correct_scale": True, "num_kv_shared_layers": 15, "laurel_rank": 64,
                "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144},
}

# Fields with the values that they may have; others ask for what is not done here.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False), "mlp_bias": (None, False),
    "attn_logit_softcapping": (None, 0, 0.0), "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1, 1.0), "altup_active_idx": (None, 0),
    "quantization_config": (None,), "hidden_act": (None, "silu"),
    "hidden_activation": (None, "gelu_pytorch_tanh")}
_NULLABLE = ("sliding_window", "final_logit_softcapping")
"""Fields whose null means none; that of others means the family's default."""
_SLIDING, _FULL = "sliding_attention", "full_attention"
_HINT = "see docs/backbones.md for what is supported"
_MOST_LAYERS = 1024


@dataclass(frozen=True)
class _Fields:
    """The fields of a decoder, by name, with its family's defaults."""

    path: Path
    values: Mapping[str, Any]

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.wrong(name, value, "a whole number above 0")
        return value

    def number(self, name: str, values: Mapping[str, Any] | None = None) -> float:
        value = (self.values if values is None else values).get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (
                0 < value < float("inf")):
            raise self.wrong(name, value, "a number above 0")
        return float(value)

    def per_layer(self, name: str, n: int, default: Any) -> list[Any]:
        value = self.values.get(name)
        value = default if value is None else value
        values = value if isinstance(value, list) else [value] * n
        if len(values) != n:
            raise self.wrong(name, value, f"{n} values, one for each layer")
        return values

    def wrong(self, name: str, value: Any, wanted: str) -> DataError:
        shown = ascii(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
        return DataError(f"{self.path}: {name} is {shown}", f"it must be {wanted}")


def read_architecture(path: Path) -> Architecture:
    """The architecture that a config.json describes.

    Args:
      path: the file.

    Raises:
      DataError: missing or damaged, an architecture that is not known here, or a field that asks
        for what is not done here.
    """
    content = read_object(path, "give a folder with config.json and model.safetensors")
    fields, family = _open(path, content)
    for name, allowed in _REFUSED.items():
        if fields.values.get(name) not in allowed:
            raise DataError(f"{path}: {name} = {str(fields.values[name])[:60]} is not supported",
                            _HINT)
    heads, width = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    kv_heads = fields.whole("num_key_value_heads", heads)
    head_width = fields.whole("head_dim", max(1, width // heads))
    if heads % kv_heads or head_width % 2:
        raise DataError(f"{path}: {heads} query heads over {kv_heads} key heads of width "
                        f"{head_width}", "the heads must divide, and their width be even")
    scale = 1.0 if family == "gemma3n" else head_width**-0.5
    if family == "gemma3":
        scale = fields.whole("query_pre_attn_scalar") ** -0.5
    return Architecture(
        family=family, vocab_size=fields.whole("vocab_size"), d_model=width, n_heads=heads,
        n_kv_heads=kv_heads, head_width=head_width,
        max_length=fields.whole("max_position_embeddings"), layers=_layers(fields, family),
        norm_epsilon=fields.number("rms_norm_eps"),
        query_scale=scale,
        softcap=float(fields.values.get("final_logit_softcapping") or 0.0),
        tie_embeddings=bool(fields.values["tie_word_embeddings"]),
        altup=_altup(fields) if family == "gemma3n" else None)


def end_ids(content: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, of a config.json or generation_config.json; there may be several."""
    inner = content.get("text_config")
    value = content.get("eos_token_id")
    if value is None and isinstance(inner, dict):
        value = inner.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return tuple(one for one in values if type(one) is int and one >= 0)


def write_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json, in the form of transformers 5, that `read_architecture` reads back.

    Args:
      architecture: of a decoder.
      dtype: of its tensors.
    """
    cfg, first = architecture, architecture.layers[0]
    content: dict[str, Any] = {
        "architectures": [_CLASSES[cfg.family]], "model_type": _MODEL_TYPES[cfg.family],
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.d_model,
        "intermediate_size": first.mlp_width, "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_width, "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_epsilon, "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": dtype, "attention_bias": False,
        ("hidden_activation" if cfg.is_gemma else "hidden_act"):
            "gelu_pytorch_tanh" if cfg.is_gemma else "silu"}
    ropes = {_SLIDING if spec.window else _FULL: _rope_json(spec.rope) for spec in cfg.layers}
    windows = [spec.window for spec in cfg.layers if spec.window]
    if cfg.family != "llama":
        content["layer_types"] = [_SLIDING if spec.window else _FULL for spec in cfg.layers]
        content["sliding_window"] = windows[0] if windows else None
    if cfg.family == "qwen3":
        content["use_sliding_window"] = bool(windows)
    content["rope_parameters"] = ropes if cfg.is_gemma else next(iter(ropes.values()))
    if cfg.is_gemma:
        content["final_logit_softcapping"] = cfg.softcap or None
    if cfg.family == "gemma3":
        content["query_pre_attn_scalar"] = round(cfg.query_scale**-2)
    if cfg.altup:
        content |= {
            "intermediate_size": [spec.mlp_width for spec in cfg.layers],
            "altup_num_inputs": cfg.altup.streams, "altup_active_idx": 0,
            "altup_correct_scale": cfg.altup.correct_scale, "laurel_rank": cfg.altup.laurel_rank,
            "hidden_size_per_layer_input": cfg.altup.per_layer_width,
            "vocab_size_per_layer_input": cfg.altup.per_layer_vocabulary,
            "num_kv_shared_layers": cfg.n_layers - cfg.n_own_layers,
            "activation_sparsity_pattern": [spec.sparsity for spec in cfg.layers]}
    return content


def _open(path: Path, content: Mapping[str, Any]) -> tuple[_Fields, str]:
    family = _FAMILIES.get(str(content.get("model_type")))
    if family is None:
        raise DataError(f"{path}: the architecture {str(content.get('model_type'))[:60]!r} is not "
                        "known", f"known: {', '.join(sorted(_FAMILIES))}")
    inner = content.get("text_config", content)
    if not isinstance(inner, dict) or "hidden_size" not in inner:
        raise DataError(f"{path}: hidden_size is missing", "is it the config.json of a language "
                        "model?")
    given = {name: value for name, value in inner.items()
             if value is not None or name in _NULLABLE}
    return _Fields(path, {**_DEFAULTS[family], **given}), family


def _layers(fields: _Fields, family: str) -> tuple[LayerSpec, ...]:
    n = fields.whole("num_hidden_layers")
    if n > _MOST_LAYERS:
        raise fields.wrong("num_hidden_layers", n, f"at most {_MOST_LAYERS}")
    kinds = _kinds(fields, family, n)
    sparse = [0.95] * 10 + [0.0] * (n - 10) if family == "gemma3n" and n > 10 else 0.0
    sparsity = fields.per_layer("activation_sparsity_pattern", n, sparse)
    widths = fields.per_layer("intermediate_size", n, None)
    shared = fields.values.get("num_kv_shared_layers", 0)
    if type(shared) is not int or not 0 <= shared < n:
        raise fields.wrong("num_kv_shared_layers", shared, f"at least 0 and below {n}")
    ropes = {kind: _rope(fields, family, kind) for kind in set(kinds)}
    specs = []
    for i, kind in enumerate(kinds):
        window = fields.whole("sliding_window") if kind == _SLIDING else 0
        source = -1
        if i >= n - shared:  # the last one of its kind that has keys of its own
            own = [j for j in range(n - shared) if kinds[j] == kind]
            if not own:
                raise fields.wrong("num_kv_shared_layers", shared, f"fewer: no layer with keys of "
                                   f"its own is of the kind {kind}")
            source = own[-1]
        if type(widths[i]) is not int or widths[i] < 1:
            raise fields.wrong("intermediate_size", widths[i], "a whole number above 0")
        if not isinstance(sparsity[i], int | float) or not 0 <= sparsity[i] < 1:
            raise fields.wrong("activation_sparsity_pattern", sparsity[i], "below 1")
        specs.append(LayerSpec(widths[i], ropes[kind], window, source, float(sparsity[i])))
    return tuple(specs)


def _kinds(fields: _Fields, family: str, n: int) -> list[str]:
    """Sliding or full, for every layer."""
    kinds = fields.values.get("layer_types")
    if family == "llama":
        kinds = [_FULL] * n
    elif kinds is None and family == "qwen3":
        sliding = fields.values.get("use_sliding_window") and fields.values["sliding_window"]
        kinds = [_SLIDING if sliding and i >= fields.values["max_window_layers"] else _FULL
                 for i in range(n)]
    elif kinds is None:
        every = fields.whole("sliding_window_pattern")
        kinds = [_FULL if (i + 1) % every == 0 else _SLIDING for i in range(n)]
    if not isinstance(kinds, list) or len(kinds) != n or not set(kinds) <= {_SLIDING, _FULL}:
        raise fields.wrong("layer_types", kinds, f"{n} of {_SLIDING} and {_FULL}")
    return kinds


def _rope(fields: _Fields, family: str, kind: str) -> Rope:
    """Frequencies of a kind of layer; `rope_parameters` is transformers 5, `rope_scaling` 4."""
    given = fields.values.get("rope_parameters")
    gemma = family.startswith("gemma")
    if isinstance(given, dict):
        given = given.get(kind, given)
        theta = given.get("rope_theta")
    else:
        # Version 4 of a Gemma stretches the full layers alone.
        stretched = not gemma or kind == _FULL
        given = (fields.values.get("rope_scaling") or {}) if stretched else {}
        theta = None
    if not isinstance(given, dict):
        raise fields.wrong("rope_scaling", given, "an object")
    if theta is None:
        theta = fields.values["rope_local_base_freq" if gemma and kind == _SLIDING else
                              "rope_theta"]
    name = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise DataError(f"{fields.path}: partial_rotary_factor is not supported", _HINT)
    theta = fields.number("rope_theta", {"rope_theta": theta})
    if name == "default":
        return Rope(theta)
    if name == "linear":
        return Rope(theta, "linear", fields.number("factor", given))
    if name == "llama3":
        low, high = fields.number("low_freq_factor", given), fields.number("high_freq_factor",
                                                                           given)
        length = fields.number("original_max_position_embeddings", given)
        if low >= high:
            raise fields.wrong("low_freq_factor", low, "below high_freq_factor")
        return Rope(theta, "llama3", fields.number("factor", given), low, high, int(length))
    raise DataError(f"{fields.path}: positions of the type {str(name)[:60]!r} are not supported",
                    "supported: default, linear, llama3")


def _rope_json(rope: Rope) -> dict[str, Any]:
    content: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        content["factor"] = rope.factor
    if rope.kind == "llama3":
        content |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high,
                    "original_max_position_embeddings": rope.first_length}
    return content


def _altup(fields: _Fields) -> AltUpSpec:
    return AltUpSpec(
        streams=fields.whole("altup_num_inputs"),
        correct_scale=bool(fields.values["altup_correct_scale"]),
        laurel_rank=fields.whole("laurel_rank"),
        per_layer_width=fields.whole("hidden_size_per_layer_input"),
        per_layer_vocabulary=fields.whole("vocab_size_per_layer_input"))
