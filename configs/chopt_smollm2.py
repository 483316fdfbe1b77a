"""CHopT on SmolLM2-135M: adapters and a memory of 512 slots, on stories and questions.

Command:   python -m hippocampus.train --config=configs/chopt_smollm2.py \\
               --config.model.backbone.path=SmolLM2-135M-Instruct --config.data.corpus=fairytaleqa
Files:     a folder of the Hugging Face form, or a .gguf (pip install 'hippocampus[gguf]'); a folder
           with train.jsonl and val.jsonl, see docs/stories.md
Hardware:  one H100 80GB: 180,000 tokens/s, 23 GiB, first start 2 min 45 s
Result:    a null result (docs/memory.md): step 300 has 3.44 nats per token of validation answers, and
           answers from the memory are no better than from an empty one; later steps overfit
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults


def get_config() -> ConfigDict:
    """135M parameters that stay as they are, beside adapters of rank 16 and the memory's."""
    config = defaults("chopt")
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
