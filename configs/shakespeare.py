"""The early system: attention, a diagonal state space and Hopfield memory on Tiny Shakespeare.

3.5M parameters on characters. The state-space path is the plain A, B, C, D recurrence with a
learned input scale, and the gates of the upper layers start in its favour.

Command:   python -m hippocampus.train --config=configs/shakespeare.py
Hardware:  one NVIDIA H200, bfloat16: about 450,000 characters/s
Result:    best validation loss 1.463 (averaged weights, step 2,250 of 3,000; training loss there
           about 1.24, at the end 1.18), the whole last tenth in windows of 128, one seed
Without the state space:   --config.model.paths=hopfield,attention
State space only above layer 2:   --config.model.ssm.first_layer=2
Equal gates everywhere:   --config.model.ssm.dominant_from_layer=-1
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults


def get_config() -> ConfigDict:
    """The experiment."""
    config = defaults("hybrid")
    config.train.steps = 3000
    config.train.batch_size = 32
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_scale = 0.05
    config.optimizer.beta2 = 0.99
    config.ema.decay = 0.998
    config.data.corpus = "tinyshakespeare"
    config.data.tokenizer = "characters"
    config.data.context = 128
    config.model.vocab_size = 65
    config.model.d_model = 192
    config.model.n_layers = 5
    config.model.n_heads = 6
    config.model.dropout = 0.2
    config.model.ssm.kind = "diagonal"
    config.model.ssm.expansion = 1.0
    config.model.ssm.input_scale = True
    config.model.ssm.dominant_from_layer = 3
    config.model.hopfield.depth_schedule = (2, 1)
    config.model.mlp.width = 576
    config.model.segments.train = 1
    config.model.segments.eval = 1
    config.eval.every_steps = 250
    config.eval.batch_size = 64
    config.checkpoint.every_steps = 250
    config.log.histogram_every_steps = 500
    config.sample.every_steps = 500
    config.sample.prompt = "ROMEO:"
    config.sample.max_new_tokens = 300
    return config
