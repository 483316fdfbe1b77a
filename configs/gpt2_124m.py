"""GPT-2 small's shape, attention only: what the training benchmarks compare with their peers.

Twelve layers of causal attention with 12 heads of 64, d_model 768, a GELU MLP of 3,072, learned
positions and one tied table of 50,304 ids; one pass, no dropout and no QK-norm. What this project
adds even to one path (the norm of the path's output, the gate's parameters) stays.

Command:   python benchmarks/train_step.py --config=configs/gpt2_124m.py --peer=torch,jax
           (python -m hippocampus.train --config=configs/gpt2_124m.py trains it on OpenWebText)
Hardware:  one 80 GB GPU
Result:    benchmarks/README.md has its speed; not trained
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config() -> ConfigDict:
    """The experiment."""
    config = start_from("openwebtext.py", __file__)
    config.train.steps = 20_000
    config.train.batch_size = 32
    config.optimizer.learning_rate = 6e-4
    config.ema.decay = 0.0
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 50_304
    config.data.context = 1024
    config.model.vocab_size = 50_304
    config.model.d_model = 768
    config.model.n_layers = 12
    config.model.n_heads = 12
    config.model.paths = ("attention",)
    config.model.position = "learned"
    config.model.dropout = 0.0
    config.model.attention.n_kv_heads = 0
    config.model.attention.qk_norm = False
    config.model.mlp.kind = "gelu"
    config.model.mlp.width = 3072
    config.model.segments.train = 1
    config.model.segments.eval = 1
    config.loss.z_weight = 0.0
    return config
