"""Floating-point operations of a training step, counted from the config.

Model FLOPs utilisation (MFU) here = `training_flops_per_token` * tokens per second / (devices *
dense peak in the compute dtype). A multiply-add counts 2. Counted are matrix products and
attention scores over the causal half; not counted are elementwise work, scans, and anything
rematerialisation does twice. A pass without gradient counts its forward only. Without feedback
every pass feeds the same embeddings to the paths of layer 0, which a compiler may compute once;
they count for every pass all the same.
"""

from __future__ import annotations

from hippocampus.config import PATHS, Config, HybridConfig
from hippocampus.layers.mlp import mlp_width
from hippocampus.models.hybrid_block import BlockSpec, block_specs
from hippocampus.ops.embedding import padded_vocabulary


def training_flops_per_token(config: Config) -> float:
    """FLOPs per token of forward and backward over all segments, at the training context."""
    return sum(training_flops_by_component(config).values())


def training_flops_by_component(config: Config) -> dict[str, float]:
    """`training_flops_per_token`, part by part.

    Returns:
      FLOPs per token of "ssm", "hopfield", "attention", "mixer", "mlp", "controller", "loss" (the
      head is part of it) and "embedding" (the projection of a factorised table).
    """
    model, segments = config.model, config.model.segments
    R = segments.train
    supervised = sum(1 for w in segments.weights[-R:] if w)
    # With "stop", gradients reach an earlier pass only through its own loss.
    differentiated = R if segments.gradient == "full" else supervised
    parts = dict.fromkeys((*PATHS, "mixer", "mlp"), 0.0)
    for spec in block_specs(model):
        for name, flops in _block(model, spec, config.data.context).items():
            parts[name] += flops * (R + 2 * differentiated)
    width = model.embedding_width or model.d_model
    factor = 2.0 * width * model.d_model if model.embedding_width else 0.0
    head = 2.0 * padded_vocabulary(model.vocab_size) * width
    controller = 2.0 * segments.controller_width * (
        model.d_model + model.n_layers * len(PATHS)) if R > 1 else 0.0
    if R > 1 and segments.feedback:
        controller += 2.0 * model.d_model**2
    return {**parts, "controller": 3 * controller * (R - 1),
            "loss": 3 * (head + factor) * supervised, "embedding": 3 * factor}


def _block(model: HybridConfig, spec: BlockSpec, context: int) -> dict[str, float]:
    """Forward FLOPs per token of one block, part by part."""
    D, seen = model.d_model, (context + 1) / 2
    matrices = 3 if model.mlp.kind == "swiglu" else 2
    parts = {"mixer": 2.0 * D * model.mixer.width + 2.0 * model.mixer.width * len(spec.paths),
             "mlp": 2.0 * matrices * D * mlp_width(model.mlp, D)}
    if "ssm" in spec.paths:
        E = model.ssm.expansion * D
        if model.ssm.kind == "gru":
            parts["ssm"] = 2 * 4 * D * E + 2 * 3 * E * E
        else:
            parts["ssm"] = 2 * 3 * D * E + 2 * model.ssm.d_conv * E + (
                4 * E * E / model.n_heads if model.ssm.kind == "gated" else 0)
    if "hopfield" in spec.paths:
        patterns = (seen if model.hopfield.patterns != "slots" else 0) + (
            model.hopfield.n_slots if model.hopfield.patterns != "context" else 0)
        projections = 3 if model.hopfield.patterns != "slots" else 2
        parts["hopfield"] = 2.0 * projections * D * D + spec.depth * 4.0 * patterns * D
    if "attention" in spec.paths:
        groups = (model.attention.n_kv_heads or model.n_heads) / model.n_heads
        window = model.attention.window
        parts["attention"] = 2.0 * D * D * (2 + 2 * groups) + 4.0 * D * (
            min(seen, window) if window else seen)
    return parts
