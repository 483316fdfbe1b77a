"""Multi-query associative recall at Zoology's published settings: which memory can look things up?

Key-value pairs, then the keys again among filler; after each the model has to name its value. The
examples are those of the published code (V = 8,192; 64 tokens with 4 pairs, 100,000 of them; 128/8,
256/16, 256/32 and 256/64, 20,000 each; held out also 512/128 and 1,024/256), but for the filler,
which never is a key of its example.

Command:   python -m hippocampus.train --config=configs/recall_mqar.py:hybrid
           or :attention, :hopfield, :ssm; python benchmarks/recall.py trains all, with three seeds
Tokens:    8,192 per step; four times as many per step, in as many fewer steps, and attention alone
           does not find it (docs/recall.md)
"""

from ml_collections import ConfigDict

from hippocampus.config import PATHS
from hippocampus.config_files import defaults
from hippocampus.errors import ConfigError

LEARNING_RATES = {"hybrid": 5e-3, "attention": 5e-3, "hopfield": 3e-3, "ssm": 1e-2}


def get_config(model: str = "hybrid") -> ConfigDict:
    """Two layers of width 64, one pass."""
    if model not in LEARNING_RATES:
        raise ConfigError(f"recall_mqar has no model {model!r}",
                          f"known: {', '.join(LEARNING_RATES)}")
    config = defaults("hybrid")
    config.model.paths = PATHS if model == "hybrid" else (model,)
    config.model.d_model = 64
    config.model.n_layers = 2
    config.model.n_heads = 2
    config.model.ssm.expansion = 2.0
    config.model.hopfield.depth_schedule = (1,)
    config.model.hopfield.rope = model == "hopfield"  # nothing else tells it what stood before
    config.model.segments.train = 1
    config.model.segments.weights = (1.0,)
    config.loss.backend = "chunked"  # many processes share a device's memory
    config.data.corpus = "recall:mqar"
    config.data.tokenizer = "ids"
    config.data.documents = "packed"
    config.data.context = 256
    config.train.steps = 16_000
    config.train.batch_size = 32
    config.optimizer.learning_rate = LEARNING_RATES[model]
    config.optimizer.warmup_steps = 200
    config.optimizer.final_scale = 0.01
    config.ema.decay = 0.99
    config.eval.every_steps = 2000
    config.eval.batch_size = 128
    config.eval.max_windows = 320
    config.checkpoint.every_steps = 4000
    config.log.every_steps = 50
    config.log.histogram_every_steps = 0
    config.sample.prompt = "17 4242 23 5151 17"
    config.sample.max_new_tokens = 4
    return config
