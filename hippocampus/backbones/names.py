"""Names of parameters here and of the same tensors in files of the Hugging Face form.

A matrix lies here as (in, out) and there as (out, in); tables and vectors lie alike. The padding
of a table is not part of a file.
"""

from __future__ import annotations

import re

from hippocampus.backbones.architecture import Architecture

# Module of a layer here -> module of a layer there.
_LAYER = {
    "norm_attention": "input_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    "laurel.left": "laurel.linear_left", "laurel.right": "laurel.linear_right",
    "laurel.norm": "laurel.post_laurel_norm",
    "altup.router": "altup.modality_router", "altup.router_norm": "altup.router_norm",
    "altup.predict": "altup.prediction_coefs", "altup.correct": "altup.correction_coefs",
    "per_layer.gate": "per_layer_input_gate", "per_layer.out": "per_layer_projection",
    "per_layer.norm": "post_per_layer_input_norm",
}
_LLAMA_LAYER = {**_LAYER, "norm_mlp": "post_attention_layernorm"}
_GEMMA_LAYER = {**_LAYER, "norm_attention_out": "post_attention_layernorm",
                "norm_mlp": "pre_feedforward_layernorm",
                "norm_mlp_out": "post_feedforward_layernorm"}
_TOP = {
    "embedding": "model.embed_tokens", "norm_out.scale": "model.norm", "head": "lm_head",
    "per_layer_embedding": "model.embed_tokens_per_layer",
    "per_layer_in.kernel": "model.per_layer_model_projection",
    "per_layer_norm.scale": "model.per_layer_projection_norm",
}
_STREAMS = {"streams_in": "model.altup_projections", "streams_out":
            "model.altup_unembed_projections"}

# Decoders that see or hear lie with their other parts in one file; newer ones one folder deeper.
_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."),
             ("language_model.lm_head.", "lm_head."))
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\.")
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|embed_scale$|input_scale$")


def hub_name(name: str, architecture: Architecture) -> str:
    """The name in a file of the parameter `name`, parts joined by dots.

    Args:
      name: of a parameter, such as `layers_3.attention.query.kernel`.
      architecture: of its decoder.
    """
    if layer := re.fullmatch(r"layers_(\d+)\.(.+)", name):
        number, rest = layer.groups()
        if rest == "altup.output_scale":
            return f"model.layers.{number}.altup.correct_output_scale"
        names = _GEMMA_LAYER if architecture.is_gemma else _LLAMA_LAYER
        return f"model.layers.{number}.{names[rest.rpartition('.')[0]]}.weight"
    if stream := re.fullmatch(r"(streams_in|streams_out)_(\d+)\.kernel", name):
        return f"{_STREAMS[stream[1]]}.{stream[2]}.weight"
    return f"{_TOP[name]}.weight"


def is_transposed(name: str) -> bool:
    """Whether the parameter of this name lies in a file the other way round."""
    return name.endswith(".kernel")


def plain_name(name: str) -> str:
    """A tensor's name as a decoder alone would have it."""
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name[len(prefix):]
    return name


def is_left_out(name: str, architecture: Architecture) -> bool:
    """Whether a tensor of a file, by its `plain_name`, is none that a decoder here needs.

    So it is with what sees and hears, with an output table that is the input's, and with keys and
    values of layers that read those of others.
    """
    if _OTHER_PARTS.match(name) or _DERIVED.search(name):
        return True
    if name == "lm_head.weight":
        return architecture.tie_embeddings
    found = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.weight", name)
    return found is not None and int(found[1]) < architecture.n_layers and (
        architecture.layers[int(found[1])].source >= 0)
