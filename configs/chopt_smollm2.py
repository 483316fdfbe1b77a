"""CHopT on SmolLM2-135M: adapters and a memory of 512 slots, on stories and questions.

Command:   python -m hippocampus.train --config=configs/chopt_smollm2.py \\
               --config.model.backbone.path=SmolLM2-135M-Instruct --config.data.corpus=fairytaleqa
Files:     a folder of the Hugging Face form, or a .gguf (pip install 'hippocampus[gguf]'); a folder
           with train.jsonl and val.jsonl, see docs/stories.md
Hardware:  one H100 80GB: 180,000 tokens/s, 23 GiB, first start 2 min 45 s
Result:    a null result (docs/memory.md): 3.44 nats per token of validation answers at step 300, no
           better from the memory than from an empty one; later steps overfit
"""

from ml_collections import ConfigDict

from hippocampus.backbones.architecture import Architecture, LayerSpec, architecture_text
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults

SMOLLM2 = Architecture(
    family="llama", vocab_size=49_152, d_model=576, n_heads=9, n_kv_heads=3, head_width=64,
    max_length=8192, layers=(LayerSpec(1536, Rope(1e5)),) * 30, norm_epsilon=1e-5,
    query_scale=64**-0.5)


def get_config() -> ConfigDict:
    """135M parameters that stay as they are, beside adapters of rank 16 and the memory's."""
    config = defaults("chopt")
    config.model.vocab_size = SMOLLM2.vocab_size
    config.model.backbone.architecture = architecture_text(SMOLLM2)  # until its files are read
    config.model.backbone.train = "lora"
    config.model.lora.rank = 16
    config.model.lora.alpha = 32.0
    config.model.memory.n_slots = 512
    config.model.memory.n_writes = 64
    config.model.memory.n_heads = 4
    config.model.memory.select = "surprise"
    config.model.memory.steps = 1
    config.model.chunk = 512
    config.data.context = 1536
    config.data.form = "stories"
    config.data.corpus = "fairytaleqa"
    config.data.tokenizer = "backbone"
    config.data.stories.story_weight = 0.1
    config.data.stories.question_rows = 4
    config.train.steps = 1500
    config.train.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.ema.decay = 0.99
    config.eval.batch_size = 8
    config.eval.every_steps = 300
    config.checkpoint.every_steps = 300
    config.sample.prompt = "Question: Who was sad?\nAnswer:"
    config.sample.max_new_tokens = 40
    return config
