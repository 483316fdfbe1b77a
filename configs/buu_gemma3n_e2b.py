"""Buu on Gemma-3n E2B: gated adapters in the last five layers; `:e4b` for E4B.

Command:   python -m hippocampus.train --config=configs/buu_gemma3n_e2b.py \\
               --config.model.backbone.path=gemma-3n-E2B --config.data.corpus=TEXTS
Files:     hf download google/gemma-3n-E2B --local-dir gemma-3n-E2B   (after its licence)
Before:    --check --config.mesh.fsdp=1 (on one device), and python -m hippocampus.plan with
           --topology=v5e:2x4 need no weights; docs/planning.md has the figures
Adapters:  five times 3 d^2 + 256 d = 65,536,000 parameters in matrices and slots, 1.19 % of the
           checkpoint with its towers; d = 2048 gives W_out d^2, the state space 3 d e + 2 e^2 / 8
           with e = d / 2, the memory 2 d w + 2 S w with w = d / 4 and S = 256 slots
Result:    not trained: the weights are behind a licence
"""

from ml_collections import ConfigDict

from hippocampus.backbones.architecture import (
    AltUpSpec,
    Architecture,
    LayerSpec,
    architecture_text,
)
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults

LOCAL, GLOBAL = Rope(1e4), Rope(1e6)
OWN = 20  # layers with keys of their own; the others read those of the last two of these


def gemma3n(n_layers: int, mlp_width: int) -> Architecture:
    """The text decoder of a Gemma-3n: of five layers four see 512 tokens, and one all."""
    layers = tuple(
        LayerSpec(mlp_width, GLOBAL if i % 5 == 4 else LOCAL, 0 if i % 5 == 4 else 512,
                  -1 if i < OWN else OWN - 1 if i % 5 == 4 else OWN - 2,
                  0.95 if i < 10 else 0.0) for i in range(n_layers))
    return Architecture(
        family="gemma3n", vocab_size=262_400, d_model=2048, n_heads=8, n_kv_heads=2,
        head_width=256, max_length=32_768, layers=layers, norm_epsilon=1e-6, query_scale=1.0,
        softcap=30.0, altup=AltUpSpec(4, True, 64, 256, 262_144))


SHAPES = {"e2b": (gemma3n(30, 8192), 5_439_438_272), "e4b": (gemma3n(35, 16_384), 7_849_978_192)}


def get_config(arg: str = "e2b") -> ConfigDict:
    """The decoder stays as it is, in bfloat16; 65.6 million parameters are trained."""
    architecture, checkpoint = SHAPES[arg or "e2b"]
    config = defaults("buu")
    config.model.vocab_size = architecture.vocab_size
    config.model.backbone.architecture = architecture_text(architecture)  # until files are read
    config.model.backbone.dtype = "bfloat16"
    config.model.checkpoint_parameters = checkpoint
    config.model.adapters.count = 5
    config.model.adapters.memory.slots = 256
    config.model.adapters.memory.heads = 8
    config.model.remat = "full"
    config.data.context = 1024
    config.data.tokenizer = "backbone"
    config.data.documents = "packed"
    config.train.steps = 2000
    config.train.batch_size = 8
    config.optimizer.learning_rate = 5e-4
    config.ema.decay = 0.0
    config.eval.batch_size = 8
    config.eval.every_steps = 500
    config.eval.max_windows = 512
    config.checkpoint.every_steps = 500
    config.mesh.fsdp = 8
    config.mesh.data = -1
    return config
