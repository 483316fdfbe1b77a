"""CHopT on the smallest real Llama: stories260K of llama2.c with a memory, and stories to recall.

Command:   python -m hippocampus.train --config=configs/chopt_stories260k.py \\
               --config.model.backbone.path=stories260K/stories260K.bin \\
               --config.data.corpus=fairytaleqa
Files:     stories260K.bin and tok512.bin of huggingface.co/karpathy/tinyllamas; a folder with
           train.jsonl and val.jsonl, see docs/stories.md
Hardware:  two CPU cores
"""

from ml_collections import ConfigDict

from hippocampus.backbones.architecture import Architecture, LayerSpec, architecture_text
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults

STORIES260K = Architecture(
    family="llama", vocab_size=512, d_model=64, n_heads=8, n_kv_heads=4, head_width=8,
    max_length=512, layers=(LayerSpec(172, Rope(1e4)),) * 5, norm_epsilon=1e-5,
    query_scale=8**-0.5)


def get_config() -> ConfigDict:
    """A decoder of 260 thousand parameters, small enough to see the whole machinery at work."""
    config = defaults("chopt")
    config.model.vocab_size = STORIES260K.vocab_size
    config.model.backbone.architecture = architecture_text(STORIES260K)  # until its files are read
    config.model.backbone.train = "lora"
    config.model.memory.n_slots = 64
    config.model.memory.n_writes = 8
    config.model.chunk = 256
    config.data.context = 768
    config.data.form = "stories"
    config.data.corpus = "fairytaleqa"
    config.data.tokenizer = "backbone"
    config.data.stories.story_weight = 0.1
    config.data.stories.question_rows = 2
    config.train.steps = 400
    config.train.batch_size = 8
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 40
    config.ema.decay = 0.99
    config.eval.batch_size = 8
    config.eval.every_steps = 100
    config.eval.max_windows = 128
    config.checkpoint.every_steps = 100
    config.sample.prompt = "Question: Who was sad?\nAnswer:"
    config.sample.max_new_tokens = 40
    return config
