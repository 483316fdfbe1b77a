"""Buu on SmolLM2-135M: adapters in every fourth layer, on text or stories; `:lora` the control.

Command:   python -m hippocampus.train --config=configs/buu_smollm2.py \\
               --config.model.backbone.path=SmolLM2-135M
Control:   --config=configs/buu_smollm2.py:lora: low-rank adapters of as many parameters
Files:     a folder of the Hugging Face form, or a .gguf (pip install 'hippocampus[gguf]')
Data:      data.corpus is a text, or a .jsonl of a mixture (docs/buu.md makes one of FairytaleQA
           and WikiText); or stories with questions, --config.data.form=stories
Hardware:  one H200: 12 GiB of its memory, 102,000 tokens/s with two more runs beside it (LoRA 15
           and 69,000)
Result:    of that mixture, 3 seeds: 1.0736 bits per byte, the decoder alone 1.1388, `:lora` 1.0621
           (better); its memory adds next to nothing: docs/buu.md
"""

from ml_collections import ConfigDict

from hippocampus.backbones.architecture import Architecture, LayerSpec, architecture_text
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults

SMOLLM2 = Architecture(
    family="llama", vocab_size=49_152, d_model=576, n_heads=9, n_kv_heads=3, head_width=64,
    max_length=8192, layers=(LayerSpec(1536, Rope(1e5)),) * 30, norm_epsilon=1e-5,
    query_scale=64**-0.5)


def get_config(arg: str = "") -> ConfigDict:
    """135M parameters that stay as they are; 7.6M are trained, of either kind."""
    config = defaults("buu")
    config.model.vocab_size = SMOLLM2.vocab_size
    config.model.backbone.architecture = architecture_text(SMOLLM2)  # until its files are read
    config.model.scan_layers = True
    if arg == "lora":
        config.model.adapters.count = 0
        config.model.backbone.train = "lora"
        config.model.lora.rank = 25
        config.model.lora.alpha = 50.0
    else:
        config.model.adapters.layers = (3, 7, 11, 15, 19, 23, 27)
        config.model.adapters.memory.heads = 4
    config.data.corpus = "wikitext_mini"
    config.data.tokenizer = "backbone"
    config.data.documents = "packed"
    config.data.context = 512
    config.train.steps = 300
    config.train.batch_size = 32
    config.optimizer.learning_rate = 5e-4  # of five, the best for both
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.ema.decay = 0.99
    config.eval.batch_size = 16
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 100
    config.sample.prompt = "Once upon a time"
    config.sample.max_new_tokens = 60
    return config
