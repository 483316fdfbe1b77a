"""The fields of the hybrid model, and of the layers that other families share."""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_fields import count, group, setting
from hippocampus.errors import ConfigError

PATHS = ("ssm", "hopfield", "attention")
"""Every path a block can have, in the order that gates, masks and probes use."""


@dataclass(frozen=True)
class SSMConfig:
    """The state-space path (hippocampus.layers.modern_ssm, hippocampus.layers.mamba)."""

    kind: str = setting("gated", "gated: input-dependent decay; diagonal: plain A, B, C, D; "
                        "s6, ssd: Mamba and Mamba-2 (hippocampus.layers.mamba); gru: a gated "
                        "recurrent unit instead (hippocampus.layers.gru)",
                        choices=("gated", "diagonal", "s6", "ssd", "gru"))
    expansion: float = setting(1.5, "inner width E / d_model", above=0, high=16)
    d_conv: int = count(4, "taps of the causal convolution; 1 = none", high=256)
    d_state: int = count(4, "state size N per channel (gated has 1; usual: 16 for s6, 64 for ssd)",
                         high=1024)
    dt_rank: int = count(0, "rank of the step sizes (s6); 0 = d_model / 16, rounded up", low=0)
    head_width: int = count(64, "channels that share a decay (ssd)")
    n_groups: int = count(1, "groups of heads that share B and C (ssd)")
    conv_bias: bool = setting(True, "bias of the convolution (s6, ssd)")
    projection_bias: bool = setting(False, "biases of the projections in and out (s6, ssd)")
    input_scale: bool = setting(False, "learn a scale per channel on the scan's input")
    first_layer: int = count(0, "layers below this one have no state-space path", low=0)
    dominant_from_layer: int = count(-1, "from this layer on the state-space gate starts at "
                                     "`dominance` instead of an equal share; -1 = nowhere", low=-1)
    dominance: float = setting(0.8, "that first share", above=0, below=1)
    backend: str = setting("auto", "linear_scan backend; s6: selective_scan's; ssd: chunked or "
                           "sequential",
                           choices=("auto", "sequential", "associative", "chunked", "pallas"))


@dataclass(frozen=True)
class HopfieldConfig:
    """The associative-memory path (hippocampus.layers.mor_hopfield)."""

    patterns: str = setting("context", "what is retrieved from: the causal context, learned "
                            "slots, or both", choices=("context", "slots", "both"))
    depth_schedule: tuple[int, ...] = setting(
        (3, 2, 2, 1), "retrieval steps K per layer; the last number repeats", low=1, high=16)
    n_slots: int = count(64, "learned patterns S (slots, both)", high=10_000_000)
    step_size: float = setting(1.0, "step alpha of a retrieval; the energy never rises for "
                               "alpha <= 1", above=0, high=1)
    normalize: str = setting("l2", "norm of queries and keys per head: unit length, or RMS",
                             choices=("l2", "rms"))
    rope: bool = setting(False, "rotate queries and keys by position")


@dataclass(frozen=True)
class AttentionConfig:
    """The self-attention path (hippocampus.layers.self_attention)."""

    n_kv_heads: int = count(0, "key/value heads; 0 = as many as query heads", low=0)
    qk_norm: bool = setting(True, "RMS-normalise queries and keys per head")
    window: int = count(0, "tokens that a token sees, itself included; 0 = all before it", low=0)
    backend: str = setting("auto", "attention backend, also of the Hopfield path",
                           choices=("auto", "xla", "cudnn", "flash"))


@dataclass(frozen=True)
class MixerConfig:
    """The learned gate over the paths (hippocampus.layers.gated_mixer)."""

    width: int = count(32, "hidden width of the gate network")
    temperature: float = setting(1.0, "temperature of the gate's softmax", low=1e-3, high=1000)
    path_dropout: float = setting(0.0, "chance per sequence that training drops one path",
                                  low=0, below=1)


@dataclass(frozen=True)
class MLPConfig:
    """The feed-forward part of a block (hippocampus.layers.mlp)."""

    kind: str = setting("swiglu", "gated (swiglu) or plain (gelu)", choices=("swiglu", "gelu"))
    width: int = count(0, "hidden width F; 0 = 8/3 d_model (swiglu) or 4 d_model (gelu), "
                       "rounded up to a multiple of 16", low=0)


@dataclass(frozen=True)
class SegmentsConfig:
    """The reasoner: R passes of the stack, a controller between them."""

    train: int = count(2, "passes R in training", high=16)
    eval: int = count(3, "passes that probes can choose from at evaluation", high=16)
    gradient: str = setting("full", "through earlier passes: full, or stop at the controller",
                            choices=("stop", "full"))
    weights: tuple[float, ...] = setting(
        (0.3, 1.0), "loss weight of each pass, aligned with the last one: missing ones are 0, "
        "surplus first ones unused", low=0)
    controller_width: int = count(32, "hidden width of the controller")
    feedback: bool = setting(False, "also add a projection of the last pass to the embeddings")


@dataclass(frozen=True)
class HybridConfig:
    """The hybrid language model (hippocampus.models.hybrid_lm)."""

    family: str = setting("hybrid", "model family", choices=("hybrid",))
    vocab_size: int = count(256, "token ids; training replaces it by the tokenizer's size",
                            high=16_777_216)
    d_model: int = count(256, "width D of the residual stream", high=65_536)
    n_layers: int = count(4, "blocks L", high=1024)
    n_heads: int = count(4, "heads H of every path", high=1024)
    paths: tuple[str, ...] = setting(PATHS, "paths of every block", choices=PATHS)
    layer_paths: tuple[str, ...] = setting(
        (), "paths per layer, such as ('attention', 'ssm+attention'); empty = `paths` everywhere")
    position: str = setting("rope", "position information of the attention path",
                            choices=("rope", "learned", "none"))
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies", low=1, high=1e12)
    max_length: int = count(0, "rows of the learned position table; 0 = data.context", low=0)
    tie_embeddings: bool = setting(True, "one table for input and output")
    embedding_width: int = count(0, "width of the tables, with a projection to and from d_model; "
                                 "0 = d_model", low=0, high=65_536)
    dropout: float = setting(0.0, "dropout after each block half", low=0, below=1)
    token_noise: float = setting(0.0, "chance that training reads another row's token instead of "
                                 "its own (targets stay)", low=0, below=1)
    scan_layers: bool = setting(False, "compile runs of equal layers once (lax.scan)")
    remat: str = setting("none", "what the backward pass recomputes: none, mlp (the hidden "
                         "arrays of feed-forward parts), dots (all but matrix products), or full "
                         "(the whole block)", choices=("none", "mlp", "dots", "full"))
    compute_dtype: str = setting("auto", "type of matrix products; parameters stay float32",
                                 choices=("auto", "float32", "bfloat16", "float16"))
    norm_epsilon: float = setting(1e-6, "added to the mean square in norms", low=1e-12,
                                  high=1)
    ssm: SSMConfig = group(SSMConfig)
    hopfield: HopfieldConfig = group(HopfieldConfig)
    attention: AttentionConfig = group(AttentionConfig)
    mixer: MixerConfig = group(MixerConfig)
    mlp: MLPConfig = group(MLPConfig)
    segments: SegmentsConfig = group(SegmentsConfig)

    @property
    def passes(self) -> int:
        """Reasoning passes of training."""
        return self.segments.train

    def longest_row(self, context: int) -> int | None:
        """Tokens that a row can have: the learned positions; None = any number.

        Args:
          context: of the training, for a config that is not resolved yet.
        """
        return (self.max_length or context) if self.position == "learned" else None


def layer_paths(model: HybridConfig) -> tuple[tuple[str, ...], ...]:
    """The paths of each layer, in the order of `PATHS`.

    Raises:
      ConfigError: a layer has no path, or `layer_paths` names an unknown one.
    """
    if model.layer_paths and len(model.layer_paths) != model.n_layers:
        raise ConfigError(f"model.layer_paths has {len(model.layer_paths)} entries for "
                          f"{model.n_layers} layers", "give one entry per layer, or leave it empty")
    layers = []
    for i in range(model.n_layers):
        wanted = model.layer_paths[i].split("+") if model.layer_paths else model.paths
        if unknown := set(wanted) - set(PATHS):
            raise ConfigError(f"model.layer_paths[{i}] names {sorted(unknown)[0][:60]!r}",
                              f"allowed: {', '.join(PATHS)}, joined by '+'")
        paths = tuple(p for p in PATHS
                      if p in wanted and not (p == "ssm" and i < model.ssm.first_layer))
        if not paths:
            raise ConfigError(f"layer {i} has no path", "add one to model.paths, or lower "
                              "model.ssm.first_layer")
        layers.append(paths)
    return tuple(layers)


def depth(model: HybridConfig, layer: int) -> int:
    """Retrieval steps K of a layer: the schedule's entry, whose last number repeats."""
    schedule = model.hopfield.depth_schedule
    return schedule[min(layer, len(schedule) - 1)]
