"""A first run: a small hybrid with all three memories, on text that every Python carries.

Command:   ./run      (python -m hippocampus.train --config=configs/quickstart.py)
Hardware:  two CPU cores, about 3 minutes (5,500 bytes/s); one NVIDIA H200, 240,000 to 370,000
           bytes/s
Result:    2.25 bits per byte on the validation split (byte trigram model: 2.96)
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults


def get_config() -> ConfigDict:
    """0.98M parameters; small enough for two CPU cores."""
    config = defaults("hybrid")
    config.train.steps = 600
    config.train.batch_size = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.ema.decay = 0.99
    config.data.corpus = "pydoc"
    config.data.tokenizer = "bytes"
    config.data.context = 128
    config.model.d_model = 128
    config.model.n_layers = 3
    config.model.n_heads = 4
    config.model.ssm.expansion = 1.0
    config.model.hopfield.depth_schedule = (2, 1)
    config.model.mixer.path_dropout = 0.1  # keeps the gates from reading one path alone
    config.model.segments.gradient = "stop"
    config.model.segments.weights = (0.0, 1.0)
    config.loss.z_weight = 1e-4
    config.eval.every_steps = 150
    config.eval.max_windows = 128
    config.checkpoint.every_steps = 150
    config.log.histogram_every_steps = 150
    config.sample.every_steps = 150
    config.sample.prompt = "Return "
    config.sample.max_new_tokens = 120
    return config
