"""CHopT on Llama-3.2-3B: adapters and a memory, for a v4-8 or a GPU of 80 GB.

Command:   python -m hippocampus.train --config=configs/chopt_llama32_3b.py \\
               --config.model.backbone.path=Llama-3.2-3B --config.data.corpus=deepmind/narrativeqa
Files:     hf download meta-llama/Llama-3.2-3B --local-dir Llama-3.2-3B   (after its licence)
Before:    python -m hippocampus.plan --config=configs/chopt_llama32_3b.py --topology=v4:2x2x1
           needs no weights
Result:    compiled for v4:2x2x1: 12.3 of 32 GiB a device with 16 rows of 2,048 tokens
           (docs/planning.md); not trained: the weights are behind a licence
"""

from ml_collections import ConfigDict

from hippocampus.backbones.architecture import Architecture, LayerSpec, architecture_text
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults

ROPE = Rope(5e5, "llama3", factor=32.0, low=1.0, high=4.0, first_length=8192)
LLAMA = Architecture(
    family="llama", vocab_size=128_256, d_model=3072, n_heads=24, n_kv_heads=8, head_width=128,
    max_length=131_072, layers=(LayerSpec(8192, ROPE),) * 28, norm_epsilon=1e-5,
    query_scale=128**-0.5)


def get_config() -> ConfigDict:
    """3.2 billion parameters that stay as they are; 17 million are trained."""
    config = defaults("chopt")
    config.model.vocab_size = LLAMA.vocab_size
    config.model.backbone.architecture = architecture_text(LLAMA)  # until its files are read
    config.model.backbone.train = "lora"
    config.model.lora.rank = 8
    config.model.lora.targets = ("layers_*.attention.*",)
    config.model.memory.n_slots = 2048
    config.model.memory.width = 1024
    config.model.memory.n_heads = 8
    config.model.memory.n_writes = 64
    config.model.memory.select = "surprise"
    config.model.memory.values = "next_token"
    config.model.chunk = 1024
    config.model.remat = "full"
    config.data.context = 2048
    config.data.form = "stories"
    config.data.corpus = "deepmind/narrativeqa"
    config.data.tokenizer = "backbone"
    config.data.stories.story_weight = 0.1
    config.data.stories.question_rows = 2
    config.train.steps = 2000
    config.train.batch_size = 16
    config.optimizer.learning_rate = 2e-4
    config.ema.decay = 0.0
    config.eval.batch_size = 16
    config.eval.every_steps = 500
    config.eval.max_windows = 1024
    config.checkpoint.every_steps = 500
    config.mesh.fsdp = 4
    config.mesh.data = -1
    config.sample.prompt = "Question: Who was sad?\nAnswer:"
    return config
