"""The typed schema of a run: every field with its default, its check and its meaning.

The fields of a model stand beside it, in one file per family (`config_hybrid`,
`config_equilibrium`, `config_chopt`, `config_buu`); what fields must be to each other stands in
`config_checks`. There are no other defaults or ranges. A config file starts from
`defaults(family)`, changes what its experiment needs, and is turned at once into the frozen
dataclasses below by `hippocampus.config_files.load_config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_buu import BuuConfig as BuuConfig
from hippocampus.config_chopt import CHopTConfig as CHopTConfig
from hippocampus.config_decoder import BackboneConfig as BackboneConfig
from hippocampus.config_decoder import LoRAConfig as LoRAConfig
from hippocampus.config_equilibrium import EquilibriumConfig as EquilibriumConfig
from hippocampus.config_equilibrium import EquilibriumLossConfig as EquilibriumLossConfig
from hippocampus.config_fields import count, group, setting
from hippocampus.config_hybrid import PATHS as PATHS
from hippocampus.config_hybrid import AttentionConfig as AttentionConfig
from hippocampus.config_hybrid import HopfieldConfig as HopfieldConfig
from hippocampus.config_hybrid import HybridConfig as HybridConfig
from hippocampus.config_hybrid import MixerConfig as MixerConfig
from hippocampus.config_hybrid import MLPConfig as MLPConfig
from hippocampus.config_hybrid import SegmentsConfig as SegmentsConfig
from hippocampus.config_hybrid import SSMConfig as SSMConfig
from hippocampus.config_hybrid import depth as depth
from hippocampus.config_hybrid import layer_paths as layer_paths

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
"""The axes that devices are arranged along."""

TOKENIZERS = ("bytes", "characters", "words", "bpe", "ids", "backbone")
"""Tokenizers that are made from the corpus, and that of a pretrained decoder."""

RECALL_TASKS = ("mqar", "noisy", "induction", "selective_copy", "delayed_copy")
"""Synthetic tasks, `data.corpus` = "recall:" and one of them."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and from which seed."""

    steps: int = count(1000, "optimizer steps of the whole run")
    epochs: float = setting(0.0, "passes over the training text, instead of steps; 0 = as many "
                            "steps as `steps` says", low=0, high=1e6)
    seed: int = count(0, "seed of the initial parameters, the data order and dropout", low=0)
    batch_size: int = count(32, "sequences per optimizer step, over all devices")
    grad_accumulation: int = count(1, "micro-batches that one optimizer step is split into")
    deterministic: bool = setting(False, "on a GPU, only operations that give the same bits every "
                                  "time, which are slower; CPU and TPU always do")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and what it does not decay."""

    learning_rate: float = setting(1e-3, "peak learning rate", above=0, high=100)
    warmup_steps: int = count(100, "steps of linear warm-up from 0", low=0)
    schedule: str = setting("cosine", "after warm-up: cosine, wsd (constant, then a linear decay) "
                            "or constant", choices=("cosine", "wsd", "constant"))
    decay_fraction: float = setting(0.2, "share of the run that wsd decays over", low=0, high=1)
    final_scale: float = setting(0.1, "last learning rate / peak learning rate", low=0, high=1)
    beta1: float = setting(0.9, "decay of the first moment", low=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", low=0, below=1)
    epsilon: float = setting(1e-8, "added to the root of the second moment", low=1e-16,
                             high=1)
    weight_decay: float = setting(0.1, "decoupled weight decay", low=0, high=100)
    no_decay: tuple[str, ...] = setting(
        (r"(bias|scale|log_decay|log_beta|skip|input_scale)$",),
        "regular expressions over parameter paths that weight decay leaves alone")
    groups: tuple[tuple[str, float, float], ...] = setting(
        (), "(regular expression over the parameter path, its learning rate / learning_rate, its "
        "weight decay instead of weight_decay); the first match counts, and no_decay holds")
    clip_norm: float = setting(1.0, "largest global gradient norm; 0 = no clipping", low=0)


@dataclass(frozen=True)
class RectifiedFlowConfig:
    """The two straightness regularisers (hippocampus.training.rectified_flow)."""

    segment_weight: float = setting(0.0, "weight of the segment flow (first pass -> last pass)",
                                    low=0, high=1e6)
    depth_weight: float = setting(0.0, "weight of depth straightness over the layers",
                                  low=0, high=1e6)
    width: int = count(64, "hidden width of the velocity network")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised. Evaluation is always the plain cross-entropy."""

    label_smoothing: float = setting(0.0, "share of the target spread over the vocabulary",
                                     low=0, below=1)
    z_weight: float = setting(0.0, "weight of logsumexp(logits)^2", low=0, high=1e6)
    backend: str = setting("auto", "cross_entropy backend",
                           choices=("auto", "full", "chunked", "fused"))
    rectified_flow: RectifiedFlowConfig = group(RectifiedFlowConfig)
    equilibrium: EquilibriumLossConfig = group(EquilibriumLossConfig)


@dataclass(frozen=True)
class EMAConfig:
    """The running average of the parameters that samples and probes use."""

    decay: float = setting(0.999, "decay after its warm-up min(decay, (1+t)/(10+t)); 0 = no "
                           "average", low=0, below=1)


@dataclass(frozen=True)
class RecallConfig:
    """The examples of a synthetic task (hippocampus.data.synthetic)."""

    lengths: tuple[int, ...] = setting((64, 128, 256, 256, 256), "tokens of a training example, "
                                       "per kind", low=2, high=16_777_216)
    pairs: tuple[int, ...] = setting((4, 8, 16, 32, 64), "what there is to remember in one, per "
                                     "kind: bindings, or ids to copy", low=1, high=1_000_000)
    examples: tuple[int, ...] = setting((100_000, 20_000, 20_000, 20_000, 20_000),
                                        "training examples, per kind", low=1, high=100_000_000)
    test_lengths: tuple[int, ...] = setting(
        (64, 64, 64, 128, 256, 512, 1024), "as `lengths`, of held-out examples; while training, "
        "those that fit data.context are scored", low=2, high=16_777_216)
    test_pairs: tuple[int, ...] = setting((4, 8, 16, 32, 64, 128, 256), "as `pairs`, of held-out "
                                          "examples", low=1, high=1_000_000)
    test_examples: int = count(1000, "held-out examples of every kind")
    vocab_size: int = count(8192, "ids", low=8, high=16_777_216)
    power: float = setting(0.01, "a key is asked for i places later with chance ~ i^(power - 1); "
                           "1 = anywhere", low=0, high=100)
    updates: float = setting(0.5, "noisy: share of the keys that are bound again", low=0, high=1)
    noise: float = setting(0.5, "noisy: pairs of filler among the bindings, per key", low=0,
                           high=1000)
    seed: int = count(0, "which examples; train.seed orders them", low=0)


@dataclass(frozen=True)
class StoriesConfig:
    """Stories with questions about them (hippocampus.data.stories)."""

    text: str = setting("document", "of NarrativeQA: the whole document, or a summary of its plot",
                        choices=("document", "summary"))
    template: str = setting("Question: {question}\nAnswer: {answer}", "how a question is put, and "
                            "its answer")
    story_weight: float = setting(0.0, "weight in the loss of a prediction of the story; one of an "
                                  "answer has 1", low=0, high=1e6)
    question_rows: int = count(0, "chunks of questions each time that a story is read, chosen "
                               "anew; 0 = all", low=0, high=1_000_000)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut."""

    corpus: str = setting("pydoc", "pydoc, tinyshakespeare, wikitext_mini; a text, .jsonl or "
                          ".parquet file or a glob of them; a folder of Dataset.save_to_disk; "
                          "a hub id such as Salesforce/wikitext; or recall: and a task")
    form: str = setting("text", "text: documents to go on with; stories: stories with questions "
                        "about them, for a model with a pretrained decoder",
                        choices=("text", "stories"))
    subset: str = setting("", "configuration of a hub data set, such as wikitext-103-raw-v1; "
                          "empty = its only or default one")
    column: str = setting("text", "the column that holds the text (not for text files)")
    train_split: str = setting("train", "split to train on (hub, save_to_disk); slices such as "
                               "train[:99%] work")
    validation_split: str = setting("", "split to validate on; empty = `validation` where there "
                                    "is one, else the last tenth of the training split is held "
                                    "out (of one text's characters, otherwise of the documents)")
    test_split: str = setting("", "split to test on; empty = `test` where there is one")
    validation_files: str = setting("", "for a local corpus: file or glob to validate on")
    test_files: str = setting("", "for a local corpus: file or glob to test on")
    document_start: str = setting("", "regular expression: a line of a text file, or a row, that "
                                  "it is found in begins a new document, and rows are lines; "
                                  "empty = every text file, or row, is a document")
    streaming: bool = setting(False, "read a hub data set over the network without keeping a "
                              "copy; without a validation split its first 5,000 documents are "
                              "held out")
    tokenizer: str = setting("bytes", "bytes, characters, words, bpe, or the path of a "
                             "tokenizer.json; ids for a synthetic task; backbone for a pretrained "
                             "decoder's own")
    vocab_size: int = count(0, "ids of bpe (0 = 32,768) or words (0 = every word of the training "
                            "text); other tokenizers have their own number", low=0,
                            high=16_777_216)
    tokenizer_megabytes: int = count(2000, "bpe and words learn from the beginning of the "
                                     "training text, at most so much of it", high=1_000_000)
    documents: str = setting("joined", "joined: windows read across documents; packed: "
                             "document ids keep them apart", choices=("joined", "packed"))
    order: str = setting("shuffled", "shuffled windows, or streams: each row of a batch goes on "
                         "where that row of the batch before ended",
                         choices=("shuffled", "streams"))
    context: int = count(128, "tokens T per sequence", high=16_777_216)
    recall: RecallConfig = group(RecallConfig)
    stories: StoriesConfig = group(StoriesConfig)


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation during and after training."""

    every_steps: int = count(200, "steps between evaluations; 0 = only at the end", low=0)
    batch_size: int = count(32, "windows per evaluation batch, over all devices")
    context: int = count(0, "tokens per window; 0 = data.context", low=0, high=16_777_216)
    stride: int = count(0, "tokens from one window to the next, of which only the last `stride` "
                        "predictions count; 0 = disjoint windows", low=0, high=16_777_216)
    max_windows: int = count(0, "windows per evaluation while training; 0 = the whole split; the "
                             "one at the end is always whole", low=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = count(200, "steps between saves; the last step is always saved")
    keep_latest: int = count(2, "newest checkpoints kept")
    keep_best: int = count(1, "checkpoints with the lowest eval/loss kept", low=0)
    keep_every_steps: int = count(0, "also keep every multiple of this step; 0 = none", low=0)


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about bad steps (hippocampus.training.guard) and slow ones."""

    patience: int = count(10, "skipped steps in a row that send the run back to an earlier "
                          "checkpoint")
    max_rollbacks: int = count(3, "times that a run goes back before it gives up; 0 = at once",
                               low=0)
    spike_sigmas: float = setting(0.0, "also skip a step whose loss or gradient norm is above the "
                                  "mean by this many standard deviations of the steps before; "
                                  "0 = off", low=0, high=1e6)
    spike_window: int = count(128, "accepted steps that this mean is over; the rule begins when "
                              "half of them are there", low=2, high=1_000_000)
    slow_step_factor: float = setting(10.0, "report a step that takes this many times the median",
                                      above=0, high=1e6)
    slow_step_seconds: float = setting(10.0, "least seconds before a slow step is reported",
                                       low=0, high=1e9)


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = count(10, "steps between rows of metrics.jsonl and the console")
    histogram_every_steps: int = count(200, "steps between histograms of gates; 0 = none", low=0)
    wandb_project: str = setting("", "Weights & Biases project; empty = off")


@dataclass(frozen=True)
class SampleConfig:
    """The text that a run writes as it learns."""

    every_steps: int = count(0, "steps between samples; 0 = only at the end", low=0)
    prompt: str = setting("\n", "what the sample continues")
    max_new_tokens: int = count(200, "tokens per sample", low=1, high=1_000_000)
    temperature: float = setting(0.8, "0 = the most likely token", low=0, high=1000)
    top_k: int = count(40, "sample among the k most likely; 0 = all", low=0)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged, and how parameters lie on them."""

    devices: int = count(0, "devices that the run expects to find, over all processes; 0 = any "
                         "number", low=0)
    data: int = count(-1, "data-parallel size; -1 = all devices the other axes leave", low=-1)
    fsdp: int = count(1, "size over which parameters and batch are sharded")
    tensor: int = count(1, "size over which heads and widths are split")
    sequence: int = count(1, "size over which the time axis is split")
    gather: str = setting("small", "when parameters that fsdp spreads are gathered: where they are "
                          "used (least memory), once a step (fewest meetings of the devices), or "
                          "small: once a step where all of them take at most 1 GiB",
                          choices=("small", "step", "use"))
    rules: tuple[tuple[str, str], ...] = setting(
        ((r"embedding$|head$|(out|down|select)/kernel$", "tensor+fsdp,fsdp"),
         (r"embedding_up/kernel$", "-,tensor+fsdp"), (r"head_down$", "tensor+fsdp,-"),
         (r"slots$", "fsdp,tensor,-"), (r"ssm/gates/kernel$", "tensor,fsdp,-"),
         (r"(conv_kernel|gates/bias)$", "-,tensor+fsdp"),
         (r"(log_decay|input_kernel|output_kernel)$", "tensor+fsdp,-"),
         (r"kernel$", "fsdp,tensor")),
        "(regular expression over the parameter path, mesh axis of each of the last dimensions: a "
        "name, several joined by '+', or '-'); the first match with enough dimensions counts, an "
        "axis goes to the first of its dimensions that it divides, no match = replicated")


@dataclass(frozen=True)
class Config:
    """One experiment. Built by `load_config`, saved as config.json, frozen."""

    name: str = setting("run", "name of the run folder under checkpoints/")
    train: TrainConfig = group(TrainConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    model: HybridConfig = group(HybridConfig)  # or the class of another family in `FAMILIES`
    loss: LossConfig = group(LossConfig)
    ema: EMAConfig = group(EMAConfig)
    data: DataConfig = group(DataConfig)
    eval: EvalConfig = group(EvalConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    guard: GuardConfig = group(GuardConfig)
    log: LogConfig = group(LogConfig)
    sample: SampleConfig = group(SampleConfig)
    mesh: MeshConfig = group(MeshConfig)


FAMILIES: dict[str, type] = {
    "hybrid": HybridConfig, "equilibrium": EquilibriumConfig, "chopt": CHopTConfig,
    "buu": BuuConfig}
"""`model.family` -> the class of `Config.model`."""
