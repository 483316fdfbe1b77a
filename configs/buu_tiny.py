"""Buu on the smallest real Llama: stories260K of llama2.c with adapters; `:lora` the control.

Command:   python -m hippocampus.train --config=configs/buu_tiny.py \\
               --config.model.backbone.path=stories260K/stories260K.bin
Files:     stories260K.bin and tok512.bin of huggingface.co/karpathy/tinyllamas
Hardware:  two CPU cores, a few minutes
Result:    2.595 bits per byte of Tiny Shakespeare's validation text, `:lora` 2.479, which is
           better; counted trigrams 2.486. One seed, each at the best of three rates (adapters
           3e-3, 1e-2, 3e-2: 2.681, 2.610, 2.595; LoRA 2.554, 2.479, 2.676)
"""

from ml_collections import ConfigDict

from hippocampus.backbones.architecture import Architecture, LayerSpec, architecture_text
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults

STORIES260K = Architecture(
    family="llama", vocab_size=512, d_model=64, n_heads=8, n_kv_heads=4, head_width=8,
    max_length=512, layers=(LayerSpec(172, Rope(1e4)),) * 5, norm_epsilon=1e-5,
    query_scale=8**-0.5)


def get_config(arg: str = "") -> ConfigDict:
    """A decoder of 260 thousand parameters, small enough to see the whole machinery at work."""
    config = defaults("buu")
    config.model.vocab_size = STORIES260K.vocab_size
    config.model.backbone.architecture = architecture_text(STORIES260K)  # until its files are read
    if arg == "lora":
        config.model.adapters.count = 0
        config.model.backbone.train = "lora"
        config.model.lora.rank = 13
    else:
        config.model.adapters.layers = (0, 1, 2, 3, 4)
        config.model.adapters.memory.slots = 64
    config.data.corpus = "tinyshakespeare"
    config.data.tokenizer = "backbone"
    config.data.context = 128
    config.train.steps = 400
    config.train.batch_size = 8
    config.optimizer.learning_rate = 1e-2 if arg == "lora" else 3e-2
    config.optimizer.warmup_steps = 20
    config.ema.decay = 0.99
    config.eval.batch_size = 8
    config.eval.every_steps = 100
    config.eval.max_windows = 128
    config.checkpoint.every_steps = 100
    config.sample.prompt = "Once upon a time"
    config.sample.max_new_tokens = 60
    return config
