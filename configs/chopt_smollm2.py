"""CHopT on SmolLM2-135M, frozen: a memory of 512 slots of next tokens, on stories and questions.

Command:   python -m hippocampus.train --config=configs/chopt_smollm2.py \\
               --config.model.backbone.path=SmolLM2-135M-Instruct --config.data.corpus=fairytaleqa
Files:     a folder of the Hugging Face form, or a .gguf (pip install 'hippocampus[gguf]'); a folder
           with train.jsonl and val.jsonl, see docs/stories.md
Hardware:  one H200, beside three others like it: 3 min 30 s, half of it compiling
Result:    3.48, 3.48 and 3.43 nats per token of validation answers from a memory alone (seeds 0, 1,
           2); the answer is 8.3 to 9.0 nats likelier than from an empty memory, and 5.4 to 5.8
           likelier than from another story's, p = 0.0001 over 23 stories (docs/memory.md)
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
    """135M parameters that stay as they are, and 1.3M of the memory."""
    config = defaults("chopt")
    config.model.vocab_size = SMOLLM2.vocab_size
    config.model.backbone.architecture = architecture_text(SMOLLM2)  # until its files are read
    config.model.backbone.train = "none"
    config.model.memory.n_slots = 512
    config.model.memory.n_writes = 64
    config.model.memory.n_heads = 1
    config.model.memory.select = "surprise"
    config.model.memory.values = "next_token"
    config.model.memory.steps = 1
    config.model.chunk = 512
    config.data.context = 1536
    config.data.form = "stories"
    config.data.corpus = "fairytaleqa"
    config.data.tokenizer = "backbone"
    config.data.stories.story_weight = 0.1
    config.data.stories.question_rows = 4
    config.train.steps = 240
    config.train.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.01
    config.ema.decay = 0.95
    config.eval.batch_size = 8
    config.eval.every_steps = 80
    config.checkpoint.every_steps = 80
    config.sample.prompt = "Question: Who was sad?\nAnswer:"
    config.sample.max_new_tokens = 40
    return config
