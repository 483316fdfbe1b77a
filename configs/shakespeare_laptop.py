"""Tiny Shakespeare on a laptop: 1,536,000 characters seen, in under 0.85M parameters.

The budget of nanoGPT's documented laptop run (context 64, batch 12, 2,000 steps), whose
validation loss is 1.88. Three layers: state space, all three memories, state space; one pass.

Command:   python -m hippocampus.train --config=configs/shakespeare_laptop.py
           (--config.train.seed=1 and 2 for the others)
Hardware:  two CPU cores, float32: 70 seconds for the whole command, 83 the first time (compiling);
           nanoGPT's run takes 72 there (benchmarks/cpu.py)
Result:    validation loss 1.565 (raw) and 1.566 (averaged weights), mean of seeds 0, 1, 2 (1.563,
           1.570, 1.563), over the whole last tenth of the text in disjoint windows of 64
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults


def get_config() -> ConfigDict:
    """The experiment."""
    config = defaults("hybrid")
    config.train.steps = 2000
    config.train.batch_size = 12
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_scale = 0.02
    config.optimizer.beta2 = 0.99
    config.ema.decay = 0.99
    config.data.corpus = "tinyshakespeare"
    config.data.tokenizer = "characters"
    config.data.context = 64
    config.model.vocab_size = 65
    config.model.d_model = 128
    config.model.n_layers = 3
    config.model.layer_paths = ("ssm", "ssm+hopfield+attention", "ssm")
    config.model.ssm.expansion = 1.0
    config.model.hopfield.depth_schedule = (2,)
    config.model.mlp.width = 400
    config.model.segments.train = 1
    config.model.segments.eval = 1
    config.eval.every_steps = 1000
    config.eval.batch_size = 64
    config.eval.max_windows = 320
    config.checkpoint.every_steps = 500
    config.log.every_steps = 50
    config.log.histogram_every_steps = 1000
    config.sample.prompt = "ROMEO:"
    config.sample.max_new_tokens = 300
    return config
