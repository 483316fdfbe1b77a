"""Characters of Tiny Shakespeare with an equilibrium for depth, beside two controls without one.

    :equilibrium (the default)  Mamba layers, then one cell (state space, Hopfield memory of learned
                                patterns, MLP) that is iterated to its fixed point
    :explicit                   the same parameters, the cell applied once
    :untied                     the same FLOPs: eight cells in a row, each with weights of its own

Command:   python -m hippocampus.train --config=configs/equilibrium_shakespeare.py
Tokens:    2,000 steps of 16 x 512 = 16.4 million characters, as configs/shakespeare.py:3.5m reads
Hardware:  any one device; a step costs as many cells as there are sweeps, forward and backward
Result:    validation loss 1.4575 (three seeds, one H100, 17 ms a step); `explicit` 1.4624 (3 ms),
           `untied` 1.4380 (10 ms, 11.1M parameters): docs/equilibrium.md
Control:   `explicit` says what the iteration is worth, `untied` what tying the weights costs; all
           three read the same characters in the same order
FLOPs:     counted for every sweep that is allowed, forward and backward (--check prints them).
           Tokens that converge end a solve earlier, so it may take less time than its count says

Solvers:                  --config.model.solver.method=picard --config.model.solver.schedule=cascade
Gradient of the last sweeps, or of all:          --config.model.solver.gradient=phantom (or unroll)
Sweeps by a fixed number (no tolerance):         --config.model.solver.tol_fixedpoint=0
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults
from hippocampus.errors import ConfigError

KINDS = ("equilibrium", "explicit", "untied")
SWEEPS = 12
"""Of the equilibrium at most, and as many of its gradient."""
CELLS = 8
"""Of `untied`; a product with the Jacobian costs less than a sweep with its gradient."""


def get_config(kind: str = "equilibrium") -> ConfigDict:
    """The experiment, or a control of it."""
    if kind not in KINDS:
        raise ConfigError(f"configs/equilibrium_shakespeare.py has no kind {kind!r}",
                          f"known: {', '.join(KINDS)}")
    config = defaults("equilibrium")
    config.train.steps = 2000
    config.train.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_scale = 0.05
    config.optimizer.beta2 = 0.99
    config.optimizer.weight_decay = 1.0
    # Patterns count by their directions alone: decay would only change how fast they turn.
    config.optimizer.groups = ((r"slots$", 1.0, 0.0),)
    config.ema.decay = 0.998
    config.loss.label_smoothing = 0.05
    config.data.corpus = "tinyshakespeare"
    config.data.tokenizer = "characters"
    config.data.context = 512
    config.model.vocab_size = 65
    config.model.d_model = 256
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.dropout = 0.2
    config.model.hopfield.n_slots = 512
    if kind == "equilibrium":
        config.model.solver.max_iterations = SWEEPS
        config.model.solver.backward_iterations = SWEEPS
        config.model.solver.warmup_fraction = 0.1
        config.model.solver.ramp_fraction = 0.2
        config.loss.equilibrium.jacobian_weight = 0.1
    else:
        config.model.solver.method = "explicit"
        config.model.cell.copies = CELLS if kind == "untied" else 1
    config.eval.batch_size = 32
    config.eval.every_steps = 125
    config.checkpoint.every_steps = 250
    config.log.histogram_every_steps = 500
    config.sample.every_steps = 500
    config.sample.prompt = "ROMEO:"
    config.sample.max_new_tokens = 300
    return config
