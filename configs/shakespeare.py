"""Characters of Tiny Shakespeare: the early system (3.5m), and gated state spaces (10m, 50m).

    :3.5m (the default)   attention, a diagonal state space and Hopfield memory in every layer; the
                          state space is the plain A, B, C, D recurrence with a learned input
                          scale, and the gates of the upper layers start in its favour
    :10m                  gated state spaces; every third layer has all three memories
    :50m                  the same at width 640, regularised by guess; not tuned, never trained

Command:   python -m hippocampus.train --config=configs/shakespeare.py:10m
Hardware:  one NVIDIA H100, bfloat16; 24.6 million characters (10m) and 16.4 million (3.5m), about a
           minute and a half each
Result:    best validation loss in nats per character (averaged weights) over the whole last tenth
           in disjoint windows of the training context; seeds 0, 1, 2
             size   parameters   validation                at step           training loss there
             3.5m    3,570,675   1.423 1.413 1.415 (1.417)   1750 1750 1875    1.17 1.18 1.17
             10m    10,264,470   1.391 1.394 1.399 (1.395)   1100 1200 1200    1.27 1.24 1.23
           Windows are 512 (3.5m) and 1,024 (10m) characters: a character sees what stands before
           it in its window, so longer windows make a lower number. Training losses are of one
           batch, with dropout and noise. The best checkpoint is kept; 10m overfits after it
Tuned:     on this validation text, which is therefore no test text. 10m: 42 runs over dropout,
           weight decay, token noise (and embedding dropout, since removed), label smoothing,
           learning rate, context, depth, passes and the paths of layers. 3.5m: 6 runs over token
           noise, weight decay, dropout and context. docs/experiments.md

Of 3.5m, without the state space:   --config.model.paths=hopfield,attention
State space only above layer 2:     --config.model.ssm.first_layer=2
Equal gates everywhere:             --config.model.ssm.dominant_from_layer=-1
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults
from hippocampus.errors import ConfigError

THIRDS = ("ssm", "ssm", "ssm+hopfield+attention")
"""Two layers of state space alone, then one with all three paths."""

SIZES = ("3.5m", "10m", "50m")
SETTINGS = {
    "train.steps":                   (2000,       1500,       1500),
    "train.batch_size":              (16,         16,         16),
    "data.context":                  (512,        1024,       1024),
    "optimizer.learning_rate":       (2e-3,       2e-3,       1e-3),
    "optimizer.weight_decay":        (2.0,        2.0,        4.0),
    "loss.label_smoothing":          (0.05,       0.05,       0.05),
    "model.dropout":                 (0.2,        0.3,        0.4),
    "model.token_noise":             (0.0,        0.03,       0.05),
    "model.d_model":                 (192,        320,        640),
    "model.n_layers":                (5,          6,          9),
    "model.n_heads":                 (6,          5,          10),
    "model.layer_paths":             ((),         THIRDS * 2, THIRDS * 3),
    "model.mlp.width":               (576,        1152,       1600),
    "model.ssm.kind":                ("diagonal", "gated",    "gated"),
    "model.ssm.input_scale":         (True,       False,      False),
    "model.ssm.dominant_from_layer": (3,          -1,         -1),
    "eval.batch_size":               (32,         16,         16),
    "eval.every_steps":              (125,        100,        100),
}


def get_config(arg: str = "3.5m") -> ConfigDict:
    """The experiment at one of `SIZES`."""
    if arg not in SIZES:
        raise ConfigError(f"configs/shakespeare.py has no size {arg!r}",
                          f"known: {', '.join(SIZES)}")
    config = defaults("hybrid")
    config.optimizer.warmup_steps = 100
    config.optimizer.final_scale = 0.05
    config.optimizer.beta2 = 0.99
    config.ema.decay = 0.998
    config.data.corpus = "tinyshakespeare"
    config.data.tokenizer = "characters"
    config.model.vocab_size = 65
    config.model.ssm.expansion = 1.0
    config.model.hopfield.depth_schedule = (2, 1)
    config.model.segments.train = 1
    config.model.segments.eval = 1
    config.checkpoint.every_steps = 250
    config.log.histogram_every_steps = 500
    config.sample.every_steps = 500
    config.sample.prompt = "ROMEO:"
    config.sample.max_new_tokens = 300
    config.update_from_flattened_dict(
        {field: values[SIZES.index(arg)] for field, values in SETTINGS.items()})
    return config
