"""Floating-point operations of a training step, counted from the config.

Model FLOPs utilisation (MFU) here = `training_flops_per_token` * tokens per second / (devices *
dense peak in the compute dtype). A multiply-add counts 2. Counted are matrix products and
attention scores over the causal half; not counted are elementwise work, scans, and anything
rematerialisation does twice. A pass without gradient counts its forward only. Without feedback
every pass feeds the same embeddings to the paths of layer 0, which a compiler may compute once;
they count for every pass all the same. A solver counts all the sweeps that it may make, forward and
backward, though tokens that converge end them earlier; what its stopping rule reads does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.config import (
    PATHS,
    BuuConfig,
    CHopTConfig,
    Config,
    EquilibriumConfig,
    HybridConfig,
    SSMConfig,
)
from hippocampus.config_adapters import adapted_layers, memory_width
from hippocampus.config_equilibrium import SolverConfig
from hippocampus.layers.mlp import mlp_width
from hippocampus.models.build_model import architecture_of
from hippocampus.models.hybrid_block import BlockSpec, block_specs
from hippocampus.ops import ssd
from hippocampus.ops.embedding import padded_vocabulary


def training_flops_per_token(config: Config) -> float:
    """FLOPs per token of forward and backward over all segments, at the training context."""
    return sum(training_flops_by_component(config).values())


def training_flops_by_component(config: Config) -> dict[str, float]:
    """`training_flops_per_token`, part by part.

    Returns:
      FLOPs per token of "ssm", "hopfield", "attention", "mixer", "mlp", "controller", "loss" (the
      head is part of it) and "embedding" (the projection of a factorised table); of an equilibrium
      model of "ssm", "hopfield", "mlp", "equilibrium" (what the cell reads and gives) and "loss";
      of a CHopT of "attention", "mlp", "memory" and "loss", and of a Buu of "attention", "mlp",
      "adapters" and "loss".
    """
    return _FAMILIES[config.model.family](config.model, config.data.context)


def _hybrid(model: HybridConfig, context: int) -> dict[str, float]:
    segments = model.segments
    R = segments.train
    supervised = sum(1 for w in segments.weights[-R:] if w)
    # With "stop", gradients reach an earlier pass only through its own loss.
    differentiated = R if segments.gradient == "full" else supervised
    parts = dict.fromkeys((*PATHS, "mixer", "mlp"), 0.0)
    for spec in block_specs(model):
        for name, flops in _block(model, spec, context).items():
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


def _equilibrium(model: EquilibriumConfig, context: int) -> dict[str, float]:
    D, cell, solver = model.d_model, model.cell, model.solver
    parts = {"ssm": 3 * model.n_layers * ssm_flops(model.ssm, D, model.n_heads, context)}
    cells = cell.copies if model.is_explicit else 1
    sweeps, states = (3.0 * cells,) * 2 if model.is_explicit else _sweeps(solver)
    once = 0.0
    for part in cell.parts if cells else ():
        if part == "ssm":
            parts["ssm"] += states * ssm_flops(cell.ssm, D, model.n_heads, context)
        elif part == "mlp":
            matrices = 3 if cell.mlp.kind == "swiglu" else 2
            parts["mlp"] = states * 2.0 * matrices * D * mlp_width(cell.mlp, D)
        else:
            memory = model.hopfield
            patterns = ((context + 1) / 2 if memory.patterns != "slots" else 0) + (
                memory.n_slots if memory.patterns != "context" else 0)
            once += 2.0 * D * D * (memory.patterns != "slots")
            parts["hopfield"] = (sweeps * (2.0 * D * D + memory.steps * 4.0 * patterns * D)
                                 + states * 2.0 * D * D)
    once = cells * (once + 2 * 2.0 * D * D) + 2.0 * D * D if cells else 0.0
    head = 2.0 * padded_vocabulary(model.vocab_size) * D
    return {**parts, "equilibrium": 3 * once, "loss": 3 * head}


def _sweeps(solver: SolverConfig) -> tuple[float, float]:
    """Sweeps of a training step, and updates of the state: in forward passes through the cell.

    A product with the Jacobian's transpose costs as much as a pass, a gradient of the parameters
    as much again.
    """
    K = solver.max_iterations
    inner = solver.inner_iterations if solver.schedule == "cascade" else 1
    if solver.gradient == "unroll":
        return 3.0 * K, 3.0 * K * inner
    back = 3.0 * solver.phantom_steps if solver.gradient == "phantom" else (
        solver.backward_iterations + 3.0)
    return K + back, K * inner + back


def ssm_flops(ssm: SSMConfig, d_model: int, n_heads: int, context: int) -> float:
    """Forward FLOPs per token of a state-space path; SSD's scan is matrix products, and counts.

    Args:
      ssm: the path's fields.
      d_model: width D.
      n_heads: blocks of the gated kind's gates.
      context: tokens of a sequence; of a chunk of SSD, a token sees half.
    """
    D, E, N = d_model, ssm.expansion * d_model, ssm.d_state
    if ssm.kind == "gru":
        return 2 * 4 * D * E + 2 * 3 * E * E
    if ssm.kind == "s6":
        R = ssm.dt_rank or -(-D // 16)
        return 2 * (3 * D * E + ssm.d_conv * E + E * (R + 2 * N) + R * E)
    if ssm.kind == "ssd":
        both, seen = ssm.n_groups * N, (min(ssd.CHUNK, context) + 1) / 2
        projections = D * (2 * E + 2 * both + E / ssm.head_width) + E * D
        return 2 * (projections + ssm.d_conv * (E + 2 * both) + seen * (both + E) + 2 * E * N)
    return 2 * 3 * D * E + 2 * ssm.d_conv * E + (4 * E * E / n_heads if ssm.kind == "gated" else 0)


def _block(model: HybridConfig, spec: BlockSpec, context: int) -> dict[str, float]:
    """Forward FLOPs per token of one block, part by part."""
    D, seen = model.d_model, (context + 1) / 2
    matrices = 3 if model.mlp.kind == "swiglu" else 2
    parts = {"mixer": 2.0 * D * model.mixer.width + 2.0 * model.mixer.width * len(spec.paths),
             "mlp": 2.0 * matrices * D * mlp_width(model.mlp, D)}
    if "ssm" in spec.paths:
        parts["ssm"] = ssm_flops(model.ssm, D, model.n_heads, context)
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


def _chopt(model: CHopTConfig, context: int) -> dict[str, float]:
    """What is frozen has no gradient of its own, and what stands in front of all that is trained
    none at all; a Gemma-3n's AltUp and per-layer inputs do not count."""
    cfg, memory, seen = architecture_of(model), model.memory, ((model.chunk or context) + 1) / 2
    D = cfg.d_model
    width = memory.width or D
    times = {"none": 1.0, "lora": 2.0, "full": 3.0}[model.backbone.train]
    parts = {"attention": 0.0, "mlp": 0.0}
    for spec in cfg.layers:
        for name, flops in _decoder_layer(cfg, spec, seen).items():
            parts[name] += times * flops
    written = memory.n_writes / (model.chunk or context)
    bank = 2.0 * D * width * (2 + 2 * written) + 4.0 * memory.steps * memory.n_slots * width
    head = 2.0 * padded_vocabulary(cfg.vocab_size) * D
    return {**parts, "memory": 3.0 * bank,
            "loss": (3.0 if model.backbone.train == "full" else 2.0) * head}


def _buu(model: BuuConfig, context: int) -> dict[str, float]:
    """As of a CHopT; what lies below the first adapted layer has no gradient at all."""
    cfg, adapters, memory = architecture_of(model), model.adapters, model.adapters.memory
    layers = adapted_layers(adapters, cfg.n_layers)
    parts, D = {"attention": 0.0, "mlp": 0.0}, cfg.d_model
    for i, spec in enumerate(cfg.layers):
        frozen = 2.0 if layers and i >= layers[0] else 1.0
        times = {"none": frozen, "lora": 2.0, "full": 3.0}[model.backbone.train]
        for name, flops in _decoder_layer(cfg, spec, (context + 1) / 2).items():
            parts[name] += times * flops
    width = memory_width(memory, D)
    adapter = ssm_flops(adapters.ssm, D, cfg.n_heads, context) + 2.0 * D * D + (
        4.0 * D * width + 4.0 * memory.slots * width) + 2.0 * D * (
            D if adapters.gate_width == "channel" else 1)
    head = 2.0 * padded_vocabulary(cfg.vocab_size) * D
    return {**parts, "adapters": 3.0 * len(layers) * adapter,
            "loss": (3.0 if model.backbone.train == "full" else 2.0) * head}


def _decoder_layer(cfg: Architecture, spec: LayerSpec, seen: float) -> dict[str, float]:
    """Forward FLOPs per token of a decoder's layer, whose tokens see so many others."""
    D, inner = cfg.d_model, cfg.n_heads * cfg.head_width
    groups = cfg.n_kv_heads / cfg.n_heads if spec.source < 0 else 0.0
    attention = 2.0 * D * inner * (2 + 2 * groups) + 4.0 * inner * (
        min(seen, spec.window) if spec.window else seen)
    return {"attention": attention, "mlp": 2.0 * 3 * D * spec.mlp_width}


_FAMILIES: dict[str, Callable[[Any, int], dict[str, float]]] = {
    "hybrid": _hybrid, "equilibrium": _equilibrium, "chopt": _chopt, "buu": _buu}
