"""The typed schema of a run: every field with its default, its check and its meaning.

This is the only place with defaults and ranges (what fields must be to each other stands in
`hippocampus.config_checks`). A config file starts from `defaults(family)`, changes what its
experiment needs, and is turned at once into the frozen dataclasses below by
`hippocampus.config_files.load_config`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hippocampus.errors import ConfigError

PATHS = ("ssm", "hopfield", "attention")
"""Every path a block can have, in the order that gates, masks and probes use."""

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
"""The axes that devices are arranged along."""

TOKENIZERS = ("bytes", "characters", "words", "bpe", "ids")
"""Tokenizers that are made from the corpus."""

RECALL_TASKS = ("mqar", "noisy", "induction", "selective_copy", "delayed_copy")
"""Synthetic tasks, `data.corpus` = "recall:" and one of them."""

_LARGEST = 2**31 - 1


def _setting(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None,
    above: float | None = None, below: float | None = None, choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with the range it is held to (low and high belong to the range)."""
    metadata = {"meaning": meaning, "low": low, "high": high, "above": above, "below": below,
                "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def _count(default: int, meaning: str, *, low: int = 1, high: int = _LARGEST) -> Any:
    return _setting(default, meaning, low=low, high=high)


def _group(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and from which seed."""

    steps: int = _count(1000, "optimizer steps of the whole run")
    epochs: float = _setting(0.0, "passes over the training text, instead of steps; 0 = as many "
                             "steps as `steps` says", low=0, high=1e6)
    seed: int = _count(0, "seed of the initial parameters, the data order and dropout", low=0)
    batch_size: int = _count(32, "sequences per optimizer step, over all devices")
    grad_accumulation: int = _count(1, "micro-batches that one optimizer step is split into")
    deterministic: bool = _setting(False, "on a GPU, only operations that give the same bits every "
                                   "time, which are slower; CPU and TPU always do")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and what it does not decay."""

    learning_rate: float = _setting(1e-3, "peak learning rate", above=0, high=100)
    warmup_steps: int = _count(100, "steps of linear warm-up from 0", low=0)
    schedule: str = _setting("cosine", "after warm-up: cosine, wsd (constant, then a linear decay) "
                             "or constant", choices=("cosine", "wsd", "constant"))
    decay_fraction: float = _setting(0.2, "share of the run that wsd decays over", low=0, high=1)
    final_scale: float = _setting(0.1, "last learning rate / peak learning rate", low=0, high=1)
    beta1: float = _setting(0.9, "decay of the first moment", low=0, below=1)
    beta2: float = _setting(0.95, "decay of the second moment", low=0, below=1)
    epsilon: float = _setting(1e-8, "added to the root of the second moment", low=1e-16,
                              high=1)
    weight_decay: float = _setting(0.1, "decoupled weight decay", low=0, high=100)
    no_decay: tuple[str, ...] = _setting(
        (r"(bias|scale|log_decay|log_beta|skip|input_scale)$",),
        "regular expressions over parameter paths that weight decay leaves alone")
    clip_norm: float = _setting(1.0, "largest global gradient norm; 0 = no clipping", low=0)


@dataclass(frozen=True)
class SSMConfig:
    """The state-space path (hippocampus.layers.modern_ssm)."""

    kind: str = _setting("gated", "gated: input-dependent decay; diagonal: plain A, B, C, D; "
                         "gru: a gated recurrent unit instead (hippocampus.layers.gru)",
                         choices=("gated", "diagonal", "gru"))
    expansion: float = _setting(1.5, "inner width E / d_model", above=0, high=16)
    d_conv: int = _count(4, "taps of the causal convolution; 1 = none", high=256)
    d_state: int = _count(4, "state size N per channel (diagonal kind; gated has 1)", high=1024)
    input_scale: bool = _setting(False, "learn a scale per channel on the scan's input")
    first_layer: int = _count(0, "layers below this one have no state-space path", low=0)
    dominant_from_layer: int = _count(-1, "from this layer on the state-space gate starts at "
                                      "`dominance` instead of an equal share; -1 = nowhere", low=-1)
    dominance: float = _setting(0.8, "that first share", above=0, below=1)
    backend: str = _setting("auto", "linear_scan backend",
                            choices=("auto", "sequential", "associative", "chunked", "pallas"))


@dataclass(frozen=True)
class HopfieldConfig:
    """The associative-memory path (hippocampus.layers.mor_hopfield)."""

    patterns: str = _setting("context", "what is retrieved from: the causal context, learned "
                             "slots, or both", choices=("context", "slots", "both"))
    depth_schedule: tuple[int, ...] = _setting(
        (3, 2, 2, 1), "retrieval steps K per layer; the last number repeats", low=1, high=16)
    n_slots: int = _count(64, "learned patterns S (slots, both)", high=10_000_000)
    step_size: float = _setting(1.0, "step alpha of a retrieval; the energy never rises for "
                                "alpha <= 1", above=0, high=1)
    normalize: str = _setting("l2", "norm of queries and keys per head: unit length, or RMS",
                              choices=("l2", "rms"))
    rope: bool = _setting(False, "rotate queries and keys by position")


@dataclass(frozen=True)
class AttentionConfig:
    """The self-attention path (hippocampus.layers.self_attention)."""

    n_kv_heads: int = _count(0, "key/value heads; 0 = as many as query heads", low=0)
    qk_norm: bool = _setting(True, "RMS-normalise queries and keys per head")
    window: int = _count(0, "tokens that a token sees, itself included; 0 = all before it", low=0)
    backend: str = _setting("auto", "attention backend, also of the Hopfield path",
                            choices=("auto", "xla", "cudnn", "flash"))


@dataclass(frozen=True)
class MixerConfig:
    """The learned gate over the paths (hippocampus.layers.gated_mixer)."""

    width: int = _count(32, "hidden width of the gate network")
    temperature: float = _setting(1.0, "temperature of the gate's softmax", low=1e-3, high=1000)
    path_dropout: float = _setting(0.0, "chance per sequence that training drops one path",
                                   low=0, below=1)


@dataclass(frozen=True)
class MLPConfig:
    """The feed-forward part of a block (hippocampus.layers.mlp)."""

    kind: str = _setting("swiglu", "gated (swiglu) or plain (gelu)", choices=("swiglu", "gelu"))
    width: int = _count(0, "hidden width F; 0 = 8/3 d_model (swiglu) or 4 d_model (gelu), "
                        "rounded up to a multiple of 16", low=0)


@dataclass(frozen=True)
class SegmentsConfig:
    """The reasoner: R passes of the stack, a controller between them."""

    train: int = _count(2, "passes R in training", high=16)
    eval: int = _count(3, "passes that probes can choose from at evaluation", high=16)
    gradient: str = _setting("full", "through earlier passes: full, or stop at the controller",
                             choices=("stop", "full"))
    weights: tuple[float, ...] = _setting(
        (0.3, 1.0), "loss weight of each pass, aligned with the last one: missing ones are 0, "
        "surplus first ones unused", low=0)
    controller_width: int = _count(32, "hidden width of the controller")
    feedback: bool = _setting(False, "also add a projection of the last pass to the embeddings")


@dataclass(frozen=True)
class HybridConfig:
    """The hybrid language model (hippocampus.models.hybrid_lm)."""

    family: str = _setting("hybrid", "model family", choices=("hybrid",))
    vocab_size: int = _count(256, "token ids; training replaces it by the tokenizer's size",
                             high=16_777_216)
    d_model: int = _count(256, "width D of the residual stream", high=65_536)
    n_layers: int = _count(4, "blocks L", high=1024)
    n_heads: int = _count(4, "heads H of every path", high=1024)
    paths: tuple[str, ...] = _setting(PATHS, "paths of every block", choices=PATHS)
    layer_paths: tuple[str, ...] = _setting(
        (), "paths per layer, such as ('attention', 'ssm+attention'); empty = `paths` everywhere")
    position: str = _setting("rope", "position information of the attention path",
                             choices=("rope", "learned", "none"))
    rope_theta: float = _setting(10_000.0, "base of the rotary frequencies", low=1, high=1e12)
    max_length: int = _count(0, "rows of the learned position table; 0 = data.context", low=0)
    tie_embeddings: bool = _setting(True, "one table for input and output")
    embedding_width: int = _count(0, "width of the tables, with a projection to and from d_model; "
                                  "0 = d_model", low=0, high=65_536)
    dropout: float = _setting(0.0, "dropout after each block half", low=0, below=1)
    token_noise: float = _setting(0.0, "chance that training reads another row's token instead of "
                                  "its own (targets stay)", low=0, below=1)
    scan_layers: bool = _setting(False, "compile runs of equal layers once (lax.scan)")
    remat: str = _setting("none", "what the backward pass recomputes: none, dots (all but matrix "
                          "products), or full (the whole block)", choices=("none", "dots", "full"))
    compute_dtype: str = _setting("auto", "type of matrix products; parameters stay float32",
                                  choices=("auto", "float32", "bfloat16", "float16"))
    norm_epsilon: float = _setting(1e-6, "added to the mean square in norms", low=1e-12,
                                   high=1)
    ssm: SSMConfig = _group(SSMConfig)
    hopfield: HopfieldConfig = _group(HopfieldConfig)
    attention: AttentionConfig = _group(AttentionConfig)
    mixer: MixerConfig = _group(MixerConfig)
    mlp: MLPConfig = _group(MLPConfig)
    segments: SegmentsConfig = _group(SegmentsConfig)


@dataclass(frozen=True)
class RectifiedFlowConfig:
    """The two straightness regularisers (hippocampus.training.rectified_flow)."""

    segment_weight: float = _setting(0.0, "weight of the segment flow (first pass -> last pass)",
                                     low=0, high=1e6)
    depth_weight: float = _setting(0.0, "weight of depth straightness over the layers",
                                   low=0, high=1e6)
    width: int = _count(64, "hidden width of the velocity network")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised. Evaluation is always the plain cross-entropy."""

    label_smoothing: float = _setting(0.0, "share of the target spread over the vocabulary",
                                      low=0, below=1)
    z_weight: float = _setting(0.0, "weight of logsumexp(logits)^2", low=0, high=1e6)
    backend: str = _setting("auto", "cross_entropy backend",
                            choices=("auto", "full", "chunked", "fused"))
    rectified_flow: RectifiedFlowConfig = _group(RectifiedFlowConfig)


@dataclass(frozen=True)
class EMAConfig:
    """The running average of the parameters that samples and probes use."""

    decay: float = _setting(0.999, "decay after its warm-up min(decay, (1+t)/(10+t)); 0 = no "
                            "average", low=0, below=1)


@dataclass(frozen=True)
class RecallConfig:
    """The examples of a synthetic task (hippocampus.data.synthetic)."""

    lengths: tuple[int, ...] = _setting((64, 128, 256, 256, 256), "tokens of a training example, "
                                        "per kind", low=2, high=16_777_216)
    pairs: tuple[int, ...] = _setting((4, 8, 16, 32, 64), "what there is to remember in one, per "
                                      "kind: bindings, or ids to copy", low=1, high=1_000_000)
    examples: tuple[int, ...] = _setting((100_000, 20_000, 20_000, 20_000, 20_000),
                                         "training examples, per kind", low=1, high=100_000_000)
    test_lengths: tuple[int, ...] = _setting(
        (64, 64, 64, 128, 256, 512, 1024), "as `lengths`, of held-out examples; while training, "
        "those that fit data.context are scored", low=2, high=16_777_216)
    test_pairs: tuple[int, ...] = _setting((4, 8, 16, 32, 64, 128, 256), "as `pairs`, of held-out "
                                           "examples", low=1, high=1_000_000)
    test_examples: int = _count(1000, "held-out examples of every kind")
    vocab_size: int = _count(8192, "ids", low=8, high=16_777_216)
    power: float = _setting(0.01, "a key is asked for i places later with chance ~ i^(power - 1); "
                            "1 = anywhere", low=0, high=100)
    updates: float = _setting(0.5, "noisy: share of the keys that are bound again", low=0, high=1)
    noise: float = _setting(0.5, "noisy: pairs of filler among the bindings, per key", low=0,
                            high=1000)
    seed: int = _count(0, "which examples; train.seed orders them", low=0)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut."""

    corpus: str = _setting("pydoc", "pydoc, tinyshakespeare, wikitext_mini; a text, .jsonl or "
                           ".parquet file or a glob of them; a folder of Dataset.save_to_disk; "
                           "a hub id such as Salesforce/wikitext; or recall: and a task")
    subset: str = _setting("", "configuration of a hub data set, such as wikitext-103-raw-v1; "
                           "empty = its only or default one")
    column: str = _setting("text", "the column that holds the text (not for text files)")
    train_split: str = _setting("train", "split to train on (hub, save_to_disk); slices such as "
                                "train[:99%] work")
    validation_split: str = _setting("", "split to validate on; empty = `validation` where there "
                                     "is one, else the last tenth of the training split is held "
                                     "out (of one text's characters, otherwise of the documents)")
    test_split: str = _setting("", "split to test on; empty = `test` where there is one")
    validation_files: str = _setting("", "for a local corpus: file or glob to validate on")
    test_files: str = _setting("", "for a local corpus: file or glob to test on")
    document_start: str = _setting("", "regular expression: a line of a text file, or a row, that "
                                   "it is found in begins a new document, and rows are lines; "
                                   "empty = every text file, or row, is a document")
    streaming: bool = _setting(False, "read a hub data set over the network without keeping a "
                               "copy; without a validation split its first 5,000 documents are "
                               "held out")
    tokenizer: str = _setting("bytes", "bytes, characters, words, bpe, or the path of a "
                              "tokenizer.json; ids for a synthetic task")
    vocab_size: int = _count(0, "ids of bpe (0 = 32,768) or words (0 = every word of the training "
                             "text); other tokenizers have their own number", low=0,
                             high=16_777_216)
    tokenizer_megabytes: int = _count(2000, "bpe and words learn from the beginning of the "
                                      "training text, at most so much of it", high=1_000_000)
    documents: str = _setting("joined", "joined: windows read across documents; packed: "
                              "document ids keep them apart", choices=("joined", "packed"))
    order: str = _setting("shuffled", "shuffled windows, or streams: each row of a batch goes on "
                          "where that row of the batch before ended",
                          choices=("shuffled", "streams"))
    context: int = _count(128, "tokens T per sequence", high=16_777_216)
    recall: RecallConfig = _group(RecallConfig)


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation during and after training."""

    every_steps: int = _count(200, "steps between evaluations; 0 = only at the end", low=0)
    batch_size: int = _count(32, "windows per evaluation batch, over all devices")
    context: int = _count(0, "tokens per window; 0 = data.context", low=0, high=16_777_216)
    stride: int = _count(0, "tokens from one window to the next, of which only the last `stride` "
                         "predictions count; 0 = disjoint windows", low=0, high=16_777_216)
    max_windows: int = _count(0, "windows per evaluation while training; 0 = the whole split; the "
                              "one at the end is always whole", low=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = _count(200, "steps between saves; the last step is always saved")
    keep_latest: int = _count(2, "newest checkpoints kept")
    keep_best: int = _count(1, "checkpoints with the lowest eval/loss kept", low=0)
    keep_every_steps: int = _count(0, "also keep every multiple of this step; 0 = none", low=0)


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about bad steps (hippocampus.training.guard) and slow ones."""

    patience: int = _count(10, "skipped steps in a row that send the run back to an earlier "
                           "checkpoint")
    max_rollbacks: int = _count(3, "times that a run goes back before it gives up; 0 = at once",
                                low=0)
    spike_sigmas: float = _setting(0.0, "also skip a step whose loss or gradient norm is above the "
                                   "mean by this many standard deviations of the steps before; "
                                   "0 = off", low=0, high=1e6)
    spike_window: int = _count(128, "accepted steps that this mean is over; the rule begins when "
                               "half of them are there", low=2, high=1_000_000)
    slow_step_factor: float = _setting(10.0, "report a step that takes this many times the median",
                                       above=0, high=1e6)
    slow_step_seconds: float = _setting(10.0, "least seconds before a slow step is reported",
                                        low=0, high=1e9)


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = _count(10, "steps between rows of metrics.jsonl and the console")
    histogram_every_steps: int = _count(200, "steps between histograms of gates; 0 = none", low=0)
    wandb_project: str = _setting("", "Weights & Biases project; empty = off")


@dataclass(frozen=True)
class SampleConfig:
    """The text that a run writes as it learns."""

    every_steps: int = _count(0, "steps between samples; 0 = only at the end", low=0)
    prompt: str = _setting("\n", "what the sample continues")
    max_new_tokens: int = _count(200, "tokens per sample", low=1, high=1_000_000)
    temperature: float = _setting(0.8, "0 = the most likely token", low=0, high=1000)
    top_k: int = _count(40, "sample among the k most likely; 0 = all", low=0)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged, and how parameters lie on them."""

    devices: int = _count(0, "devices that the run expects to find, over all processes; 0 = any "
                          "number", low=0)
    data: int = _count(-1, "data-parallel size; -1 = all devices the other axes leave", low=-1)
    fsdp: int = _count(1, "size over which parameters and batch are sharded")
    tensor: int = _count(1, "size over which heads and widths are split")
    sequence: int = _count(1, "size over which the time axis is split")
    rules: tuple[tuple[str, str], ...] = _setting(
        ((r"embedding$|head$", "tensor,fsdp"), (r"(out|down)/kernel$", "tensor,fsdp"),
         (r"embedding_up/kernel$", "-,tensor+fsdp"), (r"head_down$", "tensor+fsdp,-"),
         (r"slots$", "fsdp,tensor,-"), (r"ssm/gates/kernel$", "tensor,fsdp,-"),
         (r"(conv_kernel|gates/bias)$", "-,tensor+fsdp"),
         (r"(log_decay|input_kernel|output_kernel)$", "tensor+fsdp,-"),
         (r"kernel$", "fsdp,tensor")),
        "(regular expression over the parameter path, mesh axis of each of the last dimensions: a "
        "name, several joined by '+', or '-'); the first match with enough dimensions counts, an "
        "axis that does not divide is left out, no match = replicated")


@dataclass(frozen=True)
class Config:
    """One experiment. Built by `load_config`, saved as config.json, frozen."""

    name: str = _setting("run", "name of the run folder under checkpoints/")
    train: TrainConfig = _group(TrainConfig)
    optimizer: OptimizerConfig = _group(OptimizerConfig)
    model: HybridConfig = _group(HybridConfig)
    loss: LossConfig = _group(LossConfig)
    ema: EMAConfig = _group(EMAConfig)
    data: DataConfig = _group(DataConfig)
    eval: EvalConfig = _group(EvalConfig)
    checkpoint: CheckpointConfig = _group(CheckpointConfig)
    guard: GuardConfig = _group(GuardConfig)
    log: LogConfig = _group(LogConfig)
    sample: SampleConfig = _group(SampleConfig)
    mesh: MeshConfig = _group(MeshConfig)


FAMILIES: dict[str, type] = {"hybrid": HybridConfig}
"""`model.family` -> the class of `Config.model`."""


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
